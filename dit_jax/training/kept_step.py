"""A training step that is traced once for all starts of a run.

JAX's compilation cache keeps what XLA makes of a program; but to look there, a start traces the program again, which is
most of what is left for it to do. So the traced program (StableHLO, by `jax.export`) is kept in the same folder. A
start reads it, and what it was compiled to, in a thread while the state is made; or traces it there.

The file is named after all that a trace depends on: this package's source, the libraries' versions, the config, the
devices and JAX's settings. What is damaged, or takes other arrays than the step at hand, is traced anew.
"""

import concurrent.futures
import contextlib
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import secrets
import typing
from collections.abc import Callable

import jax
from jax import export

from dit_jax.config import Config, config_to_dict
from dit_jax.types import Array, Batch

if typing.TYPE_CHECKING:  # reading begins before these are imported
    from dit_jax.training.state import TrainState
    from dit_jax.training.step import Constants

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "einops", "numpy")
DIGEST_BYTES = hashlib.sha256().digest_size


class KeptStep:
    """The step of a config on a mesh, kept in a folder, from which it is read from now on if it is there.

    The config alone must determine the step, but for the shapes of its arguments.
    """

    def __init__(self, config: Config, mesh: jax.sharding.Mesh, folder: str | os.PathLike):
        self._mesh = mesh
        self._file = pathlib.Path(folder) / f"train_step-{_identity(config, mesh)}.stablehlo"
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "kept_step")
        self._found = self._thread.submit(self._read)

    def compiled(self, step_fn: Callable, state: "TrainState", batch: Batch, constants: "Constants") -> Callable:
        """Returns the jitted `step_fn(state, batch, constants) -> (state, metrics)` for such arguments (abstract).

        If it is not kept yet, it is traced from now on, and compiled when it is called first: compilers measure on the
        devices, which may still be busy with the state. Other shapes or shardings are an error.
        """
        compile_step = self._thread.submit(self._found_or_traced, step_fn, state, batch, constants)
        self._thread.shutdown(wait=False)
        program = None

        def call(state: "TrainState", batch: Batch, constants: "Constants"):
            nonlocal program
            program = program or compile_step.result()()
            leaves, structure = jax.tree.flatten(state)
            leaves, metrics = program(leaves, batch, jax.tree.leaves(constants))
            return structure.unflatten(leaves), metrics

        return call

    def _found_or_traced(
        self, step_fn: Callable, state: "TrainState", batch: Batch, constants: "Constants"
    ) -> Callable[[], Callable]:
        """Returns what gives the compiled step, as a program of flat states: a file holds no classes of trees."""
        leaves, structure = jax.tree.flatten(state)
        flat_constants, constants_structure = jax.tree.flatten(constants)
        args = leaves, batch, flat_constants
        found = self._found.result()
        if found is not None and _arguments(found[0]) == jax.tree.map(lambda x: (x.shape, x.dtype), args):
            return lambda: found[1]

        def flat_step(leaves: list[Array], batch: Batch, constants: list[Array]):
            state, metrics = step_fn(structure.unflatten(leaves), batch, constants_structure.unflatten(constants))
            return jax.tree.leaves(state), metrics

        shardings = jax.tree.map(lambda x: x.sharding, args)
        out_shardings = shardings[0], None
        # Without keep_unused, the exported program forgets the shardings of what it does not read, such as some labels.
        flat = jax.jit(
            flat_step, donate_argnums=0, in_shardings=shardings, out_shardings=out_shardings, keep_unused=True
        )
        try:
            exported = export.export(flat)(*args)
        except (ValueError, NotImplementedError):  # it has what only some compilers know: it is traced by every start
            return lambda: flat
        self._write(exported.serialize())
        return lambda: _compile(exported, self._mesh)

    def _read(self) -> tuple[export.Exported, Callable] | None:
        try:
            content = self._file.read_bytes()
        except OSError:
            return None
        digest, program = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
        if hashlib.sha256(program).digest() != digest:
            return None
        exported = export.deserialize(bytearray(program))
        return exported, _compile(exported, self._mesh)

    def _write(self, program: bytes) -> None:
        temporary = self._file.with_suffix(f".{secrets.token_hex(8)}.tmp")
        try:
            temporary.write_bytes(hashlib.sha256(program).digest() + program)
            os.replace(temporary, self._file)
        except OSError:  # a full disk, or no folder: this run needs no file
            with contextlib.suppress(OSError):
                temporary.unlink()


def _compile(exported: export.Exported, mesh: jax.sharding.Mesh) -> Callable:
    shardings, _ = exported.in_tree.unflatten(exported.in_shardings_jax(mesh))
    args, _ = exported.in_tree.unflatten(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in exported.in_avals)
    out_shardings = exported.out_tree.unflatten(exported.out_shardings_jax(mesh))

    def train_step(*args):  # by this name it is known to compilers, profilers and the cache
        return exported.call(*args)

    program = jax.jit(train_step, donate_argnums=0, in_shardings=shardings, out_shardings=out_shardings)
    return program.lower(*args).compile()


def _arguments(exported: export.Exported) -> tuple:
    """Returns the arguments as (shape, dtype) each."""
    args, _ = exported.in_tree.unflatten((x.shape, x.dtype) for x in exported.in_avals)
    return args


def _identity(config: Config, mesh: jax.sharding.Mesh) -> str:
    """Returns a SHA-256 of all that the trace of a step depends on."""
    package = pathlib.Path(__file__).parents[1]
    sources = {str(file.relative_to(package)): _sha256(file) for file in sorted(package.rglob("*.py"))}
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES} | {"python": platform.python_version()}
    devices = [(device.platform, device.device_kind, device.id) for device in mesh.devices.flat]
    client = mesh.devices.flat[0].client.platform_version
    parts = (
        sources,
        versions,
        config_to_dict(config),
        dict(mesh.shape),
        devices,
        client,
        sorted(jax.config.values.items()),
    )
    return hashlib.sha256(json.dumps(parts, default=repr).encode()).hexdigest()


def _sha256(file: pathlib.Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
