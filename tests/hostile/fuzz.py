"""Property-based fuzzing of every reader: whatever the bytes, it reads them or raises ValueError or OSError.

    python -m tests.hostile.fuzz --examples=20000 [--reader=safetensors]

Bytes are arbitrary, or a valid file with pieces cut, doubled and overwritten. Prints the most memory that Python took
for one input; ends at the first other error, with the smallest input that causes it.
"""

import argparse
import io
import json
import pathlib
import pickle
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dit_jax.config import DataConfig, config_from_dict
from dit_jax.data import archives, latent_cache
from dit_jax.data.pipeline import image_transform
from dit_jax.data.sources import open_source
from dit_jax.files import read_json
from dit_jax.metrics import adm_files, history
from dit_jax.pretrained.files import read_pickled_arrays, read_tensors
from tests.hostile import corpus

MAX_MEMORY = 2**30  # bytes that Python may take for one input: twice what the largest image takes that is decoded


def mutated(valid: list[bytes]) -> st.SearchStrategy[bytes]:
    """Returns bytes that are arbitrary, or one of the valid files with up to four pieces changed."""

    @st.composite
    def change(draw) -> bytes:
        content = bytearray(draw(st.sampled_from(valid)))
        for _ in range(draw(st.integers(0, 4))):
            start = draw(st.integers(0, len(content)))
            stop = draw(st.integers(start, min(len(content), start + 64)))
            piece = draw(st.one_of(st.binary(max_size=16), st.just(bytes(content[start:stop]) * 2)))
            content[start:stop] = piece
        return bytes(content)

    return st.one_of(st.binary(max_size=300), change(), change())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def changed_json(valid: dict) -> st.SearchStrategy:
    """Returns JSON values: arbitrary ones, or the valid one with some of its keys, on two levels, set to others."""

    @st.composite
    def change(draw):
        values = json.loads(json.dumps(valid))
        for _ in range(draw(st.integers(1, 3))):
            key = draw(st.sampled_from(sorted(values)))
            if isinstance(values[key], dict) and values[key] and draw(st.booleans()):
                values[key][draw(st.sampled_from(sorted(values[key])))] = draw(JSON)
            else:
                values[key] = draw(JSON)
        return values

    return st.one_of(JSON, change(), change())


def valid_tensors() -> list[bytes]:
    """Returns safetensors files, of several dtypes."""
    from safetensors.numpy import save

    return [save({"a": np.zeros((2, 3), "f4"), "b": np.ones(2, "f2")}), corpus.safetensors(corpus.entry(), bytes(4))]


def valid_torch() -> list[bytes]:
    """Returns PyTorch files in both of its forms."""
    import torch

    files = []
    for zipped in (True, False):
        file = io.BytesIO()
        weights = {"model": {"a": torch.zeros(2, 3), "b": torch.ones(2, dtype=torch.float16)}}
        torch.save(weights, file, _use_new_zipfile_serialization=zipped)
        files.append(file.getvalue())
    return files


def valid_npz() -> list[bytes]:
    """Returns ADM's two kinds of files."""
    files = []
    for arrays in (
        {"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "labels": np.zeros(2, np.int64)},
        {"mu": np.zeros(3), "sigma": np.eye(3), "mu_s": np.zeros(2), "sigma_s": np.eye(2)},
    ):
        for save in (np.savez, np.savez_compressed):
            file = io.BytesIO()
            save(file, **arrays)
            files.append(file.getvalue())
    return files


def valid_images() -> list[bytes]:
    """Returns small images in each format, and two that lie about their size."""
    from PIL import Image

    files = [corpus.png(1, 80_000_000), corpus.jpeg(9000, 9000)]
    for form in ("PNG", "JPEG", "WEBP", "BMP", "GIF"):
        file = io.BytesIO()
        Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(file, form)
        files.append(file.getvalue())
    return files


def valid_archives() -> list[bytes]:
    """Returns an archive of each kind."""
    import bz2
    import gzip
    import tarfile
    import zipfile

    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/b", bytes(100))
    tar = corpus.tar_gz((tarfile.TarInfo("a/b"), bytes(100)))
    return [tar, gzip.decompress(tar), gzip.compress(bytes(100)), bz2.compress(bytes(100)), zipped.getvalue()]


MANIFEST = {
    "version": 2,
    "data": {"name": "a", "num_classes": 3, "splits": {"train": 3}},
    "autoencoder": "abc",
    "splits": {"train": 3},
    "latent_shape": [2, 2, 1],
    "stochastic": False,
    "num_flips": 1,
    "dtype": "float16",
    "extra_fields": [],
    "mean": [0.0],
    "std": [1.0],
    "scale": 1.0,
    "shards": {"train": [["latents-train-00000-of-00001.arrayrecord", 3, 100, "abc"]]},
}
CONFIG = {
    "stage": "diffusion",
    "data": {"name": "a", "image_size": 8, "channels": 1, "num_classes": 3},
    "dit": {"depth": 2, "width": 32, "num_heads": 2, "patch_size": 2},
    "training": {"num_train_steps": 4},
    "sampling": {"num_steps": 3, "cfg_channels": None},
    "diffusion": {"num_timesteps": 10},
    "latents": {"shape": [4, 4, 2]},
    "mesh": {"data": 2, "rules": [["a", ["fsdp"]]]},
}


def image_folder(folder: pathlib.Path, image: bytes | None, metadata: bytes | None = None):
    """Reads an image folder's only image as training does."""
    (folder / "a").mkdir(exist_ok=True)
    (folder / "a" / "0.png").write_bytes(image or corpus.png(1, 1))
    fields = ()
    if metadata is not None:
        (folder / "metadata.jsonl").write_bytes(metadata)
        fields = ("caption",)
    data = DataConfig(name=str(folder), image_size=4, num_classes=1, extra_fields=fields)
    source = open_source(data, "train")
    if image is not None:
        image_transform(data, train=True)(source[0], np.random.default_rng(0))


def readers(folder: pathlib.Path) -> Iterator[tuple[str, st.SearchStrategy, Callable]]:
    """Yields (name, inputs, function that reads one)."""

    def of_file(name: str, read: Callable) -> Callable:
        def write_and_read(content: bytes) -> None:
            (folder / name).write_bytes(content)
            read(folder / name)

        return write_and_read

    def of_json(name: str, read: Callable) -> Callable:
        return lambda value: of_file(name, read)(json.dumps(value).encode())

    pickles = [pickle.dumps({"a": {"b": np.zeros(3, "f4")}, "c": np.ones((2, 2), "f2")}, p) for p in (3, 4)]
    row = b'{"step": 1, "split": "train", "seconds": 1.0, "loss": 1.0}\n'
    caption = b'{"file_name": "a/0.png", "caption": "a"}\n'

    def read_npz(path: pathlib.Path) -> None:
        if adm_files.has_statistics(path):
            adm_files.read_statistics(path)
        else:
            list(adm_files.SamplesFile(path).batches(2))

    yield "safetensors", mutated(valid_tensors()), of_file("a.safetensors", read_tensors)
    yield "torch", mutated(valid_torch()), of_file("a.pt", read_tensors)
    yield "pickle", mutated(pickles), of_file("a.ckpt", read_pickled_arrays)
    yield "npz", mutated(valid_npz()), of_file("a.npz", read_npz)
    yield "image", mutated(valid_images()), lambda content: image_folder(folder / "images", content)
    yield "metadata", mutated([caption]), lambda content: image_folder(folder / "fields", None, content)
    for suffix in (".tar.gz", ".tar", ".gz", ".bz2", ".zip"):
        yield f"archive{suffix}", mutated(valid_archives()), of_file(f"a{suffix}", archives.check_archive)
    yield "json", mutated([json.dumps(MANIFEST).encode()]), of_file("a.json", read_json)
    manifest = of_json("cache/manifest.json", lambda path: latent_cache.read_manifest(path.parent))
    yield "manifest", changed_json(MANIFEST), manifest
    yield "config", changed_json(CONFIG), config_from_dict
    yield (
        "metrics",
        mutated([row]),
        of_file("run/metrics/metrics.jsonl", lambda _: history.read_metrics(folder / "run")),
    )


def fuzz(name: str, num_examples: int, deterministic: bool = True) -> int:
    """Gives a reader so many inputs; returns the most bytes that Python took for one."""
    most = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        for part in ("cache", "run/metrics", "images", "fields"):
            (folder / part).mkdir(parents=True)
        inputs, read = {key: (inputs, read) for key, inputs, read in readers(folder)}[name]

        @settings(
            max_examples=num_examples,
            deadline=None,
            database=None,
            derandomize=deterministic,
            suppress_health_check=list(HealthCheck),
        )
        @given(inputs)
        def reads_or_says_what_is_wrong(content) -> None:
            nonlocal most
            tracemalloc.start()
            try:
                read(content)
            except (ValueError, OSError) as error:
                assert str(error)
            finally:
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
            most = max(most, peak)
            assert peak < MAX_MEMORY, f"{peak:,} bytes"

        reads_or_says_what_is_wrong()
    return most


def names() -> list[str]:
    """Returns the names of the readers."""
    return [name for name, *_ in readers(pathlib.Path("/nowhere"))]


def main() -> int:
    """Fuzzes; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=20_000, help="of each reader (default: %(default)s)")
    parser.add_argument("--reader", choices=names(), help="default: all of them")
    args = parser.parse_args()
    for name in [args.reader] if args.reader else names():
        most = fuzz(name, args.examples, deterministic=False)
        print(f"{name}: {args.examples:,} inputs, at most {most / 2**20:.1f} MiB for one", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
