"""What identifies the images of a folder: their content, and what a run reads beside them, wherever the folder is.

An identity is a dict of JSON values, such as a latent cache and the config of a run keep it:

    name      of the data set, as it was given: where it was, and so no part of what is compared
    version   "content-" and a hash of each image's split, label, path within the folder and bytes, in order
    names     "names-" and a hash of the paths alone, which older versions of this program had as the version
    splits    the number of images of each
    fields    of each extra field a hash of its values (of "map", of the pictures' bytes); left out where there are none

A file's SHA-256 decides. To spare reading it again, sums are kept in `INDEX_FOLDER` by path, inode, size and times. A
file changed within `SETTLED_SECONDS` of being read is not kept: it might change again and its times not. The index may
be deleted at any time, and whoever cannot write there reads all files each time.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from dit_jax.files import file_lock, sha256_of, user_path, written_whole
from dit_jax.terminal import progress, tell

INDEX_FOLDER = "~/.cache/dit_jax/sums"
SETTLED_SECONDS = 2.0  # as coarse as any file system's times
UNREADABLE = "unreadable"  # in place of the sum of what is no file, not there or not ours to read: a bad example
CONTENT, NAMES = "content-", "names-"
DIGITS = 16  # of a hash that people see
KEY_BYTES, SUM_BYTES = 16, hashlib.sha256().digest_size
MAX_ENTRIES = 2**22  # of an index: 200 MB
THREADS, PART = 16, 64  # readers, and the files that one takes at a time
MANY_FILES = 2_000  # from so many on, reading them is shown
LOCK_BYTES = 2**28  # from so many on, a process waits for another that reads the same files

Listing = Mapping[str, Sequence[tuple[pathlib.Path, int]]]  # of each split: (path, label)


def folder_identity(
    name: str, listing: Listing, fields: Mapping[str, Sequence[Mapping[str, Any]]] | None = None
) -> dict[str, Any]:
    """Returns the identity of an image folder.

    Args:
      name: the folder; listing: its images, in order.
      fields: of each split, of each image, the extra fields by name; "map" is the path of a picture.
    """
    root = pathlib.Path(user_path(name))
    rows = [(split, path, label) for split, files in listing.items() for path, label in files]
    values = [row for split in listing for row in (fields[split] if fields else [{}] * len(listing[split]))]
    paths = [path for _, path, _ in rows] + [row["map"] for row in values if "map" in row]
    sums = dict(zip(paths, file_sums(paths, root), strict=True))
    relative = [path.relative_to(root).as_posix() for _, path, _ in rows]
    content = (
        f"{split}\0{label}\0{within}\0{sums[path]}" for (split, path, label), within in zip(rows, relative, strict=True)
    )
    identity = {
        "name": name,
        "version": CONTENT + _digest(content),
        "names": NAMES + names_digest(listing),
        "splits": {split: len(files) for split, files in listing.items()},
    }
    kept = {}
    for field in values[0] if values else ():
        of_field = (sums[row[field]] if field == "map" else json.dumps(row[field]) for row in values)
        kept[field] = _digest(f"{split}\0{w}\0{x}" for (split, *_), w, x in zip(rows, relative, of_field, strict=True))
    return identity | ({"fields": kept} if kept else {})


def names_digest(listing: Listing) -> str:
    """Returns a hash of the names of images and of their folders, as older versions of this program made it."""
    names = "\n".join(f"{split} {'/'.join(path.parts[-2:])}" for split in listing for path, _ in listing[split])
    return hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()[:DIGITS]


# Comparing


def without_place(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an identity without where the data is; a TFDS data set's version has its name."""
    return {key: value for key, value in identity.items() if key != "name"}


def is_same_place(one: str, other: str) -> bool:
    """Returns whether two names of a data set are equal, or lead to one folder."""
    return one == other or (os.path.isdir(_real(one)) and _real(one) == _real(other))


def in_form_of(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an identity as it would read in a record of the same data, so that the two can be compared by equality.

    The name of a folder does not count, where its content is recorded. In records of older versions it is not: there
    names and place must be the same.
    """
    found, name, version = dict(found), recorded.get("name"), str(recorded.get("version"))
    if version.startswith(CONTENT) and "names" in found:
        return found | {"name": name}
    if version.startswith(NAMES) and "names" in found:
        same_place = isinstance(name, str) and is_same_place(name, found["name"])
        kept = {key: value for key, value in found.items() if key not in ("names", "fields")}
        return kept | {"version": found["names"], "name": name if same_place else found["name"]}
    return found


def describe_version(identity: Mapping[str, Any], fields: Iterable[str] = ()) -> str:
    """Returns what a run's config has as the version of its data: with the splits' sizes and the fields it reads."""
    sizes = ", ".join(f"{split} {size}" for split, size in identity["splits"].items())
    subset = ", shipped subset" if identity.get("shipped_subset") else ""
    kept = identity.get("fields", {})
    sums = "".join(f"; {name} {kept[name]}" for name in fields if name in kept)
    return f"{identity['version']} ({sizes}{subset}{sums})"


def continued_version(recorded: str | None, identity: Mapping[str, Any], fields: Iterable[str] = ()) -> str | None:
    """Returns the version that a run records from now on, having recorded another or none; None where it contradicts.

    A run of an older version recorded the images' names alone. Where they are still the same it goes on, and their
    content is recorded behind the names.
    """
    version = describe_version(identity, fields)
    if recorded in (None, version) or "names" not in identity:
        return version if recorded in (None, version) else None
    both, names = f"{identity['names']} {version}", describe_version(dict(identity) | {"version": identity["names"]})
    return both if recorded in (both, names) else None


def continues(recorded: str | None, version: str | None) -> bool:
    """Returns whether a version is the recorded one, or that one with the images' content behind the names."""
    return recorded == version or (
        is_of_names(recorded) and str(version).startswith(f"{recorded.split()[0]} {CONTENT}")
    )


def is_of_names(version: str | None) -> bool:
    """Returns whether a recorded version knows the names of images, and not their content."""
    return version is not None and version.startswith(NAMES) and not version.partition(" ")[2].startswith(CONTENT)


# Sums of files


def file_sums(paths: Sequence[pathlib.Path], root: pathlib.Path | None = None) -> list[str]:
    """Returns the SHA-256 of each file's content; `UNREADABLE` of what cannot be opened as a file.

    Args:
      root: the folder that all are in, for the index of sums that are known; None: all are read.

    Raises:
      ValueError: where the disk fails.
    """
    index = None if root is None else _Index(root)
    found = _known(paths, index)
    missing = [path for path, known in zip(paths, found, strict=True) if known is None]
    if not missing:
        return found
    size = sum(_parts_map(lambda path: getattr(_stat(path), "st_size", 0), missing))
    with _only_reader(index if size >= LOCK_BYTES else None, root):
        if size >= LOCK_BYTES:  # another process may have read them while this one waited
            found = _known(paths, index)
            missing = [path for path, known in zip(paths, found, strict=True) if known is None]
        read = dict(zip(missing, _read(missing, index), strict=True))
    return [read[path] if known is None else known for path, known in zip(paths, found, strict=True)]


def _known(paths: Sequence[pathlib.Path], index: "_Index | None") -> list[str | None]:
    if index is None:
        return [None] * len(paths)
    entries = index.read()
    if not entries:
        return [None] * len(paths)
    sums = _parts_map(lambda path: entries.get(index.key(path, _stat(path))), paths)
    return [None if found is None else found.hex() for found in sums]


def _read(paths: Sequence[pathlib.Path], index: "_Index | None") -> list[str]:
    """Returns the sums of files, all of which are read, and keeps those of settled ones."""
    new: dict[bytes, bytes] = {}
    # Few files are read in silence.
    shown = progress(
        total=len(paths),
        unit="file",
        description="reading images, to know whether they are the same: file",
        active=len(paths) >= MANY_FILES,
    )

    def read(path: pathlib.Path) -> str:
        begun, before = time.time_ns(), _stat(path)
        if before is None or not stat.S_ISREG(before.st_mode):
            return UNREADABLE
        try:
            found = sha256_of(path)
        except (FileNotFoundError, PermissionError):
            return UNREADABLE
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}); try again, or replace it") from error
        settled = max(before.st_mtime_ns, before.st_ctime_ns) < begun - SETTLED_SECONDS * 1e9
        if index is not None and settled and index.key(path, before) == index.key(path, _stat(path)):
            new[index.key(path, before)] = bytes.fromhex(found)
        shown.update()
        return found

    try:
        with shown:
            return _parts_map(read, paths)
    finally:
        if index is not None and new:
            index.add(new)


def _parts_map(function: Any, paths: Sequence[pathlib.Path]) -> list:
    """Returns a function's values, computed by threads, some files at a time; an error or Ctrl-C ends them soon."""
    parts = [paths[start : start + PART] for start in range(0, len(paths), PART)]
    if len(parts) <= 1:
        return [function(path) for path in paths]
    stopped = False
    threads = concurrent.futures.ThreadPoolExecutor(THREADS, "sums")
    try:

        def of_part(part: Sequence[pathlib.Path]) -> list:
            return [] if stopped else [function(path) for path in part]

        return [value for values in threads.map(of_part, parts) for value in values]
    finally:
        stopped = True
        threads.shutdown(cancel_futures=True)


def _stat(path: pathlib.Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None


class _Index:
    """The sums of a folder's files that are known: a file of (key, sum) pairs behind its own SHA-256."""

    def __init__(self, root: pathlib.Path):
        self.root, self.path = root, None
        with contextlib.suppress(ValueError):  # there is no home
            name = hashlib.sha256(os.fsencode(_real(str(root)))).hexdigest()[:DIGITS]
            self.path = pathlib.Path(user_path(INDEX_FOLDER)) / name

    def key(self, path: pathlib.Path, found: os.stat_result | None) -> bytes | None:
        """Returns what a file's sum is kept by; None of what is not there."""
        if found is None:
            return None
        facts = os.path.relpath(path, self.root), found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
        text = "\0".join(map(str, facts)).encode("utf-8", "surrogateescape")
        return hashlib.blake2b(text, digest_size=KEY_BYTES).digest()

    def read(self) -> dict[bytes, bytes]:
        """Returns the sums by key; none where the index is not there, or damaged."""
        try:
            content = b"" if self.path is None else self.path.read_bytes()
        except OSError:
            return {}
        body, size = content[SUM_BYTES:], KEY_BYTES + SUM_BYTES
        if hashlib.sha256(body).digest() != content[:SUM_BYTES]:
            return {}
        return {body[i : i + KEY_BYTES]: body[i + KEY_BYTES : i + size] for i in range(0, len(body), size)}

    def add(self, new: Mapping[bytes, bytes]) -> None:
        """Keeps sums, beside those that other processes may have added."""
        entries = self.read() | dict(new)
        entries = dict(new) if len(entries) > MAX_ENTRIES else entries
        body = b"".join(key + value for key, value in sorted(entries.items()))
        with contextlib.suppress(OSError):
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with written_whole(self.path) as temporary:
                    temporary.write_bytes(hashlib.sha256(body).digest() + body)


@contextlib.contextmanager
def _only_reader(index: _Index | None, root: pathlib.Path | None) -> Iterator[None]:
    """Keeps processes that share a home from reading the same files at once; where that cannot be, all read."""

    def told() -> None:
        tell(f"waiting for another process that reads the images in {root}")

    with contextlib.ExitStack() as stack:
        if index is not None and index.path is not None:
            with contextlib.suppress(OSError):
                stack.enter_context(file_lock(index.path.with_suffix(".lock"), on_wait=told))
        yield


def _real(name: str) -> str:
    with contextlib.suppress(ValueError):  # a record may name a home that is not known here
        name = user_path(name)
    return os.path.realpath(name)


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()[:DIGITS]
