"""What a user gives to draw from: checked before any device is touched, then raw conditions and known images."""

import dataclasses
from collections.abc import Collection, Sequence

import jax.numpy as jnp
import numpy as np

from dit_jax.config import Config
from dit_jax.data.folder import MARKED
from dit_jax.data.layouts import LayoutTokenizer
from dit_jax.data.tokenizer import Tokenizer
from dit_jax.evaluation.generate import KnownImages, check_known, require_codec
from dit_jax.evaluation.text_encoders import CaptionEncoder
from dit_jax.models.autoencoder import Codec
from dit_jax.models.spatial import of_low_resolution, of_map, of_masked
from dit_jax.types import Array, Conditions


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
    """What is given, each [S, S, ...] for all images that are drawn, or [n, S, S, ...] for them in turn; None: nothing.

    image: uint8 [.., S, S, C], to enlarge, to paint in, or to start from; S is the model's `data.image_size`, and less
    by its factor for a model of super-resolution. mask: [.., S, S], where to paint: bool, or levels of 0 to 1 (from 0.5
    on) or to 255 (from 128 on). classes: integers [.., S, S], of each pixel, for a model of semantic synthesis. layout:
    the text of boxes (`data.layouts`), or several texts, for a model that draws boxes. prompts: a caption or several,
    for a model of text; "" is that of none.
    """

    image: np.ndarray | None = None
    mask: np.ndarray | None = None
    classes: np.ndarray | None = None
    layout: str | Sequence[str] | None = None
    prompts: str | Sequence[str] | None = None

    def __post_init__(self):
        for name in ("layout", "prompts"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, [getattr(self, name)])
            texts = getattr(self, name)
            if texts is not None and not (len(texts) and all(isinstance(text, str) for text in texts)):
                raise ValueError(f"{name} must be a text, or several; got {str(texts)[:200]}")
        for name, num_axes in (("image", 4), ("mask", 3), ("classes", 3)):
            value = getattr(self, name)
            if value is not None:
                value = _marked(np.asarray(value)) if name == "mask" else np.asarray(value)
                if name == "mask" and value.ndim > 2 and value.shape[-1] == 1:
                    value = value[..., 0]
                value = value if value.ndim == num_axes else value[None]
                if value.ndim != num_axes or not len(value):
                    raise ValueError(
                        f"{name} must have {num_axes - 1} axes, or {num_axes} for several; got {value.shape}"
                    )
                object.__setattr__(self, name, value)

    @property
    def num_given(self) -> int:
        """How many images there are to draw, where nothing else says it: the most that are given of a kind."""
        return max((len(value) for value in vars(self).values() if value is not None), default=1)

    @property
    def _is_given(self) -> dict[str, bool]:
        return {name: value is not None for name, value in vars(self).items()}

    def check(self, config: Config, tokenizer: Tokenizer | None = None, raw: Collection[str] = ()) -> None:
        """Raises ValueError where the model of a config has no use for what is given, or needs more or another size.

        tokenizer: of a model of text; raw: the conditions that are there as the network reads them.
        """
        kind, size, channels = config.spatial and config.spatial.kind, config.data.image_size, config.data.channels
        needed = {"low_resolution": ("image",), "inpainting": ("image", "mask"), "semantic": ("classes",)}.get(kind, ())
        needed = () if "spatial" in raw else needed
        if (self.layout is None) != (config.layout is None or "layout" in raw):
            raise ValueError(
                "a layout is of no use to this model, which reads no boxes; leave it out"
                if config.layout is None
                else f"the model draws boxes of {', '.join(config.layout.classes)}; give a layout, such as "
                f"'{config.layout.classes[0]} 0.1 0.1 0.6 0.9'"
            )
        if self.layout is not None:
            self._layout_tokens(config)
        self._check_prompts(tokenizer)
        missing = [name for name in needed if not self._is_given[name]]
        if missing:
            names = [{"classes": "map of classes"}.get(name, name) for name in missing]
            raise ValueError(f"the model's spatial condition is of kind {kind!r}; give the {' and the '.join(names)}")
        if kind == "low_resolution" and self.image is not None:
            small = size // config.spatial.factor
            if self.image.shape[1:] != (small, small, channels) or self.image.dtype != np.uint8:
                raise ValueError(
                    f"a model that enlarges {config.spatial.factor} times to {size} pixels needs an image of {small} x "
                    f"{small} x {channels}, uint8, not {self.image.shape[1:]} {self.image.dtype}; scale or crop it"
                )
        if kind == "low_resolution" and self.mask is not None:
            raise ValueError("a mask is of no use to a model of super-resolution; leave it out")
        if self.mask is not None and self.image is None:
            raise ValueError("a mask needs the image to paint in; give both")
        if self.mask is not None and not self.mask.any(axis=(1, 2)).all():
            number = int(self.mask.any(axis=(1, 2)).argmin())
            raise ValueError(
                f"mask {number} has nothing to paint within the square that is cut from its middle; mark it there"
            )
        if self.classes is not None:
            if kind != "semantic":
                raise ValueError("a map of classes is of use to a model of semantic synthesis alone; leave it out")
            if not np.issubdtype(self.classes.dtype, np.integer):
                raise ValueError(f"a map of classes must be of whole numbers, not {self.classes.dtype}")
            if self.classes.shape[1:] != (size, size):
                raise ValueError(f"a map of classes must be {size} x {size}, not {self.classes.shape[1:]}; scale it")
            if self.classes.min() < 0 or self.classes.max() >= config.spatial.num_classes:
                raise ValueError(
                    f"a map's classes must be from 0 to {config.spatial.num_classes - 1}, as the model's, not "
                    f"{self.classes.min()} to {self.classes.max()}"
                )
        check_known(config, config.sampling, self._known(config))

    def _check_prompts(self, tokenizer: Tokenizer | None) -> None:
        if (self.prompts is None) != (tokenizer is None):
            raise ValueError(
                "a prompt is of no use to this model, which reads no text or has no text encoder with it; leave it out"
                if tokenizer is None
                else "the model draws for captions; give a prompt"
            )
        for prompt in self.prompts or ():
            if cut := tokenizer.cut(prompt):
                raise ValueError(
                    f"a prompt must have at most the model's {tokenizer.max_length} tokens, but this one would be cut "
                    f"before {cut[:200]!r}; shorten it"
                )

    def conditions(
        self, config: Config, codec: Codec | None, num_images: int, captions: CaptionEncoder | None = None
    ) -> Conditions:
        """Returns the raw conditions that these are, [num_images, ...]; none where the network reads none of them."""
        sequences = {}
        if self.layout is not None:
            sequences["layout"] = self._layout_tokens(config)
        if captions is not None:
            sequences["text"] = captions.condition(self.prompts)
        in_turn = {
            name: {part: self._in_turn(rows, num_images) for part, rows in parts.items()}
            for name, parts in sequences.items()
        }
        return in_turn | self._spatial(config, codec, num_images)

    def _spatial(self, config: Config, codec: Codec | None, num_images: int) -> Conditions:
        if config.spatial is None or (self.classes if config.spatial.kind == "semantic" else self.image) is None:
            return {}
        if config.spatial.kind == "low_resolution":
            spatial = of_low_resolution(config, _to_float(self.image))
        elif config.spatial.kind == "semantic":
            spatial = of_map(config, jnp.asarray(self.classes, jnp.int32))
        else:
            require_codec(config, codec is not None)
            image, mask = (self._in_turn(x, max(len(self.image), len(self.mask))) for x in (self.image, self.mask))
            spatial = of_masked(config, _to_float(image), jnp.asarray(mask[..., None], jnp.float32), codec)
        return {"spatial": self._in_turn(np.asarray(spatial), num_images)}

    def known(self, config: Config, num_images: int) -> KnownImages | None:
        """Returns the images whose pixels those that are drawn keep, or that they start from."""
        known = self._known(config)
        if known is None:
            return None
        return KnownImages(*(None if x is None else self._in_turn(x, num_images) for x in known))

    def _known(self, config: Config) -> KnownImages | None:
        if self.image is None or (config.spatial is not None and config.spatial.kind == "low_resolution"):
            return None
        return KnownImages(self.image, None if self.mask is None else self.mask[..., None])

    def _layout_tokens(self, config: Config) -> dict[str, np.ndarray]:
        tokenizer = LayoutTokenizer(config.layout)
        tokens = [tokenizer.tokenize(tokenizer.parse(text)) for text in self.layout]
        return {name: np.stack([each[name] for each in tokens]) for name in tokens[0]}

    def _in_turn(self, x: np.ndarray, num_images: int) -> np.ndarray:
        """Returns [num_images, ...]: the rows of x in turn; of one row no copies are made."""
        if len(x) == 1:
            return np.broadcast_to(x, (num_images, *x.shape[1:]))
        return x[np.arange(num_images) % len(x)]


def _to_float(images: np.ndarray) -> Array:
    return jnp.asarray(images, jnp.float32) / 127.5 - 1.0


def _marked(mask: np.ndarray) -> np.ndarray:
    """Returns where a mask is marked, bool: of levels of 0 to 1 from 0.5 on, of those to 255 from `MARKED` on."""
    return mask if mask.dtype == bool else mask >= (MARKED if mask.max(initial=0) > 1 else 0.5)
