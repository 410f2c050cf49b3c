"""What a training step carries from one step to the next, and how it is made on a mesh."""

import flax.struct
import jax
import jax.numpy as jnp
import optax

from dit_jax.config import Config
from dit_jax.models.averages import average_decays
from dit_jax.models.build import init_params
from dit_jax.parallel.rules import tree_shardings
from dit_jax.types import Array, Params, PRNGKey


@flax.struct.dataclass
class TrainState:
    """step: int32 scalar, the number of updates made; ema_params: None without an EMA; averages: others, by name."""

    step: Array
    params: Params
    opt_state: optax.OptState
    ema_params: Params | None
    averages: dict[str, Params] = flax.struct.field(default_factory=dict)

    @property
    def eval_params(self) -> Params:
        """The weights that evaluation and sampling use."""
        return self.params if self.ema_params is None else self.ema_params


def init_state(config: Config, optimizer: optax.GradientTransformation, key: PRNGKey) -> TrainState:
    """Returns the state before the first step; the EMA starts at the initial weights, as in the reference."""
    params = init_params(config, key)
    ema_params = None if config.training.ema_decay is None else jax.tree.map(jnp.copy, params)
    averages = {name: jax.tree.map(jnp.copy, params) for name in average_decays(config.training)}
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema_params, averages)


def abstract_state(config: Config, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh) -> TrainState:
    """Returns the state's shapes, dtypes and shardings, without memory."""
    shapes = jax.eval_shape(lambda: init_state(config, optimizer, jax.random.key(config.seed)))
    shardings = tree_shardings(shapes, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def create_state(config: Config, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh) -> TrainState:
    """Returns the initial state, each shard made where it lives: no parameter ever exists whole on one device."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, optimizer, mesh))
    init = jax.jit(lambda key: init_state(config, optimizer, key), out_shardings=shardings)
    return init(jax.random.key(config.seed))
