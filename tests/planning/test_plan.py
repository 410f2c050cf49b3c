"""`dit-jax plan`: what it says of a program, on eight CPU devices with a TPU's figures; and with libtpu, of a slice."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from dit_jax.cli import plan as plan_verb
from dit_jax.cli.main import main
from dit_jax.config import ComputeConfig, MeshConfig, config_from_dict, config_to_dict
from dit_jax.parallel.chips import chip_of
from dit_jax.parallel.mesh import make_mesh
from dit_jax.planning import compiled, plan
from tests.tiny import adversarial_config, dit_config

ROOT = pathlib.Path(__file__).parents[2]
CHIP = chip_of("TPU v5 lite")
TINY = ("--config=configs/dit_imagenet.py:S/8", "--config.dit.depth=1", "--config.training.global_batch_size=8")


def with_mesh(config, **mesh):
    return dataclasses.replace(config, mesh=MeshConfig(**mesh))


def latents_config(tmp_path, **mesh):
    values = config_to_dict(dit_config(tmp_path))
    values["latents"] = {"shape": (8, 8, 2)}
    values["dit"] |= {"width": 128, "depth": 1}
    return with_mesh(config_from_dict(values), **mesh)


def plan_on_cpu(config, program=plan_verb.train_program):
    mesh = make_mesh(config.mesh)
    return plan.plan_program(config, program(config, mesh), CHIP)


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plans")
    return {
        "data": plan_on_cpu(latents_config(folder, data=8)),
        "fsdp": plan_on_cpu(latents_config(folder, data=1, fsdp=8)),
    }


def test_the_state_of_a_device_is_an_eighth_of_it_where_it_is_split_over_eight(plans):
    whole, split = plans["data"]["state"], plans["fsdp"]["state"]
    for name in ("parameters", "optimizer", "averages"):
        assert whole[name] / 8 <= split[name] < whole[name] / 4, name  # small parameters stay whole
    assert whole["optimizer"] == pytest.approx(2 * whole["parameters"], rel=1e-3)  # Adam's two moments
    assert whole["averages"] == whole["parameters"]
    assert split["loss"] == split["constants"] == 0


def test_gradients_are_all_that_data_parallelism_sends(plans):
    report = plans["data"]
    assert set(report["collectives"]) == {"all-reduce"}
    assert report["least_sent"] <= report["sent"] <= 1.01 * report["least_sent"]
    assert report["least_sent"] == 2 * 7 / 8 * report["state"]["parameters"]


def test_fsdp_gathers_parameters(plans):
    assert plans["fsdp"]["collectives"]["all-gather"]["count"] > 0
    assert plans["fsdp"]["least_collectives"]["reduce-scatter"] > 0


def test_the_predicted_time_is_the_longest_of_the_parts_and_the_wait(plans):
    for report in plans.values():
        times = report["predicted"]
        parts = [times[f"{name}_seconds"] for name in ("compute", "memory", "overlapped_network")]
        assert times["seconds"] == max(parts) + times["waiting_network_seconds"]
        assert 0 < times["mfu"] < 1
        assert times["images_per_second"] == pytest.approx(8 / times["seconds"])
        # The backward pass takes twice the forward's multiply-adds, but needs no gradient of the input.
        assert 0.9 < times["flops"] / report["model_flops"] <= 1
        assert report["margin"] == CHIP.memory_bytes - report["needed"]
        assert report["needed"] == sum(report["memory"].values())
    json.dumps(plans)


def test_an_autoencoder_with_a_discriminator_and_a_sampler_are_planned_too(tmp_path):
    report = plan_on_cpu(with_mesh(adversarial_config(tmp_path), data=8))
    assert report["fits"] and report["state"]["loss"] > 0
    config, num_steps = latents_config(tmp_path, data=8), 40
    config = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, num_steps=num_steps))
    report = plan_on_cpu(config, plan_verb.sampler_program)
    assert report["fits"] and "least_sent" not in report and report["predicted"]["flops"] > 0
    # Each of the steps reads the parameters.
    assert report["predicted"]["memory_seconds"] * CHIP.memory_bandwidth > num_steps * report["state"]["parameters"]


@pytest.mark.parametrize(
    ("message", "sizes"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (335.31G) "
            "exceeds available HBM (15.75G).",
            (335.31, 15.75),
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 19.53G "
            "of 15.75G hbm. Exceeded hbm capacity by 3.78G.",
            (19.53, 15.75),
        ),
        ("Ran out of memory in memory space hbm. Used 512.00M of 0.25G hbm.", (0.5, 0.25)),
    ],
)
def test_an_out_of_memory_error_gives_both_sizes(message, sizes):
    assert compiled.sizes_of_error(message) == tuple(round(size * 2**30) for size in sizes)


def test_another_error_of_the_compiler_is_passed_on():
    with pytest.raises(ValueError, match="the compiler failed: INTERNAL: no"):
        compiled.sizes_of_error("INTERNAL: no")


class OutOfMemory:
    """A jitted function whose compilation runs out of a chip's memory."""

    def lower(self, *args):
        raise jax.errors.JaxRuntimeError("Ran out of memory in memory space hbm. Used 20.00G of 15.75G hbm. Exceeded")


def test_what_does_not_fit_comes_with_flags_that_need_less(tmp_path):
    config = latents_config(tmp_path, data=2)
    mesh = make_mesh(config.mesh, jax.devices()[:2])
    program = dataclasses.replace(plan_verb.train_program(config, mesh), function=OutOfMemory())
    report = plan.plan_program(config, program, CHIP)
    assert (report["fits"], report["needed"], report["available"]) == (False, 20 * 2**30, 63 * 2**28)
    assert report["suggestions"] == [
        "--config.mesh.data=-1 --config.mesh.fsdp=2",
        "--config.compute.remat=dots",
        "--config.compute.remat=full",
        "--config.training.accumulation_steps=2",
        "--config.training.global_batch_size=4",
        "a larger slice, or chips with more memory",
    ]
    report |= {"topology": "v5e:1x2", "chips": 2, "mesh": dict(mesh.shape), "global_batch_size": 8}
    text = "\n".join(plan_verb.describe(report, 1))
    assert "needs 20.00 GiB of the 15.75 GiB of a chip: DOES NOT FIT; try" in text
    for flags in report["suggestions"]:
        overrides = dict(flag.removeprefix("--config.").split("=") for flag in flags.split() if "=" in flag)
        assert all(key.split(".")[0] in ("mesh", "compute", "training") for key in overrides)


def pretend_to_compile(monkeypatch, needed_by, state=2**28, available=2**31):
    """Makes plans of what `needed_by(config)` says, on four devices; returns what it compiled, and plan_of."""
    tried = []

    def placed_state(config, devices):
        if config.mesh.fsdp == 4:
            raise ValueError("1152 must be divisible")
        return {"data": 4 // config.mesh.fsdp, "fsdp": config.mesh.fsdp}, {"parameters": state // config.mesh.fsdp}

    def plan_of(config, devices, sampler):
        axes, parts = placed_state(config, devices)
        tried.append((config.mesh.fsdp, config.compute.remat, config.training.accumulation_steps))
        report = {"needed": needed_by(config), "available": available, "state": parts, "mesh": axes}
        report["fits"] = report["needed"] <= available
        return report | {"suggestions": plan.suggest(config, axes, report)}

    monkeypatch.setattr(plan_verb, "plan_of", plan_of)
    monkeypatch.setattr(plan_verb, "placed_state", placed_state)
    return tried, plan_of


def test_what_does_not_fit_is_planned_again_until_it_does(tmp_path, monkeypatch):
    enough = "full"
    needed_by = lambda config: 2**30 if config.compute.remat == enough else 2**31 + 1  # noqa: E731
    tried, plan_of = pretend_to_compile(monkeypatch, needed_by)
    config = latents_config(tmp_path, data=4)
    found = plan_verb.what_fits(config, [], False, plan_of(config, [], False))
    assert tried == [(1, "none", 1), (1, "dots", 1), (1, "full", 1)]
    assert found["flags"] == ["--config.compute.remat=full"] and found["plan"]["fits"]
    assert plan_verb.recommended_line(found, False) == (
        "recommended: --config.compute.remat=full: needs 1.00 GiB of 2.00 GiB, fits"
    )
    enough = "never"
    assert plan_verb.what_fits(config, [], False, plan_of(config, [], False)) is None
    assert plan_verb.recommended_line(None, False).startswith("no mesh, remat or accumulation makes it fit; train with")


def test_what_cannot_be_enough_is_not_compiled(tmp_path, monkeypatch):
    config = latents_config(tmp_path, data=4)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, global_batch_size=4 * 1024))
    needed_by = lambda config: 2**28 + 2**41 // config.training.accumulation_steps  # noqa: E731
    tried, plan_of = pretend_to_compile(monkeypatch, needed_by)
    found = plan_verb.what_fits(config, [], False, plan_of(config, [], False))
    # 2,048 GiB beside the state: 3 % of them, in 36 parts or more, might fit beside it in 2 GiB; but all are needed.
    assert tried == [(1, "none", 1), (1, "full", 64)]
    assert found is None


def test_what_fits_has_a_smaller_split_where_it_sends_too_much(tmp_path, monkeypatch):
    def plan_of(config, devices, sampler):
        fsdp, is_kept = config.mesh.fsdp, config.compute.remat == "none"
        report = {"mesh": {"data": 64 // fsdp, "fsdp": fsdp}, "fits": not is_kept, "available": 2**31, "needed": 2**30}
        suggestions = ["--config.mesh.data=-1 --config.mesh.fsdp=64", "--config.compute.remat=dots"]
        report |= {"suggestions": suggestions[fsdp == 64 :], "state": {}}
        return report | {"sent": 2.4e6 if fsdp == 64 else 0.8e6, "least_sent": 1e6}

    monkeypatch.setattr(plan_verb, "plan_of", plan_of)
    monkeypatch.setattr(plan_verb, "placed_state", lambda config, devices: ({"data": 1, "fsdp": 64}, {}))
    monkeypatch.setattr(plan, "at_best", lambda *_: 0)
    config = latents_config(tmp_path, data=-1, fsdp=8)
    first = plan_of(config, [], False)
    found = plan_verb.what_fits_and_sends_little(config, [], False, first)
    assert not first["fits"] and found["plan"]["fits"] and not plan.sends_too_much(found["plan"])
    assert found["flags"] == ["--config.mesh.data=-1", "--config.mesh.fsdp=8", "--config.compute.remat=dots"]


def test_a_split_that_sends_too_much_is_not_recommended(tmp_path, monkeypatch):
    plans = {1: (1.0, True), 8: (1.2, True), 64: (1.5, True)}

    def plan_of(config, devices, sampler):
        ratio, fits = plans[config.mesh.fsdp]
        report = {"mesh": {"data": 64 // config.mesh.fsdp, "fsdp": config.mesh.fsdp}, "fits": fits, "available": 2**31}
        return report | {"sent": 1e6 * ratio, "least_sent": 1e6, "needed": 2**30, "predicted": {"seconds": 1 / ratio}}

    monkeypatch.setattr(plan_verb, "plan_of", plan_of)
    config = latents_config(tmp_path, data=1, fsdp=64)
    worst = plan_of(config, [], False)
    assert plan.sends_too_much(worst)
    found = plan_verb.what_sends_less(config, [], False, worst)
    assert found["flags"] == ["--config.mesh.data=-1", "--config.mesh.fsdp=8"]
    assert plan_verb.recommended_line(found, True) == (
        "recommended: --config.mesh.data=-1 --config.mesh.fsdp=8: it sends much more than the least; this 1.2 MB, "
        "1.20 x the least for its parameters and gradients, 1.0 MB; needs 1.00 GiB of 2.00 GiB, fits"
    )
    assert plan.recommended([worst, found["plan"]]) is found["plan"]  # though it is slower
    assert plan.recommended([worst]) is worst
    plans[8] = (1.2, False)
    assert plan_verb.what_sends_less(config, [], False, worst)["plan"]["mesh"]["fsdp"] == 1
    plans[1] = (1.3, True)
    assert plan_verb.what_sends_less(config, [], False, worst) is None


def test_with_fsdp_no_device_ever_holds_a_copy_of_parameters_and_optimizer(plans):
    whole = plans["data"]["copy"]
    state = plans["data"]["state"]
    assert whole["held"] == whole["whole"] == whole["at_most"] == state["parameters"] + state["optimizer"]
    split = plans["fsdp"]["copy"]
    assert split["whole"] == whole["whole"] and split["held"] < whole["whole"] / 4
    assert split["held"] < split["at_most"] < split["whole"]
    lines = [plan_verb.describe_copy(plans[name]["copy"], "chip") for name in ("data", "fsdp")]
    assert "holds a full copy" in lines[0] and lines[1].endswith("never a full copy")


def test_a_program_that_gathers_all_parameters_and_the_optimizer_is_told_so(tmp_path):
    config = latents_config(tmp_path, data=1, fsdp=8)
    program = plan_verb.train_program(config, make_mesh(config.mesh))
    state = program.args[0]
    here = state.step.sharding  # on every device

    def gather(state, batch, constants):
        return jax.lax.with_sharding_constraint((state.params, state.opt_state), here)

    report = plan.plan_program(config, dataclasses.replace(program, function=jax.jit(gather)), CHIP)
    assert report["copy"]["at_most"] >= report["copy"]["whole"]
    assert plan_verb.describe_copy(report["copy"], "chip").endswith("a full copy for a time, perhaps")


def test_nothing_is_suggested_that_is_already_done(tmp_path):
    config = dataclasses.replace(latents_config(tmp_path), compute=ComputeConfig(remat="full"))
    tight = {"needed": 2**34, "available": 2**33, "state": {"parameters": 2**32}}
    assert plan.suggest(config, {"data": 1, "fsdp": 8}, tight) == ["a larger slice, or chips with more memory"]
    assert plan.suggest_for_sampling(config, {"data": 1, "fsdp": 8}) == ["a larger slice, or chips with more memory"]
    # Accumulation would not see the whole batch.
    config = dataclasses.replace(adversarial_config(tmp_path), compute=ComputeConfig(remat="full"))
    assert plan.suggest(config, {"data": 1, "fsdp": 2}, tight)[:-1] == ["--config.training.global_batch_size=4"]


def test_a_sweep_tries_a_few_splits_and_recommends_the_fastest_that_fits(tmp_path):
    assert plan.fsdp_splits(256) == [1, 8, 64, 256]
    assert plan.fsdp_splits(4) == [1, 4] and plan.fsdp_splits(1) == [1]
    configs = plan.sweep_meshes(dit_config(tmp_path), 16)
    # Of its batch of 8: two devices share an example.
    assert [(c.mesh.data, c.mesh.fsdp, c.mesh.sequence) for c in configs] == [(8, 1, 2), (1, 8, 2)]
    plans = [
        {"fits": False, "reason": "no"},
        {"fits": True, "predicted": {"seconds": 2.0}},
        {"fits": True, "predicted": {"seconds": 1.0}},
        {"fits": True, "predicted": {"seconds": 1.0}, "later": True},
    ]
    assert plan.recommended(plans) is plans[2]
    assert plan.recommended(plans[:1]) is None


def test_a_sampler_of_an_autoencoder_is_an_error_before_anything_is_compiled(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--config=configs/autoencoder_kl.py:f8", "--topology=v5e:2x2", "--sampler"])
    assert "--sampler needs a config of stage 'diffusion', not 'autoencoder'" in capsys.readouterr().err


def run_plan(*flags, env=()):
    command = [sys.executable, "-m", "dit_jax", "plan", *TINY, *flags]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", **dict(env)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


has_libtpu = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(
    not has_libtpu, reason='libtpu, which compiles for TPUs, is not installed: pip install -e ".[tpu]"'
)


@pytest.mark.skipif(has_libtpu, reason="libtpu is installed")
def test_a_machine_without_libtpu_is_told_how_to_install_it():
    result = run_plan("--topology=v5e:2x2")
    assert result.returncode == 2
    assert 'pip install -e ".[tpu]"' in result.stderr and result.stderr.count("\n") == 1


@needs_libtpu
def test_an_unknown_topology_is_one_line_with_examples():
    for topology in ("v9z:2x2", "v5e:3x3x3", "pod"):
        result = run_plan(f"--topology={topology}")
        assert result.returncode == 2
        *_, line = result.stderr.splitlines()
        assert line.startswith(f"dit-jax plan: error: --topology={topology} is not a slice") and "v5e:16x16" in line


@needs_libtpu
def test_a_tiny_config_is_planned_for_a_real_topology():
    result = run_plan("--topology=v5e:2x2", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["fits"] and report["chips"] == 4 and report["mesh"]["data"] == 4
    assert report["sent"] == pytest.approx(report["least_sent"], rel=0.01)


def test_every_kind_of_memory_and_collective_is_printed(plans):
    report = plans["fsdp"] | {"topology": "v5e:2x4", "chips": 8, "mesh": {"data": 1, "fsdp": 8}, "global_batch_size": 8}
    report["remat"] = "none"
    text = "\n".join(plan_verb.describe(report, 1))
    for word in (
        "fits",
        "parameters",
        "optimizer",
        "averages",
        "activations",
        "all-gather",
        "predicted",
        "MFU",
        "FLOPs",
    ):
        assert word in text, word
    assert re.search(r"mesh data 1 x fsdp 8, batch 8", text)
    assert "predicted" in plan_verb.sweep_line(report)
    assert plan_verb.recommendation(report) == (
        "recommended: --config.mesh.data=1 --config.mesh.fsdp=8 --config.compute.remat=none"
    )


def test_bytes_per_device_are_those_of_a_shard(plans):
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    assert compiled.bytes_per_device({"a": jax.ShapeDtypeStruct((8, 3), jnp.bfloat16, sharding=sharding)}) == 2 * 3 * 2
