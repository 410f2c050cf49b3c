"""An image folder's identity is its content: found by hashes, whatever sizes and times say, and wherever it is."""

import concurrent.futures
import hashlib
import json
import os
import pathlib

import pytest
from PIL import Image

from dit_jax.config import DataConfig
from dit_jax.data import identity, sources
from tests.tiny import data_section, make_image_folder, write_captions


@pytest.fixture(autouse=True)
def index(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "INDEX_FOLDER", str(tmp_path / "home" / "sums"))
    return tmp_path / "home" / "sums"


@pytest.fixture
def folder(tmp_path):
    return make_image_folder(tmp_path / "images", num_images=12)


def of(folder, **more):
    found = sources.source_identity(DataConfig(**data_section(folder), **more))
    assert json.loads(json.dumps(found)) == found
    return identity.without_place(found)


def edit(path):
    """Changes an image; its name, size and time of change stay."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.mark.parametrize("number", [0, 9])  # of both splits
def test_an_image_edited_under_its_name_size_and_time_is_other_data(folder, number):
    before = of(folder)
    edit(folder / "class_1" / f"{number:03}.png")
    after = of(folder)
    assert after["version"] != before["version"] and after["version"].startswith("content-")
    assert {k: v for k, v in after.items() if k != "version"} == {k: v for k, v in before.items() if k != "version"}


def test_images_that_changed_places_are_other_data(folder):
    before, (one, other) = of(folder), (folder / "class_0" / f"00{i}.png" for i in (1, 2))
    one.rename(folder / "x")
    other.rename(one)
    (folder / "x").rename(other)
    assert of(folder) != before


def test_a_folder_that_moved_is_the_same_data(folder, tmp_path, monkeypatch):
    before = of(folder)
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    assert of("./images") == of("images") == of(tmp_path / "link") == before
    folder.rename(tmp_path / "elsewhere")
    assert of(tmp_path / "elsewhere") == before


def test_captions_are_part_of_it_where_they_are_read(folder):
    write_captions(folder)
    before, without = of(folder, extra_fields=("caption",)), of(folder)
    assert set(before["fields"]) == {"caption"} and "fields" not in without
    assert without == {key: value for key, value in before.items() if key != "fields"}
    file = folder / "metadata.jsonl"
    file.write_text(file.read_text().replace("star", "flag"))
    after = of(folder, extra_fields=("caption",))
    assert after["fields"] != before["fields"] and of(folder) == without
    assert identity.describe_version(after, ["caption"]) != identity.describe_version(before, ["caption"])
    assert identity.describe_version(after) == identity.describe_version(before)


def test_maps_are_part_of_it_with_their_content(folder):
    lines = []
    for path in sorted(folder.glob("*/*.png")):
        name = path.relative_to(folder).as_posix()
        (folder / "maps" / path.parent.name).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 1).save(folder / "maps" / name)
        lines.append(json.dumps({"file_name": name, "map": f"maps/{name}"}) + "\n")
    (folder / "maps").rename(folder / ".maps")
    (folder / "metadata.jsonl").write_text("".join(lines).replace('"maps/', '".maps/'))
    before = of(folder, map_field="map")
    edit(folder / ".maps" / "class_2" / "011.png")
    after = of(folder, map_field="map")
    assert after["fields"] != before["fields"] and after["version"] == before["version"] == of(folder)["version"]


# The index of sums that are known


def paths_of(folder):
    return sorted(folder.glob("*/*.png"))


def reads_nothing(monkeypatch):
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("read again"))


def test_a_file_that_has_just_changed_is_read_again(folder, index):
    identity.file_sums(paths_of(folder), folder)
    assert not index.exists()  # all of them are young


def test_what_has_not_changed_is_not_read_again_and_what_has_is(folder, index, monkeypatch):
    monkeypatch.setattr(identity, "SETTLED_SECONDS", -60.0)  # as if they were old
    before = identity.file_sums(paths_of(folder), folder)
    edit(paths_of(folder)[5])
    after = identity.file_sums(paths_of(folder), folder)
    assert [i for i, (one, other) in enumerate(zip(before, after, strict=True)) if one != other] == [5]
    assert after[5] == hashlib.sha256(paths_of(folder)[5].read_bytes()).hexdigest()
    with monkeypatch.context() as patch:
        reads_nothing(patch)
        assert identity.file_sums(paths_of(folder), folder) == after
    (file,) = index.iterdir()
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    assert identity.file_sums(paths_of(folder), folder) == after


def test_processes_at_once_keep_an_index_that_is_whole(folder, monkeypatch):
    monkeypatch.setattr(identity, "SETTLED_SECONDS", -60.0)
    monkeypatch.setattr(identity, "LOCK_BYTES", 1)
    monkeypatch.setattr(identity, "PART", 2)
    paths = paths_of(folder)
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: identity.file_sums(paths, folder), range(8)))
    assert all(sums == identity.file_sums(paths) for sums in found)
    reads_nothing(monkeypatch)
    identity.file_sums(paths, folder)


@pytest.mark.parametrize("home", ["a file", "none"])
def test_without_a_home_to_write_to_all_is_read_each_time(folder, tmp_path, monkeypatch, home):
    monkeypatch.setattr(identity, "SETTLED_SECONDS", -60.0)
    expected = identity.file_sums(paths_of(folder))
    if home == "a file":
        (tmp_path / "file").touch()
        monkeypatch.setattr(identity, "INDEX_FOLDER", str(tmp_path / "file" / "sums"))
    else:
        monkeypatch.setattr(identity, "INDEX_FOLDER", "~no_such_user/sums")
    assert identity.file_sums(paths_of(folder), folder) == expected


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    names = ["pipe", "dangling", "none", "."]
    assert identity.file_sums([tmp_path / name for name in names], tmp_path) == [identity.UNREADABLE] * len(names)


# What older versions recorded


def test_a_run_that_recorded_names_goes_on_where_they_are_the_same_and_records_the_content(folder):
    found = of(folder)
    names = hashlib.sha256(
        "\n".join(
            f"{split} {path.parent.name}/{path.name}"
            for split, held_out in (("train", False), ("test", True))
            for path in paths_of(folder)
            if (int(path.stem) == 9) == held_out
        ).encode()
    ).hexdigest()[:16]
    recorded = f"names-{names} (train 33, test 3)"  # as older versions have it
    now = identity.continued_version(recorded, found)
    assert now == f"names-{names} {found['version']} (train 33, test 3)"
    assert identity.is_of_names(recorded) and not identity.is_of_names(now) and identity.continues(recorded, now)
    assert identity.continued_version(now, found) == now
    edit(paths_of(folder)[0])
    assert identity.continued_version(recorded, of(folder)) is not None  # nobody can tell
    assert identity.continued_version(now, of(folder)) is None
    paths_of(folder)[0].rename(folder / "class_0" / "x.png")
    assert identity.continued_version(recorded, of(folder)) is None


def test_records_of_names_are_compared_by_names_and_place(folder, tmp_path):
    found = sources.source_identity(DataConfig(**data_section(folder)))
    old = {key: value for key, value in found.items() if key != "names"} | {"version": found["names"]}
    assert identity.in_form_of(old, found) == old
    moved = found | {"name": str(tmp_path)}
    assert identity.in_form_of(old, moved) != old
    assert identity.in_form_of(old | {"name": os.path.relpath(pathlib.Path(folder))}, found)["name"] != str(folder)
    assert identity.in_form_of(found, moved) == found
    tfds = {"name": "mnist", "version": "mnist/3.0.1"}
    assert identity.in_form_of(tfds, tfds) == tfds
