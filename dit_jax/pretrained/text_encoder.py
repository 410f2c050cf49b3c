"""Names of text encoders' parameters in Hugging Face's files: BERT's (and MiniLM's), CLIP's text tower, T5's encoder.

A file may hold more than the encoder (a pooler, a decoder, CLIP's image tower), and its names may have the prefix that
such a model gives them; `config.json` beside it tells the form.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dit_jax.pretrained.name_map import Entry, Tensors

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "quick_gelu": "quick_gelu", "relu": "relu"}  # theirs: ours
FIRST_TENSORS = {  # of a form, with which all of its names share a prefix
    "bert": "embeddings.word_embeddings.weight",
    "clip": "embeddings.token_embedding.weight",
    "t5": "encoder.block.0.layer.0.SelfAttention.q.weight",
}
PROJECTION = "text_projection.weight"  # of CLIP, beside the tower
TOKEN_TYPES, T5_TOKENS = "embeddings.token_type_embeddings.weight", ("shared.weight", "encoder.embed_tokens.weight")
BUCKETS = {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}  # of all released T5s


def text_encoder_form(values: Mapping[str, Any]) -> str:
    """Returns which form a `config.json` is of: "bert", "clip" or "t5"."""
    name = values.get("model_type")
    form = {"clip_text_model": "clip"}.get(name, name)
    if form not in FIRST_TENSORS:
        raise ValueError(f"model_type={str(name)[:100]!r} must be bert, clip, clip_text_model or t5")
    return form


def text_encoder_shape(form: str, values: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    """Returns the fields of a `TextShape` from a `config.json` and from `encoder_tensors`.

    Raises:
      ValueError, KeyError, TypeError: where the config is of something else.
    """
    if form == "t5":
        feed_forward = values.get("feed_forward_proj", "relu")
        if feed_forward not in ("relu", "gated-gelu"):
            raise ValueError(f"feed_forward_proj={feed_forward!r} must be relu or gated-gelu")
        for name, value in BUCKETS.items():
            if values.get(name, value) != value:
                raise ValueError(f"{name}={values[name]!r} must be {value}")
        gated = feed_forward == "gated-gelu"
        return {
            "vocab_size": values["vocab_size"],
            "max_length": values.get("n_positions", 512),
            "width": values["d_model"],
            "depth": values["num_layers"],
            "num_heads": values["num_heads"],
            "head_dim": values["d_kv"],
            "hidden": values["d_ff"],
            "activation": "gelu_tanh" if gated else "relu",
            "gated": gated,
            "biases": "none",
            "norm": "rms",
            "epsilon": values["layer_norm_epsilon"],
            "positions": "relative",
        }
    values = values.get("text_config", values)  # of CLIP with both towers
    activation = values["hidden_act"]
    if activation not in ACTIVATIONS or values.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(f"hidden_act={activation!r} must be of {', '.join(ACTIVATIONS)}, and positions absolute")
    shape = {
        "vocab_size": values["vocab_size"],
        "max_length": values["max_position_embeddings"],
        "width": values["hidden_size"],
        "depth": values["num_hidden_layers"],
        "num_heads": values["num_attention_heads"],
        "head_dim": values["hidden_size"] // values["num_attention_heads"],
        "hidden": values["intermediate_size"],
        "activation": ACTIVATIONS[activation],
        "biases": "all",
        "epsilon": values["layer_norm_eps"],
    }
    if form == "bert":
        return shape | {"post_norm": True, "normalized": True}  # as sentence-transformers pools
    projection = len(tensors[PROJECTION]) if PROJECTION in tensors else None
    return shape | {"causal": True, "pooling": "last", "projection": projection}


def encoder_tensors(form: str, tensors: Tensors) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the tensors that `text_encoder_entries` names, and the names of those that are left out.

    Two things are taken into the tensors here: BERT's type of a first sentence, which is added to every token, into the
    positions; T5's logits, which are not divided by sqrt(head_dim) as ours are, into its queries (`scaled_queries`).
    """
    first = FIRST_TENSORS[form]
    prefixes = [name.removesuffix(first) for name in tensors if name.endswith(first)]
    if not prefixes:
        raise ValueError(f"tensor {first!r} is missing; not the text encoder of config.json")
    prefix = min(prefixes, key=len)
    parts = {"bert": ("embeddings.", "encoder."), "t5": ("encoder.", T5_TOKENS[0])}.get(form)
    parts = parts or ("embeddings.", "encoder.", "final_layer_norm.")
    kept = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(tuple(prefix + part for part in parts)) and not name.endswith("position_ids")
    }
    left_out = [name for name in tensors if name.removeprefix(prefix) not in kept and not name.endswith("position_ids")]
    if form == "clip" and PROJECTION in tensors:
        kept[PROJECTION] = tensors[PROJECTION]
        left_out.remove(PROJECTION)
    if form == "t5":
        kept.setdefault(T5_TOKENS[0], kept.get(T5_TOKENS[1]))
        if kept[T5_TOKENS[0]] is None:
            raise ValueError(f"tensor {T5_TOKENS[0]!r} is missing")
        kept.pop(T5_TOKENS[1], None)  # the same table
    if form == "bert":
        types, positions = kept.pop(TOKEN_TYPES), "embeddings.position_embeddings.weight"
        kept[positions] = kept[positions] + types[0]
    return kept, left_out


def scaled_queries(tensors: Tensors, head_dim: int) -> dict[str, np.ndarray]:
    """Returns T5's tensors with its queries multiplied by sqrt(head_dim)."""
    scale = np.float32(head_dim**0.5)
    return {
        name: tensor * scale if name.endswith("SelfAttention.q.weight") else tensor for name, tensor in tensors.items()
    }


def text_encoder_entries(form: str, shape: Mapping[str, Any]) -> list[Entry]:
    """Returns the entries of a form and of what `text_encoder_shape` returned."""
    return list({"bert": _bert, "clip": _clip, "t5": _t5}[form](shape))


def _bert(shape: Mapping[str, Any]) -> Iterator[Entry]:
    yield Entry("token_table", ("embeddings.word_embeddings.weight",))
    yield Entry("position_table", ("embeddings.position_embeddings.weight",))
    yield from _norm("norm", "embeddings.LayerNorm")
    for i in range(shape["depth"]):
        ours, theirs = f"blocks_{i}", f"encoder.layer.{i}"
        yield from _linear(f"{ours}/qkv", *(f"{theirs}.attention.self.{name}" for name in ("query", "key", "value")))
        yield from _linear(f"{ours}/proj", f"{theirs}.attention.output.dense")
        yield from _norm(f"{ours}/norm1", f"{theirs}.attention.output.LayerNorm")
        yield from _linear(f"{ours}/fc1", f"{theirs}.intermediate.dense")
        yield from _linear(f"{ours}/fc2", f"{theirs}.output.dense")
        yield from _norm(f"{ours}/norm2", f"{theirs}.output.LayerNorm")


def _clip(shape: Mapping[str, Any]) -> Iterator[Entry]:
    yield Entry("token_table", ("embeddings.token_embedding.weight",))
    yield Entry("position_table", ("embeddings.position_embedding.weight",))
    for i in range(shape["depth"]):
        ours, theirs = f"blocks_{i}", f"encoder.layers.{i}"
        yield from _norm(f"{ours}/norm1", f"{theirs}.layer_norm1")
        yield from _linear(f"{ours}/qkv", *(f"{theirs}.self_attn.{name}_proj" for name in "qkv"))
        yield from _linear(f"{ours}/proj", f"{theirs}.self_attn.out_proj")
        yield from _norm(f"{ours}/norm2", f"{theirs}.layer_norm2")
        yield from _linear(f"{ours}/fc1", f"{theirs}.mlp.fc1")
        yield from _linear(f"{ours}/fc2", f"{theirs}.mlp.fc2")
    yield from _norm("norm", "final_layer_norm")
    if shape["projection"]:
        yield Entry("projection/kernel", (PROJECTION,), linear=True)


def _t5(shape: Mapping[str, Any]) -> Iterator[Entry]:
    yield Entry("token_table", (T5_TOKENS[0],))
    yield Entry("relative_table", ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",))
    for i in range(shape["depth"]):
        ours, (attention, mlp) = f"blocks_{i}", (f"encoder.block.{i}.layer.{j}" for j in (0, 1))
        yield Entry(f"{ours}/norm1/scale", (f"{attention}.layer_norm.weight",))
        names = tuple(f"{attention}.SelfAttention.{name}.weight" for name in "qkv")
        yield Entry(f"{ours}/qkv/kernel", names, linear=True)
        yield Entry(f"{ours}/proj/kernel", (f"{attention}.SelfAttention.o.weight",), linear=True)
        yield Entry(f"{ours}/norm2/scale", (f"{mlp}.layer_norm.weight",))
        layer, names = ("value_gate", ("wi_1", "wi_0")) if shape["gated"] else ("fc1", ("wi",))
        names = tuple(f"{mlp}.DenseReluDense.{name}.weight" for name in names)
        yield Entry(f"{ours}/{layer}/kernel", names, linear=True)
        yield Entry(f"{ours}/fc2/kernel", (f"{mlp}.DenseReluDense.wo.weight",), linear=True)
    yield Entry("norm/scale", ("encoder.final_layer_norm.weight",))


def _norm(path: str, name: str) -> Iterator[Entry]:
    yield from (Entry(f"{path}/scale", (f"{name}.weight",)), Entry(f"{path}/bias", (f"{name}.bias",)))


def _linear(path: str, *names: str) -> Iterator[Entry]:
    yield Entry(f"{path}/kernel", tuple(f"{name}.weight" for name in names), linear=True)
    yield Entry(f"{path}/bias", tuple(f"{name}.bias" for name in names), flat=True)
