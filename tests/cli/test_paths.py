"""Paths as people give them: a leading ~ in each of them, homes that are not known, names with wildcards."""

import argparse
import dataclasses
import importlib
import os
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.checkpoint import Checkpoints
from dit_jax.cli.main import VERBS, main, path_flag, paths_flag
from dit_jax.config import Config, config_from_dict, config_to_dict, load_config, override_config
from dit_jax.files import user_path
from tests.tiny import autoencoder_config, dit_config

# Flags of text that are no paths; a cache's is expanded where it is used, as the config's is.
NO_PATHS = {
    "train": set(),
    "encode": {"dtype"},
    "sample": {"labels", "prompt", "strength", "sampler", "steps", "cfg_scale", "eta", "average"},
    "evaluate": {"metrics", "cache", "labels", "sampler", "steps", "cfg_scale", "eta", "average", "varied"}
    | {"sweep.sampler", "sweep.steps", "sweep.cfg_scale", "sweep.ema_length"},
    "convert": {"kind"},
    "plan": {"topology"},
    "benchmark": {"what"},
    "info": set(),
    "report": set(),
}
CACHES = {"config.evaluation.cache", "config.compute.compilation_cache"}
NO_PATH_KEYS = CACHES | {
    "config.data.train_split",
    "config.data.eval_split",
    "config.data.version",
    "config.data.map_field",
    "config.latents.autoencoder",
    "config.conditions.text.caption_field",
    "config.conditions.text.encoder",
    "config.conditions.layout.layout_field",
    "config.conditions.layout.classes",
    "config.data.extra_fields",
    "config.evaluation.metrics",
    "config.training.keep_best_metric",
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_flag_that_may_be_a_path_has_the_type_that_expands_it(verb):
    parser = argparse.ArgumentParser()
    importlib.import_module(f"dit_jax.cli.{verb}").add_arguments(parser)
    takes_text = {
        action.option_strings[0].removeprefix("--"): action.type
        for action in parser._actions
        if action.nargs != 0 and action.type not in (int, float)
    }
    paths = {name for name, kind in takes_text.items() if kind in (path_flag, paths_flag)}
    assert set(takes_text) - paths == NO_PATHS[verb], "make it a path_flag, or name it here"


def text_keys(schema: type, path: str):
    """Yields (dotted key, field) of the schema's keys of text."""
    hints = typing.get_type_hints(schema)
    for f in dataclasses.fields(schema):
        kinds = [kind for kind in (hints[f.name], *typing.get_args(hints[f.name])) if kind is not type(None)]
        if str in kinds:
            yield f"{path}.{f.name}", f
        for section in filter(dataclasses.is_dataclass, kinds):
            yield from text_keys(section, f"{path}.{f.name}")


def test_every_config_key_that_may_be_a_path_is_marked_as_one():
    keys = {key: f.metadata.get("path", False) for key, f in text_keys(Config, "config")}
    assert {key for key, is_path in keys.items() if not is_path} - NO_PATH_KEYS == set(), "mark it, or name it here"
    assert all(keys[key] for key in ("config.data.name", "config.latents.path", "config.training.init_from"))


def test_a_leading_tilde_is_the_home_of_who_gives_it_and_a_default_stays_as_it_is(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of one")
    values = config_to_dict(dit_config("~/images")) | {"latents": {"shape": (4, 4, 2), "path": "~/latents"}}
    config = config_from_dict(values)
    assert (config.data.name, config.latents.path) == ("/home/of one/images", "/home/of one/latents")
    assert config.compute.compilation_cache.startswith("~/")  # each machine has its own
    assert config_from_dict(config_to_dict(config)) == config
    assert [user_path(path) for path in ("~", "~/a b", "a/~/b", "./~")] == [
        "/home/of one",
        "/home/of one/a b",
        "a/~/b",
        "./~",
    ]
    assert paths_flag("~/a.png,b.png,~/c.png") == "/home/of one/a.png,b.png,/home/of one/c.png"


@pytest.mark.parametrize("home", ["nobody's", "not set", "empty"])
def test_a_home_that_is_not_known_is_one_line(home, monkeypatch, capsys, tmp_path):
    path = "~no_such_user/run" if home == "nobody's" else "~/run"
    if home != "nobody's":
        monkeypatch.setenv("HOME", "") if home == "empty" else monkeypatch.delenv("HOME")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as without an entry for the user
    with pytest.raises(SystemExit) as exit_info:
        main(["info", f"--workdir={path}"])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and f"{path}: the home folder {path[:-4]} is not known" in error
    values = config_to_dict(autoencoder_config("images"))
    values["data"]["name"] = path
    config = config_from_dict(values)  # of a run that comes from another machine: it is read as it is
    assert config.data.name == path
    for key in ("data.name", "data.raw_dir"):
        with pytest.raises(ValueError, match=f"^config.{key}={path}: the home folder"):
            override_config(config, [(key, path)])
    assert override_config(config, [("seed", "1")]).seed == 1
    file = tmp_path / "config.py"
    file.write_text(f"import ml_collections\n\ndef get_config():\n    return ml_collections.ConfigDict({values!r})\n")
    with pytest.raises(ValueError, match=f"^config.data.name={path}: the home folder"):
        load_config(str(file))


@pytest.mark.parametrize("name", ["run[1]", "run*?", "a run, ü"])
def test_a_checkpoint_is_read_back_from_a_folder_of_any_name(name, tmp_path):
    """Orbax takes the names of folders for patterns of wildcards."""
    workdir, tree = tmp_path / name, {"weights": jnp.arange(6.0)}
    (tmp_path / "run1").mkdir()  # what the patterns would find
    with Checkpoints(workdir, max_to_keep=1) as checkpoints:
        checkpoints.save(3, {"params": tree}, dit_config("images"))
    abstract = {"weights": jax.ShapeDtypeStruct((6,), jnp.float32)}
    restored = Checkpoints(workdir).restore(3, {"params": abstract})["params"]
    np.testing.assert_array_equal(restored["weights"], tree["weights"])
    assert Checkpoints(workdir).verify(3).step == 3
