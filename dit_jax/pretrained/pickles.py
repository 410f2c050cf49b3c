"""What a pickle says, as plain values: it is parsed, and nothing in it is imported, called or built.

A pickle is a program for a machine with a stack (`pickletools` describes its operations). Here containers, text and
numbers become Python's own; a name of a module's stays a `Name`, and a call, with the state that its result would get,
becomes a `Made`. So a file may hold anything beside what is wanted of it, such as the callbacks of a training program.
Memory and time stay in proportion to the bytes that are there, whatever these say of sizes.
"""

import dataclasses
import io
import math
import pickletools
from typing import Any, BinaryIO

import numpy as np

MAX_PICKLE_BYTES = 2**28  # LPIPS' has 59 MB
MAX_OPCODES = 1_000_000  # an array or a tensor takes 30 to 40: a DiT-XL with its Adam state 60,000
MAX_SIDE = 2**40  # of an array
MAX_AXES = 64  # NumPy has no more
MAX_SHOWN = 300  # letters of a name in an error

VALUES = (  # operations that push their argument
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES "
    "SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8"
)
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": list}
FROM_MARK = {"TUPLE": tuple, "LIST": list, "FROZENSET": tuple}
LAST = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Name:
    """A function or a class that a pickle refers to."""

    module: str
    name: str

    def __str__(self) -> str:
        return shown(f"{self.module}.{self.name}")[1:-1]


PERSISTENT = Name("pickle", "persistent_load")  # is called for what lies outside of the pickle


@dataclasses.dataclass(eq=False, slots=True)
class Made:
    """What a pickle would have called, with what; and what its result would have been given."""

    function: Any
    arguments: Any
    state: Any = None
    items: dict | None = None  # of one that is a mapping

    def __str__(self) -> str:
        return str(self.function) if isinstance(self.function, Name) else type(self.function).__name__


class Key:
    """A key of a dict that is no text. Each is another one: hashes that a file chooses could take any time."""

    def __init__(self, value: Any):
        self.value = value


def read_pickle(file: BinaryIO | bytes, size: int) -> tuple[Any, list[Made]]:
    """Returns what the next pickle of a file says, and its references to what lies outside of it, in order.

    Args:
      file: at the pickle's start; size: of the file in bytes.

    Raises:
      ValueError, and others: where it is damaged, or has more operations or bytes than files of weights have.
    """
    file = io.BytesIO(file) if isinstance(file, bytes) else file
    start = file.tell()
    stack, marks, memo, persistent = [], [], {}, []
    values = frozenset(VALUES.split())

    def since_mark() -> list:
        height = marks.pop()
        items = stack[height:]
        del stack[height:]
        return items

    def set_items(pairs: list) -> None:
        target = stack[-1]
        if isinstance(target, Made):
            target.items = {} if target.items is None else target.items
            target = target.items
        if type(target) is not dict or len(pairs) % 2:
            raise ValueError(f"it sets items of a {type(target).__name__}")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            target[key if type(key) is str else Key(key)] = value

    def extend(items: list) -> None:
        if type(stack[-1]) is list:
            stack[-1].extend(items)
        elif not isinstance(stack[-1], Made):
            raise ValueError(f"it appends to a {type(stack[-1]).__name__}")

    for count, (opcode, argument, position) in enumerate(pickletools.genops(file)):
        name = opcode.name
        if count >= MAX_OPCODES or position - start > MAX_PICKLE_BYTES:
            raise ValueError(f"it has more than {MAX_OPCODES:,} opcodes or {MAX_PICKLE_BYTES:,} bytes")
        if name in values:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in EMPTY:
            stack.append(EMPTY[name]())
        elif name in FROM_MARK:
            stack.append(FROM_MARK[name](since_mark()))
        elif name in LAST:
            items = tuple(stack[-LAST[name] :])
            del stack[-LAST[name] :]
            stack.append(items)
        elif name == "DICT":
            items = since_mark()
            stack.append({})
            set_items(items)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            set_items([key, value])
        elif name == "SETITEMS":
            set_items(since_mark())
        elif name == "APPEND":
            item = stack.pop()
            extend([item])
        elif name in ("APPENDS", "ADDITEMS"):
            extend(since_mark())
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "POP" and marks and marks[-1] == len(stack):
            marks.pop()
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            since_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            if argument > count:
                raise ValueError(f"it numbers an object higher than the {count} opcodes before")
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(Name(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            if type(attribute) is not str or type(module) is not str:
                raise ValueError("a name in it is no text")
            stack.append(Name(module, attribute))
        elif name == "INST":
            stack.append(Made(Name(*argument.split(" ", 1)), tuple(since_mark())))
        elif name == "OBJ":
            function, *arguments = since_mark()
            stack.append(Made(function, tuple(arguments)))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = stack.pop(), stack.pop()
            stack.append(Made(function, arguments))
        elif name == "NEWOBJ_EX":
            _, arguments, function = stack.pop(), stack.pop(), stack.pop()
            stack.append(Made(function, arguments))
        elif name == "BUILD":
            state = stack.pop()
            if not isinstance(stack[-1], Made):
                raise ValueError(f"it gives a state to a {type(stack[-1]).__name__}")
            stack[-1].state = state
        elif name in ("PERSID", "BINPERSID"):
            persistent.append(Made(PERSISTENT, argument if name == "PERSID" else stack.pop()))
            stack.append(persistent[-1])
        elif name == "FRAME":
            if argument > size - position:
                raise ValueError(f"it has a frame of {argument:,} bytes, more than the file")
        elif name not in ("PROTO", "STOP"):
            raise ValueError(f"it has opcode {name}")
    return stack.pop(), persistent


def mapping_of(node: Any) -> dict | None:
    """Returns the items of what is a dict, or would be made one, of any class; None of another thing."""
    if type(node) is dict:
        return node
    if not isinstance(node, Made):
        return None
    if node.items is not None:
        return node.items
    if type(node.arguments) is not tuple or str(node.function) not in ("collections.OrderedDict", "builtins.dict"):
        return None
    pairs = node.arguments[0] if node.arguments else ()  # Python 2 wrote OrderedDict([[key, value], ...])
    if type(pairs) is not list or not all(type(pair) is list and len(pair) == 2 for pair in pairs):
        return {} if pairs == () else None
    return {key if type(key) is str else Key(key): value for key, value in pairs}


def is_call(node: Any, *names: str) -> bool:
    """Returns whether something would be the result of a function, named with its module."""
    return isinstance(node, Made) and isinstance(node.function, Name) and str(node.function) in names


def is_array(node: Any) -> bool:
    """Returns whether something would be a NumPy array."""
    return is_call(node, "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")  # NumPy 1, 2


def array_of(node: Made) -> np.ndarray:
    """Returns the array of floats that something would be, read-only: a view of the bytes that the pickle holds.

    Raises:
      ValueError: where it is not one of floats, or its shape does not fit its bytes.
    """
    if type(node.state) is not tuple or len(node.state) != 5:
        raise ValueError("an array in it has no content")
    _, shape, dtype, is_fortran, content = node.state
    if is_call(content, "_codecs.encode"):  # bytes of a pickle that Python 2 can read
        content = content.arguments[0].encode("latin-1")
    if type(content) is not bytes:
        raise ValueError("an array in it is one of objects")
    dtype = _dtype_of(dtype)
    if not is_shape(shape):
        raise ValueError("an array in it has no shape")
    if math.prod(shape) * dtype.itemsize != len(content):
        raise ValueError(f"an array in it of shape {shape} has {len(content):,} bytes")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if is_fortran is True else "C")


def is_shape(value: Any) -> bool:
    """Returns whether something is a tuple of sizes."""
    whole = type(value) is tuple and len(value) <= MAX_AXES
    return whole and all(type(side) is int and 0 <= side <= MAX_SIDE for side in value)


def _dtype_of(node: Any) -> np.dtype:
    if not is_call(node, "numpy.dtype") or type(node.state) is not tuple or len(node.arguments) != 3:
        raise ValueError("an array in it has no dtype")
    name, (_, byte_order, *extras) = node.arguments[0], node.state
    if name not in ("f2", "f4", "f8"):
        raise ValueError(f"its arrays must be float, not of dtype {shown(name)}")
    if byte_order not in ("<", ">") or any(extra not in (None, -1, 0) for extra in extras):
        raise ValueError(f"a dtype in it is no plain {name}")
    return np.dtype(byte_order + name)


def kind_of(node: Any) -> str:
    """Returns what something is, for an error: the class or the function of a call, with its module."""
    return str(node) if isinstance(node, Made | Name) else type(node).__name__


def shown(name: Any) -> str:
    """Returns a name out of a file for an error: in quotes, without escape codes, whole unless it is no name."""
    if type(name) is not str:
        return f"a {kind_of(name)}"
    return repr(name if len(name) <= MAX_SHOWN else f"a name of {len(name):,} letters")
