"""Classes by name: which are the same, which is the number of each, and where a run records them."""

import dataclasses
import unicodedata

import pytest

from dit_jax.checkpoint import write_config
from dit_jax.cli.main import main
from dit_jax.cli.sample import parse_labels
from dit_jax.cli.train import resolve_images, with_data_version, with_recorded_version
from dit_jax.config import config_from_dict, config_to_dict
from dit_jax.data import sources
from dit_jax.evaluation.generate import check_classifier
from dit_jax.evaluation.given import Given
from dit_jax.evaluation.loaded import LoadedModel
from tests.cli.test_main import write_config as write_config_file
from tests.tiny import dit_config, make_image_folder

NAMES = ("1", "2", "10", "tench, Tinca tinca", "Säge", "cat")


@pytest.fixture
def folder(tmp_path):
    """Images of the classes 2, 9 and 10."""
    folder = make_image_folder(tmp_path / "images")
    for i, name in enumerate(("10", "9", "2")):
        (folder / f"class_{i}").rename(folder / name)
    return folder


def with_names(config, names, **data):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, class_names=names, **data))


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("0,5", [0, 5]),
        ("cat", [5]),
        ("cat, 3", [5, 3]),
        ('"tench, Tinca tinca",cat', [3, 5]),
        (unicodedata.normalize("NFD", "Säge"), [4]),
        ("2,10", [1, 2]),  # a name first
        (None, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_labels_are_names_or_numbers(text, numbers):
    assert parse_labels(text, 6, NAMES) == numbers


def test_a_name_that_looks_like_another_number_is_told(capsys):
    parse_labels("2", 6, NAMES)
    assert capsys.readouterr().out == "--labels: 2 is the name of class number 1\n"
    assert parse_labels("2", 6) == [2] and not capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        ("cot", NAMES, "--labels=cot: 'cot' is no class; did you mean 'cat'?"),
        ("CAT", NAMES, "did you mean 'cat'?"),
        ("7", NAMES, "7 is no class; it must be from 0 to 5, or 1, 2, 10, tench"),
        ("-7", NAMES, "-7 is no class; it must be from"),
        ("cat", None, "'cat' is no class; it must be from 0 to 5, and this model has no names of them"),
        ("0,,1", None, "'' is no class"),
        ("", None, "must be classes with commas between"),
    ],
)
def test_what_is_no_class_is_one_line_with_the_nearest(text, names, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")) as error:
        parse_labels(text, 6, names)
    assert "\n" not in str(error.value)


def test_model_takes_labels_by_name(folder):
    config = with_names(dit_config(folder), ("2", "9", "10"))
    model = LoadedModel(config, {}, 0, None, None)
    for labels in (["10", "2"], [2, "2"], {"label": ["10", 0]}, [2, 0]):
        conditions, _ = model.inputs(labels, Given(), config.sampling)
        assert conditions["label"].tolist() == [2, 0]
    assert model.inputs("9", Given(), config.sampling)[0]["label"].tolist() == [1]
    assert model.inputs([3], Given(), config.sampling)[0]["label"].tolist() == [3]  # no class
    with pytest.raises(ValueError, match="'11th' is no class; it must be from"):
        model.inputs(["11th"], Given(), config.sampling)


def test_a_run_records_its_classes_in_the_order_of_their_labels(folder):
    config = resolve_images(dit_config(folder))
    assert config.data.class_names == ("2", "9", "10")
    assert config_from_dict(config_to_dict(config)) == config
    assert sources.class_names(config.data) == ["2", "9", "10"]
    other = with_names(dit_config(folder), ("10", "9", "2"))
    assert resolve_images(other).data.class_names == ("10", "9", "2")
    with pytest.raises(ValueError, match=r"class_names\[0\]='10' but the data has \['2'\]; change the config"):
        with_data_version(other, sources.source_identity(config.data))


def test_names_of_tfds_are_those_of_its_builder(shipped):
    names = sources.source_identity(shipped)["class_names"]
    assert len(names) == 10 and names[:2] == ["T-shirt/top", "Trouser"] and names[-1] == "Ankle boot"


def test_a_run_of_an_older_release_goes_on_in_its_order(folder, tmp_path):
    """The version is what that release recorded of these files."""
    version = "names-85a4b8ff6ea9f137 (train 54, test 6)"
    old = with_names(dit_config(folder), None, version=version)
    (tmp_path / "run").mkdir()
    write_config(tmp_path / "run", old)
    resumed = resolve_images(with_recorded_version(dit_config(folder), tmp_path / "run"))
    assert resumed.data.version.startswith("names-85a4b8ff6ea9f137 content-")
    assert resumed.data.class_names == ("10", "2", "9")
    files = sources.open_source(resumed.data, "train")._files
    assert [label for path, label in files if path.parent.name == "10"] == [0] * 18


def test_a_classifier_of_other_classes_is_refused(folder):
    def pair(ours, theirs, **data):
        config = with_names(dit_config(folder), ours)
        other = config_to_dict(with_names(config, theirs, **data)) | {"stage": "classifier", "sampling": None}
        other["dit"] |= {"class_conditional": False, "label_dropout": 0.0}
        return config, config_from_dict(other)

    check_classifier(*pair(("2", "9", "10"), ("2", "9", "10")))
    check_classifier(*pair(("2", "9", "10"), None))
    with pytest.raises(ValueError, match=r"data.class_names is \('10', '2', '9'\), not \('2', '9', '10'\)"):
        check_classifier(*pair(("2", "9", "10"), ("10", "2", "9")))
    with pytest.raises(ValueError, match=r"data.class_names is \('10', '2', '9'\), not \('2', '9', '10'\)"):
        check_classifier(*pair(("2", "9", "10"), None, version="names-0 (train 1, test 1)"))


def test_info_tells_which_class_is_which(folder, tmp_path, capsys):
    path = write_config_file(tmp_path / "config.py", with_names(dit_config(folder), ("2", "a\x1b[2J", "10")))
    main(["info", f"--config={path}"])
    assert "3 classes: 0 '2', 1 'a\\x1b[2J', 2 '10'\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("class_names", ("a", "b"), "must be 3 different names, one a class"),
        ("class_names", ("a", "b", "a"), "must be 3 different names, one a class"),
        ("background", (1, 2), "must be a grey level or RGB, each from 0 to 255"),
        ("background", (256,), "must be a grey level or RGB, each from 0 to 255"),
    ],
)
def test_names_and_background_that_cannot_be_are_refused(folder, key, value, message):
    values = config_to_dict(dit_config(folder))
    assert config_from_dict(values | {"data": values["data"] | {"background": (0,)}}).data.background == (0,)
    with pytest.raises(ValueError, match=message):
        config_from_dict(values | {"data": values["data"] | {key: value}})
