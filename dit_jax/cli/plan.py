"""Compiles a config's real training step for a TPU slice, on a machine without a TPU: memory, FLOPs, collectives.

Needs libtpu, which the extra `tpu` brings: pip install -e ".[tpu]".
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import typing

from dit_jax.cli.main import add_config_argument, load_run_config
from dit_jax.config import Config, check_platform, override_config

if typing.TYPE_CHECKING:
    from jax.sharding import Mesh

    from dit_jax.planning.plan import Program

HELP = "compiles a config for a TPU slice without a TPU: memory, FLOPs, collectives, a predicted time"
GIB = 2**30
# JAX runs on the CPU, and libtpu only compiles: it neither asks a cloud for its TPUs nor locks one that is there.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
# It would warn that it finds no TPU. Neither the topology nor what is compiled depends on these.
QUIET = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_STDERR_LOG_LEVEL": "3"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    add_config_argument(parser)
    parser.add_argument(
        "--topology", required=True, metavar="NAME", help="v4:4x4x4, v5e:16x16, v5p:8x8x8, v6e:16x16, tpu7x:4x4x4, ..."
    )
    parser.add_argument("--sampler", action="store_true", help="plan the config's sampling too (stage diffusion)")
    parser.add_argument("--sweep", action="store_true", help="compare a few splits of the devices, and recommend one")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Compiles, and prints the plan."""
    config = load_run_config(args)
    if args.sampler and config.stage != "diffusion":
        raise ValueError(f"--sampler needs a config of stage 'diffusion', not {config.stage!r}")
    os.environ.update(ENVIRONMENT | QUIET)  # before JAX and libtpu read them

    from dit_jax.parallel.chips import chip_of
    from dit_jax.planning.compiled import topology_devices
    from dit_jax.planning.plan import sends_too_much

    devices = topology_devices(args.topology)
    check_platform(config, devices[0].platform)
    chip = chip_of(devices[0].device_kind)
    report = {"topology": args.topology, "devices": len(devices), "chips": len(devices) // chip.devices}
    if args.sweep:
        report |= sweep(config, devices, args.sampler, args.json)
        if not args.json:
            print(recommendation(report["recommended"]))
    else:
        report |= plan_of(config, devices, args.sampler)
        if not args.json:
            print("\n".join(describe(report, chip.devices)), flush=True)
        if not report["fits"]:
            report["recommended"] = what_fits_and_sends_little(config, devices, args.sampler, report)
        elif sends_too_much(report):
            report["recommended"] = what_sends_less(config, devices, args.sampler, report)
        if "recommended" in report and not args.json:
            print(recommended_line(report["recommended"], report["fits"]))
    if args.json:
        print(json.dumps(report))


def sweep(config: Config, devices: list, sampler: bool, quiet: bool) -> dict:
    """Returns the plans of the config on each mesh, of each that does not fit with more remat, and the best of them."""
    from dit_jax.planning.plan import recommended, remat_policies

    plans, meshes = [], candidates(config, devices)
    for i, candidate in enumerate(meshes, start=1):
        for policy in remat_policies(candidate):
            compute = dataclasses.replace(candidate.compute, remat=policy)
            axes = f"data {candidate.mesh.data}, fsdp {candidate.mesh.fsdp}, remat {policy}"
            print(f"compiling mesh {i} of {len(meshes)}: {axes} ...", file=sys.stderr, flush=True)
            plans.append(plan_or_reason(dataclasses.replace(candidate, compute=compute), devices, sampler))
            if not quiet:
                print(sweep_line(plans[-1]), flush=True)
            if plans[-1]["fits"] or "reason" in plans[-1]:  # computing again what fits would only take time
                break
    best = recommended(plans)
    return {"plans": plans, "recommended": best and {name: best[name] for name in ("mesh", "remat")}}


def candidates(config: Config, devices: list) -> list[Config]:
    """Returns the config on each mesh that a sweep compares."""
    from dit_jax.parallel.mesh import batch_shards, make_mesh
    from dit_jax.planning.plan import sweep_meshes

    mesh = make_mesh(dataclasses.replace(config.mesh, data=-1, fsdp=1), devices)
    return sweep_meshes(config, batch_shards(mesh))


def what_fits_and_sends_little(config: Config, devices: list, sampler: bool, plan: dict) -> dict | None:
    """Returns what `what_fits` does; with a smaller split where that one sends too much and a smaller one fits, too."""
    from dit_jax.planning.plan import sends_too_much

    found = what_fits(config, devices, sampler, plan)
    if found is None or not sends_too_much(found["plan"]):
        return found
    flags = [flag.removeprefix("--config.").split("=") for flag in found["flags"]]
    less = what_sends_less(override_config(config, flags), devices, sampler, found["plan"])
    if less is None:
        return found
    chosen = dict(flag.split("=") for flag in [*found["flags"], *less["flags"]])
    return {"flags": [f"{key}={value}" for key, value in chosen.items()], "plan": less["plan"]}


def what_fits(config: Config, devices: list, sampler: bool, plan: dict) -> dict | None:
    """Returns the flags with which a config that does not fit does, each the first that the plan before suggests.

    With them comes the plan that they make; None where only a smaller batch or a larger slice is left. What cannot be
    enough is not compiled, but taken together with what is suggested next.
    """
    from dit_jax.planning.plan import at_best, suggest

    chosen = {}
    while not plan["fits"]:
        for suggestion in plan["suggestions"]:
            flags = dict(flag.removeprefix("--config.").split("=") for flag in suggestion.split() if "=" in flag)
            if not flags or "training.global_batch_size" in flags:
                return None  # the one would be another run, the other another machine
            candidate = override_config(config, list(flags.items()))
            try:
                axes, state = placed_state(candidate, devices)
                least = at_best(config, plan, candidate, state)
                if least > plan["available"]:
                    plan = {"fits": False, "needed": least, "available": plan["available"], "state": state}
                    plan["suggestions"] = suggest(candidate, axes, plan)
                else:
                    print(f"compiling with {suggestion} ...", file=sys.stderr, flush=True)
                    plan = plan_of(candidate, devices, sampler)
                break
            except ValueError:  # of a mesh that cannot be
                continue
        config, chosen = candidate, chosen | flags
    return {"flags": [f"--config.{key}={value}" for key, value in chosen.items()], "plan": plan}


def what_sends_less(config: Config, devices: list, sampler: bool, plan: dict) -> dict | None:
    """Returns the flags of the first smaller split of the parameters that fits and does not send too much; or None."""
    from dit_jax.planning.plan import fsdp_splits, sends_too_much

    for fsdp in reversed(fsdp_splits(plan["mesh"]["data"] * plan["mesh"]["fsdp"])):
        if fsdp >= plan["mesh"]["fsdp"]:
            continue
        flags = {"mesh.data": "-1", "mesh.fsdp": str(fsdp)}
        print(f"compiling with fsdp {fsdp} ...", file=sys.stderr, flush=True)
        found = plan_or_reason(override_config(config, list(flags.items())), devices, sampler)
        if found["fits"] and not sends_too_much(found):
            return {"flags": [f"--config.{key}={value}" for key, value in flags.items()], "plan": found}
    return None


def placed_state(config: Config, devices: list) -> tuple[dict[str, int], dict[str, int]]:
    """Returns the axes of a config's mesh, and the bytes of each part of the state that a device holds."""
    from dit_jax.parallel.mesh import make_mesh
    from dit_jax.planning.compiled import bytes_per_device

    mesh = make_mesh(config.mesh, devices)
    state = train_program(config, mesh).state
    return dict(mesh.shape), {name: bytes_per_device(tree) for name, tree in state.items()}


def plan_or_reason(config: Config, devices: list, sampler: bool) -> dict:
    """Returns the plan of a config, or why its mesh cannot be."""
    try:
        return plan_of(config, devices, sampler)
    except ValueError as error:
        return {"mesh": config.mesh.axes, "remat": config.compute.remat, "fits": False, "reason": str(error)}


def plan_of(config: Config, devices: list, sampler: bool) -> dict:
    """Returns the plan of the training step, and under `sampler` that of sampling if it is asked for."""
    from dit_jax.parallel.chips import chip_of
    from dit_jax.parallel.mesh import check_batch_size, make_mesh
    from dit_jax.planning.plan import plan_program

    mesh, chip = make_mesh(config.mesh, devices), chip_of(devices[0].device_kind).per_device()
    check_batch_size(config.training.global_batch_size, mesh, "config.training.global_batch_size")
    plan = {"mesh": dict(mesh.shape), "remat": config.compute.remat}
    plan["global_batch_size"] = config.training.global_batch_size
    plan |= plan_program(config, train_program(config, mesh), chip)
    if sampler:
        plan["sampler"] = plan_program(config, sampler_program(config, mesh), chip)
    return plan


def train_program(config: Config, mesh: "Mesh") -> "Program":
    """Returns the step that `dit-jax train` runs, with its arguments' shapes and shardings."""
    from dit_jax.models.autoencoder import FROZEN_WITH_ENCODER
    from dit_jax.planning.plan import Program
    from dit_jax.training.state import abstract_state
    from dit_jax.training.step import jit_train_step

    config = with_scale(config)
    optimizer, train_step = update_of(config)
    frozen = FROZEN_WITH_ENCODER if config.autoencoder and config.autoencoder.frozen_encoder else ()
    state, constants = abstract_state(config, optimizer, mesh), abstract_constants(config, mesh)
    parts = {
        "parameters": state.params,
        "optimizer": state.opt_state,
        "averages": (state.ema_params, state.averages),
        "loss": state.loss_state,
        "constants": constants,
    }
    trained = {name: tree for name, tree in state.params.items() if name not in frozen}
    if state.loss_state is not None:
        trained = (trained, state.loss_state.params)
    args = (state, abstract_batch(config, mesh), constants)
    return Program("train", jit_train_step(train_step, state), args, parts, trained)


def with_scale(config: Config) -> Config:
    """Returns the config with a scale of its latents, which a run reads from its cache: any will do to compile."""
    if config.latents is None or config.latents.scale is not None:
        return config
    return dataclasses.replace(config, latents=dataclasses.replace(config.latents, scale=1.0))


def update_of(config: Config) -> tuple:
    """Returns the optimizer and the update of the config's stage, not yet jitted (`training.loop.build_update`)."""
    from dit_jax.training.autoencoder_step import make_autoencoder_gradients, make_observe
    from dit_jax.training.classifier_step import make_classifier_loss
    from dit_jax.training.diffusion_step import make_diffusion_loss
    from dit_jax.training.loop import build_update
    from dit_jax.training.step import gradients_of

    if config.stage == "autoencoder":
        return build_update(config, make_autoencoder_gradients(config), make_observe(config))
    make_loss = make_classifier_loss if config.stage == "classifier" else make_diffusion_loss
    return build_update(config, gradients_of(make_loss(config), config.training.accumulation_steps), None)


def sampler_program(config: Config, mesh: "Mesh") -> "Program":
    """Returns the drawing of one batch by weights placed as in training; decoded if the config has an autoencoder."""
    import jax
    import jax.numpy as jnp

    from dit_jax.evaluation.generate import make_draw
    from dit_jax.models.build import abstract_conditions, abstract_params
    from dit_jax.parallel.mesh import batch_sharding, replicated
    from dit_jax.parallel.rules import tree_shardings
    from dit_jax.planning.plan import Program

    draw, batch_size = make_draw(config, config.sampling, mesh)
    shapes = abstract_params(config)
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        tree_shardings(shapes, mesh, config.mesh.rules),
    )
    codec = abstract_codec(config, mesh)
    rows, conditions = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh)),
        (jax.ShapeDtypeStruct((batch_size,), jnp.int32), abstract_conditions(config, batch_size)),
    )
    seed = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    state = {"parameters": params, "autoencoder": codec}
    return Program("sampler", draw, (params, codec, seed, rows, conditions), state)


def abstract_batch(config: Config, mesh: "Mesh") -> dict:
    """Returns the shapes of a training batch on the mesh, as `data.pipeline` makes it."""
    import jax
    import jax.numpy as jnp

    from dit_jax.cli.train import encodes_text, reads_images, text_of
    from dit_jax.data.latent_cache import MANIFEST_NAME, read_manifest
    from dit_jax.models.build import abstract_conditions, abstract_tokens
    from dit_jax.parallel.mesh import batch_sharding

    if reads_images(config):
        name, shape = "image", (config.data.image_size, config.data.image_size, config.data.channels)
    else:
        # A mean and a log-variance a channel; of a VQ autoencoder, as only its cache tells, the latent itself.
        *grid, channels = config.latents.shape
        cached = config.latents.path is not None and (pathlib.Path(config.latents.path) / MANIFEST_NAME).exists()
        stochastic = not cached or read_manifest(config.latents.path).stochastic
        name, shape = "moments", (*grid, 2 * channels if stochastic else channels)
    arrays = {name: (shape, jnp.float32), "label": ((), jnp.int32)}
    if config.spatial is not None and config.spatial.kind == "inpainting":
        arrays["hole"] = (*shape[:2], 1), jnp.float32
    if config.spatial is not None and config.spatial.kind == "semantic":
        arrays["map"] = shape[:2], jnp.int32
    size, sharding = config.training.global_batch_size, batch_sharding(mesh)
    batch = {name: jax.ShapeDtypeStruct((size, *shape), dtype) for name, (shape, dtype) in arrays.items()}
    if text_of(config):
        batch["text"] = (
            abstract_tokens(size, text_of(config).max_length)
            if encodes_text(config)
            else abstract_conditions(config, size)["text"]
        )
    if config.layout is not None:
        batch["layout"] = abstract_tokens(size, config.layout.num_tokens)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch)


def abstract_constants(config: Config, mesh: "Mesh"):
    """Returns the shapes of what the loss reads and no step changes: LPIPS, or what encodes in each step; or None."""
    from dit_jax.cli.train import encodes_text, reads_images, text_encoder_source
    from dit_jax.evaluation.text_encoders import load_text_encoder
    from dit_jax.models.conditioners import FrozenNetworks
    from dit_jax.perceptual.lpips import abstract_lpips

    if config.stage == "autoencoder":
        return on_every_device(abstract_lpips(), mesh) if config.autoencoder.perceptual_weight else None
    codec = abstract_codec(config, mesh) if reads_images(config) else None
    text_encoder = None
    if encodes_text(config):
        text_encoder = on_every_device(load_text_encoder(text_encoder_source(config)), mesh)
    return None if codec is None and text_encoder is None else FrozenNetworks(codec, text_encoder)


def abstract_codec(config: Config, mesh: "Mesh"):
    """Returns the shapes of the autoencoder that the config's latents are of; None where it names none."""
    from dit_jax.checkpoint import find_checkpoint
    from dit_jax.cli.train import autoencoder_source
    from dit_jax.models.autoencoder import Codec
    from dit_jax.models.build import abstract_params, build_autoencoder

    if config.latents is None or (config.latents.path or config.latents.encode_with) is None:
        return None
    source = autoencoder_source(config)
    _, autoencoder = find_checkpoint(pathlib.Path(source))
    module = build_autoencoder(autoencoder.autoencoder, autoencoder.data.channels)
    latents = with_scale(config).latents
    return Codec(on_every_device(abstract_params(autoencoder), mesh), module, latents.scale, latents.shift)


def on_every_device(shapes, mesh: "Mesh"):
    """Returns a tree of shapes, each of them whole on every device."""
    import jax

    from dit_jax.parallel.mesh import replicated

    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), shapes)


def describe(report: dict, devices_per_chip: int) -> list[str]:
    """Returns the lines that tell a plan."""
    of_chip = "chip" if devices_per_chip == 1 else f"device (a chip is {devices_per_chip})"
    mesh = " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
    lines = [f"{report['topology']}: {report['chips']} chips, mesh {mesh}, batch {report['global_batch_size']}"]
    lines += describe_program(report, "training step", of_chip)
    if "sampler" in report:
        lines += describe_program(report["sampler"], "sampling a batch", of_chip)
    return lines


def describe_program(plan: dict, what: str, of_chip: str) -> list[str]:
    """Returns the lines that tell the plan of one program."""
    needs = f"{what}, compiled in {plan['compile_seconds']:.0f} s: needs {memory(plan['needed'])} of the "
    needs += f"{memory(plan['available'])} of a {of_chip}"
    if not plan["fits"]:
        return [f"{needs}: DOES NOT FIT; try", *(f"  {flags}" for flags in plan["suggestions"])]
    lines = [f"{needs}: fits, {memory(plan['margin'])} to spare"]
    lines += [f"  {name:<22} {memory(size):>10}" for name, size in plan["state"].items() if size]
    lines += [
        f"  {'activations and other':<22} {memory(plan['memory']['temporaries']):>10}  temporaries, at their peak"
    ]
    lines += [f"sends {mb(plan['sent'])} a {of_chip}" + least_of(plan)]
    least = plan.get("least_collectives", {})
    for kind, figures in plan["collectives"].items():
        note = f"  at least {mb(least[kind])}" if least.get(kind) else ""
        count, background = figures["count"], figures["asynchronous"]
        lines.append(f"  {kind:<20} {count:>5} times, {background:>5} asynchronous {mb(figures['bytes']):>12}{note}")
    if "copy" in plan:
        lines.append(describe_copy(plan["copy"], of_chip))
    times = plan["predicted"]
    lines.append(
        f"predicted, a roofline and not a measurement: {1e3 * times['seconds']:.3g} ms"
        + (f", {times['images_per_second']:.4g} images/s, MFU {times['mfu']:.0%}" if "mfu" in times else "")
    )
    parts = (("matmuls", "compute"), ("memory", "memory"), ("network", "overlapped_network"))
    shown = ", ".join(f"{name} {1e3 * times[f'{key}_seconds']:.3g} ms" for name, key in parts)
    lines.append(
        f"  the longest of {shown}; and {1e3 * times['waiting_network_seconds']:.3g} ms waiting for the network"
    )
    if "model_flops" in plan:
        lines.append(
            f"  {plan['model_flops']:.4g} FLOPs (6 x the multiply-adds) of {times['flops']:.4g} in the program"
        )
    return lines


def describe_copy(copy: dict, of_chip: str) -> str:
    """Returns the line about how much of the parameters and optimizer a device ever has."""
    whole = f"{memory(copy['whole'])} of parameters and optimizer"
    if copy["held"] == copy["whole"]:
        return f"a {of_chip} holds a full copy of the {whole}"
    verdict = "never a full copy" if copy["at_most"] < copy["whole"] else "a full copy for a time, perhaps"
    gathered = memory(copy["at_most"] - copy["held"])
    return f"of the {whole} a {of_chip} holds {memory(copy['held'])}, and gathers {gathered} in a step: {verdict}"


def least_of(plan: dict) -> str:
    """Returns how what is sent compares with the least, if that is known and not nothing."""
    least = plan.get("least_sent")
    return f", {plan['sent'] / least:.2f} x the least for its parameters and gradients, {mb(least)}" if least else ""


def sweep_line(plan: dict) -> str:
    """Returns the line that tells a plan among others."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items()) + f", remat {plan['remat']}"
    if "reason" in plan:
        return f"{mesh}: not possible: {plan['reason']}"
    if not plan["fits"]:
        return f"{mesh}: does not fit: needs {memory(plan['needed'])} of {memory(plan['available'])}"
    times = plan["predicted"]
    return (
        f"{mesh}: needs {memory(plan['needed'])} of {memory(plan['available'])}, sends {mb(plan['sent'])}, predicted "
        f"{1e3 * times['seconds']:.3g} ms, MFU {times['mfu']:.0%} (compiled in {plan['compile_seconds']:.0f} s)"
    )


def recommendation(best: dict | None) -> str:
    """Returns the line that ends a sweep."""
    if best is None:
        return "none fits; plan one of them without --sweep to see what to change"
    axes = {axis: size for axis, size in best["mesh"].items() if size > 1 or axis in ("data", "fsdp")}
    flags = [f"--config.mesh.{axis}={size}" for axis, size in axes.items()]
    return " ".join(["recommended:", *flags, f"--config.compute.remat={best['remat']}"])


def recommended_line(found: dict | None, fits: bool) -> str:
    """Returns the line about what makes a config fit that does not, or one that fits send less."""
    if found is None:
        if fits:
            return "it sends much more than the least, and no smaller split of the parameters that fits sends less"
        return "no mesh, remat or accumulation makes it fit; train with a smaller batch, or on more or larger chips"
    plan = found["plan"]
    needs = f"needs {memory(plan['needed'])} of {memory(plan['available'])}, fits"
    why = f"it sends much more than the least; this {mb(plan['sent'])}{least_of(plan)}; " if fits else ""
    return f"recommended: {' '.join(found['flags'])}: {why}{needs}"


def memory(size: float) -> str:
    """Returns bytes of memory in GiB, or in MiB where they are fewer."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / GIB * 1024:.1f} MiB"


def mb(size: float) -> str:
    """Returns bytes as megabytes."""
    return f"{size / 1e6:,.1f} MB"
