"""Parameters, multiply-adds and shardings of a config or a checkpoint."""

import argparse
import json

from dit_jax.cli.main import add_config_argument, load_run_config, path_flag
from dit_jax.config import Config, undivided_activations
from dit_jax.data.classes import describe_classes

MAX_NAMES = 100  # of classes in a line; --json has all
HELP = "prints parameters, Gflops and shardings of a config or a checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    add_config_argument(parser, required=False)
    parser.add_argument("--workdir", type=path_flag, metavar="DIR", help="of a run, instead of --config")
    parser.add_argument(
        "--verify", action="store_true", help="read all of --workdir's checkpoints, and say which are what was saved"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Counts from shapes alone: no parameter is made."""
    if (args.config is None) == (args.workdir is None):
        raise ValueError("give one of --config=FILE and --workdir=DIR")
    if args.verify:
        if args.workdir is None:
            raise ValueError("--verify needs --workdir=DIR")
        verify(args.workdir, args.json)
        return
    step = None
    if args.config:
        config = load_run_config(args)
    elif args.overrides:
        raise ValueError("--config.KEY=VALUE needs --config=FILE; a workdir has its own config")
    else:
        from dit_jax.checkpoint import find_checkpoint

        step, config = find_checkpoint(args.workdir)

    from dit_jax.checkpoint import Checkpoints
    from dit_jax.models.averages import initial_share_note
    from dit_jax.models.build import abstract_params
    from dit_jax.models.cost import describe_cost
    from dit_jax.parallel.mesh import make_mesh
    from dit_jax.parallel.rules import describe_shardings

    names = config.data.class_names
    info = {"stage": config.stage, "step": step, "class_names": names} | describe_cost(config)
    if config.autoencoder and config.autoencoder.discriminator:
        info["discriminator_parameters"] = count_discriminator(config)
    info["shardings"] = describe_shardings(abstract_params(config), make_mesh(config.mesh), config.mesh.rules)
    if step is not None and "ema_params" in Checkpoints(args.workdir).items(step):
        info["average"] = initial_share_note(config.training, step)
    info["shardings"]["undivided"] = undivided_activations(config, info["shardings"]["mesh"])
    if args.json:
        print(json.dumps(info))
        return
    print(f"stage {config.stage}" + (f", checkpoint of step {step}" if step is not None else ""))
    if names:
        print(describe_classes(names, MAX_NAMES))
    print(f"{info['parameters']:,} parameters, {info['macs'] / 1e9:.4g} Gflops (multiply-adds of one forward pass)")
    for name, count in info["modules"].items():
        print(f"  {name:<20} {count:>15,} {info['module_macs'][name] / 1e9:>12.4g} G")
    if "discriminator_parameters" in info:
        print(f"and in training a discriminator of {info['discriminator_parameters']:,} parameters")
    if info.get("average"):
        print(info["average"])
    print(f"shardings over {info['shardings']['mesh']}; what is not listed is replicated")
    for path, spec in info["shardings"]["split"].items():
        print(f"  {path:<60} {spec}")
    for line in info["shardings"]["undivided"]:
        print(line)


def count_discriminator(config: Config) -> int:
    """Returns the parameters of the discriminator that an autoencoder trains against, its batch statistics aside."""
    import jax
    import jax.numpy as jnp

    from dit_jax.models.cost import count_params
    from dit_jax.perceptual.patchgan import build_discriminator

    discriminator = build_discriminator(config.autoencoder.discriminator)
    images = jax.ShapeDtypeStruct((1, *config.input_shape), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    variables = jax.eval_shape(lambda key, images: discriminator.init(key, images, train=True), key, images)
    return count_params(variables["params"])


def verify(workdir: str, as_json: bool) -> None:
    """Prints the state of each checkpoint; raises ValueError where one is damaged, or there is none."""
    from dit_jax.checkpoint import verify_workdir

    reports = []
    for report in verify_workdir(workdir):
        reports.append(report)
        if not as_json:
            told = report.get("reason") or f"{report['arrays']:,} arrays, {report['bytes'] / 1e6:,.1f} MB"
            print(f"{report['path']}: {report['state']}: {told}", flush=True)
    if as_json:
        print(json.dumps({"checkpoints": reports}))
    if not reports:
        raise ValueError(f"{workdir} has no checkpoints; give the --workdir of a `dit-jax train` run")
    damaged = [report["path"] for report in reports if report["state"] == "damaged"]
    if damaged:
        raise ValueError(
            f"{len(damaged)} of {len(reports)} checkpoints of {workdir} are damaged: {', '.join(damaged)}; the newest "
            "good one is used in their place"
        )
