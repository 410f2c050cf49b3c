"""A run uses what its config names: the autoencoder and the text encoder by digest, images by content."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from dit_jax.checkpoint import Checkpoints, params_digest, write_config
from dit_jax.cli.train import check_same_run, copy_autoencoder, resolve_images, with_recorded_version
from dit_jax.config import ConditionsConfig, LatentsConfig, TextConfig
from dit_jax.evaluation.loaded import AUTOENCODER_DIR, load, stored_digest
from dit_jax.evaluation.text_encoders import check_text_encoder, copy_text_encoder, text_digest
from dit_jax.models.build import init_params
from tests.tiny import autoencoder_config, dit_config, make_image_folder, write_tokenizer


def save(workdir, config, seed):
    with Checkpoints(workdir, max_to_keep=1) as checkpoints:
        checkpoints.save(0, {"params": jax.jit(lambda: init_params(config, jax.random.key(seed)))()}, config)


@pytest.fixture(scope="module")
def autoencoders(tmp_path_factory):
    """Two workdirs of autoencoders, of other weights."""
    root = tmp_path_factory.mktemp("autoencoders")
    for seed, name in enumerate("ab"):
        save(root / name, autoencoder_config(root), seed)
    return root / "a", root / "b"


def damage(workdir):
    file = max((path for path in workdir.rglob("*") if path.is_file() and "params" in str(path)), key=_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def _size(path):
    return path.stat().st_size


def latent_config(root, digest):
    return dataclasses.replace(dit_config(root), latents=LatentsConfig((4, 4, 2), scale=1.0, autoencoder=digest))


def test_a_digest_is_that_of_the_weights_as_they_are_loaded(autoencoders):
    one, other = autoencoders
    assert stored_digest(one) == params_digest(load(one).params) != stored_digest(other)


def test_an_autoencoder_left_by_a_start_that_failed_is_replaced(autoencoders, tmp_path):
    one, other = autoencoders
    copy_autoencoder(one, tmp_path, stored_digest(one))
    before = (tmp_path / AUTOENCODER_DIR).stat().st_ino
    copy_autoencoder(one, tmp_path, stored_digest(one))
    assert (tmp_path / AUTOENCODER_DIR).stat().st_ino == before  # a good one stays
    copy_autoencoder(other, tmp_path, stored_digest(other))
    assert stored_digest(tmp_path / AUTOENCODER_DIR) == stored_digest(other)
    assert [path.name for path in tmp_path.iterdir()] == [AUTOENCODER_DIR]


def test_an_autoencoder_that_a_checkpoint_may_depend_on_is_not_replaced(autoencoders, tmp_path):
    one, other = map(stored_digest, autoencoders)
    copy_autoencoder(autoencoders[0], tmp_path, one)
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    with pytest.raises(
        ValueError, match=f"is the autoencoder '{one}', but the run's latents are of '{other}'"
    ) as error:
        copy_autoencoder(autoencoders[1], tmp_path, other)
    assert "\n" not in str(error.value) and stored_digest(tmp_path / AUTOENCODER_DIR) == one


def test_a_damaged_copy_is_made_again_and_a_damaged_source_is_refused(autoencoders, tmp_path, capsys):
    source, digest = tmp_path / "cache" / AUTOENCODER_DIR, stored_digest(autoencoders[0])
    shutil.copytree(autoencoders[0], source)
    (tmp_path / "run" / "checkpoints" / "2").mkdir(parents=True)
    copy_autoencoder(source, tmp_path / "run", digest)
    damage(tmp_path / "run" / AUTOENCODER_DIR)
    copy_autoencoder(source, tmp_path / "run", digest)
    assert stored_digest(tmp_path / "run" / AUTOENCODER_DIR) == digest
    assert "is copied from" in capsys.readouterr().err
    damage(source)
    copy_autoencoder(source, tmp_path / "run", digest)  # the run has its own
    (tmp_path / "new").mkdir()
    with pytest.raises(ValueError, match="is damaged .*run `dit-jax encode --output=.*cache` again") as error:
        copy_autoencoder(source, tmp_path / "new", digest)
    assert "\n" not in str(error.value) and not list((tmp_path / "new").iterdir())
    with pytest.raises(ValueError, match=f"is the autoencoder '{stored_digest(autoencoders[1])}', but the latents are"):
        copy_autoencoder(autoencoders[1], tmp_path / "new", digest)
    with pytest.raises(ValueError, match="there is no autoencoder in"):
        copy_autoencoder(tmp_path / "none", tmp_path / "new", digest)
    assert not list((tmp_path / "new").iterdir())


def test_a_workdir_whose_autoencoder_is_another_is_not_loaded(autoencoders, tmp_path):
    one, other = map(stored_digest, autoencoders)
    save(tmp_path, latent_config(tmp_path, other), seed=0)
    copy_autoencoder(autoencoders[0], tmp_path, one)
    message = f"must be the autoencoder of the latents .config.latents.autoencoder='{other}'., but is another .'{one}'."
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_text_encoder_that_is_another_is_an_error(tmp_path):
    text = TextConfig(path=str(write_tokenizer(tmp_path / "one")), transformer={})
    text = dataclasses.replace(text, encoder=text_digest(text, text.path))
    copy_text_encoder(text, text.path, tmp_path / "copy")
    check_text_encoder(text, tmp_path / "copy")
    check_text_encoder(dataclasses.replace(text, encoder=None), tmp_path / "copy")
    file = tmp_path / "copy" / "tokenizer.json"
    file.write_text(file.read_text().replace("red", "rod"))
    with pytest.raises(ValueError, match="must be the text encoder of the run .*encoder='[0-9a-f]{64}'"):
        check_text_encoder(text, tmp_path / "copy")


# Images


def start(config, workdir):
    """Returns the config as `train` would record it, after what it checks of a run that is there."""
    config = resolve_images(with_recorded_version(config, workdir))
    check_same_run(workdir, config)
    return config


def edit(folder):
    path = folder / "class_1" / "003.png"
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)


def named(config, folder):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, name=str(folder)))


def test_a_run_is_resumed_on_its_images_wherever_they_are_and_on_no_others(tmp_path):
    folder = make_image_folder(tmp_path / "images")
    config = autoencoder_config(folder)
    recorded = start(config, tmp_path)
    assert recorded.data.version.startswith("content-") and recorded.data.version.endswith("(train 54, test 6)")
    write_config(tmp_path, recorded)
    assert start(config, tmp_path) == recorded
    moved = folder.rename(tmp_path / "moved")
    assert start(named(config, moved), tmp_path).data.version == recorded.data.version
    edit(moved)
    with pytest.raises(ValueError, match="config.data.version='content-.*but the data is 'content-.*other images") as e:
        start(named(config, moved), tmp_path)
    assert "\n" not in str(e.value)


def test_a_run_that_recorded_the_names_of_its_images_goes_on_at_their_place_and_says_so(tmp_path, capsys):
    folder = make_image_folder(tmp_path / "images")
    config = autoencoder_config(folder)
    old = "names-afd9373837e01f4b (train 54, test 6)"  # as older versions recorded them
    write_config(tmp_path, dataclasses.replace(config, data=dataclasses.replace(config.data, version=old)))
    before = (tmp_path / "config.json").read_text()
    recorded = start(config, tmp_path)
    assert "had recorded the names of its images alone" in capsys.readouterr().out
    assert recorded.data.version.startswith("names-afd9373837e01f4b content-")
    shutil.copytree(folder, tmp_path / "other")
    with pytest.raises(ValueError, match="holds a run of another config .config.data.name: "):
        start(named(config, tmp_path / "other"), tmp_path)  # of the same names, but nobody knows of what content
    assert (tmp_path / "config.json").read_text() == before
    write_config(tmp_path, recorded)
    capsys.readouterr()
    assert start(config, tmp_path) == recorded and "had recorded" not in capsys.readouterr().out
    edit(folder)
    with pytest.raises(ValueError, match="other images"):
        start(config, tmp_path)


def test_captions_are_recorded_by_runs_that_read_them_alone(tmp_path):
    folder = make_image_folder(tmp_path / "images")
    rows = [{"file_name": str(path.relative_to(folder)), "caption": "a"} for path in folder.glob("*/*.png")]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = autoencoder_config(folder)
    assert "caption" not in resolve_images(config).data.version
    fields = dataclasses.replace(config.data, extra_fields=("caption",))
    assert "caption" not in resolve_images(dataclasses.replace(config, data=fields)).data.version  # kept, not read
    conditions = ConditionsConfig(TextConfig(path="none", transformer={}))
    captioned = dataclasses.replace(dit_config(folder), conditions=conditions)
    recorded = resolve_images(captioned)
    assert "; caption " in recorded.data.version
    file = folder / "metadata.jsonl"
    file.write_text(file.read_text().replace('"a"', '"b"'))
    with pytest.raises(ValueError, match="other fields of them"):
        resolve_images(dataclasses.replace(captioned, data=recorded.data))
