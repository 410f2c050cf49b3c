"""Converts released weights to a workdir that `dit_jax.load` and `train` take, and a workdir's weights back.

A workdir as --input is converted back: to a file (.pt, .safetensors) in the released form, or else to a folder as
diffusers has it. No code in a file is run: pickles are read with PyTorch's `weights_only`.
"""

import argparse
import pathlib

from dit_jax.config import load_config

HELP = "converts released PyTorch weights to a workdir, and back"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.add_argument("--kind", required=True, choices=("dit", "autoencoder"), help="what the weights are of")
    parser.add_argument("--input", required=True, metavar="PATH", help="a file, a diffusers folder, or a workdir")
    parser.add_argument("--output", required=True, metavar="PATH", help="a workdir; or a file or folder (see above)")
    parser.add_argument(
        "--config", metavar="FILE[:ARG]", help="of the new workdir, overridden as in `train` (default: as released)"
    )
    parser.add_argument("--autoencoder", metavar="WORKDIR", help="of a DiT's latents; sampling images needs it")
    parser.set_defaults(overridable="")


def run(args: argparse.Namespace) -> None:
    """Reads and checks everything, then writes the output aside and renames it."""
    source, output = pathlib.Path(args.input), pathlib.Path(args.output)
    if not source.exists():
        raise ValueError(f"--input={source}: no such file or folder")
    if output.exists():
        raise ValueError(f"--output={output} exists; delete it or choose another")
    if not args.config and args.overrides:
        raise ValueError("--config.KEY=VALUE needs --config=FILE")
    if args.autoencoder and args.kind != "dit":
        raise ValueError(f"--autoencoder is for --kind=dit, not {args.kind}")
    back = (source / "checkpoints").is_dir()
    if back and (args.config or args.autoencoder):
        raise ValueError(f"--input={source} is a workdir, which has its own config and autoencoder")
    config = load_config(args.config, args.overrides) if args.config else None

    from dit_jax.evaluation.converted import export_weights, import_weights

    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    if back:
        export_weights(args.kind, source, output)
    else:
        for note in import_weights(args.kind, source, output, config, args.autoencoder):
            print(note)
    print(f"{source} converted: {output}")
