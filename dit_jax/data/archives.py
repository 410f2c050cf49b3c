"""What an archive would unpack to, before anything unpacks it: TFDS does so in memory and believes every size."""

import bz2
import gzip
import pathlib
import tarfile
import zipfile
import zlib
from typing import IO

MAX_EXPANSION, SLACK = 32, 2**24  # unpacked, of an archive's size, and bytes beyond; raw images shrink to a tenth
READ_BYTES = 2**20


def check_archive(path: pathlib.Path) -> None:
    """Raises ValueError where an archive is damaged, a bomb, or has a name that leads out of its folder.

    A file of another kind, by its name's end, is not looked at.
    """
    opens = {".gz": gzip.open, ".tgz": gzip.open, ".bz2": bz2.open, ".tar": open}
    most = MAX_EXPANSION * path.stat().st_size + SLACK
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                for entry in archive.infolist():
                    _check_name(entry.filename)
                _check_size(sum(entry.file_size for entry in archive.infolist()), most)
        elif path.suffix in opens:
            with opens[path.suffix](path, "rb") as file:
                is_tar = path.suffix in (".tar", ".tgz") or path.stem.endswith(".tar")
                (_check_tar if is_tar else _check_stream)(file, most)
    except (ValueError, EOFError, OSError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be unpacked: {error}; fetch it again, or take it out of there") from error


def _check_tar(file: IO[bytes], most: int) -> None:
    with tarfile.open(fileobj=file, mode="r:") as archive:
        size = 0
        for entry in archive:
            _check_name(entry.name)
            if entry.issym() or entry.islnk():
                _check_name(entry.linkname)
            size += entry.size  # holes included, which take no room in the archive
            _check_size(size, most)


def _check_stream(file: IO[bytes], most: int) -> None:
    size = 0
    while content := file.read(READ_BYTES):
        size += len(content)
        _check_size(size, most)


def _check_size(size: int, most: int) -> None:
    if size > most:
        raise ValueError(f"it holds more than {most:,} bytes, {MAX_EXPANSION} times its size: a decompression bomb")


def _check_name(name: str) -> None:
    path = pathlib.PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"its {name[:100]!r} leads out of the folder that it is unpacked to")
