"""JSON files that someone else may have written: a value or one clear ValueError, in bounded memory."""

import json
import os
import pathlib
from typing import Any

MAX_DEPTH = 64  # a config has five
MAX_BYTES = 2**24  # parsed, JSON takes thirty times its size at the worst; the largest here, a cache's, has some 10 KB


def read_json(path: str | os.PathLike, remedy: str = "restore it") -> Any:
    """Returns the value in a file.

    Raises:
      FileNotFoundError: where it is not there; ValueError: where it is too large, or not JSON.
    """
    path = pathlib.Path(path)
    size = path.stat().st_size
    if size > MAX_BYTES or not path.is_file():
        raise ValueError(f"{path} must be a file of at most {MAX_BYTES:,} bytes, but has {size:,}; {remedy}")
    try:
        return parse_json(path.read_bytes())
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


def _children(value: dict | list) -> Any:
    return value.values() if isinstance(value, dict) else value
