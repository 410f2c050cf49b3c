"""The manifest of a checkpoint: what its arrays hold and which files it has, and the check of the files.

It is a JSON file in the checkpoint's folder, `manifest/metadata` (for Orbax the JSON item "manifest"), written when all
else is and before the rename that completes the checkpoint:

    {"format": 1, "step": 2000, "metrics": {"loss": 0.08},
     "arrays": {"params": {"blocks_0/attn/qkv/kernel": CONTENT_SUM, ...}, ...},
     "files": {"params/manifest.ocdbt": [BYTES, CRC32], ...},
     "crc32": of all this, as `_crc_of` writes it}

Files are checked before anything parses them; arrays (`content`) once they are read.
"""

import dataclasses
import json
import os
import pathlib
import zlib

MANIFEST, CONFIG = "manifest", "config"  # items that are JSON
METADATA = "_CHECKPOINT_METADATA"  # Orbax's list of a checkpoint's items
FILE = "metadata"  # of a JSON item, as Orbax names it
FORMAT = 1
READ_BYTES = 1 << 20


class DamagedCheckpoint(ValueError):
    """A checkpoint is not what was saved."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """metrics: held-out figures of the step, None where it has none; arrays: sums by item and name."""

    step: int
    metrics: dict[str, float] | None
    arrays: dict[str, dict[str, str]]
    files: dict[str, list[int]]

    def write(self, folder: pathlib.Path) -> None:
        """Writes it to a checkpoint's folder, through to the disk."""
        fields = {"format": FORMAT} | dataclasses.asdict(self)
        path = folder / MANIFEST / FILE
        path.write_text(json.dumps(fields | {"crc32": _crc_of(fields)}))
        sync(path)


def read_manifest(folder: pathlib.Path) -> Manifest | None:
    """Returns the manifest of a checkpoint's folder; None where it was written before there were any.

    Raises:
      DamagedCheckpoint: where it cannot be read, or is missing though Orbax's list of items names it.
    """
    path = folder / MANIFEST / FILE
    try:
        text = path.read_text()
    except FileNotFoundError:
        if MANIFEST in read_json(folder / METADATA, METADATA).get("item_handlers", {}):
            raise DamagedCheckpoint(f"{MANIFEST}/{FILE} is missing") from None
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedCheckpoint(f"{MANIFEST}/{FILE} cannot be read ({error})") from error
    try:
        fields = json.loads(text)
        crc, version = fields.pop("crc32"), fields.pop("format")
        if version == FORMAT and crc == _crc_of({"format": version} | fields):
            return Manifest(**fields)
    except (json.JSONDecodeError, RecursionError, AttributeError, KeyError, TypeError):
        pass
    raise DamagedCheckpoint(f"{MANIFEST}/{FILE} is not what was saved")


def _crc_of(fields: dict) -> int:
    return zlib.crc32(json.dumps(fields, sort_keys=True).encode())


def read_json(path: pathlib.Path, name: str) -> dict:
    """Returns a JSON object; raises DamagedCheckpoint, with the name, where the file holds none."""
    try:
        value = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{name} cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise DamagedCheckpoint(f"{name} must be a JSON object, not {type(value).__name__}")
    return value


def list_files(folder: pathlib.Path) -> list[str]:
    """Returns the files of a checkpoint but its manifest, sorted."""

    def fail(error: OSError) -> None:  # what cannot be listed is not missing
        raise error

    walk = os.walk(folder, onerror=fail)
    paths = ((pathlib.Path(root) / name).relative_to(folder).as_posix() for root, _, names in walk for name in names)
    return sorted(path for path in paths if path != f"{MANIFEST}/{FILE}")


def sync(path: pathlib.Path) -> None:
    """Returns when a file's bytes are on the disk; gives up the copy in memory, so that who reads, reads the disk."""
    with path.open("rb") as file:
        os.fsync(file)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sum_file(path: pathlib.Path) -> list[int]:
    """Returns the size of a file and the CRC-32 of its bytes."""
    size = crc = 0
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return [size, crc]


def check_files(folder: pathlib.Path, manifest: Manifest, items: set[str], share: tuple[int, int] = (0, 1)) -> None:
    """Raises DamagedCheckpoint unless the files of these items, and of the checkpoint as a whole, are as they were.

    share: (i, n) reads every n-th file, from the i-th on; the others' sizes are looked at.
    """

    def wanted(name: str) -> bool:
        return "/" not in name or name.split("/")[0] in items

    expected = {name: entry for name, entry in manifest.files.items() if wanted(name)}
    try:
        found = {name: (folder / name).stat().st_size for name in list_files(folder) if wanted(name)}
        for name in sorted(expected.keys() | found.keys()):
            if name not in found:
                raise DamagedCheckpoint(f"{name} is missing")
            if name not in expected:
                raise DamagedCheckpoint(f"{name} is no file of this checkpoint; remove it")
            if found[name] != expected[name][0]:
                raise DamagedCheckpoint(f"{name} has {found[name]:,} bytes, not {expected[name][0]:,}")
        number, count = share
        for name in sorted(expected)[number::count]:
            if sum_file(folder / name) != expected[name]:
                raise DamagedCheckpoint(f"{name} has other bytes than were saved")
    except OSError as error:
        raise DamagedCheckpoint(f"a file cannot be read ({error})") from error
