"""What a network costs: parameters and multiply-adds, counted from its trace without running it.

The papers' "Gflops" are multiply-adds of one forward pass of one image.
"""

import collections
import math
import re
from collections.abc import Callable

import jax
from jax.extend import core

from dit_jax.config import Config
from dit_jax.models.build import abstract_inputs, abstract_params, build_model
from dit_jax.types import Params


def describe_cost(config: Config) -> dict:
    """Returns a config's `parameters`, the `macs` of one example's forward pass, and both by module.

    `modules` and `module_macs` are by the name of the network's direct children, all blocks (of a level) together.
    """
    params, model = abstract_params(config), build_model(config)
    modules = {_without_number(name): 0 for name in params}
    module_macs = dict(modules)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        modules[_without_number(path[0].key)] += math.prod(leaf.shape)
    by_scope = macs_by_scope(lambda p, *inputs: model.apply({"params": p}, *inputs), params, *abstract_inputs(config))
    for scope, macs in by_scope.items():
        child = next(name for name in scope.split("/") if name in params)  # Flax names a module's operations after it
        module_macs[_without_number(child)] += macs
    return {
        "parameters": count_params(params),
        "macs": sum(by_scope.values()),
        "modules": modules,
        "module_macs": module_macs,
    }


def _without_number(name: str) -> str:
    return re.sub(r"^(blocks|down_\d+|mid|up_\d+)_.+$", r"\1", name)


def count_params(params: Params) -> int:
    """Returns the number of parameters in a tree of arrays or of their shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def count_macs(function: Callable, *args) -> int:
    """Returns the multiply-adds of the matmuls and convolutions of `function(*args)`; args may be abstract."""
    return sum(macs_by_scope(function, *args).values())


def macs_by_scope(function: Callable, *args) -> collections.Counter[str]:
    """Returns the same by the `named_scope` of the operation, joined by "/"."""
    counts: collections.Counter[str] = collections.Counter()
    _add_macs(counts, jax.make_jaxpr(function)(*args).jaxpr, "", 1)
    return counts


def _add_macs(counts: collections.Counter[str], jaxpr: core.Jaxpr, scope: str, times: int) -> None:
    for equation in jaxpr.eqns:
        inner_scope = f"{scope}/{equation.source_info.name_stack}"
        if macs := _equation_macs(equation):
            counts[inner_scope] += times * macs
        trips = _times(equation)
        for param in equation.params.values():
            inner = param.jaxpr if isinstance(param, core.ClosedJaxpr) else param
            if isinstance(inner, core.Jaxpr):
                _add_macs(counts, inner, inner_scope, times * trips)


def _times(equation: core.JaxprEqn) -> int:
    """Returns how often the inner computation of an operation is done, on all devices together."""
    if equation.primitive.name == "scan":
        return equation.params["length"]
    if equation.primitive.name == "shard_map":  # whose inner computation is one device's
        return math.prod(equation.params["mesh"].shape[axis] for axis in equation.params["newly_manual_axes"])
    return 1


def _equation_macs(equation: core.JaxprEqn) -> int:
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
    if equation.primitive.name == "conv_general_dilated":
        kernel, spec = equation.invars[1].aval.shape, equation.params["dimension_numbers"].rhs_spec
        return math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // kernel[spec[0]]
    return 0
