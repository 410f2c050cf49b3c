"""Converts released weights to a workdir that `dit_jax.load` and `train` take, and a workdir's weights back.

A workdir as --input is converted back: to a file (.pt, .safetensors) in the released form, or else to a folder as
diffusers has it. No code in a file is run: pickles are read with PyTorch's `weights_only`.
"""

import argparse
import json
import os
import pathlib
import shutil
import typing

from dit_jax.config import (
    Config,
    DataConfig,
    DiffusionConfig,
    DiTConfig,
    LatentsConfig,
    SamplingConfig,
    TrainingConfig,
    load_config,
)

if typing.TYPE_CHECKING:
    from dit_jax.pretrained.name_map import Tensors

HELP = "converts released PyTorch weights to a workdir, and back"
DIFFUSERS_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
LATENT_FACTOR, LATENT_SCALE = 8, 0.18215  # of the autoencoder that the released models were trained with (section 4)
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of the paper's widths (table 1): no tensor tells


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.add_argument("--kind", required=True, choices=("dit",), help="what the weights are of")
    parser.add_argument("--input", required=True, metavar="PATH", help="a file, a diffusers folder, or a workdir")
    parser.add_argument("--output", required=True, metavar="PATH", help="a workdir; or a file or folder (see above)")
    parser.add_argument(
        "--config", metavar="FILE[:ARG]", help="of the new workdir, overridden as in `train` (default: as released)"
    )
    parser.add_argument("--autoencoder", metavar="WORKDIR", help="of the latents; sampling images needs it")
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
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    if (source / "checkpoints").is_dir():
        if args.config or args.autoencoder:
            raise ValueError(f"--input={source} is a workdir, which has its own config and autoencoder")
        export(source, output)
    else:
        config = load_config(args.config, args.overrides) if args.config else None
        import_weights(source, output, config, args.autoencoder)
    print(f"{source} converted: {output}")


def import_weights(source: pathlib.Path, output: pathlib.Path, config: Config | None, autoencoder: str | None) -> None:
    """Writes a workdir with a checkpoint of step 0 of a released file or a diffusers folder."""
    from dit_jax.checkpoint import Checkpoints, find_checkpoint, write_config
    from dit_jax.evaluation.loaded import AUTOENCODER_DIR
    from dit_jax.models.build import abstract_params
    from dit_jax.pretrained.dit import diffusers_entries, released_entries
    from dit_jax.pretrained.name_map import from_tensors

    if source.is_dir():
        shape, tensors = read_diffusers(source)
        entries = diffusers_entries
    else:
        shape, tensors = read_released(source)
        entries = released_entries
    config = released_config(shape) if config is None else config
    check_shape(source, config, shape)
    if autoencoder:
        _, autoencoder_config = find_checkpoint(autoencoder)
        if autoencoder_config.stage != "autoencoder":
            raise ValueError(f"--autoencoder={autoencoder} is a run of stage {autoencoder_config.stage!r}")
    try:
        params = from_tensors(entries(shape["depth"], shape["patch_size"]), tensors, abstract_params(config))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        if autoencoder:
            shutil.copytree(
                autoencoder, temporary / AUTOENCODER_DIR, ignore=shutil.ignore_patterns("samples", "metrics")
            )
        write_config(temporary, config)
        with Checkpoints(temporary, max_to_keep=1) as checkpoints:
            checkpoints.save(0, {"params": params}, config)
        os.replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_released(path: pathlib.Path) -> tuple[dict[str, int], "Tensors"]:
    """Returns the shape of the model in a released file, and its tensors without the position table."""
    import numpy as np

    from dit_jax.nn.embeddings import sincos_2d
    from dit_jax.pretrained.dit import POSITION_TABLE, released_shape
    from dit_jax.pretrained.files import read_tensors

    tensors = read_tensors(path)
    try:
        shape = released_shape(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    rows = shape["height"] // shape["patch_size"]
    table = tensors.pop(POSITION_TABLE)
    if table.shape != (1, rows**2, shape["width"]) or not np.allclose(
        table[0], sincos_2d(rows, rows, shape["width"]), rtol=0, atol=1e-5
    ):
        raise ValueError(f"{path}: tensor {POSITION_TABLE!r} must be DiT's sine-cosine table, which is computed here")
    return shape, tensors


def read_diffusers(folder: pathlib.Path) -> tuple[dict[str, int], "Tensors"]:
    """Returns the shape of the model in a folder of diffusers (a pipeline's, or its transformer's), and its tensors."""
    from dit_jax.pretrained.files import read_tensors

    folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"--input={folder} must be a workdir (with checkpoints/) or a diffusers folder (config.json)")
    try:
        values = json.loads(path.read_text())
        shape = {
            "depth": values["num_layers"],
            "num_heads": values["num_attention_heads"],
            "width": values["num_attention_heads"] * values["attention_head_dim"],
            "patch_size": values["patch_size"],
            "num_classes": values["num_embeds_ada_norm"],
            "height": values["sample_size"],
            "channels": values["in_channels"],
            "out_channels": values.get("out_channels") or values["in_channels"],
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the config of a DiTTransformer2DModel ({error!r})") from error
    if not all(isinstance(value, int) and value > 0 for value in shape.values()):
        raise ValueError(f"{path}: {shape} must be positive whole numbers")
    weights = [folder / name for name in DIFFUSERS_WEIGHTS if (folder / name).is_file()]
    if not weights:
        raise ValueError(f"{folder} has none of {', '.join(DIFFUSERS_WEIGHTS)}")
    return shape, read_tensors(weights[0])


def released_config(shape: dict[str, int]) -> Config:
    """Returns the config under which a released model was trained, for a model of this shape."""
    width, height, channels = shape["width"], shape["height"], shape["channels"]
    num_heads = shape.get("num_heads") or HEADS.get(width)
    if num_heads is None:
        raise ValueError(f"the weights do not tell the number of heads of width {width}; give --config=FILE")
    return Config(
        stage="diffusion",
        data=DataConfig(
            name="imagenet2012",
            image_size=LATENT_FACTOR * height,
            num_classes=shape["num_classes"],
            eval_split="validation",
        ),
        training=TrainingConfig(num_train_steps=400_000),
        dit=DiTConfig(depth=shape["depth"], width=width, num_heads=num_heads, patch_size=shape["patch_size"]),
        latents=LatentsConfig(shape=(height, height, channels), scale=LATENT_SCALE),
        diffusion=DiffusionConfig(variance="learned_range" if shape["out_channels"] == 2 * channels else "fixed_large"),
        sampling=SamplingConfig(cfg_channels=min(3, channels)),
    )


def check_shape(source: pathlib.Path, config: Config, shape: dict[str, int]) -> None:
    """Raises ValueError where a config describes another model than the one that was read."""
    from dit_jax.models.build import build_dit

    if config.stage != "diffusion":
        raise ValueError(f"--config must be of stage 'diffusion', not {config.stage!r}")
    model = build_dit(config)
    ours = {
        "depth": model.depth,
        "width": model.width,
        "patch_size": model.patch_size,
        "num_classes": model.num_classes,
        "height": config.input_shape[0],
        "channels": config.input_shape[-1],
        "out_channels": model.out_channels,
        "num_heads": model.num_heads,
    }
    differences = [f"{name} {ours[name]} (weights: {value})" for name, value in shape.items() if ours[name] != value]
    if differences or model.conditioning != ("adaln_zero",):
        raise ValueError(f"{source} is of another model than the config: {'; '.join(differences) or 'conditioning'}")


def export(workdir: pathlib.Path, output: pathlib.Path) -> None:
    """Writes a workdir's weights for evaluation as a file in the released form, or as a diffusers folder."""
    from dit_jax.checkpoint import find_checkpoint, restore_eval_params
    from dit_jax.models.build import abstract_params
    from dit_jax.nn.embeddings import sincos_2d
    from dit_jax.pretrained.dit import POSITION_TABLE, diffusers_entries, released_entries
    from dit_jax.pretrained.files import write_tensors
    from dit_jax.pretrained.name_map import to_tensors

    step, config = find_checkpoint(workdir)
    if config.stage != "diffusion" or config.dit.conditioning != ("adaln_zero",) or not config.dit.class_conditional:
        raise ValueError(f"--input={workdir} must hold a class-conditional adaLN-Zero DiT: the known forms are of it")
    dit, (height, width, _) = config.dit, config.input_shape
    params = restore_eval_params(workdir, step, abstract_params(config))
    if output.suffix:
        tensors = to_tensors(released_entries(dit.depth, dit.patch_size), params)
        tensors[POSITION_TABLE] = sincos_2d(height // dit.patch_size, width // dit.patch_size, dit.width)[None]
        write_tensors(output, tensors)
        return
    if height != width:
        raise ValueError(f"--input={workdir} is of inputs {height} x {width}; diffusers has square ones only")
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        (temporary / "config.json").write_text(json.dumps(diffusers_config(config), indent=2) + "\n")
        tensors = to_tensors(diffusers_entries(dit.depth, dit.patch_size), params)
        write_tensors(temporary / DIFFUSERS_WEIGHTS[0], tensors)
        os.replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def diffusers_config(config: Config) -> dict:
    """Returns the `config.json` of diffusers' `DiTTransformer2DModel` for a model."""
    dit = config.dit
    height, _, channels = config.input_shape
    return {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": dit.num_heads,
        "attention_head_dim": dit.width // dit.num_heads,
        "in_channels": channels,
        "out_channels": 2 * channels if config.diffusion.variance == "learned_range" else channels,
        "num_layers": dit.depth,
        "sample_size": height,
        "patch_size": dit.patch_size,
        "num_embeds_ada_norm": config.data.num_classes,
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
    }
