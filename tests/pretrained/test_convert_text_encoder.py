"""Text encoders of Hugging Face's files give the states that transformers 5.24 gives, padded captions included.

Random weights, tiny shapes. Tolerance 1e-5 on states of deviation about 1: float32 sums in another order.
"""

import json
import re
import shutil

import jax
import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)
from transformers.utils.logging import disable_progress_bar

from dit_jax.cli.main import main
from dit_jax.evaluation.text_encoders import load_text_encoder
from dit_jax.models.text_encoder import FrozenTextEncoder
from tests.tiny import WORDS, write_tokenizer

disable_progress_bar()
TOLERANCE = 1e-5
LENGTHS, MAX_LENGTH, VOCABULARY = (3, 7, 10), 10, 40
TRANSFORMER = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TRANSFORMER |= {"intermediate_size": 48, "max_position_embeddings": 16}
CLIP = TRANSFORMER | {"projection_dim": 24, "bos_token_id": 1, "eos_token_id": VOCABULARY - 1, "pad_token_id": 0}
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "num_heads": 3, "d_ff": 48, "num_layers": 2}
T5 |= {"decoder_start_token_id": 0}
VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
MODELS = {
    "bert": lambda: BertModel(BertConfig(**TRANSFORMER)),
    "clip": lambda: CLIPTextModel(CLIPTextConfig(**CLIP)),
    "clip, projected, gelu": lambda: CLIPTextModelWithProjection(CLIPTextConfig(**CLIP | {"hidden_act": "gelu"})),
    "clip, both towers": lambda: CLIPModel(CLIPConfig(text_config=CLIP, vision_config=VISION, projection_dim=24)),
    "t5 v1.0": lambda: T5EncoderModel(T5Config(**T5)),
    "t5 v1.1": lambda: T5EncoderModel(T5Config(**T5, feed_forward_proj="gated-gelu")),
    "t5 with its decoder": lambda: T5ForConditionalGeneration(T5Config(**T5, feed_forward_proj="gated-gelu")),
}


def make_model(name):
    """Returns a model whose parameters, those that start as zeros or ones too, are random and not small."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for path, parameter in model.named_parameters():
        # T5 does not scale its logits: its queries are small instead
        deviation = 0.3 if "SelfAttention.q" not in path else 0.1
        torch.nn.init.normal_(parameter, 1.0 if "norm" in path.lower() and path.endswith("weight") else 0.0, deviation)
    return model


def captions():
    rng = np.random.default_rng(0)
    mask = np.arange(MAX_LENGTH) < np.array(LENGTHS)[:, None]
    ids = np.where(mask, rng.integers(3, VOCABULARY, mask.shape), 0)
    ids[np.arange(len(LENGTHS)), np.array(LENGTHS) - 1] = VOCABULARY - 1  # CLIP's end
    return ids.astype(np.int32), mask


def theirs(name, model):
    """Returns the states and the pooled states of transformers."""
    ids, mask = (torch.tensor(array).long() for array in captions())
    with torch.no_grad():
        if name == "clip, both towers":
            output = model.get_text_features(ids, attention_mask=mask)
            return output.last_hidden_state.numpy(), output.pooler_output.numpy()
        if name == "t5 with its decoder":
            model = model.encoder
        output = model(ids, attention_mask=mask)
    states = output.last_hidden_state.numpy()
    if name.startswith("clip"):
        return states, (output.text_embeds if "projected" in name else output.pooler_output).numpy()
    pooled = (states * mask.numpy()[..., None]).sum(axis=1) / mask.numpy().sum(axis=1, keepdims=True)
    return states, pooled / np.linalg.norm(pooled, axis=1, keepdims=True) if name == "bert" else pooled


def write_released(name, folder):
    model = make_model(name)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_states_are_those_of_transformers(tmp_path, name):
    model = write_released(name, tmp_path / "released")
    main(["convert", "--kind=text_encoder", f"--input={tmp_path / 'released'}", f"--output={tmp_path / 'ours'}"])
    encoder = load_text_encoder(tmp_path / "ours")
    ids, mask = captions()
    ours, (states, pooled) = jax.jit(FrozenTextEncoder.encode)(encoder, ids, mask), theirs(name, model)
    assert 0.3 < states[mask].std() < 30
    scale = max(1.0, states[mask].std())
    np.testing.assert_allclose(ours["states"][mask] / scale, states[mask] / scale, atol=TOLERANCE)
    scale = max(1.0, pooled.std())
    np.testing.assert_allclose(ours["pooled"] / scale, pooled / scale, atol=TOLERANCE)
    assert (ours["mask"] == mask).all()


def test_a_file_of_weights_will_do_and_what_is_left_out_is_told(tmp_path, capsys):
    write_released("t5 with its decoder", tmp_path)
    weights = tmp_path / "model.safetensors"
    main(["convert", "--kind=text_encoder", f"--input={weights}", f"--output={tmp_path / 'ours'}"])
    assert "tensors of other parts: decoder." in capsys.readouterr().out
    assert load_text_encoder(tmp_path / "ours").module.shape.gated


def change_config(**values):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def remove(name):
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("tokenizer.json"), "must hold tokenizer.json, too"),
        (remove("config.json"), "must hold config.json, too"),
        (remove("model.safetensors"), "has none of model.safetensors, pytorch_model.bin"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100), "truncated or not a safetensors file"),
        (lambda folder: (folder / "config.json").write_text("[]"), "no text encoder known here"),
        (change_config(model_type="gpt2"), "must be bert, clip, clip_text_model or t5"),
        (change_config(model_type="clip_text_model"), "'embeddings.token_embedding.weight' is missing"),
        (change_config(hidden_act="swish"), "hidden_act='swish' must be of gelu"),
        (change_config(hidden_size="wide"), "no text encoder known here"),
        (change_config(num_attention_heads=0), "no text encoder known here"),
        (change_config(num_hidden_layers=10**9), "depth=1000000000 must be from 1 to "),
        (change_config(num_hidden_layers=3), "tensor 'encoder.layer.2.*' is missing"),
        (change_config(num_hidden_layers=1), "tensor 'encoder.layer.1.*' is not expected"),
        (change_config(vocab_size=10**30), "vocab_size=1000000000000000000000000000000 must be from 1"),
        (change_config(intermediate_size=40), "'encoder.layer.0.intermediate.dense.weight' must have shape .40, 32."),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, capsys, change, message):
    write_released("bert", tmp_path / "released")
    change(tmp_path / "released")
    with pytest.raises(SystemExit) as error:
        main(["convert", "--kind=text_encoder", f"--input={tmp_path / 'released'}", f"--output={tmp_path / 'ours'}"])
    assert error.value.code
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(message, said), said
    assert not (tmp_path / "ours").exists()


def test_a_tokenizer_of_more_ids_than_the_encoder_has_rows_is_an_error(tmp_path, capsys):
    torch.manual_seed(0)
    BertModel(BertConfig(**TRANSFORMER | {"vocab_size": len(WORDS)})).save_pretrained(tmp_path / "released")
    write_tokenizer(tmp_path / "released")
    with pytest.raises(SystemExit):
        main(["convert", "--kind=text_encoder", f"--input={tmp_path / 'released'}", f"--output={tmp_path / 'ours'}"])
    assert "give the tokenizer that the encoder was trained with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "holds no text encoder"),
        (lambda folder: (folder / "text_encoder.json").write_text("{}"), "is damaged .*vocab_size is missing"),
        (lambda folder: (folder / "text_encoder.safetensors").unlink(), "is damaged .*no such file"),
        (lambda folder: (folder / "text_encoder.safetensors").write_bytes(b""), "is damaged .*not a safetensors file"),
    ],
)
def test_a_damaged_folder_is_one_line(tmp_path, change, message):
    write_released("clip", tmp_path / "released")
    main(["convert", "--kind=text_encoder", f"--input={tmp_path / 'released'}", f"--output={tmp_path / 'ours'}"])
    change(tmp_path / "ours")
    with pytest.raises(ValueError, match=message) as error:
        load_text_encoder(tmp_path / "ours")
    assert "\n" not in str(error.value)
