"""Files that others may have written, may be writing or may read: bounded JSON, sums, whole writes and locks.

A file is written beside its place and renamed, so that it is there as a whole or not at all, also after a power cut. A
record that decides results holds a sum of its own content (`sealed`), so that a flipped bit in it is found.
"""

import contextlib
import errno
import fcntl
import functools
import glob
import hashlib
import json
import os
import pathlib
import re
import secrets
import shutil
import socket
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

Value = TypeVar("Value")

_HOST = socket.gethostname()
MAX_DEPTH = 64  # a config has five
MAX_BYTES = 2**24  # parsed, JSON takes thirty times its size at the worst; the largest here, a cache's, has some 10 KB
SUM_KEY = "sha256_of_this"  # of a sealed record
RETRY_SECONDS = (0.1, 0.5, 2.0, 5.0)  # before each further try where a disk fails for a moment
FOR_A_MOMENT = (
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EAGAIN,
    errno.ECONNRESET,
    errno.ENOTCONN,
    errno.EHOSTDOWN,
)
OUT_OF = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)  # memory, descriptors
NO_RIGHTS = (errno.EACCES, errno.EPERM)
LITTLE = 2**20  # bytes: a disk with less is full
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what a disk without locks answers


def user_path(path: str) -> str:
    """Returns a path whose leading `~` or `~user` is the home folder, which a shell puts there only at a word's start.

    Raises:
      ValueError: where that home is not known.
    """
    if not path.startswith("~"):
        return path
    home = path.partition("/")[0]
    found = "~" if home == "~" and os.environ.get("HOME") == "" else os.path.expanduser(home)
    if found.startswith("~"):
        remedy = "set HOME" if home == "~" else "name a user of this machine"
        raise ValueError(f"{path}: the home folder {home} is not known; {remedy}, or give the path without ~")
    return found + path.removeprefix(home)


def read_json(path: str | os.PathLike, remedy: str = "restore it") -> Any:
    """Returns the value in a file.

    Raises:
      FileNotFoundError: where it is not there; ValueError: where it is too large, or not JSON.
    """
    path = pathlib.Path(path)
    size = patiently(path.stat).st_size
    if size > MAX_BYTES or not path.is_file():
        raise ValueError(f"{path} must be a file of at most {MAX_BYTES:,} bytes, but has {size:,}; {remedy}")
    content = patiently(path.read_bytes)
    try:
        return parse_json(content)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); {remedy}") from error


def parse_json(text: str | bytes) -> Any:
    """Returns the value of a text; raises ValueError where it is not JSON, or nested so deep that recursion ends."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [x for each in level if isinstance(each, (dict, list)) for x in _children(each)]
        if not level:
            return value
    raise ValueError("it is nested too deep")


def read_lines(path: str | os.PathLike) -> list[str]:
    """Returns the lines of a text that a person wrote, normalised: with any newline, a byte-order mark or none.

    Raises:
      OSError: where it cannot be read; ValueError: where it is not UTF-8.
    """
    try:
        text = pathlib.Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8, but its byte {error.start} is not; save it so") from error
    return re.split("\r\n|\r|\n", normalised(text))


def normalised(text: str) -> str:
    """Returns a text with one code for each character (Unicode's NFC): a Mac writes "é" as two, others as one."""
    return unicodedata.normalize("NFC", text)


def is_number(value: Any) -> bool:
    """Returns whether a JSON value is a number that a float can hold: not a truth value, nor one of 400 digits."""
    if type(value) is int:
        return abs(value) < 2**1023
    return type(value) is float


def to_json(value: Any) -> str:
    """Returns a value as the text of a file: indented, with a newline at its end."""
    return json.dumps(value, indent=2) + "\n"


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """Returns a record of JSON values with a sum of its content, which `check_seal` compares."""
    return record | {SUM_KEY: _sum(record)}


def check_seal(record: Any) -> dict[str, Any]:
    """Returns a sealed record without its sum; raises ValueError where it has none, or another than its content's."""
    if not isinstance(record, dict) or SUM_KEY not in record:
        raise ValueError("it has no sum of its content")
    content = {key: value for key, value in record.items() if key != SUM_KEY}
    if record[SUM_KEY] != _sum(content):
        raise ValueError("its content is not what its sum is of")
    return content


def sha256_of(path: str | os.PathLike) -> str:
    """Returns the SHA-256 of a file's content, in hexadecimal."""

    def read() -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return patiently(read)


def print_warning(message: str) -> None:
    """Prints a message on standard error, if there is one."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def patiently(read: Callable[[], Value], tell: Callable[[str], None] = print_warning) -> Value:
    """Returns what `read` does; where the disk fails for a moment, it is told in a line and tried again."""
    for seconds in RETRY_SECONDS:
        try:
            return read()
        except Exception as error:  # libraries in C++ have types of their own
            if not is_of_a_moment(error):
                raise
            tell(f"warning: a read failed and is tried again: {' '.join(str(error).split())[:300]}")
        time.sleep(seconds)
    return read()


def is_of_a_moment(error: BaseException) -> bool:
    """Returns whether an error, or one that led to it, is of a disk that may answer when it is asked again."""
    return _is_one_of(error, FOR_A_MOMENT)


def is_of_this_process(error: BaseException, rights: bool = True) -> bool:
    """Returns whether an error is of what this process lacks, memory, descriptors or rights: the file may be good."""
    chain = list(_chain(error))
    no_memory = any(isinstance(each, MemoryError) or "RESOURCE_EXHAUSTED" in str(each) for each in chain)
    return no_memory or _is_one_of(error, OUT_OF + NO_RIGHTS * rights)


def _is_one_of(error: BaseException, numbers: tuple[int, ...]) -> bool:
    texts = [os.strerror(number) for number in numbers]
    return any(
        each.errno in numbers if isinstance(each, OSError) and each.errno else any(text in str(each) for text in texts)
        for each in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen = set()
    while error is not None and id(error) not in seen:  # one that is raised twice may lead to itself
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def file_name(text: str) -> str:
    """Returns a text from a file or a user as the name of one file, which is in the folder that it is written to."""
    return re.sub(r"[^\w.+-]", "_", text)[:100].lstrip(".") or "_"


@contextlib.contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields where to write a file, or a folder; afterwards it is at `path` and on the disk, as a whole.

    Where the body or the disk fails, `path` is what it was and nothing is left beside it. What a killed process left
    beside it goes when another one writes there.

    Raises:
      OSError: where it cannot be written; it names `path`.
    """
    path = pathlib.Path(path)
    _remove_left_in(path.parent)
    temporary = path.with_name(f".{path.name}.{_HOST}-{os.getpid()}-{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        flush_tree(temporary) if temporary.is_dir() else flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    except Exception as error:
        number = _storage_error(error, temporary)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)


def _storage_error(error: Exception, temporary: pathlib.Path) -> int | None:
    """Returns the number of the system's error that made a write fail; None where it was something else.

    Libraries in C++ raise types of their own, which may not say more than that a write failed.
    """
    if isinstance(error, OSError) and error.errno is not None:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        is_ours = not names or any(name.startswith(str(temporary)) for name in names)
        return error.errno if is_ours else None  # of another file, which it names
    if isinstance(error, ValueError):  # which says what it is in a line
        return None
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS):
        if os.strerror(number) in str(error):
            return number
    return errno.ENOSPC if shutil.disk_usage(temporary.parent).free < LITTLE else None


@functools.cache
def _remove_left_in(folder: pathlib.Path) -> None:
    """Removes what processes of this machine that have ended left of `written_whole` in a folder; once a process."""
    with contextlib.suppress(OSError):
        for left in folder.glob(f".*.{glob.escape(_HOST)}-*-*.tmp"):
            with contextlib.suppress(ValueError, OSError):
                if not _runs(int(left.name.rsplit("-", 2)[1])):
                    shutil.rmtree(left) if left.is_dir() else left.unlink()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def write_text_whole(path: str | os.PathLike, text: str) -> None:
    """Writes a text file as `written_whole` does; what is no character (half of a UTF-16 pair) becomes a "?"."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")


def write_one_of_many(path: pathlib.Path, content: bytes) -> None:
    """Writes a file whole, in a folder of very many that can be made again: the disk is not waited for.

    Raises:
      OSError: where it cannot be written; it names `path`, and nothing is left beside it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise type(error)(error.errno, os.strerror(error.errno), str(path)) from error


def read_records(path: pathlib.Path, check: Callable[[Any], Any]) -> tuple[list[Any], list[bytes]]:
    """Returns what `check` makes of the value of each line, and the lines that are damaged: no JSON, or it raises.

    What follows the last newline was not written to its end, and is neither. Of a file that is not there: nothing.
    """
    if not path.is_file():  # nor is a pipe, or a device, read
        return [], []
    lines = patiently(path.read_bytes).split(b"\n")[:-1]
    rows, damaged = [], []
    for line in lines:
        try:
            rows.append(check(parse_json(line.decode("utf-8"))))
        except ValueError:
            damaged.append(line)
    return rows, damaged


def keep_lines(path: pathlib.Path, rows: list[Any], damaged: list[bytes], tell: Callable[[str], None]) -> None:
    """Makes a file hold these rows alone; the damaged lines that it had go to NAME.damaged, which is told."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if damaged:
        aside = path.with_name(f"{path.name}.damaged")
        append_whole(aside, b"".join(line + b"\n" for line in damaged))
        tell(f"warning: {len(damaged)} lines of {path} are damaged; they are set aside in {aside.name}")
    if (path.read_bytes() if path.is_file() else b"") != text.encode():
        write_text_whole(path, text)


def append_whole(path: pathlib.Path, content: bytes, sync: bool = False) -> None:
    """Appends to a file, all of the content or (where the process is killed meanwhile) a part of it.

    sync: return when it is on the disk.

    Raises:
      OSError: where it cannot be written, such as on a full disk; the file is what it was. It names `path`.
    """
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("ab", buffering=0) as file:
            while content:
                content = content[file.write(content) :]
            if sync:
                os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        raise type(error)(error.errno, os.strerror(error.errno), str(path)) from error


def flush_tree(folder: str | os.PathLike) -> None:
    """Returns when all files and folders below a folder, and it itself, are on the disk."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            flush(os.path.join(root, name))
        flush(root)


def flush(path: str | os.PathLike) -> None:
    """Returns when a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def file_lock(path: pathlib.Path, wait: bool = True, on_wait: Callable[[], None] | None = None) -> Iterator[bool]:
    """Yields whether this process holds an advisory lock, on one machine or a shared disk; the file itself stays.

    It is let go afterwards, or when the process ends in any way.

    Args:
      path: the lock's file, which is neither read nor written; made with its folder if it is not there.
      wait: until the holder lets go or is killed; otherwise yields False at once where another process holds it.
      on_wait: called before waiting.

    Raises:
      OSError: where the file cannot be made, or its disk has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                yield False
                return
            if on_wait is not None:
                on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield True


@contextlib.contextmanager
def only_one(path: pathlib.Path, what: str) -> Iterator[None]:
    """Lets one process at a time do something, on one machine or on a shared disk.

    The lock ends with the process, however it ends: nothing has to be removed. Its file says who holds it. A disk
    without locks (some mounted buckets) costs a line: there a second process is not noticed.

    Args:
      path: the lock's file; what: is done, such as "DIR is being trained".

    Raises:
      ValueError: where another process holds it; it names the other's host, number and start.
    """
    with contextlib.ExitStack() as stack:
        try:
            held = stack.enter_context(file_lock(path, wait=False))
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print_warning(f"warning: {path} cannot be locked ({error.strerror}): a second start is not noticed")
            yield
            return
        if not held:
            raise ValueError(f"{what}: {_holder(path)}; wait for its end or stop it, or choose another folder")
        start = time.strftime("%Y-%m-%d %H:%M:%S")
        record = {"host": socket.gethostname(), "process": os.getpid(), "since": start}
        with contextlib.suppress(OSError):  # on a full disk the lock holds, but does not say whose it is
            path.write_text(json.dumps(record) + "\n", encoding="utf-8")  # the same file: it is locked, not its name
        yield


def _holder(path: pathlib.Path) -> str:
    for _ in range(10):  # it may hold the lock, and not have written yet
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            record = read_json(path)
            return f"process {record['process']} on {record['host']} since {record['since']}"
        time.sleep(0.1)
    return "another process"


def _children(value: dict | list) -> Any:
    return value.values() if isinstance(value, dict) else value


def _sum(record: dict[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
