"""`dit-jax sample --prompt` and `LoadedModel.sample(prompts=...)`: captions one by one and together, padded or not."""

import numpy as np
import pytest

from dit_jax.cli.main import main
from dit_jax.config import config_to_dict
from dit_jax.evaluation.loaded import load
from tests.cli.test_main import fail
from tests.tiny import WORDS, dit_config, make_image_folder, write_captions, write_text_encoder

LENGTH = 6


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The workdir of a DiT that was trained on captions for a few steps, with large updates."""
    root = tmp_path_factory.mktemp("prompts")
    folder = write_captions(make_image_folder(root / "images"))
    values = config_to_dict(dit_config(folder))
    values["conditions"] = {
        "text": {"path": str(write_text_encoder(root / "encoder")), "max_length": LENGTH, "frozen_width": 12}
    }
    values["dit"] |= {"class_conditional": False, "conditioning": ("adaln_zero", "in_context")}
    values["optimizer"]["learning_rate"] = 3e-2
    values["diffusion"]["prediction"] = "x_0"
    config = root / "config.py"
    config.write_text(
        f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({values!r})\n"
    )
    main(["train", f"--config={config}", f"--workdir={root / 'run'}"])
    return root / "run"


def draw(workdir, output, *flags):
    main(["sample", f"--workdir={workdir}", f"--output={output}", *flags])
    with np.load(output / "samples.npz") as file:
        return file["arr_0"]


def test_prompts_of_mixed_lengths_draw_what_each_draws_alone(workdir):
    prompts, model = [WORDS[0], " ".join(WORDS[:3]), ""], load(workdir)
    together = model.sample(prompts=prompts)
    assert len(together) == 3 and len({image.tobytes() for image in together}) == 3
    noise_of_each = [model.sample(prompts=[prompt] * 3)[i] for i, prompt in enumerate(prompts)]
    np.testing.assert_array_equal(together, noise_of_each)


def test_swapped_prompts_swap_conditions_and_nothing_else(workdir):
    model = load(workdir)
    one, other = WORDS[:2]
    drawn, swapped = model.sample(prompts=[one, other]), model.sample(prompts=[other, one])
    np.testing.assert_array_equal(model.sample(prompts=[one, one])[1], swapped[1])
    np.testing.assert_array_equal(model.sample(prompts=[other, other])[0], swapped[0])
    assert (drawn != swapped).any()


def test_file_of_prompts_draws_them_in_turn(workdir, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{WORDS[0]}\n\n{WORDS[1]}\n")
    images = draw(workdir, tmp_path / "file", f"--prompts_file={tmp_path / 'prompts.txt'}", "--num_samples=3")
    one = draw(workdir, tmp_path / "one", f"--prompt={WORDS[0]}", "--num_samples=3")
    other = draw(workdir, tmp_path / "other", f"--prompt={WORDS[1]}", "--num_samples=3")
    np.testing.assert_array_equal(images, np.stack([one[0], other[1], one[2]]))


def test_weight_0_of_the_text_draws_without_it(workdir):
    model = load(workdir)
    unconditional = model.sample(prompts=["", ""], cfg_scale=1.0)
    prompts = list(WORDS[:2])
    for cfg_scales in ({"text": 0.0}, [("text", 0.0)]):
        for others in (1.0, 3.0, None):  # there are no others
            without = model.sample(prompts=prompts, cfg_scale=others, cfg_scales=cfg_scales)
            np.testing.assert_array_equal(without, unconditional)
    for settings in ({"cfg_channels": None}, {"sampler": "ancestral", "cfg_interval": (0.5, 2.0)}):
        without = model.sample(prompts=prompts, cfg_scales={"text": 0.0}, **settings)
        unconditional = model.sample(prompts=["", ""], cfg_scale=1.0, **settings)
        np.testing.assert_array_equal(without, unconditional)


def test_weight_of_the_text_can_be_given_on_the_command_line(workdir, tmp_path):
    prompt = f"--prompt={WORDS[0]}"
    own = draw(workdir, tmp_path / "own", prompt, "--num_samples=2", "--config.sampling.cfg_scales={'text': 3.0}")
    np.testing.assert_array_equal(own, draw(workdir, tmp_path / "all", prompt, "--num_samples=2", "--cfg_scale=3"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "foo"}, "sampling.sampler='foo' must be one of"),
        ({"cfg_scales": {"txt": 1.0}}, "the model has no condition 'txt'"),
        ({"cfg_scales": {"text": "much"}}, "sampling.cfg_scales"),
        ({"stepz": 3}, "sampling.stepz is not a config key; did you mean"),
    ],
)
def test_wrong_setting_from_python_is_named(workdir, settings, message):
    with pytest.raises(ValueError, match=message):
        load(workdir).sample(prompts=WORDS[0], **settings)


def test_bad_prompts_are_one_line_errors(workdir, tmp_path, capsys):
    sample = ["sample", f"--workdir={workdir}", f"--output={tmp_path / 'out'}"]
    words = [WORDS[i % len(WORDS)] for i in range(2 * LENGTH)]
    message = fail(capsys, *sample, f"--prompt={' '.join(words)}")
    kept = LENGTH - 2  # of the tokens two begin and end the caption
    assert "6 tokens" in message and repr(" ".join(words[kept:])) in message
    assert "give a prompt" in fail(capsys, *sample)
    (tmp_path / "empty.txt").write_text("\n")
    assert "has none" in fail(capsys, *sample, f"--prompts_file={tmp_path / 'empty.txt'}")
    assert "text file" in fail(capsys, *sample, f"--prompts_file={tmp_path / 'missing.txt'}")
    assert "one of them" in fail(capsys, *sample, "--prompt=a", f"--prompts_file={tmp_path / 'empty.txt'}")
    assert not (tmp_path / "out").exists()
