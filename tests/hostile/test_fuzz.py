"""A reader reads what it is given, or raises ValueError or OSError; the inputs are the same every time."""

import pytest

from tests.hostile.fuzz import fuzz, names

NUM_EXAMPLES = 60  # of each reader; `python -m tests.hostile.fuzz` gives any number


@pytest.mark.parametrize("reader", names())
def test_a_reader_reads_or_says_what_is_wrong(reader):
    fuzz(reader, NUM_EXAMPLES)
