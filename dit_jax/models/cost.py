"""What a network costs: parameters and multiply-adds, counted from its trace without running it.

The papers' "Gflops" are multiply-adds of one forward pass of one image.
"""

import math
import re
from collections.abc import Callable

import jax
from jax.extend import core

from dit_jax.config import Config
from dit_jax.models.build import abstract_inputs, abstract_params, build_model
from dit_jax.types import Params


def describe_cost(config: Config) -> dict:
    """Returns a config's `parameters`, those of its `modules` by name, and the `macs` of one example's forward pass."""
    params, model = abstract_params(config), build_model(config)
    modules: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = re.sub(r"^blocks_\d+$", "blocks", path[0].key)
        modules[name] = modules.get(name, 0) + math.prod(leaf.shape)
    macs = count_macs(lambda p, *inputs: model.apply({"params": p}, *inputs), params, *abstract_inputs(config))
    return {"parameters": count_params(params), "macs": macs, "modules": modules}


def count_params(params: Params) -> int:
    """Returns the number of parameters in a tree of arrays or of their shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def count_macs(function: Callable, *args) -> int:
    """Returns the multiply-adds of the matmuls and convolutions of `function(*args)`; args may be abstract."""
    return _jaxpr_macs(jax.make_jaxpr(function)(*args).jaxpr)


def _jaxpr_macs(jaxpr: core.Jaxpr) -> int:
    return sum(_equation_macs(equation) for equation in jaxpr.eqns)


def _equation_macs(equation: core.JaxprEqn) -> int:
    params = equation.params
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
    if equation.primitive.name == "conv_general_dilated":
        kernel, spec = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec
        return math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // kernel[spec[0]]
    trips = params["length"] if equation.primitive.name == "scan" else 1
    inner = [p.jaxpr if isinstance(p, core.ClosedJaxpr) else p for p in params.values()]
    return trips * sum(_jaxpr_macs(p) for p in inner if isinstance(p, core.Jaxpr))
