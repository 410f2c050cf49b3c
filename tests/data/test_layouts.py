"""Layouts as text and as LDM's tokens."""

import numpy as np
import pytest

from dit_jax.config import LayoutConfig, TokenTransformerConfig
from dit_jax.data.layouts import Box, LayoutTokenizer
from dit_jax.data.pipeline import layout_tokens

LAYOUT = LayoutConfig(("cat", "hot dog"), TokenTransformerConfig(16, 1), num_sections=5)
TOKENIZER = LayoutTokenizer(LAYOUT)
TEXT = "cat 0 0.25 0.5 1; hot dog 0.5 0 1 0.26"


def test_thirty_objects_are_92_tokens_and_shorter_layouts_are_padded():
    """LDM, section 4.3.1: three tokens an object, a start and an end."""
    assert LAYOUT.num_tokens == 92 and LAYOUT.vocab_size == 2 + 5 * 5 + 2
    start, end, place = 27, 28, lambda row, column: 2 + 5 * row + column
    tokens = TOKENIZER.tokenize(TOKENIZER.parse(TEXT))
    expected = [start, 0, place(1, 0), place(4, 2), 1, place(0, 2), place(1, 4), end]
    np.testing.assert_array_equal(tokens["ids"], expected + [0] * (92 - len(expected)))
    np.testing.assert_array_equal(tokens["mask"], np.arange(92) < len(expected))
    full = TOKENIZER.tokenize([Box(0, 0, 0, 1, 1)] * 30)
    assert full["mask"].all() and full["ids"][-1] == end and full["ids"].max() < LAYOUT.vocab_size
    assert TOKENIZER.tokenize(TOKENIZER.parse(""))["mask"].sum() == 2  # an empty picture; the null has no token at all


def test_tokens_say_what_the_boxes_are():
    fine = LayoutTokenizer(LayoutConfig(("a", "b"), TokenTransformerConfig(16, 1), num_sections=101))
    boxes = [Box(1, 0.1, 0.25, 0.9, 0.5), Box(0, 0.0, 0.0, 1.0, 0.33)]
    np.testing.assert_allclose(fine.boxes_of(**fine.tokenize(boxes)), boxes, atol=0.005)
    mirrored = fine.boxes_of(**fine.tokenize(boxes, mirrored=True))
    np.testing.assert_allclose(mirrored, [(1, 0.1, 0.25, 0.9, 0.5), (0, 0.0, 0.0, 1.0, 0.33)], atol=0.005)
    left = fine.boxes_of(**fine.tokenize([Box(0, 0.0, 0.2, 0.3, 0.4)], mirrored=True))
    np.testing.assert_allclose(left, [(0, 0.7, 0.2, 1.0, 0.4)], atol=0.005)


def test_example_and_its_mirror_image_have_their_own_tokens():
    conditions = layout_tokens(LAYOUT)
    for mirrored in (False, True):
        found = conditions({"layout": TEXT}, mirrored, None)["layout"]
        np.testing.assert_array_equal(found["ids"], TOKENIZER.tokenize(TOKENIZER.parse(TEXT), mirrored)["ids"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat 0 0 1.2 1", r"'cat' has the box \(0.0, 0.0, 1.2, 1.0\), which must lie within the image"),
        ("cat -0.1 0 1 1", "must lie within the image"),
        ("cat 0.5 0 0.5 1", "0 <= left < right <= 1"),
        ("cat 0 nan 1 1", "must lie within the image"),
        ("cat 0 0 1", "'cat 0 0 1' must be a class and four numbers"),
        ("cat 0 0 1 x", "must be a class and four numbers"),
        ("0 0 1 1", "must be a class and four numbers"),
        ("cow 0 0 1 1", "'cow' is no class of the model; its classes are cat, hot dog"),
        ("cat 0 0 1 1;" * 31, "31 boxes are more than the model's 30"),
    ],
)
def test_layout_that_cannot_be_is_one_line(text, message):
    with pytest.raises(ValueError, match=message) as error:
        TOKENIZER.tokenize(TOKENIZER.parse(text))
    assert "\n" not in str(error.value)
