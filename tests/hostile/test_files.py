"""Names that lead elsewhere, sizes that lie, folders whose programs would be run: found before anything is used."""

import dataclasses
import json
import tarfile

import numpy as np
import pytest

from dit_jax.cli.main import main
from dit_jax.config import ComputeConfig, DataConfig
from dit_jax.data.archives import check_archive
from dit_jax.data.latent_cache import read_manifest
from dit_jax.data.pipeline import image_transform
from dit_jax.data.sources import open_source
from dit_jax.evaluation.loaded import copy_weights
from dit_jax.files import MAX_BYTES, read_json
from tests.hostile import corpus
from tests.hostile.fuzz import MANIFEST
from tests.tiny import dit_config


def link(target):
    info = tarfile.TarInfo("a/link")
    info.type, info.linkname = tarfile.SYMTYPE, target
    return corpus.tar_gz((info, b""))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tar.gz", corpus.tar_gz((tarfile.TarInfo("../../a"), b"x")), "'../../a' leads out"),
        ("a.tgz", corpus.tar_gz((tarfile.TarInfo("a/../../b"), b"x")), "leads out"),
        ("a.tar.gz", corpus.tar_gz((tarfile.TarInfo("/etc/a"), b"x")), "'/etc/a' leads out"),
        ("a.tar.gz", link("/etc/passwd"), "'/etc/passwd' leads out"),
        ("a.tar.gz", link("../../../etc"), "leads out"),
        ("a.zip", corpus.npz({"../a": b"x"}), "'../a' leads out"),
        ("a.zip", corpus.npz({"..\\a": b"x"}), "leads out"),
        ("a.gz", corpus.gzip_bomb(2**26), "decompression bomb"),
        ("a.zip", corpus.npz({"a": bytes(2**26)}), "decompression bomb"),
        ("a.tar.gz", corpus.tar_gz((tarfile.TarInfo("a"), bytes(2**26))), "decompression bomb"),
        ("a.tar", b"x" * 1000, "cannot be unpacked"),
        ("a.gz", b"x" * 1000, "cannot be unpacked"),
        ("a.zip", b"", "cannot be unpacked"),
    ],
    # Not the bytes: gzip writes the time into them, and processes that collect the tests must agree on their names.
    ids=lambda value: "content" if isinstance(value, bytes) else None,
)
def test_an_archive_is_looked_at_before_it_is_unpacked(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        check_archive(tmp_path / name)


def test_a_good_archive_and_other_files_pass(tmp_path):
    for name, content in {
        "a.tar.gz": corpus.tar_gz((tarfile.TarInfo("a/b.bin"), np.random.default_rng(0).bytes(10**5))),
        "a.zip": corpus.npz({"a/b.bin": b"abc"}),
        "labels-idx1-ubyte": b"abc",
    }.items():
        (tmp_path / name).write_bytes(content)
        check_archive(tmp_path / name)


@pytest.mark.parametrize(
    "file",
    ["../../secret.arrayrecord", "/etc/passwd", "latents-train-00001-of-00001.arrayrecord", "a[0:3]", ""],
)
def test_a_manifest_names_files_of_its_own_folder_alone(tmp_path, file):
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST))
    assert read_manifest(tmp_path).shards["train"][0].count == 3
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST | {"shards": {"train": [[file, 3, 100, "abc"]]}}))
    with pytest.raises(ValueError, match="damaged .shards of 'train', their files"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"latent_shape": [2, 2, 10**9]},
        {"shards": {"train": [["latents-train-00000-of-00001.arrayrecord", 3, 5, "abc"]]}},
        {"splits": {"train": 2}},
        {"data": {"num_classes": 3, "splits": None}},
        {"splits": {}},
        {"shards": {}},
        {"scale": float("nan")},
        {"scale": float("inf")},
        {"num_flips": 3},
        {"shards": {"train": []}, "splits": {"train": 0}},
    ],
    ids=str,
)
def test_a_manifest_whose_values_cannot_be_is_damaged(tmp_path, change):
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST | change))
    with pytest.raises(ValueError, match="is damaged"):
        read_manifest(tmp_path)


def test_links_of_a_workdir_are_not_followed(tmp_path):
    source = tmp_path / "source"
    (source / "checkpoints" / "0").mkdir(parents=True)
    (source / "config.json").write_text("{}")
    (source / "checkpoints" / "0" / "data").write_text("1")
    (source / "notes").symlink_to("/etc")
    copy_weights(source, tmp_path / "copy")
    assert sorted(p.name for p in (tmp_path / "copy").rglob("*")) == ["0", "checkpoints", "config.json", "data"]
    (source / "checkpoints" / "1").symlink_to("/etc")
    with pytest.raises(ValueError, match="checkpoints/1 must not be a link"):
        copy_weights(source, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("text", [corpus.DEEP, "[" * 65 + "]" * 65, " " * (MAX_BYTES + 1), '{"a": ', "\xff"])
def test_json_that_is_too_deep_too_large_or_none_is_an_error(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=str(path)):
        read_json(path)
    path.write_text("[" * 64 + "]" * 64)
    read_json(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (corpus.png(2**31 - 1, 2**31 - 1), "cannot read image"),
        (corpus.png(10_000, 10_000), "more than 89,478,485"),
        (corpus.png(9000, 9000), "cannot read image"),
        (corpus.jpeg(60_000, 60_000), "cannot read image"),
        (corpus.png(0, 0), "cannot read image"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_that_lies_about_its_size_is_an_error(tmp_path, content, message):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_source(DataConfig(name=str(tmp_path), image_size=8, num_classes=1), "train")[0]


def test_an_image_too_narrow_to_be_scaled_is_an_error():
    transform = image_transform(DataConfig(name="x", image_size=256), train=False)
    example = {"image": np.zeros((1, 100_000, 3), np.uint8), "label": 0}
    with pytest.raises(ValueError, match="100000 by 1 pixels is too narrow for 256"):
        transform(example, np.random.default_rng(0))


@pytest.mark.parametrize("name", ["huggingface:evil", "evil:latest", "a.py", "ns:a/b:1.0.0"])
def test_a_data_set_whose_code_would_be_fetched_is_an_error(name):
    with pytest.raises(ValueError, match="must be an existing folder, or a TFDS name"):
        open_source(DataConfig(name=name, image_size=8), "train")


@pytest.mark.parametrize("verb", ["sample", "evaluate"])
def test_compiled_programs_are_never_read_from_a_folder_that_a_workdir_names(monkeypatch, tmp_path, verb):
    """They are machine code, and a workdir may be anyone's."""
    config = dataclasses.replace(
        dit_config(tmp_path), compute=ComputeConfig(compilation_cache=str(tmp_path / "programs"))
    )

    class Called(Exception):
        pass

    def called(folder):
        raise Called(folder)

    monkeypatch.setattr("dit_jax.checkpoint.find_checkpoint", lambda *_: (0, config))
    monkeypatch.setattr("dit_jax.parallel.compilation_cache.use_compilation_cache", called)
    with pytest.raises(Called) as folder:
        main([verb, f"--workdir={tmp_path}", f"--output={tmp_path / 'output'}"])
    assert folder.value.args == (ComputeConfig().compilation_cache,)
