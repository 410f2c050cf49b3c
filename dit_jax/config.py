"""The schema of a run: frozen dataclasses, strict conversion and cross-field checks.

A config file (`configs/*.py`) returns an `ml_collections.ConfigDict`; `load_config` turns it, with the
overrides of the command line, into one `Config`. Below that there is no ConfigDict, no `.get` and no flag:
every default lives here, once. This module imports no accelerator library, so that a mistake in a config is
reported before any device is touched.
"""

import ast
import contextlib
import dataclasses
import difflib
import importlib.util
import math
import pathlib
import re
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from dit_jax.files import user_path


def field(
    default: Any = dataclasses.MISSING,
    *,
    fixed: bool = True,
    recorded: bool = False,
    path: bool = False,
    factory: Any = dataclasses.MISSING,
):
    """A config field.

    `fixed=False` marks what a resumed run may change without becoming another run; `recorded` what a run fills in
    where it is None, from the data that it finds; `path` what may be a file or a folder: its leading `~` becomes the
    home of who gives it. (A cache's stays until the cache is used: who reads the config has a cache of their own.)
    """
    metadata = {"fixed": fixed, "recorded": recorded, "path": path}
    return dataclasses.field(default=default, default_factory=factory, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """A labelled image data set and how its images become arrays in [-1, 1]."""

    name: str = field(path=True)  # a TFDS name ("fashion_mnist"), or a folder with one sub-folder a class
    image_size: int  # pixels per side after the centre crop
    channels: int = 3  # 1 (grey) or 3 (RGB)
    num_classes: int = 1000
    horizontal_flip: bool = True  # random in training (DiT paper, section 4)
    train_split: str = "train"
    eval_split: str = "test"  # held-out images: never trained on
    version: str | None = field(None, recorded=True)  # of the data, with its sizes; None: whatever is there
    data_dir: str | None = field(
        None, fixed=False, path=True
    )  # where TFDS keeps prepared data; None: TFDS's own default
    raw_dir: str | None = field(
        None, fixed=False, path=True
    )  # raw files (TFDS's manual ones too), if the host does not answer
    num_threads: int = field(4, fixed=False)  # reading threads of each process
    # Of the examples seen, how many may be unreadable: another one stands in for each. More of them end the run.
    max_bad_share: float = field(0.01, fixed=False)
    extra_fields: tuple[str, ...] = field((), fixed=False)  # of an example, kept in a latent cache, such as "caption"
    # The classes by name, in the order of their labels; None: a folder's as people count ("2" before "10"), or TFDS's.
    class_names: tuple[str, ...] | None = field(None, recorded=True)
    background: tuple[int, ...] = (255, 255, 255)  # grey or RGB, on which what is transparent in a folder's images lies
    map_field: str | None = None  # of metadata.jsonl: the path from there of a picture of an image's pixels' classes


@dataclasses.dataclass(frozen=True)
class CodebookConfig:
    """The codes of a VQ autoencoder (VQ-VAE, arXiv:1711.00937; VQGAN, arXiv:2012.09841)."""

    num_codes: int
    update: Literal["gradient", "ema"] = "gradient"  # ema: codes are moving means of what they stand for (appendix A.1)
    decay: float = 0.99  # of those means, and of the usage of each code
    loss_weight: float = 1.0
    commitment_weight: float = 0.25  # beta: pulls the encoder to its codes
    # A code used less than this share of the codes' mean usage becomes an output of the encoder; None: never.
    restart_usage: float | None = None


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """The patch discriminator (PatchGAN, arXiv:1611.07004) and its hinge loss, as LDM trains with them."""

    num_layers: int = 3  # with stride 2
    base_channels: int = 64
    start_step: int = 50_001  # neither judges nor learns before
    weight: float = 0.5  # times the adaptive weight (VQGAN, equation 7)


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """The convolutional autoencoder of LDM (arXiv:2112.10752, appendix G) and what it is trained with."""

    base_channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4)  # a level each; the resolution halves between levels
    num_res_blocks: int = 2  # a level in the encoder; the decoder has one more
    attention_levels: tuple[int, ...] = ()  # levels (0 is full resolution) that attend; the middle always does
    latent_channels: int = 4
    num_groups: int = 32  # of every GroupNorm
    reconstruction_loss: Literal["l1", "l2"] = "l1"
    perceptual_weight: float = 0.0  # of LPIPS, in the reconstruction loss; LDM: 1
    # What `dit-jax convert --kind=lpips` wrote.
    lpips_path: str = field("weights/lpips_vgg16.safetensors", fixed=False, path=True)
    learn_log_variance: bool = False  # of the reconstruction's likelihood, one number; False: 0
    kl_weight: float = 1e-6  # on the KL summed over an image, against the reconstruction loss so summed (LDM code)
    codebook: CodebookConfig | None = None  # VQ; None: KL-regularised
    discriminator: DiscriminatorConfig | None = None
    frozen_encoder: bool = False  # train the decoder alone: the latents stay what they are
    # Of its latents for a denoiser (`LatentsConfig`), where the file that it was converted from tells them.
    latents_scale: float | None = field(None, fixed=False)
    latents_shift: float | None = field(None, fixed=False)


@dataclasses.dataclass(frozen=True)
class LatentsConfig:
    """The latents that a diffusion run trains on; without this section it trains on pixels."""

    shape: tuple[int, int, int]  # (H, W, C) of one latent, as the autoencoder makes it
    path: str | None = field(None, fixed=False, path=True)  # a cache: what `dit-jax encode --output` wrote
    # Instead of a cache: the workdir of what encodes in each step.
    encode_with: str | None = field(None, fixed=False, path=True)
    scale: float | None = field(None, recorded=True)  # latents are multiplied by it; None: the cache's, 1/std
    shift: float = 0.0  # subtracted from the latents before, as Stable Diffusion 3 does
    autoencoder: str | None = field(None, recorded=True)  # SHA-256 of what made them; None: whatever made the cache


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """The transformer of DiT (arXiv:2212.09748, section 3)."""

    depth: int
    width: int
    num_heads: int
    patch_size: int
    # How timestep and label reach a block (figure 3), one way or several: the paper's four blocks are one each.
    # adaLN reads the sum of all conditions' vectors; the other two read a token of timestep and label each, and the
    # tokens of a text or layout.
    conditioning: tuple[Literal["adaln_zero", "adaln", "cross_attention", "in_context"], ...] = ("adaln_zero",)
    long_skips: bool = False  # from each block of the first half to its mirror in the second (U-ViT, arXiv:2209.12152)
    class_conditional: bool = True  # False: labels are not read
    mlp_ratio: float = 4.0
    label_dropout: float = 0.1  # share of labels replaced by the null class in training (section 3.1)
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the matmuls; parameters are float32


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The U-Net of LDM (arXiv:2112.10752, appendix E) and of ADM (arXiv:2105.05233, section 3)."""

    base_channels: int
    channel_multipliers: tuple[int, ...]  # a level each; the resolution halves between levels
    attention_levels: tuple[int, ...]  # levels (0 is full resolution) that attend; the middle always does
    num_res_blocks: int = 2  # a level on the way down; on the way up it has one more
    num_heads: int | None = None  # of every attention; or
    head_channels: int | None = None  # the channels of a head, whose number then grows with a level's channels
    # Width of the tokens of a label, text or layout, to which transformer blocks attend (LDM). None: attention to the
    # image itself alone (ADM); of a text the pooled vector is added to the timestep's.
    context_width: int | None = None
    transformer_depth: int = 1  # blocks of each of them
    scale_shift_norm: bool = False  # the timestep's vector scales and shifts norms (ADM), and does not only shift
    resblock_updown: bool = False  # residual blocks halve and double the resolution (ADM), not convolutions
    class_conditional: bool = True  # False: labels are not read
    label: Literal["context", "vector"] = "context"  # a token (LDM), or added to the timestep's vector (ADM)
    label_dropout: float = 0.1  # share of labels replaced by the null class in training
    num_groups: int = 32  # of every GroupNorm
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the matmuls and convolutions; parameters are float32

    @property
    def level_channels(self) -> tuple[int, ...]:
        """The channels of each level."""
        return tuple(self.base_channels * multiplier for multiplier in self.channel_multipliers)

    def heads_of(self, channels: int) -> int:
        """Returns the number of heads of an attention over so many channels."""
        return self.num_heads or channels // self.head_channels


@dataclasses.dataclass(frozen=True)
class TokenTransformerConfig:
    """The transformer over a condition's tokens that LDM trains with the denoiser (arXiv:2112.10752, appendix E.2)."""

    width: int
    depth: int
    num_heads: int = 8
    head_dim: int = 64  # of LDM's, whatever the width


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Captions as a condition: tokens for cross-attention or in context, and a pooled vector for adaLN."""

    # A folder of `tokenizer.json`, and of a frozen encoder's weights.
    path: str = field("weights/minilm", fixed=False, path=True)
    caption_field: str = "caption"  # of an example, as `data.extra_fields` are
    max_length: int = 77  # tokens of a caption; shorter ones are padded, so that one program serves them all
    transformer: TokenTransformerConfig | None = None  # trained with the denoiser; None: the frozen encoder in `path`
    vocab_size: int = 30_522  # of that transformer; the default is BERT's
    frozen_width: int = 384  # of the frozen encoder's states and pooled state; the default is MiniLM's
    dropout: float = 0.1  # share of captions replaced by the null in training
    encoder: str | None = field(None, recorded=True)  # SHA-256 of the tokenizer and the frozen encoder


@dataclasses.dataclass(frozen=True)
class SpatialConfig:
    """A map of the input's own height and width, which the network reads beside x_t as further channels (LDM, 3.3)."""

    # Of what. low_resolution: the image itself, reduced (super-resolution); inpainting: the image without what a random
    # mask hides, and the mask; semantic: the class of each pixel (`config.data.map_field`), a channel a class.
    kind: Literal["low_resolution", "inpainting", "semantic"]
    factor: int | None = None  # low_resolution: pixels a side that became one; LDM: 4
    num_classes: int | None = None  # semantic
    dropout: float = 0.0  # share of maps replaced by zeros in training; 0: guidance leaves the map alone


@dataclasses.dataclass(frozen=True)
class LayoutConfig:
    """Boxes with classes as a condition: tokens (`data.layouts`), read by a transformer trained with the denoiser."""

    classes: tuple[str, ...]  # of boxes, by name
    transformer: TokenTransformerConfig  # LDM: 16 layers of width 512
    layout_field: str = "layout"  # of an example, as `data.extra_fields` are
    max_objects: int = 30  # of three tokens each, with a start and an end 92 (LDM)
    num_sections: int = 32  # places along a side that the corners of boxes are rounded to
    dropout: float = 0.1  # share of layouts replaced by the null in training

    @property
    def num_tokens(self) -> int:
        """The length that layouts are padded to."""
        return 3 * self.max_objects + 2

    @property
    def vocab_size(self) -> int:
        """Classes, places, the start and the end."""
        return len(self.classes) + self.num_sections**2 + 2


@dataclasses.dataclass(frozen=True)
class ConditionsConfig:
    """What a denoiser is conditioned on beside the class label, which is of its own section."""

    text: TextConfig | None = None
    layout: LayoutConfig | None = None
    spatial: SpatialConfig | None = None


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """The forward process; the defaults are the DiT paper's (section 4), with epsilon prediction, learned variance."""

    num_timesteps: int = 1000  # T
    schedule: Literal["linear", "scaled_linear", "cosine"] = "linear"  # scaled_linear: linear in sqrt(beta), as LDM
    beta_start: float = 1e-4  # beta_start and beta_end: of the two linear schedules
    beta_end: float = 2e-2
    prediction: Literal["epsilon", "x_0", "v"] = "epsilon"  # what the network predicts; v: arXiv:2202.00512, appendix D
    variance: Literal["learned_range", "fixed_small", "fixed_large"] = "learned_range"  # fixed: DDPM, section 3.2
    min_snr_gamma: float | None = None  # weigh by min(SNR, gamma) (arXiv:2303.09556); None: all noise levels alike


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule; the defaults are the DiT paper's (section 4)."""

    learning_rate: float = 1e-4
    schedule: Literal["constant", "cosine"] = "constant"  # after the warm-up; cosine ends at 0
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 0.0
    max_grad_norm: float | None = None  # clip the global gradient norm


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How long, how large, how often."""

    num_train_steps: int = field(fixed=False)
    # The workdir whose weights for evaluation a run starts with; None: random ones.
    init_from: str | None = field(None, path=True)
    init_from_any: bool = field(False, fixed=False)  # also weights that were trained for something else: what fits
    global_batch_size: int = 256  # over all devices of all processes
    accumulation_steps: int = field(1, fixed=False)  # parts of a batch whose gradients are added up: less memory
    ema_decay: float | None = 0.9999  # of the weights that sampling and evaluation use; None: no EMA
    extra_ema_decays: tuple[float, ...] = ()  # of further averages, chosen between after training
    ema_lengths: tuple[float, ...] = ()  # of power-function averages (arXiv:2312.02696); (0.05, 0.1) there
    snapshot_every_steps: int = field(10_000, fixed=False)  # of these, kept for post-hoc averages of any length
    log_every_steps: int = field(100, fixed=False)
    eval_every_steps: int = field(5000, fixed=False)  # held-out metrics and a picture
    checkpoint_every_steps: int = field(5000, fixed=False)
    max_checkpoints: int = field(3, fixed=False)  # older ones are deleted, once the newest is verified, but for
    keep_every_steps: int | None = field(None, fixed=False)  # those of steps that this divides,
    keep_best_metric: str | None = field(None, fixed=False)  # and the best by a held-out figure, such as "loss"
    keep_best_mode: Literal["min", "max"] = field("min", fixed=False)  # max: more is better, as of PSNR
    num_eval_examples: int = field(1024, fixed=False)
    # A step whose loss or gradient norm is not finite is skipped. After so many in a row the run goes back to the
    # checkpoint before them and on behind them; after so many such returns it stops.
    max_bad_steps: int = field(10, fixed=False)
    max_rollbacks: int = field(3, fixed=False)
    # Also skips a step whose loss is so many robust standard deviations above the median of the last; None: does not.
    spike_zscore: float | None = field(None, fixed=False)


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How images are drawn in training and by default afterwards."""

    sampler: Literal["ancestral", "ddim", "dpm_solver", "plms"] = "ancestral"  # dpm_solver: DPM-Solver++ (2M)
    num_steps: int = 250
    # Which timesteps (`schedules.respaced_timesteps`); None: "trailing" for dpm_solver, which would leap too far to
    # timestep 0, and "even" for the others.
    spacing: Literal["even", "ddim", "trailing"] | None = None
    timesteps: tuple[int, ...] | None = None  # ascending, instead of num_steps and spacing
    cfg_scale: float = 1.5  # classifier-free guidance; 1.0 is none
    # Of conditions with a weight of their own, such as {"text": 3.0}; cfg_scale is for all others together.
    cfg_scales: tuple[tuple[str, float], ...] = ()
    cfg_channels: int | None = 3  # guide the first channels only, as the released DiT does; None: all
    cfg_interval: tuple[float, float] | None = None  # guide at these sigma / alpha only (arXiv:2404.07724); None: all
    x_0_limit: float | None = None  # clip the predicted x_0 to [-limit, limit]; 1.0 for pixels
    x_0_percentile: float | None = None  # where this of |x_0| is above the limit, scale it down to it (Imagen)
    eta: float = 0.0  # DDIM's noise (arXiv:2010.02502, eq. 16); 0 is deterministic
    # Image to image: the walk starts from a given image with the noise of this share of its steps, and goes down these
    # alone; 1: from noise alone.
    strength: float = 1.0
    # Where pixels are known: how often each `jump_length` steps are walked, from what they led to noised again, so that
    # what is painted comes to fit (RePaint, arXiv:2201.09865, section 4.2).
    num_resamplings: int = 1
    jump_length: int = 10
    batch_size: int = 64  # images that a device draws at once
    decode_batch_size: int = 16  # of them decoded at once: the autoencoder's activations are far larger than the DiT's
    decode_tile: int | None = None  # latents wider or higher than this are decoded by tiles of it; None: whole


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Figures of images that a diffusion run draws while it trains, by its sampling section, at every evaluation.

    They are held-out figures like any other, and their number of images is in their names: `fd_classifier_1k`.
    """

    num_samples: int = 1000
    metrics: tuple[str, ...] = ("fd", "recognised")  # of those of `dit-jax evaluate`
    features: str = field("classifier", path=True)  # the network, as --features there
    cache: str = "~/.cache/dit_jax/evaluation"  # of classifiers and of the training images' statistics


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; one of the axes may be -1: all devices that the others leave.

    The last axis is of the nearest devices: it talks most.
    """

    data: int = -1  # splits the batch
    fsdp: int = 1  # splits the batch, and every large parameter with its moments and averages
    tensor: int = 1  # splits attention heads, hidden units of MLPs, and channels within residual blocks
    sequence: int = 1  # splits tokens, or the rows of an autoencoder's images: for grids too large for one device
    slices: int | None = None  # that the data axis spans, with a slower network between them; None: as the devices say
    # Parameters that the table of `parallel.rules` does not name, or names otherwise: (pattern of the path's end, axes
    # of its last dimensions), such as ("my_layer/kernel", ("fsdp", "tensor")).
    rules: tuple[tuple[str, tuple[Literal["data", "fsdp", "tensor", "sequence"] | None, ...]], ...] = ()

    @property
    def axes(self) -> dict[str, int]:
        """The size of each mesh axis, in the mesh's order."""
        return {axis: getattr(self, axis) for axis in ("data", "fsdp", "tensor", "sequence")}


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How a network is computed: its memory and speed. The results are the same, beyond the last bits of sums."""

    # Compile one transformer block and loop over it, rather than all of them one after another: the compilation of a
    # deep network takes a fraction of the time. Unrolled, XLA may optimize across blocks; on CPU a loop is slower.
    scan_blocks: bool = False
    # What of a block the backward pass computes again, instead of keeping it from the forward pass. dots: all but
    # matmuls with parameters (and convolutions), a little time for much memory; full: all but the block's input, for a
    # third more multiplications; offload: as dots, what is kept waits in the host's memory.
    remat: Literal["none", "dots", "full", "offload"] = "none"
    # The kernel of a transformer's attention. xla: any device; cudnn: GPUs, in bfloat16; flash: TPUs, for sequences of
    # a thousand tokens and more. The last two never hold the weights [T, T] of a head in memory.
    attention: Literal["xla", "cudnn", "flash"] = "xla"
    # Folder of compiled programs, so that a run which is started again compiles nothing; None: none is kept. Hosts that
    # train together should share it: process 0 alone writes. JAX_COMPILATION_CACHE_DIR, where it is set, goes before.
    compilation_cache: str | None = "~/.cache/dit_jax/compilations"


ATTENTION_PLATFORMS = {"cudnn": "gpu", "flash": "tpu"}  # what a kernel is for; the others run anywhere


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    stage: Literal["autoencoder", "diffusion", "classifier"]  # classifier: of noised images, to guide a sampler
    data: DataConfig
    training: TrainingConfig
    autoencoder: AutoencoderConfig | None = None  # stage "autoencoder"
    dit: DiTConfig | None = None  # stage "classifier", and "diffusion": this network,
    unet: UNetConfig | None = None  # or this one
    conditions: ConditionsConfig | None = None  # stage "diffusion"; None: the class label alone
    latents: LatentsConfig | None = None  # stages "diffusion" and "classifier"
    diffusion: DiffusionConfig | None = None  # stages "diffusion" and "classifier"
    sampling: SamplingConfig | None = field(None, fixed=False)  # stage "diffusion"
    evaluation: EvaluationConfig | None = field(None, fixed=False)  # stage "diffusion"; None: held-out losses alone
    optimizer: OptimizerConfig = field(factory=OptimizerConfig)
    mesh: MeshConfig = field(factory=MeshConfig, fixed=False)
    compute: ComputeConfig = field(factory=ComputeConfig, fixed=False)
    seed: int = 0

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of what the stage's network takes: latents if there are any, else images."""
        return self.latents.shape if self.latents else (self.data.image_size, self.data.image_size, self.data.channels)

    @property
    def denoiser(self) -> DiTConfig | UNetConfig | None:
        """The section of the network that stage "diffusion" trains."""
        return self.dit or self.unet

    @property
    def condition_dropout(self) -> dict[str, float]:
        """The conditions of the denoiser by name, each with the share of it that training replaces by its null."""
        rates = {"label": self.denoiser.label_dropout} if self.denoiser.class_conditional else {}
        sections = vars(self.conditions) if self.conditions else {}
        return rates | {name: section.dropout for name, section in sections.items() if section is not None}

    @property
    def layout(self) -> LayoutConfig | None:
        """The condition of boxes, if there is one."""
        return self.conditions.layout if self.conditions else None

    @property
    def spatial(self) -> SpatialConfig | None:
        """The condition that is concatenated to x_t, if there is one."""
        return self.conditions.spatial if self.conditions else None

    @property
    def spatial_shape(self) -> tuple[int, int, int]:
        """(H, W, K) of that condition."""
        *grid, channels = self.input_shape
        kinds = {"low_resolution": self.data.channels, "inpainting": channels + 1, "semantic": self.spatial.num_classes}
        return *grid, kinds[self.spatial.kind]

    @property
    def example_data(self) -> DataConfig:
        """The data set, with the fields of an example that conditions are made of."""
        text, fields = self.conditions and self.conditions.text, self.data.extra_fields
        read = ([text.caption_field] if text else []) + ([self.layout.layout_field] if self.layout else [])
        return dataclasses.replace(self.data, extra_fields=(*fields, *(name for name in read if name not in fields)))

    @property
    def num_downsamplings(self) -> int:
        """Halvings of the resolution by the autoencoder (3 for f8)."""
        return len(self.autoencoder.channel_multipliers) - 1


# The sections a stage uses; a section of another stage would be silently ignored, so it is an error.
STAGE_SECTIONS = {
    "autoencoder": ("autoencoder",),
    "classifier": ("dit", "latents", "diffusion"),
    "diffusion": ("dit", "unet", "conditions", "diffusion", "sampling", "latents", "evaluation"),
}
OPTIONAL_SECTIONS = ("dit", "unet", "conditions", "latents", "evaluation")


# Far beyond any network there is: beyond is a slip, or a file made to fill the memory.
MAX_COUNT, MAX_SIDE, MAX_DEPTH, MAX_LEVELS, MAX_WIDTH = 2**31 - 1, 2**14, 2**10, 16, 2**17
MAX_CODES, MAX_POSITIONS = 2**24, 2**28  # rows of a table; numbers in the table of position embeddings
ZERO_ALLOWED = ("attention_levels", "background", "timesteps", "start_step", "max_rollbacks")  # beside zero by default
SIGNED = ("shift", "latents_shift")  # numbers that may be negative
MIN_TILE = 8  # latents a side: what looks around a place, or everywhere, would see too little of a smaller tile
LPIPS_MIN_SIZE = 16  # pixels a side: VGG-16 halves them four times


# What of an autoencoder's section makes its network, rather than its losses.
AUTOENCODER_NETWORK = (
    "base_channels",
    "channel_multipliers",
    "num_res_blocks",
    "attention_levels",
    "latent_channels",
    "num_groups",
    "codebook",
)


def load_config(
    path_and_arg: str,
    overrides: Sequence[tuple[str, str]] = (),
    starting_config: Callable[[str], Config] | None = None,
) -> Config:
    """Returns the checked config of a file, with overrides.

    Args:
      path_and_arg: a Python file with `get_config()`, or `FILE:ARG` for `get_config(ARG)`.
      overrides: (dotted path, value as text), for example ("optimizer.learning_rate", "3e-4").
      starting_config: the config of the workdir that `training.init_from` names. Of it come the keys of an
        autoencoder's network that file and overrides leave out, and of its data set where they name none.

    Raises:
      ValueError: for a missing file, an unknown key, a wrong type or an inconsistent value; one line with the remedy.
    """
    path, _, arg = path_and_arg.partition(":")
    if not pathlib.Path(path).is_file():
        raise ValueError(f"--config={path}: no such file; give a file such as configs/fashion_mnist_dit.py")
    spec = importlib.util.spec_from_file_location("dit_jax_config_file", path)
    if spec is None:
        raise ValueError(f"--config={path} must be a Python file (.py) that defines get_config()")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        values = (module.get_config(arg) if arg else module.get_config()).to_dict()
    except (Exception, SystemExit) as error:  # the file is the user's code: what it raises is to be seen, in one line
        raise ValueError(f"--config={path_and_arg} failed: {type(error).__name__}: {error}") from error
    for key, text in overrides:
        _override(values, key, text)
    training = values.get("training")
    init_from = training.get("init_from") if isinstance(training, dict) else None
    if values.get("stage") == "autoencoder" and not values.get("data") and init_from is None:
        raise ValueError(
            "config.data is missing; set it, or the workdir whose network and data a run starts with as "
            "--config.training.init_from=DIR"
        )
    if starting_config and values.get("stage") == "autoencoder" and isinstance(init_from, str):
        other = starting_config(init_from)
        if other.stage == "autoencoder":
            values = _with_network_of(values, config_to_dict(other))
    config = config_from_dict(values)
    _check_homes(config, "config")
    return config


def _with_network_of(values: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Returns an autoencoder's values; the keys of its network and data that they lack are those of another run."""
    network, data = (dict(values.get(name) or {}) for name in ("autoencoder", "data"))
    theirs = other["data"] | {"version": None}  # the data is found anew
    if "name" in data:
        theirs = {key: theirs[key] for key in ("image_size", "channels")}
    network = {key: other["autoencoder"][key] for key in AUTOENCODER_NETWORK} | network
    return values | {"autoencoder": network, "data": theirs | data}


def override_config(config: Config, overrides: Sequence[tuple[str, str]]) -> Config:
    """Returns the checked config with (dotted path, value as text) overrides, as `load_config` applies them."""
    values = config_to_dict(config)
    for key, text in overrides:
        _override(values, key, text)
    return config_from_dict(values)


def override_data(data: DataConfig, overrides: Sequence[tuple[str, str]]) -> DataConfig:
    """Returns a data section with (dotted path, value as text) overrides, all of them of "data."."""
    values = {"data": dataclasses.asdict(data)}
    for key, text in overrides:
        _override(values, key, text)
    return _convert_section(DataConfig, values["data"], "config.data")


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """Returns the checked config of nested mappings (a ConfigDict's or a JSON file's content)."""
    if not isinstance(values, Mapping):
        raise ValueError(f"config={_shown(values)} must be a section (a ConfigDict), not {type(values).__name__}")
    values = dict(values)
    stage = values.get("stage")
    for section in STAGE_SECTIONS.get(stage, ()) if isinstance(stage, str) else ():
        if values.get(section) is None and section not in OPTIONAL_SECTIONS:
            values[section] = {}  # all defaults, or an error that names the first key without one
    config = _convert(Config, values, "config")
    check_config(config)
    return config


def override_section(section: Any, overrides: Mapping[str, Any], path: str) -> Any:
    """Returns a section with overrides by key, each as its type; ValueError where one is of another, or unknown."""
    values = {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
    return _convert_section(type(section), values | dict(overrides), path)


def config_to_dict(config: Config) -> dict[str, Any]:
    """Returns nested dicts of JSON values; `config_from_dict` is the inverse."""
    return dataclasses.asdict(config)


def check_config(config: Config) -> None:
    """Raises ValueError where fields contradict one another; needs no device."""
    data, training, stage = config.data, config.training, config.stage
    for section in {section for sections in STAGE_SECTIONS.values() for section in sections}:
        used = section in STAGE_SECTIONS[stage]
        _require(used or getattr(config, section) is None, f"config.{section} is not used by {stage=}; remove it")
    _check_numbers(config, "config")
    _check_sizes(config)
    _require(data.channels in (1, 3), f"config.data.channels={data.channels} must be 1 (grey) or 3 (RGB)")
    _require(
        len(data.background) in (1, 3) and max(data.background) <= 255,
        f"config.data.background={_shown(data.background)} must be a grey level or RGB, each from 0 to 255, such as "
        "(255,) or (255, 255, 255)",
    )
    _require(
        data.class_names is None
        or (len(set(data.class_names)) == len(data.class_names) == data.num_classes and all(data.class_names)),
        f"config.data.class_names={_shown(data.class_names)} must be {data.num_classes} different names, one a class",
    )
    _require(
        data.train_split != data.eval_split,
        f"config.data.eval_split={data.eval_split!r} must differ from train_split: it holds images never trained on",
    )
    warmup_steps = config.optimizer.warmup_steps
    _require(
        warmup_steps < training.num_train_steps,
        f"config.optimizer.{warmup_steps=} must be less than config.training.num_train_steps="
        f"{training.num_train_steps}",
    )
    ema_decay = training.ema_decay
    _require(ema_decay is None or ema_decay < 1, f"config.training.{ema_decay=} must be below 1, or None for no EMA")
    _require(
        all(decay < 1 for decay in training.extra_ema_decays) and all(0 < x < 0.288 for x in training.ema_lengths),
        f"config.training: extra_ema_decays={training.extra_ema_decays} must be below 1, "
        f"ema_lengths={training.ema_lengths} between 0 and 0.288 (the plain mean)",
    )
    _require(
        training.global_batch_size % training.accumulation_steps == 0,
        f"config.training.accumulation_steps={training.accumulation_steps} must divide "
        f"global_batch_size={training.global_batch_size}",
    )
    _require(
        training.keep_best_metric is None or training.checkpoint_every_steps % training.eval_every_steps == 0,
        f"config.training.keep_best_metric={training.keep_best_metric!r} needs held-out figures of every checkpoint: "
        f"checkpoint_every_steps={training.checkpoint_every_steps} must be a multiple of "
        f"eval_every_steps={training.eval_every_steps}",
    )
    for name in ("b1", "b2"):
        value = getattr(config.optimizer, name)
        _require(value < 1, f"config.optimizer.{name}={value} must be below 1")
    axes, slices = config.mesh.axes, config.mesh.slices
    _require(
        all(size == -1 or size > 0 for size in axes.values()) and list(axes.values()).count(-1) <= 1,
        f"config.mesh={axes} must be positive sizes, at most one of them -1 (the devices that are left)",
    )
    _require(slices is None or slices > 0, f"config.mesh.{slices=} must be positive, or None for the devices' own")
    for pattern, _ in config.mesh.rules:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"config.mesh.rules: {pattern!r} must be a regular expression ({error})") from error
    {"autoencoder": _check_autoencoder, "diffusion": _check_diffusion, "classifier": _check_classifier}[stage](config)


def check_platform(config: Config, platform: str) -> None:
    """Raises ValueError where the config asks for what a platform (cpu, gpu, tpu) does not have."""
    attention = config.compute.attention
    wanted = ATTENTION_PLATFORMS.get(attention, platform)
    _require(
        platform == wanted,
        f"config.compute.{attention=} is for {wanted}, and the devices are {platform}; set it to 'xla'",
    )


def for_platform(config: Config, platform: str) -> Config:
    """Returns the config of a trained model, with what its platform lacks replaced by what runs anywhere."""
    if ATTENTION_PLATFORMS.get(config.compute.attention, platform) == platform:
        return config
    return dataclasses.replace(config, compute=dataclasses.replace(config.compute, attention="xla"))


def undivided_activations(config: Config, axes: Mapping[str, int]) -> list[str]:
    """Returns a line for each activation that an axis of the mesh does not divide: it is left whole along it.

    Every device of that axis then computes all of it. The results are the same, the devices' time is lost.

    Args:
      axes: the mesh's sizes by name.
    """
    sizes = []  # (what, its size, axis)
    if config.autoencoder is not None:
        autoencoder = config.autoencoder
        for level, multiplier in enumerate(autoencoder.channel_multipliers):
            sizes.append((f"image rows at level {level}", config.data.image_size // 2**level, "sequence"))
            sizes.append((f"channels at level {level}", multiplier * autoencoder.base_channels, "tensor"))
    if config.unet is not None:
        unet, (height, _, _) = config.unet, config.input_shape
        for level, channels in enumerate(unet.level_channels):
            sizes.append((f"rows at level {level}", height // 2**level, "sequence"))
            sizes.append((f"channels at level {level}", channels, "tensor"))
            if level in unet.attention_levels:
                sizes.append((f"attention heads at level {level}", unet.heads_of(channels), "tensor"))
    if config.dit is not None:
        dit, (height, width, _) = config.dit, config.input_shape
        num_tokens = height // dit.patch_size * (width // dit.patch_size)
        if "in_context" in dit.conditioning:
            num_tokens += 1 + dit.class_conditional + num_condition_tokens(config)
        sizes += [
            ("attention heads", dit.num_heads, "tensor"),
            ("hidden units of the MLP", int(dit.width * dit.mlp_ratio), "tensor"),
            ("tokens", num_tokens, "sequence"),
        ]
    return [
        f"config.mesh.{axis}={axes[axis]} does not divide the {size} {what}: each of its devices computes all of them"
        for what, size, axis in sizes
        if size % axes.get(axis, 1)
    ]


def num_condition_tokens(config: Config) -> int:
    """Returns the tokens of a denoiser's sequences, such as a caption, padding included."""
    text = config.conditions and config.conditions.text
    return (text.max_length if text else 0) + (config.layout.num_tokens if config.layout else 0)


def _check_autoencoder(config: Config) -> None:
    autoencoder, size, compute = config.autoencoder, config.data.image_size, config.compute
    _require(
        not compute.scan_blocks and compute.attention == "xla" and compute.remat != "offload",
        f"config.compute: scan_blocks={compute.scan_blocks}, attention={compute.attention!r}, remat={compute.remat!r} "
        "cannot be for stage='autoencoder'; set False, 'xla' and one of 'none', 'dots' and 'full'",
    )
    num_levels = len(autoencoder.channel_multipliers)
    _require(num_levels > 0, "config.autoencoder.channel_multipliers=() must name a level, such as (1, 2, 4)")
    _require(
        all(level < num_levels for level in autoencoder.attention_levels),
        f"config.autoencoder.attention_levels={autoencoder.attention_levels} must be below {num_levels}, the levels",
    )
    factor = 2**config.num_downsamplings
    _require(
        size % factor == 0,
        f"config.data.image_size={size} must be divisible by {factor}, the autoencoder's downsampling; "
        f"try {round_to_multiple(size, factor)}",
    )
    for multiplier in autoencoder.channel_multipliers:
        channels = autoencoder.base_channels * multiplier
        _require(
            channels % autoencoder.num_groups == 0,
            f"config.autoencoder.num_groups={autoencoder.num_groups} must divide every level's channels; "
            f"base_channels x {multiplier} = {channels}",
        )
    _check_autoencoder_loss(config)


def _check_autoencoder_loss(config: Config) -> None:
    autoencoder, size = config.autoencoder, config.data.image_size
    codebook, discriminator = autoencoder.codebook, autoencoder.discriminator
    _require(
        autoencoder.perceptual_weight == 0 or size >= LPIPS_MIN_SIZE,
        f"config.data.image_size={size} must be at least {LPIPS_MIN_SIZE} for LPIPS; "
        "or set config.autoencoder.perceptual_weight=0",
    )
    if codebook is not None:
        _require(codebook.decay < 1, f"config.autoencoder.codebook.decay={codebook.decay} must be below 1")
        share = codebook.restart_usage
        _require(
            share is None or 0 < share < 1,
            f"config.autoencoder.codebook.restart_usage={share} must be between 0 and 1 (the mean usage), or None",
        )
    if discriminator is not None:
        # Every stride halves the sides; two more layers of kernel 4 without a stride take one pixel each.
        smallest = 3 * 2**discriminator.num_layers
        _require(
            size >= smallest,
            f"config.data.image_size={size} must be at least {smallest} for a discriminator of "
            f"num_layers={discriminator.num_layers}; lower it",
        )
    # What the discriminator and the codebook know of a batch is of the whole batch.
    _require(
        config.training.accumulation_steps == 1 or (discriminator is None and codebook is None),
        f"config.training.accumulation_steps={config.training.accumulation_steps} must be 1 with a discriminator or a "
        "codebook: their statistics are of a whole batch",
    )


def _check_classifier(config: Config) -> None:
    dit, num_classes = config.dit, config.data.num_classes
    _require(dit is not None, "stage='classifier' needs the network of config.dit; add that section")
    _require(
        not dit.class_conditional,
        "config.dit.class_conditional=True must be False for stage='classifier': the label is what it predicts",
    )
    _require(num_classes > 1, f"config.data.{num_classes=} must be 2 or more for stage='classifier'")
    _check_dit(config)
    _check_process(config)


def _check_diffusion(config: Config) -> None:
    _require(
        (config.dit is None) != (config.unet is None),
        f"stage='diffusion' needs one of config.dit and config.unet, and has {'both' if config.dit else 'neither'}",
    )
    name, check = ("dit", _check_dit) if config.dit is not None else ("unet", _check_unet)
    check(config)
    rates = {f"{name}.label_dropout": config.denoiser.label_dropout}
    for name, section in (vars(config.conditions) if config.conditions else {}).items():
        if section is not None:
            rates[f"conditions.{name}.dropout"] = section.dropout
    for name, rate in rates.items():
        _require(0 <= rate <= 1, f"config.{name}={rate} must be in [0, 1]")
    _check_process(config)
    if config.layout is not None:
        _check_layout(config.layout)
    if config.spatial is not None:
        _check_spatial(config)
    check_sampling(config.sampling, config)


def _check_process(config: Config) -> None:
    """Raises ValueError where the latents, or the process that noises them, contradict themselves."""
    diffusion, latents = config.diffusion, config.latents
    if latents is not None:
        _require(
            latents.scale is None or 0 < latents.scale < math.inf,
            f"config.latents.scale={latents.scale} must be positive and finite, or None for the cache's",
        )
        _require(math.isfinite(latents.shift), f"config.latents.shift={latents.shift} must be finite")
        _require(
            latents.path is None or latents.encode_with is None,
            f"config.latents.path={latents.path!r} and encode_with={latents.encode_with!r}: give one of them",
        )
        _require(
            latents.encode_with is None or latents.scale is not None,
            f"config.latents.encode_with={latents.encode_with!r} needs config.latents.scale, 1 / std of the latents; "
            "0.18215 for Stable Diffusion's f8",
        )
    _require(
        0 < diffusion.beta_start < diffusion.beta_end < 1,
        f"config.diffusion: 0 < beta_start={diffusion.beta_start} < beta_end={diffusion.beta_end} < 1 must hold",
    )
    gamma = diffusion.min_snr_gamma
    _require(gamma is None or gamma > 0, f"config.diffusion.min_snr_gamma={gamma} must be positive, or None")


def _check_dit(config: Config) -> None:
    dit, (height, width, _) = config.dit, config.input_shape
    _require(dit.mlp_ratio > 0, f"config.dit.mlp_ratio={dit.mlp_ratio} must be positive")
    _require(
        height % dit.patch_size == 0 and width % dit.patch_size == 0,
        f"config.dit.patch_size={dit.patch_size} must divide the input's {height} x {width}",
    )
    _require(
        dit.width % dit.num_heads == 0 and dit.width % 4 == 0,
        f"config.dit.width={dit.width} must be divisible by num_heads={dit.num_heads} and by 4 (position embedding)",
    )
    _require(
        config.compute.attention != "cudnn" or dit.dtype == "bfloat16",
        f"config.compute.attention='cudnn' needs config.dit.dtype='bfloat16', not {dit.dtype!r}",
    )
    modulations = [way for way in dit.conditioning if way.startswith("adaln")]
    _require(
        dit.conditioning and len(set(dit.conditioning)) == len(dit.conditioning) and len(modulations) <= 1,
        f"config.dit.conditioning={dit.conditioning} must name a way, none twice, and one adaln at most",
    )
    _require(
        not (dit.long_skips and config.compute.scan_blocks),
        "config.compute.scan_blocks=True must be False with config.dit.long_skips: the blocks are not alike",
    )


def _check_unet(config: Config) -> None:
    unet, (height, width, _), compute = config.unet, config.input_shape, config.compute
    num_levels = len(unet.channel_multipliers)
    _require(num_levels > 0, "config.unet.channel_multipliers=() must name a level, such as (1, 2, 4)")
    _require(
        all(level < num_levels for level in unet.attention_levels),
        f"config.unet.attention_levels={unet.attention_levels} must be below {num_levels}, the levels",
    )
    factor = 2 ** (num_levels - 1)
    _require(
        height % factor == 0 and width % factor == 0,
        f"the input's {height} x {width} must be divisible by {factor}, which {num_levels} levels of "
        "config.unet.channel_multipliers halve it to; use fewer",
    )
    _require(
        unet.base_channels % math.lcm(2, unet.num_groups) == 0,
        f"config.unet.base_channels={unet.base_channels} must be even and divisible by num_groups={unet.num_groups}; "
        f"try {round_to_multiple(unet.base_channels, math.lcm(2, unet.num_groups))}",
    )
    _require(
        (unet.num_heads is None) != (unet.head_channels is None),
        f"config.unet: num_heads={unet.num_heads} and head_channels={unet.head_channels}: give one of them",
    )
    for level in {*unet.attention_levels, num_levels - 1}:
        channels = unet.level_channels[level]
        _require(
            channels % (unet.num_heads or unet.head_channels) == 0,
            f"config.unet: num_heads={unet.num_heads}, head_channels={unet.head_channels} must divide the {channels} "
            f"channels of level {level}, which attends",
        )
        width = channels // unet.heads_of(channels)
        _require(
            compute.attention != "cudnn" or (unet.dtype == "bfloat16" and width <= 256 and width % 8 == 0),
            f"config.compute.attention='cudnn' needs config.unet.dtype='bfloat16', not {unet.dtype!r}, and heads of at "
            f"most 256 channels, a multiple of 8; those of level {level} have {width}",
        )
    _require(
        unet.context_width is not None or not unet.class_conditional or unet.label == "vector",
        "config.unet.label='context' needs context_width, the width of its token; or set label='vector'",
    )
    _require(
        unet.context_width is None
        or (unet.class_conditional and unet.label == "context")
        or num_condition_tokens(config),
        f"config.unet.context_width={unet.context_width} needs tokens to attend to: those of a label, text or layout",
    )
    _require(
        not compute.scan_blocks,
        "config.compute.scan_blocks=True cannot be for config.unet, whose blocks differ; set False",
    )


def _check_layout(layout: LayoutConfig) -> None:
    names = layout.classes
    _require(
        names
        and len(set(names)) == len(names)
        and all(name == name.strip() != "" and ";" not in name for name in names),
        f"config.conditions.layout.classes={_shown(names)} must be different names, without a ; or blanks around them",
    )
    _require(layout.dropout <= 1, f"config.conditions.layout.dropout={layout.dropout} must be in [0, 1]")
    _require(layout.num_sections > 1, f"config.conditions.layout.num_sections={layout.num_sections} must be above 1")


def _check_spatial(config: Config) -> None:
    spatial, size, map_field = config.spatial, config.data.image_size, config.data.map_field
    _require(spatial.dropout <= 1, f"config.conditions.spatial.dropout={spatial.dropout} must be in [0, 1]")
    for name, kind in (("factor", "low_resolution"), ("num_classes", "semantic")):
        value = getattr(spatial, name)
        _require(
            (value is None) == (spatial.kind != kind),
            f"config.conditions.spatial.{name}={value} must be given where kind={kind!r}, and only there; "
            f"here kind={spatial.kind!r}",
        )
    _require(
        spatial.factor is None or (spatial.factor > 1 and size % spatial.factor == 0),
        f"config.conditions.spatial.factor={spatial.factor} must divide config.data.image_size={size}, and be above 1",
    )
    _require(
        spatial.kind != "semantic" or map_field is not None,
        f"config.data.{map_field=} must name the field of each image's map, for conditions.spatial.kind='semantic'",
    )
    latents = config.latents
    _require(
        latents is None or latents.shape[0] == latents.shape[1] and size % latents.shape[0] == 0,
        f"config.latents.shape={latents and latents.shape} must be square, with sides that divide "
        f"config.data.image_size={size}, for config.conditions.spatial",
    )


def check_sampling(sampling: SamplingConfig, config: Config) -> None:
    """Raises ValueError where a sampler's settings contradict the trained model's config."""
    num_timesteps, channels, dropout = config.diffusion.num_timesteps, config.input_shape[-1], config.condition_dropout
    num_steps, timesteps = sampling.num_steps, sampling.timesteps
    _require(
        0 < num_steps <= num_timesteps,
        f"sampling num_steps={num_steps} must be from 1 to the {num_timesteps} timesteps of training",
    )
    stride = math.ceil(num_timesteps / num_steps)
    _require(
        sampling.spacing != "ddim" or (num_steps > 1 and math.ceil(num_timesteps / stride) == num_steps),
        f"sampling num_steps={num_steps} with spacing=ddim must be the number of multiples of a whole stride in "
        f"{num_timesteps} timesteps; a stride of {stride} gives {math.ceil(num_timesteps / stride)}",
    )
    _require(
        timesteps is None
        or (
            timesteps
            and list(timesteps) == sorted(set(timesteps))
            and 0 <= timesteps[0] <= timesteps[-1] < num_timesteps
        ),
        f"sampling {timesteps=} must ascend within 0 to {num_timesteps - 1}",
    )
    _require(sampling.batch_size > 0, f"sampling batch_size={sampling.batch_size} must be positive")
    decode_batch_size, decode_tile = sampling.decode_batch_size, sampling.decode_tile
    _require(decode_batch_size > 0, f"sampling {decode_batch_size=} must be positive")
    _require(
        decode_tile is None or decode_tile >= MIN_TILE,
        f"sampling {decode_tile=} must be {MIN_TILE} or more, or None for whole",
    )
    _require(
        0 < sampling.strength <= 1,
        f"sampling strength={sampling.strength} must be above 0 (the image as it is) and at most 1 (noise alone)",
    )
    _require(
        sampling.num_resamplings == 1 or sampling.sampler in ("ancestral", "ddim"),
        f"sampling num_resamplings={sampling.num_resamplings} must be 1 for {sampling.sampler}, whose steps build on "
        "those before; use ancestral or ddim",
    )
    _require(0 <= sampling.eta <= 1, f"sampling eta={sampling.eta} must be from 0 (deterministic) to 1 (ancestral)")
    own_scales, rates = dict(sampling.cfg_scales), ", ".join(f"{name} {rate}" for name, rate in dropout.items())
    _require(
        sampling.cfg_scale >= 0 and (sampling.cfg_scale == 1 or any(rate > 0 for rate in dropout.values())),
        f"sampling cfg_scale={sampling.cfg_scale} must be >= 0, and 1 for a model none of whose conditions has dropout "
        f"({rates or 'it has none'}): guidance needs a model that was trained with a condition and without",
    )
    for name, scale in sampling.cfg_scales:
        _require(
            name in dropout,
            f"sampling cfg_scales: the model has no condition {name!r}; its own are {', '.join(dropout) or 'none'}",
        )
        _require(
            scale >= 0 and (scale == 1 or dropout[name] > 0),
            f"sampling cfg_scales: {name!r} has {scale}, which must be >= 0, and 1 for a condition with "
            f"dropout={dropout[name]}: guidance needs a model that was trained with it and without",
        )
    _require(
        len(own_scales) == len(sampling.cfg_scales),
        f"sampling cfg_scales={sampling.cfg_scales} must name each condition once",
    )
    cfg_channels, cfg_interval = sampling.cfg_channels, sampling.cfg_interval
    _require(
        cfg_channels is None or 0 < cfg_channels <= channels,
        f"sampling {cfg_channels=} must be from 1 to the input's {channels} channels, or None for all",
    )
    _require(
        cfg_interval is None or 0 <= cfg_interval[0] < cfg_interval[1],
        f"sampling {cfg_interval=} must ascend, from 0 (no noise), or be None for all noise levels",
    )
    limit, percentile = sampling.x_0_limit, sampling.x_0_percentile
    _require(limit is None or limit > 0, f"sampling x_0_limit={limit} must be positive, or None for no limit")
    _require(
        percentile is None or (limit is not None and 0 < percentile <= 100),
        f"sampling x_0_percentile={percentile} must be from 0 to 100, with x_0_limit set, or None to clip",
    )


def check_seed(seed: int) -> None:
    """Raises ValueError where a seed of samples is none."""
    _require(0 <= seed <= MAX_COUNT, f"seed={seed} must be from 0 to {MAX_COUNT}")


def round_to_multiple(value: int, multiple: int) -> int:
    """Returns the positive multiple nearest to a value: what an error suggests instead of it."""
    return max(multiple, multiple * round(value / multiple))


def fixed_differences(old: Config, new: Config) -> list[str]:
    """Returns "key: old -> new" for every difference that makes `new` another run than `old`."""
    return list(_differences(old, new, "config"))


def _differences(old: Any, new: Any, path: str):
    if dataclasses.is_dataclass(old) and dataclasses.is_dataclass(new):
        for f in dataclasses.fields(old):
            old_value = getattr(old, f.name)
            not_yet_recorded = f.metadata.get("recorded", False) and old_value is None
            if f.metadata.get("fixed", True) and not not_yet_recorded:
                yield from _differences(old_value, getattr(new, f.name), f"{path}.{f.name}")
    elif old != new:
        yield f"{path}: {old!r} -> {new!r}"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_sizes(config: Config) -> None:
    """Raises ValueError where a network or an image would fill any memory: what multiplies sizes can rely on it."""
    sizes = [("data.image_size", config.data.image_size, MAX_SIDE)]
    if config.autoencoder is not None:
        autoencoder = config.autoencoder
        width = autoencoder.base_channels * max(autoencoder.channel_multipliers, default=1)
        sizes += [
            ("autoencoder.channel_multipliers, their number", len(autoencoder.channel_multipliers), MAX_LEVELS),
            ("autoencoder.base_channels times a multiplier", width, MAX_WIDTH),
            ("autoencoder.latent_channels", autoencoder.latent_channels, MAX_WIDTH),
            ("autoencoder.num_res_blocks", autoencoder.num_res_blocks, MAX_DEPTH),
        ]
        if autoencoder.codebook is not None:
            sizes += [("autoencoder.codebook.num_codes", autoencoder.codebook.num_codes, MAX_CODES)]
        if autoencoder.discriminator is not None:
            discriminator = autoencoder.discriminator
            sizes += [
                ("autoencoder.discriminator.num_layers", discriminator.num_layers, MAX_LEVELS),
                ("autoencoder.discriminator.base_channels", discriminator.base_channels, MAX_WIDTH),
            ]
    if config.denoiser is not None:
        height, width, channels = config.input_shape
        sizes += [
            ("latents.shape, a side", max(height, width), MAX_SIDE),
            ("latents.shape, the channels", channels, MAX_WIDTH),
            ("data.num_classes", config.data.num_classes, MAX_CODES),
            ("diffusion.num_timesteps", config.diffusion.num_timesteps, MAX_CODES),
        ]
    if config.unet is not None:
        unet = config.unet
        sizes += [
            ("unet.channel_multipliers, their number", len(unet.channel_multipliers), MAX_LEVELS),
            ("unet.base_channels times a multiplier", max((unet.base_channels, *unet.level_channels)), MAX_WIDTH),
            ("unet.num_res_blocks", unet.num_res_blocks, MAX_DEPTH),
            ("unet.context_width", unet.context_width or 0, MAX_WIDTH),
            ("unet.transformer_depth", unet.transformer_depth, MAX_DEPTH),
        ]
    if config.dit is not None:
        dit = config.dit
        num_tokens = height * width // dit.patch_size**2
        sizes += [
            ("dit.depth", dit.depth, MAX_DEPTH),
            ("dit.width", dit.width, MAX_WIDTH),
            ("dit.mlp_ratio", dit.mlp_ratio, MAX_DEPTH),
            ("dit.width times the number of tokens", dit.width * num_tokens, MAX_POSITIONS),
        ]
    if config.spatial is not None and config.spatial.num_classes is not None:
        sizes += [("conditions.spatial.num_classes", config.spatial.num_classes, MAX_WIDTH)]
    text = config.conditions and config.conditions.text
    if text:
        sizes += [
            ("conditions.text.max_length", text.max_length, MAX_CODES),
            ("conditions.text.vocab_size", text.vocab_size, MAX_CODES),
            ("conditions.text.frozen_width", text.frozen_width, MAX_WIDTH),
        ]
    if config.layout:
        layout = config.layout
        sizes += [
            ("conditions.layout.classes, their number", len(layout.classes), MAX_CODES),
            ("conditions.layout.max_objects", layout.max_objects, MAX_WIDTH),
            ("conditions.layout.num_sections", layout.num_sections, MAX_DEPTH),
            ("conditions.layout.transformer.width", layout.transformer.width, MAX_WIDTH),
            ("conditions.layout.transformer.depth", layout.transformer.depth, MAX_DEPTH),
        ]
    if text and text.transformer:
        sizes += [
            ("conditions.text.transformer.width", text.transformer.width, MAX_WIDTH),
            ("conditions.text.transformer.depth", text.transformer.depth, MAX_DEPTH),
        ]
    for name, size, most in sizes:
        _require(size <= most, f"config.{name}={size} must be at most {most:,}: no network here is larger")


def _check_numbers(section: Any, path: str) -> None:
    """Counts are positive, or zero where that is their default or they number something; no quantity is negative."""
    if isinstance(section, MeshConfig):
        return  # -1 has a meaning there
    for f in dataclasses.fields(section):
        value, name = getattr(section, f.name), f"{path}.{f.name}"
        if dataclasses.is_dataclass(value):
            _check_numbers(value, name)
        zero_allowed = f.default == 0 or f.name in ZERO_ALLOWED
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and not isinstance(number, bool):
                _require(number <= MAX_COUNT, f"{name}={_shown(value)} must be at most {MAX_COUNT}")
                _require(number > 0 or (number == 0 and zero_allowed), f"{name}={value} must be positive")
            elif isinstance(number, float) and f.name not in SIGNED:
                _require(number >= 0, f"{name}={value} must not be negative")


def _override(values: dict[str, Any], key: str, text: str) -> None:
    """Sets a dotted key from text, by the schema's type of that key."""
    *sections, name = key.split(".")
    schema, path = Config, "config"
    for section in sections:
        hints = typing.get_type_hints(schema)
        if section not in hints:
            raise ValueError(_unknown_key(path, section, hints, leaf=name))
        schema, path = _without_none(hints[section]), f"{path}.{section}"
        if not dataclasses.is_dataclass(schema):
            raise ValueError(f"{path} is a value, not a section; set it as --{path}=VALUE{_elsewhere(name, path)}")
        if values.get(section) is None:
            values[section] = {}
        if not isinstance(values[section], dict):
            return  # the file gave a value where a section belongs; conversion names it
        values = values[section]
    hints = typing.get_type_hints(schema)
    if name not in hints:
        raise ValueError(_unknown_key(path, name, hints))
    if dataclasses.is_dataclass(_without_none(hints[name])) and text != "None":
        raise ValueError(f"{path}.{name} is a section; set one of its keys, as --{path}.{name}.KEY=VALUE")
    values[name] = _parse(hints[name], text)
    if schema.__dataclass_fields__[name].metadata.get("path") and isinstance(values[name], str):
        values[name] = _in_home(values[name], f"{path}.{name}")


def _parse(hint: Any, text: str) -> Any:
    if text == "None" and type(None) in typing.get_args(hint):
        return None
    if _without_none(hint) is str or typing.get_origin(hint) is Literal:
        return text
    if _without_none(hint) is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text  # conversion says what was expected


def dataclass_from_json(schema: type, values: Any, name: str) -> Any:
    """Returns a dataclass of JSON values; ValueError names the first that is missing, unknown or of another type."""
    return _convert(schema, values, name)


def _shown(value: Any) -> str:
    """Returns a value for an error: in short, however large it is, and even where it holds itself."""
    try:
        short = reprlib.Repr()
        short.maxstring = short.maxother = 200
        short.maxtuple = short.maxlist = short.maxdict = 20
        return short.repr(value)
    except Exception:  # the repr of an object of the user's own, or of a number of too many digits
        return f"<{type(value).__name__}>"


def _convert(hint: Any, value: Any, path: str) -> Any:
    """Returns `value` as the type `hint`, or raises ValueError naming the dotted path."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _convert(_without_none(hint), value, path)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return _convert_section(hint, value, path)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{path}={_shown(value)} must be a mapping, not {type(value).__name__}")
        return {key: _convert(typing.get_args(hint)[1], each, f"{path}[{_shown(key)}]") for key, each in value.items()}
    if origin is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise ValueError(f"{path}={_shown(value)} must be one of {choices}{_suggestion(value, choices)}")
        return value
    if origin in (tuple, list):
        if isinstance(value, Mapping) and typing.get_origin(typing.get_args(hint)[0]) is tuple:  # of names and values
            value = tuple(value.items())
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{path}={_shown(value)} must be a sequence, such as (1, 2, 4)")
        hints = typing.get_args(hint)
        hints = [hints[0]] * len(value) if origin is list or hints[-1] is Ellipsis else hints
        if len(hints) != len(value):
            raise ValueError(f"{path}={_shown(value)} must have {len(hints)} entries")
        return origin(_convert(h, v, f"{path}[{i}]") for i, (h, v) in enumerate(zip(hints, value, strict=True)))
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1023:
        return float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)) or value != value:
        raise ValueError(f"{path}={_shown(value)} must be {hint.__name__}, not {type(value).__name__}")
    return value


def _convert_section(schema: type, value: Any, path: str) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"{path}={_shown(value)} must be a section (a ConfigDict), not {type(value).__name__}")
    hints = typing.get_type_hints(schema)
    for key in value:
        if key not in hints:
            raise ValueError(_unknown_key(path, key, hints))
    for f in dataclasses.fields(schema):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in value:
            raise ValueError(f"{path}.{f.name} is missing: it has no default; set it in the config file")
    values = {key: _convert(hints[key], v, f"{path}.{key}") for key, v in value.items()}
    for f in dataclasses.fields(schema):
        if f.metadata.get("path") and values.get(f.name) is not None:
            with contextlib.suppress(ValueError):  # of another machine's run: `_check_homes` refuses a user's own
                values[f.name] = user_path(values[f.name])
    return schema(**values)


def _unknown_key(path: str, key: str, known: Any, leaf: str | None = None) -> str:
    """Returns the message for a key that a section does not have, with the full path of the one that was meant.

    leaf: the last part of what was asked for, where `key` is a section on the way to it.
    """
    message = f"{path}.{str(key)[:100]} is not a config key"
    if difflib.get_close_matches(str(key)[:100], known, n=1, cutoff=0.8) or path.partition(".")[0] != "config":
        return message + _suggestion(key, known, prefix=f"{path}.")
    return message + (_elsewhere(leaf or str(key), path) or _suggestion(key, known, prefix=f"{path}."))


def _elsewhere(leaf: str, path: str) -> str:
    """Returns "; did you mean" with the paths of the whole schema that end in a key; "" where there are none."""
    found = [f"config.{name}" for name in paths_ending_in(leaf)]
    found = [name for name in found if name.rpartition(".")[0] == path] or found
    fewest = min((name.count(".") for name in found), default=0)
    shown = [name for name in found if name.count(".") == fewest][:3]
    return f"; did you mean {' or '.join(shown)}?" if shown else ""


def paths_ending_in(leaf: str) -> list[str]:
    """Returns the full paths, such as "training.num_train_steps", of a config's keys and sections of a name."""
    return [path for path in schema_paths() if path.rpartition(".")[2] == leaf]


def schema_paths(schema: type = Config, prefix: str = "") -> list[str]:
    """Returns the full path of every key and section of a config."""
    found = []
    for name, hint in typing.get_type_hints(schema).items():
        found.append(f"{prefix}{name}")
        if dataclasses.is_dataclass(_without_none(hint)):
            found += schema_paths(_without_none(hint), f"{prefix}{name}.")
    return found


def nearest_name(value: str, known: Iterable[str]) -> str | None:
    """Returns the name that was meant by another one: begun alike, else the most similar; None where none is near."""
    plain = {name: re.sub(r"[^a-z0-9]", "", name.lower()) for name in map(str, known)}
    meant = re.sub(r"[^a-z0-9]", "", value.lower())
    if len(meant) > 1:
        begun = [name for name, text in plain.items() if text and (text.startswith(meant) or meant.startswith(text))]
        if begun:
            return min(begun, key=lambda name: abs(len(plain[name]) - len(meant)))
    near = difflib.get_close_matches(value[:100], list(plain), n=1, cutoff=0.4)
    return near[0] if near else None


def did_you_mean(value: str, known: Iterable[str], prefix: str = "") -> str:
    """Returns "; did you mean NAME?" to end a message with, "" where none of the known names is near."""
    near = nearest_name(value, known)
    return f"; did you mean {prefix}{near}?" if near else ""


def _check_homes(section: Any, path: str) -> None:
    """Raises ValueError where a path begins with a home folder that is not known."""
    for f in dataclasses.fields(section):
        value, name = getattr(section, f.name), f"{path}.{f.name}"
        if dataclasses.is_dataclass(value):
            _check_homes(value, name)
        elif f.metadata.get("path") and value is not None:
            _in_home(value, name)


def _in_home(value: str, path: str) -> str:
    """Returns `user_path` of a config's value; its error names the key."""
    try:
        return user_path(value)
    except ValueError as error:
        raise ValueError(f"{path}={error}") from None


def _suggestion(value: Any, known: Any, prefix: str = "") -> str:
    near = did_you_mean(_shown(value).strip("'")[:100], known, prefix)
    return near or f"; known here: {', '.join(map(str, known))}"


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return hint
