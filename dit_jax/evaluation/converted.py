"""Workdirs from released weights, and released forms from workdirs: what `dit-jax convert` does.

A released form is a file of tensors, or a folder as diffusers has it. A converted workdir has a checkpoint of step 0
with parameters alone.
"""

import dataclasses
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from dit_jax.checkpoint import Checkpoints, find_checkpoint, read_newest_good, restore_eval_params, write_config
from dit_jax.config import (
    MAX_COUNT,
    AutoencoderConfig,
    CodebookConfig,
    Config,
    DataConfig,
    DiffusionConfig,
    DiTConfig,
    LatentsConfig,
    SamplingConfig,
    TrainingConfig,
    check_config,
)
from dit_jax.evaluation import converted_unet
from dit_jax.evaluation.latent_scale import (
    DENOISER_KEY,
    DIFFUSERS_DEFAULT,
    LatentScale,
    diffusers_values,
    read_scale,
    resolve_scale,
    scale_of_diffusers,
    scale_of_workdir,
)
from dit_jax.evaluation.loaded import AUTOENCODER_DIR, copy_weights, stored_digest
from dit_jax.files import read_json, to_json, write_text_whole, written_whole
from dit_jax.models.build import abstract_params, build_dit
from dit_jax.nn.embeddings import sincos_2d
from dit_jax.pretrained import autoencoder as autoencoder_names
from dit_jax.pretrained import dit as dit_names
from dit_jax.pretrained import unet as unet_names
from dit_jax.pretrained.files import find_weights, read_weights, write_tensors
from dit_jax.pretrained.name_map import Entry, Tensors, flatten, from_tensors, to_tensors, unwrapped

DIFFUSERS_STEM = "diffusion_pytorch_model"
DIFFUSERS_FOLDERS = {"dit": ("transformer",), "unet": ("unet",), "autoencoder": ("vae", "vqvae")}  # of a pipeline
DIFFUSERS_AUTOENCODERS = ("AutoencoderKL", "VQModel")
LATENT_FACTOR, LATENT_SCALE = 8, 0.18215  # of the autoencoder that the released DiTs were trained with (section 4)
FIRST_TENSORS = {  # of a kind, with which all of its names share a prefix: in the released form, and in diffusers'
    "dit": ("x_embedder.proj.weight", "pos_embed.proj.weight"),
    "unet": ("input_blocks.0.0.weight", "conv_in.weight"),
    "autoencoder": ("encoder.conv_in.weight", "encoder.conv_in.weight"),
}
LDM_SCALE = "scale_factor"  # in a CompVis checkpoint, where the latents' first batch gave it
PARTS = {"unet": unet_names.COMPVIS_PREFIX, "autoencoder": autoencoder_names.COMPVIS_PREFIX}  # of a CompVis checkpoint
NO_SIZES = ("label", "scale_shift_norm", "resblock_updown")  # of what a diffusers config tells of a model
OPTIONAL_SIZES = ("num_heads", "head_channels", "context_width", "label_rows")
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of the paper's widths (table 1): no tensor tells


def import_weights(
    kind: str, source: pathlib.Path, output: pathlib.Path, config: Config | None, autoencoder: str | None
) -> list[str]:
    """Writes a workdir with a checkpoint of step 0; returns notes on what was left out.

    Args:
      kind: "dit", "unet" or "autoencoder"; source: a file, or a folder of diffusers.
      output: the workdir, which must not exist yet.
      config: of the workdir; None: what the weights tell, and otherwise as released.
      autoencoder: workdir of a denoiser's autoencoder, which is copied; None: the workdir will sample latents.

    Raises:
      ValueError: where the weights do not fit, naming the tensor; nothing is written then.
    """
    is_folder = source.is_dir()
    theirs = read_autoencoder_config(autoencoder) if autoencoder else None
    shape, tensors, notes, told = (read_diffusers if is_folder else read_file)(kind, source)
    if autoencoder and (scale := scale_of_workdir(autoencoder)):
        told.append((f"--autoencoder={autoencoder}", scale))
    try:
        is_released = config is None
        config = released_config(kind, shape, theirs) if is_released else config
        config, more = with_latent_scale(kind, config, told, theirs, is_released)
        notes += more
        check_shape(kind, config, shape)
        if kind == "unet":
            params = converted_unet.import_params(config, tensors, is_folder)
        else:
            params = from_tensors(entries_of(kind, config, is_folder), tensors, abstract_params(config))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    if autoencoder:
        config = with_autoencoder(config, autoencoder)
    with written_whole(output) as temporary:
        temporary.mkdir()
        if autoencoder:
            copy_weights(autoencoder, temporary / AUTOENCODER_DIR)
        write_config(temporary, config)
        with Checkpoints(temporary, max_to_keep=1) as checkpoints:
            checkpoints.save(0, {"params": params}, config)
    return notes


def with_autoencoder(config: Config, workdir: str) -> Config:
    """Returns a denoiser's config that records which autoencoder its latents are of; ValueError where it names another.

    Of a model of pixels, which has no latents, it is the config itself.
    """
    if config.latents is None:
        return config
    digest = stored_digest(workdir)
    if config.latents.autoencoder not in (None, digest):
        raise ValueError(
            f"--autoencoder={workdir} is {digest!r}, but config.latents.autoencoder={config.latents.autoencoder!r}; "
            "give that one"
        )
    return dataclasses.replace(config, latents=dataclasses.replace(config.latents, autoencoder=digest))


def export_weights(kind: str, workdir: pathlib.Path, output: pathlib.Path) -> list[str]:
    """Writes a workdir's weights for evaluation: a file in the released form, or (no suffix) a diffusers folder.

    Returns notes: what scale and shift its latents have, and whether the output tells them.
    """
    _, config = find_checkpoint(workdir)
    if getattr(config, kind) is None:
        raise ValueError(f"--input={workdir} is a run of stage {config.stage!r} without a {kind}: not of --kind={kind}")
    check_known_form(kind, config)
    scale, notes = exported_scale(kind, workdir, config, output)
    _, params = read_newest_good(workdir, lambda step: restore_eval_params(workdir, step, abstract_params(config)))

    def to_form(diffusers: bool) -> dict[str, np.ndarray]:
        if kind == "unet":
            return converted_unet.export_tensors(config, params, diffusers)
        return to_tensors(entries_of(kind, config, diffusers), params)

    if output.suffix:
        tensors = to_form(diffusers=False)
        if kind == "dit":
            rows, columns = (side // config.dit.patch_size for side in config.input_shape[:2])
            tensors[dit_names.POSITION_TABLE] = sincos_2d(rows, columns, config.dit.width)[None]
        write_tensors(output, tensors)
        return notes
    with written_whole(output) as temporary:
        temporary.mkdir()
        values = {
            "dit": diffusers_dit_config,
            "unet": converted_unet.diffusers_config,
            "autoencoder": diffusers_autoencoder_config,
        }[kind](config)
        if scale:
            told = diffusers_values(scale)
            values |= told if kind == "autoencoder" else {DENOISER_KEY: told}
        write_text_whole(temporary / "config.json", to_json(values))
        write_tensors(temporary / f"{DIFFUSERS_STEM}.safetensors", to_form(diffusers=True))
    return notes


def read_autoencoder_config(workdir: str) -> Config:
    """Returns the config of a denoiser's autoencoder."""
    _, config = find_checkpoint(workdir)
    if config.stage != "autoencoder":
        inside = pathlib.Path(workdir) / AUTOENCODER_DIR
        remedy = f"; give {inside}" if inside.is_dir() else ""
        raise ValueError(f"--autoencoder={workdir} is a run of stage {config.stage!r}{remedy}")
    return config


def with_latent_scale(
    kind: str, config: Config, told: list[tuple[str, LatentScale]], autoencoder: Config | None, is_released: bool
) -> tuple[Config, list[str]]:
    """Returns a converted model's config with the scale and shift of its latents, and a note on who says so.

    told: (who, what), by the weights' files and by the autoencoder; is_released: nobody gave the config's own scale.
    """
    if kind == "autoencoder" and config.autoencoder and told:
        section = config.autoencoder
        given = LatentsConfig((1, 1, 1), scale=section.latents_scale, shift=section.latents_shift or 0.0)
        scale, note = resolve_scale(given, told, LATENT_SCALE)
        section = dataclasses.replace(section, latents_scale=scale.scale, latents_shift=scale.shift)
        return dataclasses.replace(config, autoencoder=section), [note]
    if kind == "autoencoder" or config.latents is None:
        return config, []
    channels = autoencoder and autoencoder.autoencoder.latent_channels
    if channels not in (None, config.latents.shape[-1]):
        raise ValueError(
            f"--autoencoder has latents of {channels} channels, but the denoiser is of {config.latents.shape[-1]}; "
            "give the one that it was trained with"
        )
    default = LATENT_SCALE if kind == "dit" else converted_unet.LATENT_SCALE
    given = dataclasses.replace(config.latents, scale=None) if is_released else config.latents
    scale, note = resolve_scale(given, told, default)
    return dataclasses.replace(config, latents=dataclasses.replace(config.latents, **scale._asdict())), [note]


def exported_scale(
    kind: str, workdir: pathlib.Path, config: Config, output: pathlib.Path
) -> tuple[LatentScale | None, list[str]]:
    """Returns the scale and shift of the latents of what is exported, and notes on them; None without latents."""
    if kind != "autoencoder":
        if config.latents is None or config.latents.scale is None:
            return None, []
        scale = LatentScale(config.latents.scale, config.latents.shift)
        inside = workdir / AUTOENCODER_DIR
        notes = [f"latents: {scale}" + (f"; export {inside} beside it, which tells diffusers" * inside.is_dir())]
        beside = [output.absolute().parent / name / "config.json" for name in DIFFUSERS_FOLDERS["autoencoder"]]
        for path in beside if not output.suffix else []:
            theirs = scale_of_diffusers(read_json(path), path) if path.is_file() else scale
            theirs = theirs or LatentScale(DIFFUSERS_DEFAULT)
            if not scale.is_close(theirs):
                notes.append(f"{path} has {theirs}: a pipeline of both decodes wrongly")
        return scale, notes
    scale = scale_of_workdir(workdir)
    if scale is None:
        return None, [
            f"latents: no scale is known of {workdir}, and diffusers takes {DIFFUSERS_DEFAULT}; export the "
            f"{AUTOENCODER_DIR}/ of a denoiser's workdir or of a cache to tell theirs"
        ]
    return scale, [f"latents: {scale}" + ("; a file has no place for it" if output.suffix else "")]


def entries_of(kind: str, config: Config, diffusers: bool) -> list[Entry]:
    """Returns the names of a model's tensors in one of its two forms."""
    if kind == "dit":
        make = dit_names.diffusers_entries if diffusers else dit_names.released_entries
        return make(config.dit.depth, config.dit.patch_size)
    make = autoencoder_names.diffusers_entries if diffusers else autoencoder_names.compvis_entries
    paths = (path for path, _ in flatten(abstract_params(config)))
    widens = {path.removesuffix("/nin_shortcut/kernel") for path in paths if path.endswith("/nin_shortcut/kernel")}
    autoencoder = config.autoencoder
    num_levels = len(autoencoder.channel_multipliers)
    entries = make(num_levels, autoencoder.num_res_blocks, autoencoder.attention_levels, widens)
    return [*entries, autoencoder_names.CODES] if autoencoder.codebook else entries


_Told = list[tuple[str, LatentScale]]  # who says what the scale and shift of the latents are


def read_file(kind: str, path: pathlib.Path) -> tuple[dict[str, Any], Tensors, list[str], _Told]:
    """Returns the shape of the model in a file of the released form, its tensors, and notes on what was left out.

    The last are the scale and shift of its latents, where the file tells them.
    """
    tensors, notes = read_weights(path)
    told = []
    try:
        tensors, more = unwrapped(tensors, FIRST_TENSORS[kind][:1], PARTS.get(kind, ""))
        notes += more
        if kind != "dit" and np.size(scale := tensors.pop(LDM_SCALE, ())) == 1:
            told.append((str(path), read_scale((float(np.ravel(scale)[0]), f"tensor {LDM_SCALE!r}"))))
        if kind == "dit":
            shape = dit_names.released_shape(tensors)
            check_position_table(tensors.pop(dit_names.POSITION_TABLE, None), shape)
        elif kind == "unet":
            tensors, more = unet_names.from_compvis(tensors)
            shape = unet_names.compvis_shape(tensors)
        else:
            tensors, more = autoencoder_names.without_prefix(tensors)
            shape = autoencoder_names.compvis_shape(tensors)
        notes += more if kind != "dit" else []
    except (ValueError, TypeError, IndexError, ZeroDivisionError) as error:  # tensors of no axes, or of none in them
        raise ValueError(f"{path}: {error}") from error
    return shape, tensors, notes, told


def check_position_table(table: np.ndarray | None, shape: dict[str, Any]) -> None:
    """Raises ValueError where a released file has a position table, and it is not the one that we compute."""
    if table is None:
        return
    rows = shape["height"] // shape["patch_size"]
    expected = sincos_2d(rows, rows, shape["width"])[None]
    # Of a file that was once in half precision it is rounded, too.
    halves = [x for x in (np.float16, ml_dtypes.bfloat16) if np.array_equal(table, table.astype(x).astype(np.float32))]
    tolerance = max([1e-5, *(float(ml_dtypes.finfo(dtype).eps) for dtype in halves)])
    if table.shape != expected.shape or not np.allclose(table, expected, rtol=0, atol=tolerance):
        raise ValueError(f"tensor {dit_names.POSITION_TABLE!r} must be DiT's sine-cosine table, which is computed here")


def read_diffusers(kind: str, folder: pathlib.Path) -> tuple[dict[str, Any], Tensors, list[str], _Told]:
    """Returns the same of a folder of diffusers: a model's, or the pipeline's that it is in."""
    inner = [folder / name for name in DIFFUSERS_FOLDERS[kind] if (folder / name).is_dir()]
    folder = inner[0] if inner else folder
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"--input={folder} must be a workdir (with checkpoints/) or a diffusers folder (config.json)")
    try:
        values = read_json(path)
        shape = {
            "dit": diffusers_dit_shape,
            "unet": unet_names.diffusers_shape,
            "autoencoder": diffusers_autoencoder_shape,
        }[kind](values)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"{path} is not the config of a diffusers model of --kind={kind} ({error!r})") from error
    sizes = [v for name, v in shape.items() if name not in NO_SIZES and not (v is None and name in OPTIONAL_SIZES)]
    numbers = [n for size in sizes for n in (size if isinstance(size, tuple) else (size,))]
    if not all(type(n) is int and 0 <= n <= MAX_COUNT for n in numbers):
        raise ValueError(f"{path}: {str(shape)[:300]} must be whole numbers, of a model's size")
    told = diffusers_scales(kind, folder, values)
    weights, notes = find_weights(folder, (DIFFUSERS_STEM,))
    tensors, more = read_weights(weights)
    try:
        tensors, wrapped = unwrapped(tensors, FIRST_TENSORS[kind][1:])
    except ValueError as error:
        raise ValueError(f"{weights}: {error}") from error
    notes += more + wrapped
    depths = (shape.get(name, 0) for name in ("depth", "num_res_blocks", "transformer_depth"))
    num_layers = max(len(shape.get("channel_multipliers", ())), *depths)
    if num_layers > len(tensors):
        raise ValueError(f"{path}: {num_layers} layers must not be more than the {len(tensors)} tensors")
    if kind == "autoencoder":
        try:
            return *diffusers_autoencoder(values, shape, tensors), notes, told
        except (ValueError, TypeError, IndexError) as error:
            raise ValueError(f"{folder}: {error}") from error
    return shape, unet_names.from_diffusers(tensors, values) if kind == "unet" else tensors, notes, told


def diffusers_scales(kind: str, folder: pathlib.Path, values: dict[str, Any]) -> _Told:
    """Returns who says what scale and shift the latents have: the config of a model, of its pipeline's autoencoder."""
    paths = [folder / "config.json"]
    if kind != "autoencoder" and folder.absolute().name in DIFFUSERS_FOLDERS[kind]:
        paths += [folder.absolute().parent / name / "config.json" for name in DIFFUSERS_FOLDERS["autoencoder"]]
    told = [(path, values if path == paths[0] else read_json(path)) for path in paths if path.is_file()]
    scales = [(str(path), scale_of_diffusers(each, path)) for path, each in told if isinstance(each, dict)]
    return [(who, scale) for who, scale in scales if scale is not None]


def diffusers_autoencoder(
    values: dict[str, Any], shape: dict[str, Any], tensors: Tensors
) -> tuple[dict[str, Any], Tensors]:
    """Returns the shape with what the weights tell, and the tensors with the names that `diffusers_entries` gives."""
    name, activation = values.get("_class_name", DIFFUSERS_AUTOENCODERS[0]), values.get("act_fn", "silu")
    if name not in DIFFUSERS_AUTOENCODERS:
        raise ValueError(f"_class_name={name!r} must be {' or '.join(DIFFUSERS_AUTOENCODERS)}: no other is known here")
    if activation not in ("silu", "swish"):
        raise ValueError(f"act_fn={activation!r} must be 'silu': the autoencoders here have no other")
    tensors = autoencoder_names.with_new_attention_names(tensors)
    num_codes = autoencoder_names.count_codes(tensors)
    if "_class_name" in values and (name == "VQModel") != (num_codes is not None):
        has = "no" if num_codes is None else "the"
        raise ValueError(f"_class_name={name!r}, but the weights have {has} codes of a VQModel; correct config.json")
    for conv, switch, factor in (("quant_conv", "use_quant_conv", 2), ("post_quant_conv", "use_post_quant_conv", 1)):
        if not values.get(switch, True):  # Stable Diffusion 3's: a KL autoencoder without this convolution
            tensors = autoencoder_names.with_identity(tensors, conv, factor * shape["latent_channels"])
    return shape | {"num_codes": num_codes}, tensors


def released_config(kind: str, shape: dict[str, Any], autoencoder: Config | None = None) -> Config:
    """Returns the config of a model of this shape, in all else as the released models were trained.

    autoencoder: the config of a denoiser's, which tells the size and the channels of its images.
    """
    training = TrainingConfig(num_train_steps=400_000)
    if kind == "unet":
        config = converted_unet.released_config(shape)
    elif kind == "autoencoder":
        names = {field.name for field in dataclasses.fields(AutoencoderConfig)}
        config = Config(
            stage="autoencoder",
            data=DataConfig(
                name="imagenet2012", image_size=256, channels=shape["image_channels"], eval_split="validation"
            ),
            training=training,
            autoencoder=AutoencoderConfig(
                **{name: value for name, value in shape.items() if name in names},
                codebook=CodebookConfig(num_codes=shape["num_codes"]) if shape["num_codes"] else None,
            ),
        )
    else:
        if "height" not in shape:
            raise ValueError(
                f"tensor {dit_names.POSITION_TABLE!r} is missing, which tells the size of the input; give --config=FILE"
            )
        width, height, channels = shape["width"], shape["height"], shape["channels"]
        num_heads = shape.get("num_heads") or HEADS.get(width)
        if num_heads is None:
            raise ValueError(f"the weights do not tell the number of heads of width {width}; give --config=FILE")
        learned = shape["out_channels"] == 2 * channels
        config = Config(
            stage="diffusion",
            data=DataConfig(
                name="imagenet2012",
                image_size=LATENT_FACTOR * height,
                num_classes=shape["num_classes"],
                eval_split="validation",
            ),
            training=training,
            dit=DiTConfig(depth=shape["depth"], width=width, num_heads=num_heads, patch_size=shape["patch_size"]),
            latents=LatentsConfig(shape=(height, height, channels), scale=LATENT_SCALE),
            diffusion=DiffusionConfig(variance="learned_range" if learned else "fixed_large"),
            sampling=SamplingConfig(cfg_channels=min(3, channels)),
        )
    if autoencoder is not None and config.latents is not None:
        factor = 2 ** (len(autoencoder.autoencoder.channel_multipliers) - 1)
        size = factor * config.latents.shape[0]
        data = dataclasses.replace(config.data, image_size=size, channels=autoencoder.data.channels)
        config = dataclasses.replace(config, data=data)
    check_config(config)
    return config


def check_shape(kind: str, config: Config, shape: dict[str, Any]) -> None:
    """Raises ValueError where a config describes another model than the one that was read."""
    if getattr(config, kind) is None:
        raise ValueError(f"--config must have a section config.{kind} for --kind={kind}")
    if kind == "unet":
        converted_unet.check_shape(config, shape)
        return
    check_known_form(kind, config)
    if kind == "dit":
        model = build_dit(config)
        ours = {name: getattr(model, name, None) for name in shape}
        ours |= {"height": config.input_shape[0], "channels": config.input_shape[-1]}
    else:
        codebook = config.autoencoder.codebook
        ours = dataclasses.asdict(config.autoencoder)
        ours |= {"image_channels": config.data.channels, "num_codes": codebook.num_codes if codebook else None}
    differences = [f"{name} {ours[name]} (weights: {value})" for name, value in shape.items() if ours[name] != value]
    if differences:
        raise ValueError(f"the weights are of another model than the config: {'; '.join(differences)}")


def check_known_form(kind: str, config: Config) -> None:
    """Raises ValueError where other programs have no form for a model."""
    if kind == "dit":
        dit, (height, width, _) = config.dit, config.input_shape
        if dit.conditioning != ("adaln_zero",) or not dit.class_conditional or height != width:
            raise ValueError("only a class-conditional adaLN-Zero DiT of square inputs has a released form")
    if kind == "unet" and config.conditions and config.conditions.text:
        raise ValueError("a U-Net of a text has no released form: it projects the text's states")


def diffusers_dit_shape(values: dict[str, Any]) -> dict[str, int]:
    """Returns the shape of a `DiTTransformer2DModel` from its config."""
    return {
        "depth": values["num_layers"],
        "num_heads": values["num_attention_heads"],
        "width": values["num_attention_heads"] * values["attention_head_dim"],
        "patch_size": values["patch_size"],
        "num_classes": values["num_embeds_ada_norm"],
        "height": values["sample_size"],
        "channels": values["in_channels"],
        "out_channels": values.get("out_channels") or values["in_channels"],
    }


def diffusers_dit_config(config: Config) -> dict[str, Any]:
    """Returns the config of a `DiTTransformer2DModel`."""
    dit = config.dit
    height, _, channels = config.input_shape
    return {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": dit.num_heads,
        "attention_head_dim": dit.width // dit.num_heads,
        "in_channels": channels,
        "out_channels": build_dit(config).out_channels,
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


def diffusers_autoencoder_shape(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the shape of an `AutoencoderKL` or a `VQModel` from its config, less the number of codes."""
    widths, blocks = values["block_out_channels"], values["down_block_types"]
    return {
        "base_channels": widths[0],
        "channel_multipliers": tuple(width // widths[0] for width in widths),
        "num_res_blocks": values["layers_per_block"],
        "attention_levels": tuple(level for level, block in enumerate(blocks) if block.startswith("Attn")),
        "latent_channels": values["latent_channels"],
        "num_groups": values.get("norm_num_groups", 32),
        "image_channels": values["in_channels"],
    }


def diffusers_autoencoder_config(config: Config) -> dict[str, Any]:
    """Returns the config of an `AutoencoderKL`, or of a `VQModel`."""
    autoencoder = config.autoencoder
    codebook = autoencoder.codebook
    levels = range(len(autoencoder.channel_multipliers))
    down = ["AttnDown" if level in autoencoder.attention_levels else "Down" for level in levels]
    form = {"_class_name": "AutoencoderKL"}
    if codebook:
        form = {
            "_class_name": "VQModel",
            "num_vq_embeddings": codebook.num_codes,
            "vq_embed_dim": autoencoder.latent_channels,
        }
    return form | {
        "in_channels": config.data.channels,
        "out_channels": config.data.channels,
        "down_block_types": [f"{name}EncoderBlock2D" for name in down],
        "up_block_types": [f"{name.replace('Down', 'Up')}DecoderBlock2D" for name in reversed(down)],
        "block_out_channels": [autoencoder.base_channels * m for m in autoencoder.channel_multipliers],
        "layers_per_block": autoencoder.num_res_blocks,
        "act_fn": "silu",
        "latent_channels": autoencoder.latent_channels,
        "norm_num_groups": autoencoder.num_groups,
        "sample_size": config.data.image_size,
    }
