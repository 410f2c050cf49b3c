"""What a training step carries from one step to the next, and how it is made on a mesh."""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import optax

from dit_jax.config import Config
from dit_jax.models.averages import average_decays
from dit_jax.models.build import init_params
from dit_jax.models.quantizer import init_code_statistics
from dit_jax.parallel.rules import tree_shardings
from dit_jax.perceptual.patchgan import build_discriminator
from dit_jax.types import Array, Params, PRNGKey

SPIKE_WINDOW = 128  # losses that a step's is compared with; those of a few minutes, so that the trend hardly matters
DISCRIMINATOR_STREAM = 1  # of the run's key: keeps its initial weights apart from the network's


@flax.struct.dataclass
class LossState:
    """What the autoencoder's loss trains and tracks beside the autoencoder; a dict's key is there if the config asks.

    params: the `discriminator`'s, and `log_variance` [] of the likelihood, trained as the autoencoder is.
    statistics: the `discriminator`'s batch statistics; of the `codebook`: `usage` [n], and `sums` [n, c] where its
    codes are moving averages.
    """

    params: Params
    opt_state: optax.OptState
    statistics: Params


@flax.struct.dataclass
class TrainState:
    """step: int32 scalar, the number of batches seen; ema_params: None without an EMA; averages: others, by name.

    recent: the `loss` [SPIKE_WINDOW] float32 of the newest good steps, NaN for those still to come; None where the
    config does not look for spikes.
    """

    step: Array
    params: Params
    opt_state: optax.OptState
    ema_params: Params | None
    averages: dict[str, Params] = flax.struct.field(default_factory=dict)
    loss_state: LossState | None = None
    recent: dict[str, Array] | None = None

    @property
    def eval_params(self) -> Params:
        """The weights that evaluation and sampling use."""
        return self.params if self.ema_params is None else self.ema_params


def init_state(config: Config, optimizer: optax.GradientTransformation, key: PRNGKey) -> TrainState:
    """Returns the state before the first step; the averages start at the initial weights, as in the reference."""
    return state_of(config, optimizer, init_params(config, key))


def state_of(config: Config, optimizer: optax.GradientTransformation, params: Params) -> TrainState:
    """Returns a state of these parameters, in which all else is new."""
    ema_params = None if config.training.ema_decay is None else jax.tree.map(jnp.copy, params)
    averages = {name: jax.tree.map(jnp.copy, params) for name in average_decays(config.training)}
    loss_state = init_loss_state(config, optimizer, params)
    recent = None if config.training.spike_zscore is None else {"loss": jnp.full(SPIKE_WINDOW, jnp.nan)}
    step = jnp.zeros((), jnp.int32)
    return TrainState(step, params, optimizer.init(params), ema_params, averages, loss_state, recent)


def init_loss_state(config: Config, optimizer: optax.GradientTransformation, params: Params) -> LossState | None:
    """Returns the state of the autoencoder's loss before the first step; None where it keeps nothing."""
    autoencoder = config.autoencoder
    if autoencoder is None:
        return None
    loss_params: Params = {}
    statistics: Params = {}
    if autoencoder.learn_log_variance:
        loss_params["log_variance"] = jnp.zeros(())
    if autoencoder.discriminator:
        key = jax.random.fold_in(jax.random.key(config.seed), DISCRIMINATOR_STREAM)
        images = jnp.zeros((1, *config.input_shape))
        variables = build_discriminator(autoencoder.discriminator).init(key, images, train=True)
        loss_params["discriminator"], statistics["discriminator"] = variables["params"], variables["batch_stats"]
    if autoencoder.codebook:
        statistics["codebook"] = init_code_statistics(autoencoder.codebook, params["quantize"]["embedding"])
    if not loss_params and not statistics:
        return None
    return LossState(loss_params, optimizer.init(loss_params), statistics)


def abstract_state(config: Config, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh) -> TrainState:
    """Returns the state's shapes, dtypes and shardings, without memory."""
    shapes = jax.eval_shape(_jit_init(config, optimizer), jax.eval_shape(jax.random.key, 0))
    shardings = tree_shardings(shapes, mesh, config.mesh.rules)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def create_state(
    config: Config, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh, params: Params | None = None
) -> TrainState:
    """Returns the initial state, of `params` or else of random ones.

    Each shard is made where it lives: no parameter ever exists whole on one device.
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, optimizer, mesh))
    if params is not None:
        return jax.jit(lambda params: state_of(config, optimizer, params), out_shardings=shardings)(params)
    return jax.jit(_jit_init(config, optimizer), out_shardings=shardings)(jax.random.key(config.seed))


@functools.lru_cache(maxsize=1)
def _jit_init(config: Config, optimizer: optax.GradientTransformation):
    """Returns the jitted `key -> initial state`, whose trace JAX keeps: shapes and values take one, not three."""
    return jax.jit(functools.partial(init_state, config, optimizer))
