"""Whether a program fits a TPU slice, what its devices exchange, and how long it would take at best.

All of it is told of one device, which is a chip, but half a chip of TPU7x. The time is a roofline, *predicted* and not
measured: a program takes at least as long as its multiplications at the chip's peak, as its memory traffic at the
bandwidth of its memory, and as its exchanges at that of its links.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax

from dit_jax.config import Config
from dit_jax.models.cost import count_macs, describe_cost
from dit_jax.parallel.chips import Chip
from dit_jax.parallel.mesh import BATCH_AXES
from dit_jax.planning.collectives import least_bytes, parse_collectives, summarize
from dit_jax.planning.compiled import Compiled, DoesNotFit, bytes_per_device, compile_program
from dit_jax.planning.traffic import memory_traffic
from dit_jax.types import Params

GATHERED_ITEMSIZE = 2  # a TPU rounds the operands of a matmul to bfloat16, and XLA gathers parameters so rounded
SWEEP_FACTOR = 8  # between the numbers of devices that a sweep splits the parameters over
MOST_SENT = 1.25  # of the least for a split of the parameters; one that sends more is recommended only where all do
# What each policy may keep of the activations, at the very least; where even that is too much, it is not compiled.
REMAT_KEEPS = {"none": 1.0, "dots": 0.25, "full": 0.03, "offload": 0.03}


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function with the abstract arguments that it is compiled for, and what of them is of interest.

    state: what a device holds of the arguments, by name; trained: the parameters whose gradients are exchanged, None
    where nothing is trained.
    """

    name: str
    function: Callable
    args: tuple
    state: dict[str, Params]
    trained: Params | None = None


def plan_program(config: Config, program: Program, chip: Chip) -> dict:
    """Returns the plan of a program, as JSON values: bytes, seconds and FLOPs, of one device.

    chip: a device's share of it.
    """
    mesh = jax.tree.leaves(program.state)[0].sharding.mesh
    compiled = compile_program(program.function, program.args)
    plan = {"program": program.name, "fits": isinstance(compiled, Compiled), "compile_seconds": compiled.seconds}
    plan["state"] = {name: bytes_per_device(tree) for name, tree in program.state.items()}
    if isinstance(compiled, DoesNotFit):
        plan |= {"needed": compiled.needed, "available": compiled.available}
        if program.trained is None:
            return plan | {"suggestions": suggest_for_sampling(config, dict(mesh.shape))}
        return plan | {"suggestions": suggest(config, dict(mesh.shape), plan)}
    plan |= {"needed": compiled.needed, "available": chip.memory_bytes, "memory": memory_of(compiled)}
    plan["margin"] = chip.memory_bytes - compiled.needed
    collectives = parse_collectives(compiled.text, mesh.size)
    plan["collectives"] = summarize(collectives)
    sent = sum(kind["bytes"] for kind in plan["collectives"].values())
    plan["sent"] = sent
    if program.trained is not None:
        least = least_bytes(program.trained, BATCH_AXES, GATHERED_ITEMSIZE, config.training.accumulation_steps)
        plan |= {"least_collectives": least, "least_sent": sum(least.values())}
        plan["copy"] = copy_of_state(program, plan, config.training.accumulation_steps)
    waited = sum(c.times * c.sent_bytes for c in collectives if not c.asynchronous)
    flops = 2 * count_macs(program.function, *program.args) / mesh.size
    plan["predicted"] = predict(chip, flops, compiled, sent - waited, waited)
    if program.trained is not None:
        batch_size = config.training.global_batch_size
        model_flops = 6 * describe_cost(config)["macs"] * batch_size / mesh.size
        plan["model_flops"] = model_flops
        plan["predicted"] |= {
            "images_per_second": batch_size / plan["predicted"]["seconds"],
            "mfu": model_flops / chip.peak_flops / plan["predicted"]["seconds"],
        }
    return plan


def memory_of(compiled: Compiled) -> dict[str, int]:
    """Returns the bytes that a program needs, by what for."""
    return {name: getattr(compiled, name) for name in ("arguments", "outputs", "temporaries", "code")}


def predict(chip: Chip, flops: float, compiled: Compiled, overlapped: float, waited: float) -> dict[str, float]:
    """Returns the roofline's times on one device.

    flops: of all matmuls and convolutions of the program, those that are computed again too; overlapped, waited: bytes
    that the device sends while it computes, and while it does nothing else.
    """
    times = {
        "compute_seconds": flops / chip.peak_flops,
        "memory_seconds": memory_traffic(compiled.text) / chip.memory_bandwidth,
        "overlapped_network_seconds": overlapped / chip.network_bandwidth,
    }
    waiting = waited / chip.network_bandwidth
    return times | {"waiting_network_seconds": waiting, "seconds": max(times.values()) + waiting, "flops": flops}


def copy_of_state(program: Program, plan: dict, num_parts: int) -> dict[str, float]:
    """Returns the bytes of the parameters and optimizer: all of them, and the most of them that a device may ever hold.

    That is what it holds between steps, and all that it gathers in one, of whatever and for however short a time: of
    accumulation's `num_parts`, in each.
    """
    names = ("parameters", "optimizer")
    whole = sum(x.size * x.dtype.itemsize for name in names for x in jax.tree.leaves(program.state[name]))
    held = sum(plan["state"][name] for name in names)
    kinds = ("all-gather", "all-to-all", "collective-permute")  # a device receives as much as it sends
    gathered = sum(plan["collectives"].get(kind, {"bytes": 0.0})["bytes"] for kind in kinds)
    return {"whole": whole, "held": held, "at_most": held + gathered / num_parts}


def suggest(config: Config, axes: dict[str, int], plan: dict) -> list[str]:
    """Returns flags that make a program need less memory, the cheapest in time first.

    plan: of the program as it is: what is `needed` and `available`, and what of it is `state`.
    """
    shards = axes["data"] * axes["fsdp"]
    training, flags = config.training, []
    if axes["data"] > 1:
        splits = [n for n in fsdp_splits(shards) if n > axes["fsdp"]]
        flags.append(f"--config.mesh.data=-1 --config.mesh.fsdp={splits[0]}")
    flags += [f"--config.compute.remat={policy}" for policy in remat_policies(config)[1:]]
    rows = training.global_batch_size // shards // training.accumulation_steps  # of a device at a time
    statistics = config.autoencoder and (config.autoencoder.codebook or config.autoencoder.discriminator)
    if rows > 1 and not statistics:  # of a whole batch, which accumulation would not see
        state = sum(plan["state"].values())
        factors = [n for n in range(2, rows + 1) if rows % n == 0]
        enough = [n for n in factors if (plan["needed"] - state) / n <= plan["available"] - state]
        flags.append(f"--config.training.accumulation_steps={training.accumulation_steps * [*enough, rows][0]}")
    if training.global_batch_size > shards:
        flags.append(f"--config.training.global_batch_size={max(shards, training.global_batch_size // 2)}")
    return [*flags, "a larger slice, or chips with more memory"]


def suggest_for_sampling(config: Config, axes: dict[str, int]) -> list[str]:
    """Returns flags that make the drawing of a batch need less memory."""
    shards, batch_size = axes["data"] * axes["fsdp"], config.sampling.batch_size
    flags = [f"--config.mesh.data=1 --config.mesh.fsdp={shards}"] if axes["data"] > 1 else []
    if batch_size > shards:
        flags.append(f"--config.sampling.batch_size={max(shards, batch_size // 2)}")
    return [*flags, "a larger slice, or chips with more memory"]


def at_best(config: Config, plan: dict, changed: Config, state: dict[str, int]) -> int:
    """Returns the bytes that a config needs at the very least which is `config`, of a plan, with less memory.

    state: what a device holds of the changed one. Its activations are those of the plan by what remat may keep.
    """
    rest = plan["needed"] - sum(plan["state"].values())
    rest *= REMAT_KEEPS[changed.compute.remat] / REMAT_KEEPS[config.compute.remat]
    rest *= config.training.accumulation_steps / changed.training.accumulation_steps
    return sum(state.values()) + int(rest)


def sends_too_much(plan: dict) -> bool:
    """Says whether a plan's split of the parameters sends more than `MOST_SENT` times the least for it."""
    return plan.get("sent", 0.0) > MOST_SENT * plan.get("least_sent", math.inf)


def remat_policies(config: Config) -> list[str]:
    """Returns the config's remat policy, then those that keep less and compute more."""
    policies = ["none", "dots", "full"]
    policy = config.compute.remat
    return policies[policies.index(policy) :] if policy in policies else [policy]


def fsdp_splits(num_devices: int) -> list[int]:
    """Returns the numbers of devices to try to split the parameters over: 1, 8, 64, ... and all."""
    splits = [SWEEP_FACTOR**i for i in range(num_devices) if SWEEP_FACTOR**i < num_devices]
    return [n for n in splits if num_devices % n == 0] + [num_devices]


def sweep_meshes(config: Config, num_devices: int) -> list[Config]:
    """Returns the config with each of a few splits between `data` and `fsdp` of the devices that split the batch.

    num_devices: those that no other axis of the config takes. Where they are more than the batch has examples for, some
    of them share an example: they split its tokens (or rows).
    """
    shards = math.gcd(num_devices, config.training.global_batch_size)
    sequence = config.mesh.sequence * num_devices // shards
    return [
        dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=shards // n, fsdp=n, sequence=sequence))
        for n in fsdp_splits(shards)
    ]


def recommended(plans: Sequence[dict]) -> dict | None:
    """Returns the first of the plans that fit with the lowest predicted time; None where none fits.

    One that sends too much is taken only where all do.
    """
    fitting = [plan for plan in plans if plan.get("fits")]
    return min(fitting, key=lambda plan: (sends_too_much(plan), plan["predicted"]["seconds"]), default=None)
