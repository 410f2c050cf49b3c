"""The schema: every mistake in a config is one line that names the key, and a config survives its JSON."""

import copy
import dataclasses
import json
import pathlib
import re

import pytest

import dit_jax
from dit_jax.config import (
    Config,
    check_config,
    check_platform,
    config_from_dict,
    config_to_dict,
    fixed_differences,
    for_platform,
    load_config,
    nearest_name,
    override_config,
    round_to_multiple,
    schema_paths,
    undivided_activations,
)

PACKAGE = pathlib.Path(dit_jax.__file__).parent

DIFFUSION = {
    "stage": "diffusion",
    "data": {"name": "images", "image_size": 32},
    "training": {"num_train_steps": 100},
    "dit": {"depth": 2, "width": 32, "num_heads": 4, "patch_size": 2},
}
AUTOENCODER = {
    "stage": "autoencoder",
    "data": {"name": "images", "image_size": 32},
    "training": {"num_train_steps": 100},
}
UNET = {
    "stage": "diffusion",
    "data": {"name": "images", "image_size": 32},
    "training": {"num_train_steps": 100},
    "unet": {"base_channels": 32, "channel_multipliers": (1, 2), "attention_levels": (1,), "num_heads": 2}
    | {"context_width": 24},
}
BASES = {"diffusion": DIFFUSION, "unet": UNET, "autoencoder": AUTOENCODER}


def edited(base, **edits):
    """Returns a copy of nested dicts with dotted keys (written with __) set."""
    values = copy.deepcopy(base)
    for key, value in edits.items():
        *sections, name = key.split("__")
        section = values
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    return values


def error_of(function, *args):
    """Returns the message of the ValueError that a call raises; a message for people is one line."""
    with pytest.raises(ValueError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def config_file(tmp_path):
    """Returns a function that writes a config file whose get_config returns a base, and returns its path."""

    def write(base=DIFFUSION, body=None):
        body = body or f"def get_config(width=None):\n    return ConfigDict({base!r})"
        path = tmp_path / "some_config.py"
        path.write_text(f"from ml_collections import ConfigDict\n\n{body}\n")
        return str(path)

    return write


# Keys


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("optimiser", "config.optimiser is not a config key; did you mean config.optimizer?"),
        ("dit__widht", "config.dit.widht is not a config key; did you mean config.dit.width?"),
        (
            "training__global_batchsize",
            "config.training.global_batchsize is not a config key; did you mean config.training.global_batch_size?",
        ),
    ],
)
def test_unknown_key_is_named_in_full_with_the_nearest(config_file, key, message):
    assert error_of(config_from_dict, edited(DIFFUSION, **{key: 1})) == message
    assert error_of(load_config, config_file(), [(key.replace("__", "."), "1")]) == message


def test_unknown_section_of_an_override_is_named(config_file):
    message = "config.optimiser is not a config key; did you mean config.optimizer?"
    assert error_of(load_config, config_file(), [("optimiser.b1", "0.5")]) == message


def test_unknown_key_like_no_other_lists_the_known():
    message = error_of(config_from_dict, edited(DIFFUSION, mesh__zzz=1))
    assert message == "config.mesh.zzz is not a config key; known here: data, fsdp, tensor, sequence, slices, rules"


@pytest.mark.parametrize("key", ["stage", "data", "training", "data.name", "training.num_train_steps", "dit.depth"])
def test_missing_key_without_default_is_named(key):
    values = copy.deepcopy(DIFFUSION)
    *sections, name = key.split(".")
    section = values
    for part in sections:
        section = section[part]
    del section[name]
    assert error_of(config_from_dict, values).startswith(f"config.{key} is missing")


def test_section_of_the_stage_without_required_keys_may_be_left_out():
    config = config_from_dict(DIFFUSION)
    assert config.diffusion.num_timesteps == 1000 and config.sampling.num_steps == 250
    assert config_from_dict(AUTOENCODER).autoencoder.base_channels == 128
    assert config.latents is None and config.autoencoder is None


@pytest.mark.parametrize(
    ("stage", "section", "value"),
    [
        ("diffusion", "autoencoder", {}),
        ("autoencoder", "dit", DIFFUSION["dit"]),
        ("autoencoder", "diffusion", {}),
        ("autoencoder", "sampling", {}),
        ("autoencoder", "latents", {"shape": (4, 4, 4)}),
    ],
)
def test_section_of_the_other_stage_is_an_error(stage, section, value):
    message = error_of(config_from_dict, edited(BASES[stage], **{section: value}))
    assert message == f"config.{section} is not used by stage={stage!r}; remove it"


def test_unknown_stage_suggests_the_nearest():
    message = error_of(config_from_dict, edited(DIFFUSION, stage="difusion"))
    assert message.startswith("config.stage='difusion' must be one of") and message.endswith("did you mean diffusion?")


# Types


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data__image_size", "32", "config.data.image_size='32' must be int, not str"),
        ("data__image_size", 32.0, "config.data.image_size=32.0 must be int, not float"),
        ("data__image_size", True, "config.data.image_size=True must be int, not bool"),
        ("data__image_size", None, "config.data.image_size=None must be int, not NoneType"),
        ("data__name", 3, "config.data.name=3 must be str, not int"),
        ("data__horizontal_flip", 1, "config.data.horizontal_flip=1 must be bool, not int"),
        ("data__horizontal_flip", "no", "config.data.horizontal_flip='no' must be bool, not str"),
        ("optimizer__learning_rate", "fast", "config.optimizer.learning_rate='fast' must be float, not str"),
        ("optimizer__learning_rate", True, "config.optimizer.learning_rate=True must be float, not bool"),
        ("optimizer__learning_rate", float("nan"), "config.optimizer.learning_rate=nan must be float"),
        ("optimizer__max_grad_norm", "1", "config.optimizer.max_grad_norm='1' must be float, not str"),
        ("optimizer__schedule", "cosin", "config.optimizer.schedule='cosin' must be one of ('constant', 'cosine')"),
        ("latents__shape", 4, "config.latents.shape=4 must be a sequence"),
        ("latents__shape", (4, 4), "config.latents.shape=(4, 4) must have 3 entries"),
        ("latents__shape", (4, "4", 4), "config.latents.shape[1]='4' must be int, not str"),
        ("dit", 3, "config.dit=3 must be a section (a ConfigDict), not int"),
        ("optimizer", None, "config.optimizer=None must be a section"),
    ],
)
def test_wrong_type_is_named_with_its_path(key, value, message):
    assert error_of(config_from_dict, edited(DIFFUSION, **{key: value})).startswith(message)


def test_whole_number_serves_as_a_float_and_a_list_as_a_tuple():
    config = config_from_dict(edited(DIFFUSION, optimizer__max_grad_norm=1, latents__shape=[8, 8, 4]))
    assert config.optimizer.max_grad_norm == 1.0 and isinstance(config.optimizer.max_grad_norm, float)
    assert config.latents.shape == (8, 8, 4) and isinstance(config.latents.shape, tuple)


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("optimizer.learning_rate", "3e-4", 3e-4),
        ("optimizer.learning_rate", "1", 1.0),
        ("optimizer.max_grad_norm", "None", None),
        ("optimizer.max_grad_norm", "0.5", 0.5),
        ("optimizer.schedule", "cosine", "cosine"),
        ("training.ema_decay", "None", None),
        ("training.num_train_steps", "7_000", 7000),
        ("data.horizontal_flip", "False", False),
        ("data.horizontal_flip", "true", True),
        ("data.name", "1234", "1234"),  # a folder's name stays text
        ("data.name", "None", "None"),  # where None is not allowed, it is a name too
        ("data.data_dir", "None", None),
        ("data.data_dir", "/a b/c", "/a b/c"),
        ("latents.shape", "(8, 8, 4)", (8, 8, 4)),
        ("latents.shape", "8,8,4", (8, 8, 4)),
        ("latents.shape", "[8, 8, 4]", (8, 8, 4)),
        ("mesh.fsdp", "-1", -1),
        ("seed", "7", 7),
    ],
)
def test_override_is_read_by_the_type_of_its_key(config_file, key, text, expected):
    mesh = [("mesh.data", "1")] if key == "mesh.fsdp" else []  # one axis alone may be -1
    value = load_config(config_file(edited(DIFFUSION, latents__shape=(4, 4, 4))), [*mesh, (key, text)])
    for name in key.split("."):
        value = getattr(value, name)
    assert value == expected and type(value) is type(expected)


def test_override_makes_and_removes_an_optional_section(config_file):
    path = config_file()
    assert load_config(path, [("latents.shape", "8,8,4")]).latents.shape == (8, 8, 4)
    path = config_file(edited(DIFFUSION, latents__shape=(4, 4, 4)))
    assert load_config(path, [("latents", "None")]).latents is None


def test_later_override_wins(config_file):
    assert load_config(config_file(), [("seed", "1"), ("seed", "2")]).seed == 2


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("data.horizontal_flip", "1", "config.data.horizontal_flip=1 must be bool, not int"),
        ("training.num_train_steps", "many", "config.training.num_train_steps='many' must be int, not str"),
        ("training.num_train_steps", "1e3", "config.training.num_train_steps=1000.0 must be int, not float"),
        ("training.num_train_steps", "None", "config.training.num_train_steps=None must be int"),
        ("stage.depth", "3", "config.stage is a value, not a section; set it as --config.stage=VALUE"),
        ("dit", "XL/2", "config.dit is a section; set one of its keys, as --config.dit.KEY=VALUE"),
        ("optimizer", "None", "config.optimizer=None must be a section"),
        ("", "3", "config. is not a config key"),
    ],
)
def test_wrong_override_is_named(config_file, key, text, message):
    assert error_of(load_config, config_file(), [(key, text)]).startswith(message)


def test_override_inside_what_the_file_made_a_value_is_named(config_file):
    path = config_file(edited(DIFFUSION, dit=3))
    assert error_of(load_config, path, [("dit.depth", "2")]).startswith("config.dit=3 must be a section")


# Rules across fields


CONTRADICTIONS = {
    "diffusion": [
        ({"data__channels": 2}, "config.data.channels=2 must be 1 (grey) or 3 (RGB)"),
        ({"data__image_size": 0}, "config.data.image_size=0 must be positive"),
        ({"data__num_classes": -10}, "config.data.num_classes=-10 must be positive"),
        ({"data__eval_split": "train"}, "config.data.eval_split='train' must differ from train_split"),
        ({"training__num_train_steps": 0}, "config.training.num_train_steps=0 must be positive"),
        ({"training__log_every_steps": 0}, "config.training.log_every_steps=0 must be positive"),
        ({"training__ema_decay": 1.0}, "ema_decay=1.0 must be below 1, or None"),
        ({"training__ema_decay": -0.1}, "config.training.ema_decay=-0.1 must not be negative"),
        (
            {"training__keep_best_metric": "loss", "training__checkpoint_every_steps": 7},
            "must be a multiple of eval_every",
        ),
        ({"optimizer__warmup_steps": 100}, "warmup_steps=100 must be less than config.training"),
        ({"optimizer__warmup_steps": -1}, "config.optimizer.warmup_steps=-1 must"),
        ({"optimizer__learning_rate": -1e-4}, "config.optimizer.learning_rate=-0.0001 must not be negative"),
        ({"optimizer__max_grad_norm": -1.0}, "config.optimizer.max_grad_norm=-1.0 must not be negative"),
        ({"seed": -1}, "config.seed=-1 must"),
        ({"mesh__data": 0}, "config.mesh={'data': 0, 'fsdp': 1, 'tensor': 1, 'sequence': 1} must be positive sizes"),
        ({"mesh__fsdp": -2}, "config.mesh={'data': -1, 'fsdp': -2, 'tensor': 1, 'sequence': 1} must be positive sizes"),
        ({"mesh__fsdp": -1}, "at most one of them -1"),
        ({"mesh__slices": 0}, "config.mesh.slices=0 must be positive, or None for the devices' own"),
        ({"mesh__rules": (("a(/kernel", ()),)}, "config.mesh.rules: 'a(/kernel' must be a regular expression"),
        ({"mesh__rules": (("a/kernel", ("model",)),)}, "config.mesh.rules[0][1][0]='model' must be one of"),
        ({"dit__patch_size": 5}, "config.dit.patch_size=5 must divide the input's 32 x 32"),
        ({"latents__shape": (7, 8, 4)}, "config.dit.patch_size=2 must divide the input's 7 x 8"),
        ({"latents__shape": (8, 7, 4)}, "config.dit.patch_size=2 must divide the input's 8 x 7"),
        ({"latents__shape": (8, 0, 4)}, "config.latents.shape=(8, 0, 4) must be positive"),
        ({"latents__shape": (8, 8, 4), "latents__scale": -1.0}, "config.latents.scale=-1.0 must not be negative"),
        ({"dit__num_heads": 5}, "config.dit.width=32 must be divisible by num_heads=5"),
        ({"dit__width": 30, "dit__num_heads": 5}, "config.dit.width=30 must be divisible by num_heads=5 and by 4"),
        ({"dit__label_dropout": 1.5}, "config.dit.label_dropout=1.5 must be in [0, 1]"),
        ({"diffusion__beta_start": 0.03}, "0 < beta_start=0.03 < beta_end=0.02 < 1 must hold"),
        ({"diffusion__beta_start": 0.0}, "0 < beta_start=0.0 < beta_end=0.02 < 1 must hold"),
        ({"diffusion__beta_end": 1.0}, "beta_end=1.0 < 1 must hold"),
        ({"sampling__num_steps": 1001}, "num_steps=1001 must be from 1 to the 1000 timesteps"),
        ({"diffusion__num_timesteps": 100}, "num_steps=250 must be from 1 to the 100 timesteps"),
        ({"sampling__batch_size": 0}, "batch_size=0 must be positive"),
        ({"sampling__eta": 1.1}, "eta=1.1 must be from 0 (deterministic) to 1"),
        ({"sampling__cfg_scale": -0.5}, "config.sampling.cfg_scale=-0.5 must not be negative"),
        ({"dit__label_dropout": 0.0}, "and 1 for a model none of whose conditions has dropout (label 0.0)"),
        ({"sampling__cfg_channels": 4}, "cfg_channels=4 must be from 1 to the input's 3 channels, or None"),
        ({"sampling__cfg_channels": 0}, "cfg_channels=0 must be positive"),
    ],
    "unet": [
        ({"dit": DIFFUSION["dit"]}, "stage='diffusion' needs one of config.dit and config.unet, and has both"),
        ({"unet": None}, "stage='diffusion' needs one of config.dit and config.unet, and has neither"),
        ({"data__image_size": 33}, "the input's 33 x 33 must be divisible by 2, which 2 levels of"),
        ({"latents__shape": (8, 7, 4)}, "the input's 8 x 7 must be divisible by 2"),
        ({"unet__channel_multipliers": ()}, "config.unet.channel_multipliers=() must name a level"),
        ({"unet__attention_levels": (2,)}, "config.unet.attention_levels=(2,) must be below 2, the levels"),
        (
            {"unet__base_channels": 40},
            "config.unet.base_channels=40 must be even and divisible by num_groups=32; try 32",
        ),
        ({"unet__base_channels": 33, "unet__num_groups": 3}, "base_channels=33 must be even"),
        ({"unet__num_heads": None}, "config.unet: num_heads=None and head_channels=None: give one of them"),
        ({"unet__head_channels": 8}, "config.unet: num_heads=2 and head_channels=8: give one of them"),
        ({"unet__num_heads": 6}, "config.unet: num_heads=6, head_channels=None must divide the 64 channels of level 1"),
        (
            {"unet__num_heads": None, "unet__head_channels": 48, "unet__attention_levels": ()},
            "head_channels=48 must divide the 64 channels of level 1, which attends",
        ),
        ({"unet__context_width": None}, "config.unet.label='context' needs context_width"),
        ({"unet__label_dropout": 1.5}, "config.unet.label_dropout=1.5 must be in [0, 1]"),
        ({"unet__class_conditional": False}, "config.unet.context_width=24 needs tokens to attend to"),
        ({"unet__label": "vector"}, "config.unet.context_width=24 needs tokens to attend to"),
        ({"compute__scan_blocks": True}, "config.compute.scan_blocks=True cannot be for config.unet"),
        ({"compute__attention": "cudnn"}, "config.compute.attention='cudnn' needs config.unet.dtype='bfloat16'"),
        (
            {"compute__attention": "cudnn", "unet__dtype": "bfloat16", "unet__base_channels": 288},
            "heads of at most 256 channels, a multiple of 8; those of level 1 have 288",
        ),
        ({"unet__num_res_blocks": 2000}, "config.unet.num_res_blocks=2000 must be at most 1,024"),
    ],
    "autoencoder": [
        ({"data__image_size": 30}, "config.data.image_size=30 must be divisible by 8, the autoencoder's down"),
        ({"autoencoder__num_groups": 24}, "config.autoencoder.num_groups=24 must divide every level's channels"),
        ({"autoencoder__base_channels": 16}, "base_channels x 1 = 16"),
        ({"autoencoder__channel_multipliers": (1, 0)}, "channel_multipliers=(1, 0) must be positive"),
        ({"autoencoder__channel_multipliers": ()}, "config.autoencoder.channel_multipliers=()"),
        ({"autoencoder__attention_levels": (4,)}, "config.autoencoder.attention_levels=(4,)"),
        ({"autoencoder__kl_weight": -1e-6}, "config.autoencoder.kl_weight=-1e-06 must not be negative"),
    ],
}


@pytest.mark.parametrize(
    ("stage", "edits", "message"), [(stage, *case) for stage, cases in CONTRADICTIONS.items() for case in cases]
)
def test_contradiction_is_named(stage, edits, message):
    assert message in error_of(config_from_dict, edited(BASES[stage], **edits))


@pytest.mark.parametrize(
    ("stage", "edits"),
    [
        ("diffusion", {"training__ema_decay": None}),
        ("diffusion", {"training__ema_decay": 0.0}),
        ("diffusion", {"optimizer__warmup_steps": 99}),
        ("diffusion", {"dit__label_dropout": 0.0, "sampling__cfg_scale": 1.0}),
        ("diffusion", {"dit__label_dropout": 1.0}),
        ("diffusion", {"sampling__num_steps": 1}),
        ("diffusion", {"sampling__num_steps": 1000}),
        ("diffusion", {"sampling__cfg_channels": None}),
        ("diffusion", {"latents__shape": (8, 8, 4), "sampling__cfg_channels": 4}),
        ("diffusion", {"data__channels": 1, "sampling__cfg_channels": 1}),
        ("diffusion", {"mesh__data": 2, "mesh__fsdp": -1}),
        ("unet", {"unet__label": "vector", "unet__context_width": None}),
        ("unet", {"unet__label": "vector", "conditions__text": {}}),
        ("unet", {"unet__channel_multipliers": (1,), "unet__attention_levels": (), "data__image_size": 7}),
        ("autoencoder", {"data__image_size": 8}),
        ("autoencoder", {"autoencoder__channel_multipliers": (1,), "data__image_size": 7}),
        ("autoencoder", {"autoencoder__attention_levels": (0, 3)}),
    ],
)
def test_limit_itself_is_allowed(stage, edits):
    check_config(config_from_dict(edited(BASES[stage], **edits)))


@pytest.mark.parametrize(
    ("value", "multiple", "nearest"), [(30, 8, 32), (1, 8, 8), (27, 8, 24), (24, 8, 24), (100, 3, 99)]
)
def test_suggested_multiple_is_the_nearest_positive(value, multiple, nearest):
    assert round_to_multiple(value, multiple) == nearest


# JSON and comparison


@pytest.mark.parametrize(
    "values",
    [
        DIFFUSION,
        AUTOENCODER,
        edited(DIFFUSION, latents__shape=(4, 4, 4), latents__scale=0.18215, latents__path="cache"),
        edited(DIFFUSION, optimizer__max_grad_norm=1.0, training__ema_decay=None, mesh__fsdp=8, seed=3),
    ],
)
def test_config_survives_its_json(values):
    config = config_from_dict(values)
    restored = config_from_dict(json.loads(json.dumps(config_to_dict(config))))
    assert restored == config and restored.input_shape == config.input_shape


def test_input_is_the_latents_where_there_are_any():
    assert config_from_dict(DIFFUSION).input_shape == (32, 32, 3)
    assert config_from_dict(edited(DIFFUSION, latents__shape=(4, 6, 5), dit__patch_size=1)).input_shape == (4, 6, 5)


MAY_CHANGE = [
    ("training__num_train_steps", 200),
    ("training__log_every_steps", 7),
    ("training__eval_every_steps", 7),
    ("training__checkpoint_every_steps", 7),
    ("training__max_checkpoints", 7),
    ("training__keep_every_steps", 7),
    ("training__keep_best_metric", "loss"),
    ("training__keep_best_mode", "max"),
    ("training__num_eval_examples", 7),
    ("data__data_dir", "elsewhere"),
    ("data__raw_dir", "elsewhere"),
    ("data__num_threads", 7),
    ("latents__path", "elsewhere"),
    ("mesh__fsdp", 8),
    ("sampling__num_steps", 10),
]
MAKES_ANOTHER_RUN = [
    ("seed", 1, "config.seed: 0 -> 1"),
    ("data__image_size", 64, "config.data.image_size: 32 -> 64"),
    ("data__version", "2", "config.data.version: '1' -> '2'"),
    ("dit__depth", 3, "config.dit.depth: 2 -> 3"),
    ("dit__dtype", "bfloat16", "config.dit.dtype: 'float32' -> 'bfloat16'"),
    ("diffusion__beta_end", 0.03, "config.diffusion.beta_end: 0.02 -> 0.03"),
    ("optimizer__learning_rate", 1e-3, "config.optimizer.learning_rate: 0.0001 -> 0.001"),
    ("training__global_batch_size", 8, "config.training.global_batch_size: 256 -> 8"),
    ("training__ema_decay", None, "config.training.ema_decay: 0.9999 -> None"),
    ("latents__shape", (8, 8, 4), "config.latents.shape: (4, 4, 4) -> (8, 8, 4)"),
    ("latents__scale", 0.5, "config.latents.scale: 0.25 -> 0.5"),
]


@pytest.mark.parametrize(("key", "value"), MAY_CHANGE)
def test_resumed_run_may_change_how_it_is_run(key, value):
    base = edited(DIFFUSION, latents__shape=(4, 4, 4))
    old, new = config_from_dict(base), config_from_dict(edited(base, **{key: value}))
    assert old != new and fixed_differences(old, new) == []


@pytest.mark.parametrize(("key", "value", "message"), MAKES_ANOTHER_RUN)
def test_change_that_makes_another_run_is_named(key, value, message):
    base = edited(DIFFUSION, latents__shape=(4, 4, 4), latents__scale=0.25, data__version="1")
    assert fixed_differences(config_from_dict(base), config_from_dict(edited(base, **{key: value}))) == [message]


def test_what_a_run_has_not_recorded_yet_may_be_filled_in():
    old = edited(DIFFUSION, latents__shape=(4, 4, 4))
    new = edited(old, latents__scale=0.5, latents__autoencoder="sha", data__version="1")
    assert fixed_differences(config_from_dict(old), config_from_dict(new)) == []
    assert len(fixed_differences(config_from_dict(new), config_from_dict(old))) == 3


def test_every_difference_is_named_once():
    old = config_from_dict(DIFFUSION)
    new = config_from_dict(
        edited(DIFFUSION, seed=1, dit__depth=3, training__num_train_steps=7, latents__shape=(4, 4, 4))
    )
    keys = sorted(difference.partition(":")[0] for difference in fixed_differences(old, new))
    assert keys == ["config.dit.depth", "config.latents", "config.seed"]


def test_run_of_the_other_stage_is_another_run():
    differences = fixed_differences(config_from_dict(DIFFUSION), config_from_dict(AUTOENCODER))
    assert "config.stage: 'diffusion' -> 'autoencoder'" in differences


def test_config_cannot_be_changed():
    config = config_from_dict(DIFFUSION)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.data.image_size = 64
    assert isinstance(config, Config)


# Files


def test_missing_file_is_named():
    message = error_of(load_config, "configs/no_such.py")
    assert message.startswith("--config=configs/no_such.py: no such file; give a file such as")


def test_file_that_is_not_python_is_named(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("stage: diffusion")
    assert "must be a Python file" in error_of(load_config, str(path))


@pytest.mark.parametrize(
    ("body", "cause"),
    [
        ("def get_config():\n    raise RuntimeError('the disk is full')", "failed: RuntimeError: the disk is full"),
        ("import no_such_module", "failed: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def get_config(:", "failed: SyntaxError: "),
        ("def make_config():\n    return ConfigDict()", "failed: AttributeError: "),
        ("def get_config():\n    return None", "failed: AttributeError: "),
    ],
)
def test_file_that_raises_is_named_with_its_cause(config_file, body, cause):
    path = config_file(body=body)
    message = error_of(load_config, path)
    assert message.startswith(f"--config={path} ") and cause in message


def test_argument_after_the_colon_reaches_the_file(config_file):
    base = edited(DIFFUSION)
    del base["dit"]
    body = (
        "def get_config(width='32'):\n"
        f"    config = ConfigDict({base!r})\n"
        "    config.dit = ConfigDict({'depth': 1, 'width': int(width), 'num_heads': 2, 'patch_size': 2})\n"
        "    return config"
    )
    path = config_file(body=body)
    assert load_config(path).dit.width == 32
    assert load_config(f"{path}:64").dit.width == 64
    assert f"--config={path}:wide failed: ValueError: " in error_of(load_config, f"{path}:wide")


def test_file_is_read_anew_each_time(config_file):
    assert load_config(config_file(DIFFUSION), [("seed", "5")]).seed == 5
    assert load_config(config_file(DIFFUSION)).seed == 0
    assert load_config(config_file(edited(DIFFUSION, seed=9))).seed == 9


@pytest.mark.parametrize(
    ("stage", "edits", "axes", "undivided"),
    [
        ("diffusion", {}, {"data": 8, "fsdp": 3, "tensor": 4, "sequence": 16}, []),
        ("diffusion", {}, {"tensor": 3}, ["tensor=3 does not divide the 4 attention heads"] * 2),
        ("diffusion", {}, {"sequence": 3}, ["sequence=3 does not divide the 256 tokens"]),
        ("diffusion", {"dit__conditioning": ("in_context",)}, {"sequence": 4}, ["does not divide the 258 tokens"]),
        ("autoencoder", {}, {"tensor": 4, "sequence": 4}, []),
        ("autoencoder", {}, {"sequence": 8}, ["sequence=8 does not divide the 4 image rows at level 3"]),
        (
            "autoencoder",
            {"autoencoder__base_channels": 96},
            {"tensor": 64},
            ["tensor=64 does not divide the 96 channels at level 0"],
        ),
    ],
)
def test_activations_that_an_axis_does_not_divide_are_told(stage, edits, axes, undivided):
    lines = undivided_activations(config_from_dict(edited(BASES[stage], **edits)), axes)
    assert len(lines) == len(undivided)
    assert not lines or undivided[0] in lines[0]


def test_rules_of_a_config_survive_json_and_the_command_line(config_file):
    rules = (("my/kernel", ("fsdp", None)), ("other/table", (None, "tensor")))
    config = load_config(config_file(), [("mesh.rules", str(rules)), ("mesh.slices", "2")])
    assert (config.mesh.rules, config.mesh.slices) == (rules, 2)
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_attention_kernel_is_for_its_platform_and_a_trained_model_runs_on_any():
    config = config_from_dict(edited(DIFFUSION, compute={"attention": "flash"}))
    check_platform(config, "tpu")
    assert error_of(check_platform, config, "gpu") == (
        "config.compute.attention='flash' is for tpu, and the devices are gpu; set it to 'xla'"
    )
    assert for_platform(config, "cpu").compute.attention == "xla"
    assert for_platform(config, "tpu") == config


@pytest.mark.parametrize("compute", [{"scan_blocks": True}, {"attention": "flash"}, {"remat": "offload"}])
def test_autoencoder_has_no_settings_of_a_transformer(compute):
    assert "cannot be for stage='autoencoder'" in error_of(config_from_dict, edited(AUTOENCODER, compute=compute))


def test_cudnn_attention_needs_bfloat16():
    values = edited(DIFFUSION, compute={"attention": "cudnn"})
    assert "needs config.dit.dtype='bfloat16'" in error_of(config_from_dict, values)
    config_from_dict(edited(values, dit__dtype="bfloat16"))


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("num_train_steps", "config.training.num_train_steps"),
        ("training.training.num_train_steps", "config.training.num_train_steps"),
        ("training.learning_rate", "config.optimizer.learning_rate"),
        ("dit.num_timesteps", "config.diffusion.num_timesteps"),
        ("dit.depth.num_train_steps", "config.training.num_train_steps"),
        ("sampler", "config.sampling.sampler"),
        ("training.num_train_step", "config.training.num_train_steps"),
    ],
)
def test_a_key_at_the_wrong_place_names_the_whole_path_of_the_right_one(key, path):
    with pytest.raises(ValueError, match=re.escape(f"; did you mean {path}?")):
        override_config(config_from_dict(DIFFUSION), [(key, "5")])
    assert path.removeprefix("config.") in schema_paths()


def test_every_path_that_a_message_or_comment_names_exists():
    """Of `config.section.key` in the package's text, also where a message ends in {section.key=}."""
    known = {f"config.{path}" for path in schema_paths()}
    sections = "|".join({path.partition(".")[0] for path in schema_paths()})
    for file in sorted(PACKAGE.rglob("*.py")):
        text = re.sub(r"\bself\.config\.", "", file.read_text(encoding="utf-8"))
        # What an f-string writes for {a.b=} begins with a.b, and so does the path that it is part of.
        text = re.sub(r"(config\.[\w.]*)\{([\w.]+)=[^}]*\}", r"\1\2", text)
        for path in re.findall(rf"(?<![\w.])(?:--)?(config\.(?:{sections})\.\w+)(?![\w(])", text):
            if path.rpartition(".")[2] not in ("KEY", "axes", "level_channels", "num_tokens", "heads_of", "vocab_size"):
                assert path in known, f"{file.relative_to(PACKAGE)}: {path}"


@pytest.mark.parametrize(
    ("given", "known", "meant"),
    [
        ("dpm", ("ancestral", "ddim", "dpm_solver", "plms"), "dpm_solver"),
        ("DPM-Solver++", ("ancestral", "ddim", "dpm_solver", "plms"), "dpm_solver"),
        ("incep", ("classifier", "inception"), "inception"),
        ("trian", ("train", "encode"), "train"),
        ("zzz", ("train", "encode"), None),
    ],
)
def test_the_choice_that_was_meant_is_the_one_that_begins_alike(given, known, meant):
    assert nearest_name(given, known) == meant
    with pytest.raises(ValueError, match=r"did you mean dpm_solver\?$"):
        override_config(config_from_dict(DIFFUSION), [("sampling.sampler", "dpm")])


NETWORK = {"base_channels": 16, "channel_multipliers": (1, 2), "latent_channels": 3, "num_groups": 4}
OWN = {
    "stage": "autoencoder",
    "data": {"name": "birds", "image_size": 32, "channels": 1, "num_classes": 5, "version": "1.0 (train 3)"},
    "autoencoder": NETWORK | {"codebook": {"num_codes": 9}, "kl_weight": 0.5, "perceptual_weight": 0.25},
    "training": {"num_train_steps": 3},
}


def finetuned(*overrides):
    path = str(PACKAGE.parent / "configs" / "autoencoder_finetune.py") + ":mse"
    return load_config(path, [("training.init_from", "own"), *overrides], lambda _: config_from_dict(OWN))


def test_an_autoencoder_to_fine_tune_gives_its_network_and_its_data():
    config, own = finetuned(), config_from_dict(OWN)
    assert {name: getattr(config.autoencoder, name) for name in NETWORK} == NETWORK
    assert config.autoencoder.codebook == own.autoencoder.codebook
    assert config.data == dataclasses.replace(own.data, version=None)  # found anew
    assert (config.autoencoder.perceptual_weight, config.autoencoder.reconstruction_loss) == (0.1, "l2")  # the file's


def test_other_data_for_fine_tuning_keeps_the_size_and_channels_and_the_command_line_goes_before():
    config = finetuned(("data.name", "bees"), ("data.num_classes", "7"), ("autoencoder.base_channels", "32"))
    assert (config.data.name, config.data.num_classes, config.data.eval_split) == ("bees", 7, "test")
    assert (config.data.image_size, config.data.channels) == (32, 1)
    assert (config.autoencoder.base_channels, config.autoencoder.num_groups) == (32, 4)
    path = str(PACKAGE.parent / "configs" / "autoencoder_finetune.py")
    with pytest.raises(ValueError, match="config.data is missing; set it, or .* --config.training.init_from=DIR"):
        load_config(path)
