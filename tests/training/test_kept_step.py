"""A kept step is the step, to the bit, and is traced once; what does not fit is traced anew."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax import export

from dit_jax.cli.plan import abstract_batch, update_of
from dit_jax.config import MeshConfig
from dit_jax.evaluation.speed import fill
from dit_jax.parallel.mesh import make_mesh
from dit_jax.training import kept_step
from dit_jax.training.kept_step import KeptStep
from dit_jax.training.state import create_state
from dit_jax.training.step import jit_train_step
from tests.tiny import adversarial_config, dit_config

MESH = MeshConfig(data=2, fsdp=4)


@pytest.fixture(params=["diffusion", "autoencoder"])
def config(request, tmp_path):
    make = {"diffusion": dit_config, "autoencoder": functools.partial(adversarial_config, start_step=0)}[request.param]
    return dataclasses.replace(make(tmp_path), mesh=MESH)


@pytest.fixture
def traces(monkeypatch):
    """The exports of steps."""
    seen, real = [], export.export
    monkeypatch.setattr(export, "export", lambda *args: seen.append(args) or real(*args))
    return seen


def run(config, folder=None):
    """Returns the state after two steps, made by a kept step or, without a folder, by the jitted one; and metrics."""
    mesh = make_mesh(config.mesh)
    optimizer, train_step = update_of(config)
    state, batch = create_state(config, optimizer, mesh), fill(abstract_batch(config, mesh))
    step_fn = jit_train_step(train_step, state)
    if folder is not None:
        step_fn = KeptStep(config, mesh, folder).compiled(step_fn, state, abstract_batch(config, mesh), None)
    first = state
    for _ in range(2):
        state, metrics = step_fn(state, batch, None)
    assert all(x.is_deleted() for x in jax.tree.leaves(first.params))  # its memory was taken over
    return state, metrics


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_a_kept_step_is_the_jitted_one_to_the_bit_and_traced_once(config, tmp_path, traces):
    wanted = run(config)
    for _ in range(2):
        assert_same(run(config, tmp_path), wanted)
    assert len(traces) == 1
    (file,) = tmp_path.glob("*.stablehlo")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert_same(run(config, tmp_path), wanted)  # damaged: traced anew, and mended
    assert_same(run(config, tmp_path), wanted)
    assert len(traces) == 2


@pytest.fixture
def files(tmp_path):
    """Returns the names that the steps of configs would be kept under."""
    mesh = make_mesh(MESH)
    return lambda config: kept_step._identity(config, mesh)


def test_another_config_source_library_or_setting_is_another_step(files, tmp_path, monkeypatch):
    config = dit_config(tmp_path)
    seen = {files(config)}
    assert files(dit_config(tmp_path)) in seen
    seen.add(files(dataclasses.replace(config, seed=1)))
    with jax.default_matmul_precision("float32"):
        seen.add(files(config))
    with monkeypatch.context() as patched:
        patched.setattr(kept_step, "_sha256", lambda file: str(file.stat().st_size))
        seen.add(files(config))
    with monkeypatch.context() as patched:
        patched.setattr(kept_step.importlib.metadata, "version", lambda name: "1.0")
        seen.add(files(config))
    assert len(seen) == 5
    assert kept_step._identity(config, make_mesh(MeshConfig(data=8))) not in seen


def test_a_step_of_other_arrays_is_traced_anew(tmp_path, traces):
    config = dit_config(tmp_path)
    mesh = make_mesh(config.mesh)
    optimizer, train_step = update_of(config)
    batch = abstract_batch(config, mesh)
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct((8, *x.shape[1:]), x.dtype, sharding=x.sharding), batch)
    double = jax.tree.map(lambda x: jax.ShapeDtypeStruct((16, *x.shape[1:]), x.dtype, sharding=x.sharding), batch)
    for number, shapes in enumerate((half, double), start=1):
        state = create_state(config, optimizer, mesh)
        step_fn = KeptStep(config, mesh, tmp_path).compiled(jit_train_step(train_step, state), state, shapes, None)
        state, _ = step_fn(state, fill(shapes), None)
        assert int(state.step) == 1 and len(traces) == number
    with pytest.raises(TypeError, match="was compiled"):
        step_fn(state, fill(half), None)


def test_what_cannot_be_kept_is_compiled_by_every_start(tmp_path, monkeypatch):
    config = dit_config(tmp_path)
    wanted = run(config)

    def refuse(*_):
        raise ValueError("a custom call with no compatibility guarantee")

    monkeypatch.setattr(export, "export", refuse)
    assert_same(run(config, tmp_path), wanted)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_costs_nothing(tmp_path):
    config = dit_config(tmp_path)
    (tmp_path / "file").touch()
    assert_same(run(config, tmp_path / "file" / "no_folder"), run(config))
