"""Pickles of arrays: read with the same bits, while nothing that a made-up one asks for is run or reserved."""

import gzip
import io
import os
import pickle
import struct
import tarfile
import tracemalloc

import numpy as np
import pytest

from dit_jax.pretrained.files import read_pickled_arrays

REFUSED = "must be a pickle of dicts of NumPy arrays; it is damaged or another thing, and nothing of it was run"
RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n"
EMPTY_ARRAY = RECONSTRUCT + b"cnumpy\nndarray\nK\x00\x85C\x01b\x87R"
MINUS_1 = b"J\xff\xff\xff\xff"
FLOAT32 = b"cnumpy\ndtype\nX\x02\x00\x00\x00f4\x89\x88\x87R(K\x03X\x01\x00\x00\x00<NNN" + 2 * MINUS_1 + b"K\x00tb"


def arrays():
    rng = np.random.default_rng(0)
    return {
        "trunk": {"conv": {"kernel": rng.normal(size=(3, 3, 2, 4)).astype(np.float32), "bias": np.zeros(4, "f4")}},
        "head": np.arange(6, dtype=np.float16),
    }


def read(tmp_path, content):
    path = tmp_path / "weights.ckpt"
    path.write_bytes(content)
    return read_pickled_arrays(path)


@pytest.mark.parametrize("protocol", [3, 4])
def test_arrays_are_read_with_their_bits(protocol, tmp_path):
    found = read(tmp_path, pickle.dumps(arrays(), protocol))
    expected = pickle.loads(pickle.dumps(arrays()))
    assert sorted(found) == ["head", "trunk/conv/bias", "trunk/conv/kernel"]
    np.testing.assert_array_equal(found["trunk/conv/kernel"], expected["trunk"]["conv"]["kernel"], strict=True)
    np.testing.assert_array_equal(found["head"], expected["head"], strict=True)


def test_numpy_1s_names_other_byte_orders_and_layouts_are_read(tmp_path):
    written = {"a": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "b": np.arange(3, dtype=">f4")}
    content = pickle.dumps(written, 3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    found = read(tmp_path, content)
    np.testing.assert_array_equal(found["a"], written["a"])
    np.testing.assert_array_equal(found["b"], written["b"])


class Runs:
    """An object whose pickle runs a command."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def hostile(marker):
    """Yields (name, pickle), each of which would run a command, call what it should not, or fill the memory."""
    command = f"touch {marker}"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        yield f"a command, protocol {protocol}", pickle.dumps({"a": Runs(os.system, command)}, protocol)
        objects = np.array([Runs(os.system, command)], dtype=object)
        yield f"an array of objects, protocol {protocol}", pickle.dumps({"a": objects}, protocol)
    yield "attributes", pickle.dumps(Runs(getattr, Runs(__import__, "os"), "system"), 3)
    yield "an attribute of a module, dotted", b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93."
    yield "a module's function", b"cnumpy\nload\nX\x01\x00\x00\x00x\x85R."
    yield "by an extension", b"\x80\x02\x82\x01."
    yield "by an identity", b"Pos\n."
    yield "an instance", f"(S'{command}'\nios\nsystem\n.".encode()
    yield "a new object", b"\x80\x02cnumpy\nndarray\nK\x01\x85\x85\x81."
    yield "NumPy's array called", b"\x80\x03cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85\x85R."
    yield "state for the class", b"\x80\x03" + RECONSTRUCT + b"}b."
    yield "state for the name", b"\x80\x03cnumpy\nndarray\nN}X\x01\x00\x00\x00aK\x01s\x86b."
    yield "attributes for a dict", b"\x80\x03}N}X\x01\x00\x00\x00aK\x01s\x86b."
    yield "objects by dtype", b"\x80\x03cnumpy\ndtype\nX\x01\x00\x00\x00O\x89\x88\x87R."
    yield "a dtype alone", b"\x80\x03}X\x01\x00\x00\x00a" + FLOAT32 + b"s."
    yield "an array without state", b"\x80\x03}X\x01\x00\x00\x00a" + EMPTY_ARRAY + b"s."
    yield "bytes that it does not have", b"\x80\x03B\xff\xff\xff\xffabc."
    yield "more bytes than there are addresses", b"\x80\x04\x8e" + b"\xff" * 8 + b"abc."
    yield "a text that it does not have", b"\x80\x03X\xff\xff\xff\xffabc."
    yield "a frame that it does not have", b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"}."
    yield "a place far off in the memo", b"\x80\x03}r\xff\xff\xff\x7f."
    yield "a place off in the memo", b"\x80\x03}r\x00\x00\x00\x01."
    yield "an object never kept", b"\x80\x03j\xff\xff\xff\x7f."
    for shape in (
        b"M\xff\xff\x85",
        b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86",
        b"J\xff\xff\xff\xff\x85",
        b"K\x04",
        b"K\x03\x85",
    ):
        state = b"(K\x01" + shape + FLOAT32 + b"\x89C\x08abcdefghtb"
        yield f"shape {shape}", b"\x80\x03}X\x01\x00\x00\x00a" + EMPTY_ARRAY + state + b"s."
    yield "a dict in itself", b"\x80\x03}q\x00X\x01\x00\x00\x00ah\x00s."
    doubling = b"".join(b"}q%c(X\x01\x00\x00\x00ah%cX\x01\x00\x00\x00bh%cu" % (i, i - 1, i - 1) for i in range(1, 100))
    yield "dicts that double", b"\x80\x03}q\x00" + doubling + b"."
    yield "many opcodes", b"\x80\x03" + b"N" * 50_000 + b"."
    yield "deep", b"\x80\x03}" + b"N" + b"\x85" * 9_000 + b"K\x01s."
    yield "long keys", b"\x80\x03}X\x00\x01\x00\x00" + b"a" * 256 + EMPTY_ARRAY + b"s."
    yield "a number as key", pickle.dumps({1: np.zeros(1)}, 3)
    yield "integers", pickle.dumps({"a": np.zeros(1, np.int32)}, 3)
    yield "no dict", pickle.dumps("text", 3)
    yield "nothing", b""
    yield "no pickle", b"PK\x03\x04 and more"


@pytest.mark.parametrize("name", [name for name, _ in hostile("/nowhere")])
def test_other_pickles_are_refused_and_run_nothing(name, tmp_path):
    marker = tmp_path / "ran"
    content = dict(hostile(marker))[name]
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=REFUSED) as error:
            read(tmp_path, content)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert not marker.exists()
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    assert peak < 5_000_000


def test_every_truncation_is_refused(tmp_path):
    content = pickle.dumps(arrays(), 4)
    for end in range(len(content)):
        with pytest.raises(ValueError, match=REFUSED):
            read(tmp_path, content[:end])


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_damaged_pickles_give_arrays_or_an_error(tmp_path):
    rng = np.random.default_rng(0)
    for protocol in (3, 4):
        whole = pickle.dumps(arrays(), protocol)
        for _ in range(1_000):
            content = bytearray(whole)
            for at in rng.integers(len(content), size=rng.integers(1, 4)):
                content[at] = rng.integers(256)
            try:
                found = read(tmp_path, bytes(content))
            except ValueError as error:
                assert "\n" not in str(error)
            else:
                assert all(type(array) is np.ndarray and array.dtype.kind == "f" for array in found.values())


def archive(path, *members):
    """Writes a .tar.gz of (name, content, changes of its header)."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content, changes in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in changes.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_a_member_of_an_archive_is_read_and_nothing_else(tmp_path):
    content = pickle.dumps(arrays(), 4)
    path = archive(tmp_path / "a.tar.gz", ("a-1/setup.py", b"raise", {}), ("a-1/weights/b.ckpt", content, {}))
    before = sorted(tmp_path.rglob("*"))
    assert sorted(read_pickled_arrays(path, "/weights/b.ckpt")) == ["head", "trunk/conv/bias", "trunk/conv/kernel"]
    assert sorted(tmp_path.rglob("*")) == before


def test_archives_without_the_member_or_larger_than_they_look_are_refused(tmp_path):
    link = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}
    path = archive(tmp_path / "link.tar.gz", ("a/b.ckpt", b"", link))
    with pytest.raises(ValueError, match=r"must hold a file /b\.ckpt, but does not"):
        read_pickled_arrays(path, "/b.ckpt")
    path = tmp_path / "bomb.tar.gz"
    path.write_bytes(gzip.compress(bytes(50_000_000)))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"unpacks to more than 1,\d{3},\d{3} bytes, as weights of its size do not"):
        read_pickled_arrays(path, "/b.ckpt")
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()
    sparse = {"pax_headers": {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(2**40)}}
    path = archive(tmp_path / "sparse.tar.gz", ("a/b.ckpt", os.urandom(4000), sparse))
    with pytest.raises(ValueError, match=r"must hold a file /b\.ckpt, but does not"):
        read_pickled_arrays(path, "/b.ckpt")
    whole = archive(tmp_path / "whole.tar.gz", ("a/b.ckpt", os.urandom(4000), {})).read_bytes()
    for end in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.tar.gz").write_bytes(whole[:end])
        with pytest.raises(ValueError, match="is truncated or not a .tar.gz file"):
            read_pickled_arrays(tmp_path / "cut.tar.gz", "/b.ckpt")
