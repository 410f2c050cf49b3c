"""Files of weights as people have them are read, or refused in one line that names what stands in the way; nothing of
them runs, and no memory is taken on their word.
"""

import argparse
import collections
import io
import json
import pickle
import struct
import sys
import tracemalloc
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.numpy import load_file, save_file

from dit_jax.evaluation.converted import check_position_table, read_file, released_config
from dit_jax.nn.embeddings import sincos_2d
from dit_jax.pretrained import pickles
from dit_jax.pretrained.dit import released_shape
from dit_jax.pretrained.files import find_weights, read_tensors, read_weights
from dit_jax.pretrained.name_map import unwrapped
from tests.hostile.corpus import torch_zip

WEIGHTS = collections.OrderedDict(
    {
        "matrix": torch.arange(12.0).reshape(3, 4),
        "half": torch.tensor([0.1, -2.0], dtype=torch.float16),
        "bfloat": torch.tensor([0.1, -2.0], dtype=torch.bfloat16),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "slice": torch.arange(10.0)[3:8:2],
        "count": torch.tensor(7),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
)
NEW_FORM_ALONE = {"eight": torch.tensor([1.0, 0.3]).to(torch.float8_e4m3fn)}


def save(path, content, **how):
    torch.save(content, path, **how)
    return path


def same(found, weights=WEIGHTS):
    assert sorted(found) == sorted(weights)
    for name, tensor in weights.items():
        np.testing.assert_array_equal(found[name], tensor.detach().float().numpy(), strict=True)


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_are_those_that_pytorch_reads(tmp_path, zipped):
    weights = WEIGHTS | (NEW_FORM_ALONE if zipped else {})
    same(read_tensors(save(tmp_path / "a.pt", weights, _use_new_zipfile_serialization=zipped)), weights)


def test_safetensors_of_every_dtype_are_read_or_named(tmp_path):
    weights = WEIGHTS | NEW_FORM_ALONE | {"mask": torch.tensor([True, False]), "number": torch.tensor(3)}
    weights = {name: tensor.detach().clone().contiguous() for name, tensor in weights.items()}
    safetensors.torch.save_file(weights, tmp_path / "a.safetensors")
    same(read_tensors(tmp_path / "a.safetensors"), weights)
    safetensors.torch.save_file({"z": torch.zeros(1, dtype=torch.complex64)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="tensor 'z' is of C64, not of F64"):
        read_tensors(tmp_path / "b.safetensors")


def make_class(name, base=object):
    """Returns a class of a module that the reader of its pickle need not have."""
    module, _, own_name = name.rpartition(".")
    parts = module.split(".")
    for i in range(len(parts)):
        sys.modules.setdefault(".".join(parts[: i + 1]), types.ModuleType(parts[i]))
    made = type(own_name, (base,), {"__module__": module})
    setattr(sys.modules[module], own_name, made)
    return made


@pytest.mark.parametrize("protocol", [2, 4])
def test_what_lightning_keeps_beside_the_weights_is_passed_over(tmp_path, protocol, monkeypatch):
    callback = make_class("lightning_there.callbacks.ModelCheckpoint")
    node = make_class("omegaconf_there.dictconfig.DictConfig", dict)
    config = node(a=1)
    config.parent = config
    beside = {
        "epoch": 3,
        "callbacks": {callback: {"best": np.float64(0.5), "scores": np.ones((2, 2)), "object": callback()}},
        "hyper_parameters": argparse.Namespace(config=config, shape=torch.Size([1]), dtype=torch.float16, kinds={1, 2}),
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4}]}],
        "best": np.float64(0.5),
        "counts": np.arange(3),
    }
    path = save(tmp_path / "a.ckpt", beside | {"state_dict": WEIGHTS}, pickle_protocol=protocol)
    for name in [name for name in sys.modules if name.startswith(("lightning_there", "omegaconf_there"))]:
        monkeypatch.delitem(sys.modules, name)
    found, notes = read_weights(path)
    same(found)
    assert notes == ["taken: what the file has in 'state_dict'"]
    found, notes = read_weights(
        save(tmp_path / "flat.ckpt", {"best": np.float64(0.5), "counts": np.arange(3), **WEIGHTS})
    )
    same(found)
    assert notes[0].startswith(
        "left out, no tensors: 2 values such as 'best' (numpy._core.multiarray.scalar), 'counts'"
    )


@pytest.mark.parametrize(
    ("nested", "taken"),
    [
        ({"model": {}, "ema": WEIGHTS, "opt": {"state": {}}}, "ema"),
        ({"model": {"state_dict": WEIGHTS}}, "model.state_dict"),
        ({"state_dict": {"a": torch.ones(1)}, "model_ema": WEIGHTS}, "model_ema"),
        ({"params": {"a": torch.ones(1)}, "params_ema": WEIGHTS}, "params_ema"),
        ({"teacher": WEIGHTS, "epoch": 3}, "teacher"),
    ],
)
def test_the_weights_are_found_in_the_dicts_around_them(tmp_path, nested, taken):
    found, notes = read_weights(save(tmp_path / "a.pt", nested))
    same(found)
    assert notes == [f"taken: what the file has in {taken!r}"]


def test_an_average_that_cannot_be_taken_is_said(tmp_path):
    _, notes = read_weights(save(tmp_path / "a.pt", {"model": WEIGHTS, "ema": {"shadow_params": [torch.ones(1)]}}))
    assert notes[0] == "the average 'ema' holds no tensors by name: 'model' is taken"


@pytest.mark.parametrize(
    "wrap", ["module.{}", "_orig_mod.{}", "module._orig_mod.{}", "_orig_mod.module.{}", "_fsdp_wrapped_module.{}"]
)
def test_names_lose_what_wraps_layers_for_training(tmp_path, wrap):
    inner = {"blocks.0.attn.weight": torch.ones(2), "out.bias": torch.zeros(1)}
    wrapped = {wrap.format(name.replace("attn", "attn._orig_mod")): tensor for name, tensor in inner.items()}
    same(read_tensors(save(tmp_path / "a.pt", wrapped)), inner)
    save_file({name: tensor.numpy() for name, tensor in wrapped.items()}, tmp_path / "a.safetensors")
    same(read_tensors(tmp_path / "a.safetensors"), inner)
    both = {"out.bias": torch.ones(1), "module.out.bias": torch.ones(1)}
    with pytest.raises(ValueError, match="tensor 'out.bias' is there twice, as 'module.out.bias' too"):
        read_tensors(save(tmp_path / "b.pt", both))


def test_a_model_inside_another_is_taken_by_its_first_tensor():
    inner = {"first.weight": np.zeros(1), "b": np.ones(1)}
    found, notes = unwrapped(
        {f"net.model.{name}": x for name, x in inner.items()} | {"loss.w": np.ones(1)}, ("first.weight",)
    )
    assert found == inner
    assert notes == [
        "taken: the tensors whose names begin with 'net.model.'", "left out: 1 tensors such as 'loss.w'"
    ]  # fmt: skip
    two = {f"{prefix}.first.weight": np.zeros(1) for prefix in ("student", "teacher")}
    with pytest.raises(ValueError, match=r"two models are there, of 'student\.' and of 'teacher\.'; keep one"):
        unwrapped(two, ("first.weight",))
    average = {f"{prefix}.first.weight": np.full(1, i) for i, prefix in enumerate(("model", "ema_model"))}
    assert unwrapped(average, ("first.weight",))[0] == {"first.weight": np.ones(1)}
    ldm = {"model.diffusion_model.first.weight": np.zeros(1), "control.first.weight": np.zeros(1)}
    assert unwrapped(ldm, ("first.weight",), "model.diffusion_model.") == (ldm, [])


# Half precision, and no table of positions


def released_dit(**more):
    """Returns the tensors that tell a released DiT's shape: width 16, patches of 2, an input of 8 x 8 x 4."""
    shapes = {"x_embedder.proj.weight": (16, 4, 2, 2), "final_layer.linear.bias": (16,)}
    shapes |= {"y_embedder.embedding_table.weight": (4, 16), "blocks.0.mlp.fc2.bias": (16,)}
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()} | more


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_a_table_of_positions_may_be_rounded_to_half_precision_and_be_no_other(dtype):
    shape = {"height": 32, "patch_size": 2, "width": 64}
    table = sincos_2d(16, 16, 64)[None]
    check_position_table(table.astype(dtype).astype(np.float32), shape)
    for other in (table + 2e-3, np.roll(table, 1, axis=1).astype(dtype).astype(np.float32)):
        with pytest.raises(ValueError, match="tensor 'pos_embed' must be DiT's sine-cosine table"):
            check_position_table(other.astype(np.float32), shape)


def test_without_a_table_of_positions_the_config_tells_the_size(tmp_path):
    save_file(released_dit(), tmp_path / "a.safetensors")
    shape, *_ = read_file("dit", tmp_path / "a.safetensors")
    assert "height" not in shape and shape["num_classes"] == 3
    with pytest.raises(
        ValueError, match="tensor 'pos_embed' is missing, which tells the size of the input; give --config"
    ):
        released_config("dit", shape)
    assert released_shape(released_dit(pos_embed=np.zeros((1, 16, 16))))["height"] == 8


# Folders: several files and an index, variants


def write_shards(folder, stem, suffix, index, tensors):
    """Writes tensors to two files and an index of them."""
    places = {}
    for i, names in enumerate((sorted(tensors)[:3], sorted(tensors)[3:]), 1):
        file = f"{stem}-{i:05d}-of-00002{suffix}"
        part = {name: tensors[name].detach().clone() for name in names}
        if suffix == ".bin":
            save(folder / file, part)
        else:
            save_file({name: x.float().numpy().copy("C") for name, x in part.items()}, folder / file)
        places |= dict.fromkeys(names, file)
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))


@pytest.mark.parametrize(
    ("stem", "suffix", "index"),
    [
        ("model", ".safetensors", "model.safetensors.index.json"),
        ("model", ".bin", "model.bin.index.json"),
        ("model.fp16", ".safetensors", "model.safetensors.index.fp16.json"),
        ("model.fp16", ".bin", "model.bin.index.fp16.json"),
        ("model.fp16", ".safetensors", "model.fp16.safetensors.index.json"),
    ],
)
def test_weights_in_several_files_are_read_by_their_index(tmp_path, stem, suffix, index):
    write_shards(tmp_path, stem, suffix, index, WEIGHTS)
    path, notes = find_weights(tmp_path, ("model",))
    assert path.name == index and notes == ["the weights of variant fp16 are taken"] * ("fp16" in stem)
    same(read_tensors(path))


def test_of_a_folder_the_whole_weights_are_taken_then_a_variants(tmp_path):
    for name in ("model.fp16.safetensors", "model.fp16.bin", "model-00001-of-00002.safetensors", "config.json"):
        (tmp_path / name).touch()
    expected = tmp_path / "model.fp16.safetensors", ["the weights of variant fp16 are taken"]
    assert find_weights(tmp_path, ("model",)) == expected
    (tmp_path / "model.non_ema.safetensors").touch()
    with pytest.raises(
        ValueError, match="several variants, model.fp16.safetensors and model.non_ema.safetensors; keep"
    ):
        find_weights(tmp_path, ("model",))
    (tmp_path / "model.bin").touch()
    assert find_weights(tmp_path, ("model",)) == (tmp_path / "model.bin", [])
    with pytest.raises(ValueError, match="has none of other.safetensors, other.bin, nor an index or a variant"):
        find_weights(tmp_path, ("other",))


@pytest.mark.parametrize(
    "file", ["../a.safetensors", "/etc/passwd", "b/a.safetensors", "..", "..\\a.safetensors", "", 3, "a.json", None]
)
def test_an_index_names_files_beside_it_alone(tmp_path, file):
    save_file({"a": np.ones(1, np.float32)}, tmp_path / "a.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    (folder / "a.json").write_text(json.dumps({"weight_map": {"a": "a.json"}}))  # an index of itself
    with pytest.raises(ValueError, match="must be the name of a file beside it"):
        read_tensors(folder / "model.safetensors.index.json")


def test_an_index_that_its_files_do_not_keep_names_the_tensor(tmp_path):
    write_shards(tmp_path, "model", ".safetensors", "model.safetensors.index.json", WEIGHTS)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    tensors = load_file(shard)
    save_file({name: tensor for name, tensor in tensors.items() if name != "slice"}, shard)
    with pytest.raises(
        ValueError, match="model-00002-of-00002.safetensors lacks tensor 'slice' of model.safetensors.index"
    ):
        read_tensors(tmp_path / "model.safetensors.index.json")
    shard.unlink()
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors: no such file"):
        read_tensors(tmp_path / "model.safetensors.index.json")


# What is refused


LONG_CLASS = "package_there." + "module." * 30 + "Quantized"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"a": torch.eye(3).to_sparse()},
            "tensor 'a' is made by torch._utils._rebuild_sparse_tensor, so it is no plain",
        ),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "tensor 'a' is of torch.ComplexFloatStorage, not of float64"),
        ({"a": torch._neg_view(torch.ones(2))}, "tensor 'a' is negated or conjugated when it is read"),
        ({"a": torch.empty(3, device="meta")}, "tensor 'a' is made by torch._utils._rebuild_meta_tensor_no_storage"),
        ({"model": make_class(LONG_CLASS)()}, f"it has 'model' ({LONG_CLASS}); nothing of it was run"),
        ({"model": make_class("package_there.\x1b[31mRed")()}, "'model' (package_there.\\x1b[31mRed)"),
        ({"\x1b[31mred": torch.eye(3).to_sparse()}, "tensor '\\x1b[31mred' is made by"),
        (make_class("package_there.Model")(), "must hold a dict of tensors, not package_there.Model"),
        ({"g": {"a": torch.ones(1)}, "d": {"a": torch.ones(1)}}, "several dicts of tensors; save one of them alone"),
        ({}, "it holds no tensors by name; it has nothing"),
        ([1, 2], "must hold a dict of tensors, not list"),
    ],
    ids=lambda value: None if isinstance(value, str) else "content",
)
def test_what_stands_in_the_way_is_named_whole_and_without_escape_codes(tmp_path, content, message):
    with pytest.raises(ValueError) as error:
        read_tensors(save(tmp_path / "a.pt", content))
    assert message in str(error.value)
    assert str(error.value).isprintable()


def test_a_flipped_bit_of_a_tensor_is_found(tmp_path):
    path = save(tmp_path / "a.pt", {"a": torch.full((64,), 3.0)})
    content = bytearray(path.read_bytes())
    content[content.index(struct.pack("<f", 3.0) * 64)] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="'a/data/0' in it is damaged: it is not what its sum is of"):
        read_tensors(path)


def test_a_place_before_the_beginning_is_damage_that_names_the_file(tmp_path):
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"}.")
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x40  # of the place of the list of members
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a.pt is truncated or not a PyTorch file"):
        read_tensors(path)


def call(name, argument):
    """Returns the opcodes of a call with one argument."""
    module, _, function = name.rpartition(".")
    return f"c{module}\n{function}\n".encode() + argument + b"\x85R"


def hostile_pickles():
    """Yields (name, pickle), which would take gigabytes or any time in an unpickler that believes it."""
    number = b"\x8a\x06" + (3 << 30).to_bytes(6, "little")
    yield "bytearrays", call("builtins.bytearray", call("builtins.bytearray", number))
    for name in (
        "builtins.bytes",
        "builtins.bytearray",
        "builtins.range",
        "builtins.list",
        "torch.zeros",
        "numpy.zeros",
    ):
        yield name, call(name, number)
    yield "a list times", b"coperator\nmul\n(]N\x61" + number + b"tR"
    yield "a shape", call("torch.Size", b"(" + number * 3 + b"t")
    yield "a new object", b"cbuiltins\nbytearray\n" + number + b"\x85\x81"
    yield "an instance", b"(" + number + b"ibuiltins\nbytearray\n"
    yield "a place in the memo", b"}r\xff\xff\xff\x7f"
    yield "a place in the memo, as text", b"}p" + b"9" * 4000 + b"\n"
    yield "bytes that are not there", b"\x8e" + struct.pack("<Q", 2**40)
    yield "a text that is not there", b"X\xff\xff\xff\xff"
    yield "a long number", b"\x8b\xff\xff\xff\x7f"
    yield "tuples that double", b")q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(100))
    yield (
        "dicts that double",
        b"}q\x00"
        + b"".join(b"}q%c(X\x01\x00\x00\x00ah%cX\x05\x00\x00\x00modelh%cu" % (i, i - 1, i - 1) for i in range(1, 99)),
    )
    yield "a dict in itself", b"}q\x00X\x05\x00\x00\x00modelh\x00s"
    yield "deep", b"N" + b"\x85" * 10_000
    yield "many opcodes", b"]" * 21_000
    keys = b"".join(b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N" for i in range(1, 3000))
    yield "keys of one hash", b"}(" + keys + b"u"


@pytest.mark.parametrize("form", ["zip", "old"])
@pytest.mark.parametrize("name", [name for name, _ in hostile_pickles()])
def test_no_memory_is_taken_on_the_word_of_a_pickle(tmp_path, name, form, monkeypatch):
    monkeypatch.setattr(pickles, "MAX_OPCODES", 20_000)  # else it takes seconds
    content = b"\x80\x02" + dict(hostile_pickles())[name] + b"."
    if form == "zip":
        content = torch_zip(content)
    else:
        old = io.BytesIO()
        torch.save({}, old, _use_new_zipfile_serialization=False)
        head = old.getvalue()
        content = (
            head[: head.rindex(b"\x80\x02", 0, head.rindex(b"\x80\x02"))] + content
        )  # after its three first pickles
    (tmp_path / "a.pt").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as error:
            read_tensors(tmp_path / "a.pt")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(str(error.value)) < 1500 and str(error.value).isprintable()
    assert peak < 20_000_000


def tensor_call(shape, numel=4, key="0", storage="FloatStorage"):
    """Returns a pickle of {"a": tensor} that claims a shape and a storage's size."""

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Storage(), 0, shape, (1,) * len(shape), False, {})

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", getattr(torch, storage), key, "cpu", numel) if isinstance(value, Storage) else None

    file = io.BytesIO()
    Pickler(file, 2).dump({"a": Tensor()})
    return file.getvalue()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (2**35,)}, "its tensors would take 137,438,953,472 bytes, 4 times more than it has"),
        ({"shape": (2**30, 0)}, None),
        ({"shape": (8,), "numel": 2**40}, "tensor 'a' does not fit its 16 bytes"),
        ({"shape": (4,), "key": "../data.pkl"}, "it has no 'archive/data/../data.pkl'"),
        ({"shape": (-1,)}, "tensor 'a' is damaged: it has no shape"),
        ({"shape": (2**62, 2**62)}, "tensor 'a' is damaged: it has no shape"),
    ],
)
def test_a_tensor_is_no_larger_than_what_is_there(tmp_path, changes, message):
    (tmp_path / "a.pt").write_bytes(torch_zip(tensor_call(**changes), extra=bytes(16)))
    if message is None:
        assert read_tensors(tmp_path / "a.pt")["a"].size == 0
        return
    with pytest.raises(ValueError, match=message):
        read_tensors(tmp_path / "a.pt")
