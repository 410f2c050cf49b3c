"""Classes by name: the order in which people count them, and the number (the label) of each."""

import difflib
import re
from collections.abc import Sequence

from dit_jax.files import normalised

MAX_SHOWN = 20  # names in an error


def natural_key(name: str) -> tuple:
    """Returns what sorts names as people count: "2" before "10", "class_9" before "class_10"."""
    parts = re.split(r"([0-9]+)", name)  # text and digits in turn, text first
    return *(int(part) if i % 2 else part for i, part in enumerate(parts)), name


def class_number(label: str | int, class_names: Sequence[str] | None, num_classes: int) -> int:
    """Returns the number of a class that is given by its name, or by its number.

    A text is a name first, and a number only where no class has that name.

    Raises:
      ValueError: where it is neither; it tells the nearest name.
    """
    names = [normalised(name) for name in class_names or ()]
    if isinstance(label, str):
        text = normalised(label.strip())
        if text in names:
            return names.index(text)
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", text):
            raise ValueError(f"{text[:100]!r} is no class; {_remedy(text, names, num_classes)}")
        label = int(text)
    if not 0 <= label < num_classes:
        raise ValueError(f"{label} is no class; {_remedy(str(label), names, num_classes)}")
    return int(label)


def describe_classes(names: Sequence[str], most: int = MAX_SHOWN) -> str:
    """Returns one line of which class is which, at most so many: "3 classes: 0 'ant', 1 'bee', 2 'cat'"."""
    told = ", ".join(f"{number} '{shown_name(name)}'" for number, name in enumerate(names[:most]))
    return f"{len(names):,} classes: {told}" + (f" and {len(names) - most:,} more" if len(names) > most else "")


def shown_name(name: str) -> str:
    """Returns a class's name for a terminal or a picture: what cannot be printed is escaped."""
    return name if name.isprintable() else name.encode("unicode_escape").decode("ascii")


def _remedy(text: str, names: Sequence[str], num_classes: int) -> str:
    numbers = f"it must be from 0 to {num_classes - 1}"
    if not names:
        return f"{numbers}, and this model has no names of them"
    near = difflib.get_close_matches(text, names, n=1, cutoff=0.4)
    near = near or [name for name in names if name.casefold() == text.casefold()]
    if near:
        return f"did you mean {shown_name(near[0])!r}?"
    more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    return f"{numbers}, or {', '.join(map(shown_name, names[:MAX_SHOWN]))}{more}"
