"""From config to modules and abstract parameters: the only place that knows which section builds what."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from dit_jax.config import AutoencoderConfig, Config
from dit_jax.models.autoencoder import Autoencoder
from dit_jax.models.dit import DiT, DiTClassifier
from dit_jax.models.text_encoder import TextShape
from dit_jax.models.unet import UNet
from dit_jax.types import Conditions, Params, PRNGKey


def build_autoencoder(autoencoder: AutoencoderConfig, image_channels: int, remat: str = "none") -> Autoencoder:
    """Returns the autoencoder of a config; remat is for training (`config.ComputeConfig`)."""
    names = {f.name for f in dataclasses.fields(Autoencoder)}
    fields = {k: v for k, v in dataclasses.asdict(autoencoder).items() if k in names}
    num_codes = autoencoder.codebook.num_codes if autoencoder.codebook else None
    return Autoencoder(**fields, image_channels=image_channels, num_codes=num_codes, remat=remat)


def build_dit(config: Config) -> DiT:
    """Returns the denoiser of a config."""
    return _build_transformer(DiT, config, num_outputs(config))


def build_classifier(config: Config) -> DiTClassifier:
    """Returns the classifier of noised images of a config."""
    return _build_transformer(DiTClassifier, config, config.data.num_classes)


def _build_transformer(kind: type[DiT], config: Config, out_channels: int) -> DiT:
    dit = config.dit
    return kind(
        depth=dit.depth,
        width=dit.width,
        num_heads=dit.num_heads,
        patch_size=dit.patch_size,
        num_classes=config.data.num_classes if dit.class_conditional else None,
        out_channels=out_channels,
        conditioning=dit.conditioning,
        sequences=tuple(sequence_encoders(config).items()),
        long_skips=dit.long_skips,
        mlp_ratio=dit.mlp_ratio,
        dtype=jnp.dtype(dit.dtype),
        scan_blocks=config.compute.scan_blocks,
        remat=config.compute.remat,
        attention=config.compute.attention,
    )


def sequence_encoders(config: Config) -> dict[str, TextShape | None]:
    """Returns the trained encoder of each condition of tokens, by name; None of one whose encoder is frozen."""
    text, layout, encoders = config.conditions and config.conditions.text, config.layout, {}
    if text and text.transformer is None:
        encoders["text"] = None
    elif text:
        encoders["text"] = TextShape(text.vocab_size, text.max_length, **dataclasses.asdict(text.transformer))
    if layout:
        encoders["layout"] = TextShape(layout.vocab_size, layout.num_tokens, **dataclasses.asdict(layout.transformer))
    return encoders


def build_unet(config: Config) -> UNet:
    """Returns the denoiser of a config."""
    unet = config.unet
    names = {f.name for f in dataclasses.fields(UNet)}
    fields = {name: value for name, value in dataclasses.asdict(unet).items() if name in names}
    return UNet(
        **fields
        | {
            "num_classes": config.data.num_classes if unet.class_conditional else None,
            "sequences": tuple(sequence_encoders(config).items()),
            "out_channels": num_outputs(config),
            "dtype": jnp.dtype(unet.dtype),
            "remat": config.compute.remat,
            "attention": config.compute.attention,
        }
    )


def build_denoiser(config: Config) -> nn.Module:
    """Returns the network of stage "diffusion"."""
    return build_dit(config) if config.dit is not None else build_unet(config)


def num_outputs(config: Config) -> int:
    """Returns the channels of a denoiser's output: of each of its input's the mean, and the variance if learned."""
    return (2 if config.diffusion.variance == "learned_range" else 1) * config.input_shape[-1]


def build_model(config: Config) -> nn.Module:
    """Returns the network that the config's stage trains."""
    if config.stage == "autoencoder":
        return build_autoencoder(config.autoencoder, config.data.channels, config.compute.remat)
    return build_denoiser(config) if config.stage == "diffusion" else build_classifier(config)


def abstract_inputs(config: Config, batch_size: int = 1) -> tuple:
    """Returns the shapes and dtypes of the network's call: what initialisation, counting and planning trace."""
    x = jax.ShapeDtypeStruct((batch_size, *config.input_shape), jnp.float32)
    if config.stage == "autoencoder":
        return x, jax.eval_shape(lambda: jax.random.key(0))
    x_and_t = x, jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    return x_and_t if config.stage == "classifier" else (*x_and_t, abstract_conditions(config, batch_size))


def abstract_conditions(config: Config, batch_size: int = 1) -> Conditions:
    """Returns the shapes and dtypes of the raw conditions of a denoiser."""
    abstract = {"label": jax.ShapeDtypeStruct((batch_size,), jnp.int32)}
    text = config.conditions and config.conditions.text
    if text:
        abstract["text"] = abstract_tokens(batch_size, text.max_length)
        if text.transformer is None:
            ids = abstract["text"].pop("ids")
            abstract["text"]["states"] = jax.ShapeDtypeStruct((*ids.shape, text.frozen_width), jnp.float32)
            abstract["text"]["pooled"] = jax.ShapeDtypeStruct((batch_size, text.frozen_width), jnp.float32)
    if config.layout is not None:
        abstract["layout"] = abstract_tokens(batch_size, config.layout.num_tokens)
    if config.spatial is not None:
        abstract["spatial"] = jax.ShapeDtypeStruct((batch_size, *config.spatial_shape), jnp.float32)
    return {name: abstract[name] for name in config.condition_dropout}


def abstract_tokens(batch_size: int, length: int) -> Conditions:
    """Returns the shapes and dtypes of captions or layouts as a tokenizer gives them."""
    shape = batch_size, length
    return {"ids": jax.ShapeDtypeStruct(shape, jnp.int32), "mask": jax.ShapeDtypeStruct(shape, jnp.bool_)}


def init_params(config: Config, key: PRNGKey) -> Params:
    """Returns freshly initialised parameters; under `eval_shape` or `jit` no example input is materialised."""
    zeros = lambda x: key if x.dtype == key.dtype else jnp.zeros(x.shape, x.dtype)  # noqa: E731
    inputs = jax.tree.map(zeros, abstract_inputs(config))
    return build_model(config).init(key, *inputs)["params"]


def abstract_params(config: Config) -> Params:
    """Returns the parameters' shapes and dtypes, without memory."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
