"""Files in ADM's form: ours are read by a reader as ADM's evaluation reads them, and theirs by ours."""

import io
import pathlib
import zipfile

import numpy as np
import pytest

from dit_jax.metrics import adm_files
from dit_jax.metrics.adm_files import SamplesFile, has_statistics, read_statistics, write_samples, write_statistics
from dit_jax.metrics.frechet import Statistics, statistics

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (10, 4, 6, 3), np.uint8)
POOL, SPATIAL = (statistics(RNG.standard_normal((20, d))) for d in (6, 7))


def read_as_adm_does(path):
    """Returns the images as a stream and the statistics as ADM takes them: float64 means [D], covariances [D, D]."""
    images, found = [], {}
    with zipfile.ZipFile(path) as archive:
        if "arr_0.npy" in archive.namelist():
            with archive.open("arr_0.npy") as file:
                assert np.lib.format.read_magic(file) == (1, 0)
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
                assert not fortran and dtype == np.uint8
                size = int(np.prod(shape[1:]))
                images = [np.frombuffer(file.read(size), dtype).reshape(shape[1:]) for _ in range(shape[0])]
    arrays = np.load(path)
    if "mu" in arrays:
        found = {name: arrays[name] for name in ("mu", "sigma", "mu_s", "sigma_s")}
    return images, found


def test_what_is_written_is_accepted_by_adms_reader(tmp_path):
    write_samples(tmp_path / "samples.npz", IMAGES, np.arange(10))
    images, found = read_as_adm_does(tmp_path / "samples.npz")
    assert np.array_equal(images, IMAGES) and not found
    write_statistics(tmp_path / "reference.npz", POOL, SPATIAL)
    images, found = read_as_adm_does(tmp_path / "reference.npz")
    assert images == []
    for name, expected in (("mu", POOL.mean), ("sigma", POOL.covariance), ("mu_s", SPATIAL.mean)):
        assert found[name].dtype == np.float64 and np.array_equal(found[name], expected)
    assert np.array_equal(found["sigma_s"], SPATIAL.covariance)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", ["float32", "float64", ">f8"])
def test_a_file_of_adms_is_read(save, dtype, tmp_path):
    path = tmp_path / "VIRTUAL_reference.npz"
    mean, covariance = POOL.mean.astype(dtype), np.asfortranarray(POOL.covariance.astype(dtype))
    save(path, arr_0=IMAGES, mu=mean, sigma=covariance, mu_s=SPATIAL.mean, sigma_s=SPATIAL.covariance)
    assert has_statistics(path)
    found = read_statistics(path)
    assert found.mean.dtype == found.covariance.dtype == np.float64 and found.count is None
    np.testing.assert_allclose(found.mean, POOL.mean, rtol=1e-6)
    np.testing.assert_allclose(found.covariance, POOL.covariance, rtol=1e-5, atol=1e-7)
    assert np.array_equal(read_statistics(path, "spatial").covariance, SPATIAL.covariance)
    samples = SamplesFile(path)
    assert len(samples) == 10 and samples.labels is None
    assert [len(batch) for batch in samples.batches(4)] == [4, 4, 2]
    assert np.array_equal(np.concatenate(list(samples.batches(3))), IMAGES)


def test_what_is_written_comes_back(tmp_path):
    write_samples(tmp_path / "samples.npz", IMAGES, np.arange(10))
    samples = SamplesFile(tmp_path / "samples.npz")
    assert samples.labels.dtype == np.int32 and np.array_equal(samples.labels, np.arange(10))
    assert np.array_equal(np.concatenate(list(samples.batches(10))), IMAGES)
    assert not has_statistics(tmp_path / "samples.npz")
    write_statistics(tmp_path / "reference.npz", POOL)
    found = read_statistics(tmp_path / "reference.npz")
    assert found.count == 20 and np.array_equal(found.covariance, POOL.covariance)
    with pytest.raises(ValueError, match=r"reference.npz must have the array mu_s, but has mu, num_images, sigma$"):
        read_statistics(tmp_path / "reference.npz", "spatial")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arr_0": None}, "must have the array arr_0, but has labels"),
        ({"arr_0": IMAGES / 255.0}, r"arr_0 must be images uint8 \[N, H, W, 3\] in \[0, 255\], not float64"),
        ({"arr_0": IMAGES[..., :2]}, r"arr_0 must be images uint8 \[N, H, W, 3\].*not uint8 \[10, 4, 6, 2\]"),
        ({"arr_0": IMAGES[0]}, r"not uint8 \[4, 6, 3\]"),
        ({"arr_0": IMAGES[:0], "labels": None}, r"not uint8 \[0, 4, 6, 3\]"),
        ({"arr_0": np.asfortranarray(IMAGES)}, "in C order .* in Fortran order"),
        ({"arr_0": np.zeros((2, 1, 2049, 3), np.uint8), "labels": None}, "images of 2048 pixels a side, not"),
        ({"labels": np.arange(9)}, r"labels must be integers \[10\], not int64 \[9\]"),
        ({"labels": np.arange(10.0)}, r"labels must be integers \[10\], not float64 \[10\]"),
        ({"labels": np.arange(10) - 1}, "classes from 0 on, not -1 to 8"),
    ],
)
def test_what_is_wrong_with_samples_is_named(change, message, tmp_path):
    arrays = {"arr_0": IMAGES, "labels": np.arange(10)} | change
    np.savez(tmp_path / "samples.npz", **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(ValueError, match=message) as caught:
        SamplesFile(tmp_path / "samples.npz")
    assert "\n" not in str(caught.value) and "samples.npz" in str(caught.value)


ASYMMETRIC, NEGATIVE, INFINITE = (POOL.covariance.copy() for _ in range(3))
ASYMMETRIC[0, 1] += 0.1
NEGATIVE[2, 2] = -1
INFINITE[0, 0] = np.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mu": None}, "must have the array mu, but has sigma"),
        ({"sigma": None}, "must have the array sigma, but has mu"),
        ({"mu": np.arange(6)}, r"mu must be floats \[D\], D <= 8192, not int64 \[6\]"),
        ({"mu": POOL.mean[None]}, r"mu must be floats \[D\].*not float64 \[1, 6\]"),
        ({"mu": np.zeros(8193)}, r"D <= 8192, not float64 \[8193\]"),
        ({"sigma": SPATIAL.covariance}, r"sigma must be floats \[6, 6\], as mu says, not float64 \[7, 7\]"),
        ({"mu": POOL.mean * np.nan}, "mu must be finite"),
        ({"sigma": INFINITE}, "sigma must be finite"),
        ({"sigma": NEGATIVE}, "a variance of -1"),
        ({"sigma": ASYMMETRIC}, "sigma must be symmetric, but differs from its transpose by 0.1"),
        ({"num_images": np.array([1.0, 2.0])}, r"num_images must be one integer, not float64 \[2\]"),
    ],
)
def test_what_is_wrong_with_statistics_is_named(change, message, tmp_path):
    arrays = {"mu": POOL.mean, "sigma": POOL.covariance} | change
    np.savez(tmp_path / "reference.npz", **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(ValueError, match=message) as caught:
        read_statistics(tmp_path / "reference.npz")
    assert "\n" not in str(caught.value) and "reference.npz" in str(caught.value)


def member(array=None, header=None):
    """Returns the bytes of an .npy: of an array, or with a made-up header and few bytes after it."""
    file = io.BytesIO()
    if header is None:
        np.lib.format.write_array(file, array)
    else:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(100))
    return file.getvalue()


def claim(shape, descr="|u1"):
    return member(header={"descr": descr, "fortran_order": False, "shape": shape})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (claim((10**6, 2048, 2048, 3)), "must be numbers in C order that fill its 100 bytes, not uint8"),
        (claim((2**40, 2**40, 2**40, 3)), "that fill its 100 bytes"),
        (claim((-5, -5, 4, 1)), r"arr_0 must be images uint8 \[N, H, W, 3\]"),
        (claim((5, 5, 4), "|O"), "must be numbers in C order"),
        (b"\x93NUMPY\x09\x00junk", r"not an array as NumPy writes them \(.*version \(9, 0\)"),
        (b"not an array at all", "not an array as NumPy writes them"),
    ],
)
def test_a_header_that_lies_is_named_before_memory_is_taken(content, message, tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.npz", "w") as archive:
        archive.writestr("arr_0.npy", content)
    with pytest.raises(ValueError, match=message):
        SamplesFile(tmp_path / "bad.npz")


@pytest.mark.parametrize("grey", [IMAGES[..., 0], IMAGES[..., :1]])
def test_grey_images_of_any_name_or_alone_in_a_file_are_read_as_rgb(grey, tmp_path):
    np.savez(tmp_path / "grey.npz", pictures=grey, labels=np.arange(10))
    np.save(tmp_path / "grey.npy", grey)
    for name in ("grey.npz", "grey.npy"):
        file = SamplesFile(tmp_path / name)
        assert file.shape == (10, 4, 6, 3) and len(file) == 10
        assert np.array_equal(np.concatenate(list(file.batches(3))), np.repeat(IMAGES[..., :1], 3, axis=-1))
    assert SamplesFile(tmp_path / "grey.npz").labels.tolist() == list(range(10))
    with pytest.raises(ValueError, match="grey.npy is truncated|that fill its"):
        (tmp_path / "grey.npy").write_bytes((tmp_path / "grey.npy").read_bytes()[:-1])
        SamplesFile(tmp_path / "grey.npy")


@pytest.mark.parametrize("shape", [(3, 2048, 2048, 3), (9, 2048, 2048), (400, 256, 256, 1)])
def test_images_in_memory_are_bounded_by_their_bytes_not_their_number(shape, tmp_path, monkeypatch):
    monkeypatch.setattr(adm_files, "MAX_BATCH_BYTES", 2**24)
    np.savez_compressed(tmp_path / "samples.npz", arr_0=np.zeros(shape, np.uint8))
    sizes = [batch.nbytes for batch in SamplesFile(tmp_path / "samples.npz").batches(1024)]
    assert max(sizes) <= 2**24 and sum(sizes) == np.prod(shape[:3]) * 3


def test_a_pickle_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "run",)

    np.savez(tmp_path / "bad.npz", arr_0=np.array([Evil()]), mu=np.array([Evil()]))
    for read in (SamplesFile, read_statistics):
        with pytest.raises(ValueError, match="must be numbers in C order"):
            read(tmp_path / "bad.npz")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_file_is_named(save, tmp_path):
    path = tmp_path / "samples.npz"
    save(path, arr_0=IMAGES)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="truncated or not an .npz file"):
        SamplesFile(path)
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(ValueError, match="truncated or not an .npz file"):
        list(SamplesFile(path).batches(4))
    with pytest.raises(ValueError, match="nowhere.npz: no such file"):
        SamplesFile(tmp_path / "nowhere.npz")


def test_nothing_is_left_of_a_file_that_could_not_be_written(tmp_path, monkeypatch):
    def fails(file, **_):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(adm_files.np, "savez", fails)
    with pytest.raises(OSError, match="disk full"):
        write_statistics(tmp_path / "reference.npz", Statistics(POOL.mean, POOL.covariance))
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"images must be uint8 \[N, H, W, 3\], not float64"):
        write_samples(tmp_path / "samples.npz", IMAGES / 2)
