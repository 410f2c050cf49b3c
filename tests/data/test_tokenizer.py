"""Captions become ids of a fixed length; what does not fit, and what is no tokenizer, is said in one line."""

import gc
import json

import numpy as np
import pytest
import tokenizers

from dit_jax.data import tokenizer as tokenizer_module
from dit_jax.data.tokenizer import Tokenizer
from tests.tiny import WORDS, write_tokenizer


def test_a_caption_is_padded_and_masked(tmp_path):
    tokens = Tokenizer(write_tokenizer(tmp_path), 8).tokenize(["A red flag", "star: red"])
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    found = [[words[i] for i, there in zip(*row, strict=True) if there] for row in zip(*tokens.values(), strict=True)]
    assert found == [["[CLS]", "a", "red", "flag", "[SEP]"], ["[CLS]", "star", ":", "red", "[SEP]"]]
    assert tokens["ids"].dtype == np.int32 and tokens["ids"].shape == tokens["mask"].shape == (2, 8)
    assert not tokens["ids"][~tokens["mask"]].any()


def test_an_empty_caption_is_the_null_condition(tmp_path):
    tokens = Tokenizer(write_tokenizer(tmp_path), 8).tokenize(["", "  ", "a"])
    assert tokens["mask"].any(axis=1).tolist() == [False, False, True] and not tokens["ids"][:2].any()


def test_what_is_cut_of_a_long_caption_is_told_as_it_is_written(tmp_path):
    tokenizer = Tokenizer(write_tokenizer(tmp_path), 5)
    assert tokenizer.cut("A red flag") == "" == tokenizer.cut("")
    assert tokenizer.cut("A red flag: Red  STAR") == ": Red  STAR"
    whole, cut = (tokenizer.tokenize([text])["ids"] for text in ("A red flag", "A red flag: Red  STAR"))
    assert (whole == cut).all()  # the token that ends a caption is there, too


def test_the_files_own_padding_and_length_do_not_count(tmp_path):
    folder = write_tokenizer(tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding(length=4)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert Tokenizer(folder, 16).tokenize(["a red flag: red star"])["mask"].sum() == 8


def test_bytes_that_are_no_text_are_question_marks(tmp_path):
    tokenizer = Tokenizer(write_tokenizer(tmp_path), 5)
    assert tokenizer.tokenize(["red \udcff"])["mask"].sum() == 4  # [CLS] red [UNK] [SEP]
    assert tokenizer.cut("red \udcff flag star") == "star"


def test_captions_are_one_whatever_code_of_unicode_they_are_written_in(tmp_path):
    model = tokenizers.models.WordPiece({"[UNK]": 0, "é": 1}, unk_token="[UNK]")  # which does not normalise by itself
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path, 5)
    assert tokenizer.tokenize(["é", "e\u0301"])["ids"][:, 0].tolist() == [1, 1]


def _content(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: path.write_text("{"), "is no tokenizer"),
        (lambda path: path.write_text('{"model": {"type": "Magic"}}'), "is no tokenizer"),
        (lambda path: path.write_text("[" * 10**5), "is no tokenizer"),
        (lambda path: path.write_bytes(bytes(range(256))), "is no tokenizer"),
        (lambda path: path.write_text(json.dumps(_content(path) | {"post_processor": {"type": "x"}})), "no tokenizer"),
        (lambda path: path.open("ab").truncate(2**26 + 1), "must be at most 67,108,864 bytes"),
    ],
)
def test_what_is_no_tokenizer_is_one_line(tmp_path, change, message):
    change(write_tokenizer(tmp_path) / "tokenizer.json")
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer(tmp_path, 8)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("post_processor", "sep", 1), 2**31, "gives id 2147483648, but has 9 tokens"),
        (("post_processor", "cls", 1), 9, "gives id 9, but has 9 tokens"),
        (("model", "unk_token"), "none", "cannot tokenize 'green' .*Missing"),
    ],
)
def test_a_file_that_contradicts_itself_is_one_line(tmp_path, path, value, message):
    file = write_tokenizer(tmp_path) / "tokenizer.json"
    content = part = _content(file)
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        Tokenizer(tmp_path, 8).tokenize(["green"])


def test_a_tokenizer_of_another_encoder_is_an_error(tmp_path):
    folder = write_tokenizer(tmp_path)
    assert Tokenizer(folder, 8, vocab_size=4 + len(WORDS)).vocab_size == 4 + len(WORDS)
    with pytest.raises(ValueError, match=r"has ids up to 8, but its text encoder has 8 rows; give the tokenizer"):
        Tokenizer(folder, 8, vocab_size=3 + len(WORDS))


def test_a_length_without_room_for_a_word_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"max_length=2 tokens must be more than the 2 that begin and end"):
        Tokenizer(write_tokenizer(tmp_path), 2)


PLAIN = {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}
MULTIPLIED = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"normalizer": {"type": "Replace", "pattern": {"Regex": "(x+x+)+y"}, "content": "b"}},
            "cannot tokenize 'xx.*retry",
        ),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}}, "is no tokenizer of Hugging Face's form"),
        ({"normalizer": {"type": "Sequence", "normalizers": [MULTIPLIED] * 20}}, "cannot tokenize .*too much memory"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "cannot tokenize .*chunk size must be non-zero"),
        ({"model": PLAIN | {"vocab": {"a": 2**32 - 1, "[UNK]": 1}}}, "has ids up to 4,294,967,295"),
        (
            {
                "post_processor": {
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": "X", "type_id": 0}}],
                    "pair": [],
                    "special_tokens": {},
                }
            },
            "cannot tokenize .*no entry found for key",
        ),
    ],
    ids=["regex", "table", "memory", "chunks", "ids", "template"],
)
def test_what_makes_the_package_panic_or_fill_the_memory_is_one_line(tmp_path, capfd, monkeypatch, change, message):
    monkeypatch.setattr(tokenizer_module, "BASE_MEMORY", 2**28)
    parts = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding")
    content = {"version": "1.0", "added_tokens": [], "model": PLAIN, **dict.fromkeys(parts)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer(tmp_path, 8).tokenize(["x" * 60 + "a"])
    assert "\n" not in str(error.value) and capfd.readouterr() == ("", "")


def test_a_caption_that_takes_too_long_ends_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "CAPTION_SECONDS", 0.05)
    tokenizer = Tokenizer(write_tokenizer(tmp_path), 8)
    with pytest.raises(ValueError, match="cannot tokenize 'red red .* takes more than 0.05 seconds"):
        tokenizer.tokenize(["red " * 10**6])
    assert tokenizer.tokenize(["a red flag"])["mask"].sum() == 5


def test_an_answer_that_was_not_waited_for_is_no_later_captions(tmp_path, monkeypatch):
    tokenizer = Tokenizer(write_tokenizer(tmp_path), 8)
    expected = tokenizer.tokenize(["a red flag"])
    process = tokenizer._process

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(
        process, "stdout", type("Pipe", (), {"readline": lambda self: interrupted(), "close": lambda self: None})()
    )
    with pytest.raises(KeyboardInterrupt):
        tokenizer.tokenize(["star"])
    assert process.poll() is not None
    np.testing.assert_array_equal(tokenizer.tokenize(["a red flag"])["ids"], expected["ids"])


def test_its_process_ends_with_it(tmp_path):
    tokenizer = Tokenizer(write_tokenizer(tmp_path), 8)
    process = tokenizer._process
    assert process.poll() is None
    del tokenizer
    gc.collect()
    assert process.poll() is not None
