"""Families made of Qwen: Tiny-A2D, SDAR, Dream, and Fast-dLLM v2.

They name their tensors alike. Qwen3's queries and keys are normalised head by
head, Qwen2.5's projections of queries, keys and values have biases. Attention
sees the whole sequence, or is block-causal: in SDAR and Fast-dLLM v2, whose
blocks are counted from position 0, and in the Tiny-A2D that were trained so
(bd3lm), whose blocks end where the completion begins; their config.json does
not tell. The outputs of Dream and of Fast-dLLM v2 predict the next position, as
those of the causal models that they were made of; that is a key of config.json
here (`right_shift_logits`), since other models call themselves Dream and do
not. The first position of a block of Fast-dLLM v2 is predicted by the block
before, once that is full.

The ids of special tokens stand in config.json, or with the tokenizer
(`port.model_folder`); the mask of Fast-dLLM v2 in its code alone.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

from agrpo_jax import errors
from agrpo_jax.models import base

# Our field -> the key of config.json.
_KEYS = {
  "vocab_size": "vocab_size",
  "num_layers": "num_hidden_layers",
  "width": "hidden_size",
  "num_heads": "num_attention_heads",
  "num_kv_heads": "num_key_value_heads",
  "head_dim": "head_dim",
  "mlp_width": "intermediate_size",
  "rope_theta": "rope_theta",
  "norm_eps": "rms_norm_eps",
  "tied_head": "tie_word_embeddings",
  "max_length": "max_position_embeddings",
  "attention_block": "block_size",
  "mask_id": "mask_token_id",
  "eos_id": "eos_token_id",
  "pad_id": "pad_token_id",
}
_SHIFT = "right_shift_logits"

_PARTIAL = "partial_rotary_factor"

# Key -> (values that we compute, what the original code takes if it is absent).
_ONLY: dict[str, tuple[tuple[Any, ...], Any]] = {
  "hidden_act": (("silu",), "silu"),
  "attention_dropout": ((0.0,), 0.0),
  "rope_scaling": ((None,), None),
  "use_sliding_window": ((False, None), False),
  "use_mrope": ((False, None), False),
  _PARTIAL: ((1, None), 1),
}

# Our module -> its name, within a layer and outside of the layers.
_IN_LAYER = {
  "attn_norm": "input_layernorm",
  "q": "self_attn.q_proj",
  "k": "self_attn.k_proj",
  "v": "self_attn.v_proj",
  "q_norm": "self_attn.q_norm",
  "k_norm": "self_attn.k_norm",
  "attn_out": "self_attn.o_proj",
  "mlp_norm": "post_attention_layernorm",
  "gate": "mlp.gate_proj",
  "up": "mlp.up_proj",
  "down": "mlp.down_proj",
}
_OUTSIDE = {
  "embed": "model.embed_tokens",
  "final_norm": "model.norm",
  "head": "lm_head",
}

_A2D = ("a2d-qwen2", "a2d-qwen3")
# What a family's members have in common, and the class that computes them.
_A2D_QWEN2 = dict(qkv_bias=True, qk_norm=False, shift=0, blocks_from="end")
_A2D_QWEN3 = dict(qkv_bias=False, qk_norm=True, shift=0, blocks_from="end")
_DREAM = dict(qkv_bias=True, qk_norm=False, shift=1, blocks_from="start")
_SDAR = dict(qkv_bias=False, qk_norm=True, shift=0, blocks_from="start")
_FAST_DLLM_V2 = dict(qkv_bias=True, qk_norm=False, shift=1, blocks_from="start")
# What transformers takes for a key that is absent; else 0: width / num_heads.
_HEAD_DIM = {"a2d-qwen3": 128, "sdar": 128}
# As released; the others attend to the whole row.
_BLOCK = {"sdar": 4, "Fast_dLLM_Qwen": 32}
_BLOCK_KEY = {"Fast_dLLM_Qwen": "bd_size"}
_MASK_ID = {"Fast_dLLM_Qwen": 151665}
_ARCHITECTURES = {
  "sdar": "SDARForCausalLM",
  "a2d-qwen2": "A2DQwen2LMHeadModel",
  "a2d-qwen3": "A2DQwen3LMHeadModel",
  "Dream": "DreamModel",
  "Fast_dLLM_Qwen": "Fast_dLLM_QwenForCausalLM",
}


def _keys(model_type: str) -> dict[str, str]:
  """Our field -> the key of a family's config.json."""
  block_key = _BLOCK_KEY.get(model_type, _KEYS["attention_block"])
  return _KEYS | {"attention_block": block_key}


def _read(
  model_type: str,
  usual: Mapping[str, Any],
  raw: Mapping[str, Any],
  switches: Mapping[str, Any],
) -> base.Shape:
  # transformers 5 writes what there is to say of RoPE there.
  rope = raw.get("rope_parameters") or {}
  scaling = raw.get("rope_scaling")
  if scaling in ({"rope_type": "default"}, {"type": "default"}):
    raw = {**raw, "rope_scaling": None}
  found = base.unsupported(raw, _ONLY)
  if not isinstance(rope, Mapping):
    found.append(f"rope_parameters={rope!r} is not an object")
    rope = {}
  found += base.unsupported(rope, {_PARTIAL: _ONLY[_PARTIAL]})
  # A bias of the output projection too, which none of the families has.
  if raw.get("attention_bias"):
    found.append(f"attention_bias={raw['attention_bias']!r}: only False works")
  kinds = raw.get("layer_types")
  if kinds is not None and (
    not isinstance(kinds, list)
    or any(kind != "full_attention" for kind in kinds)
  ):
    found.append(f"layer_types={kinds!r}: only 'full_attention' works")
  keys = _keys(model_type)
  values: dict[str, Any] = {name: raw.get(key) for name, key in keys.items()}
  if values["rope_theta"] is None:
    values["rope_theta"] = rope.get("rope_theta")
  if rope.get("rope_type", "default") != "default":
    found.append(f"rope_type={rope['rope_type']!r}: only 'default' works")
  for name, absent in (
    ("head_dim", _HEAD_DIM.get(model_type, 0)),
    ("norm_eps", 1e-6),
    ("tied_head", False),
    ("pad_id", values["eos_id"]),
    ("attention_block", _BLOCK.get(model_type, 0)),
    ("mask_id", _MASK_ID.get(model_type)),
  ):
    if values[name] is None:
      values[name] = absent
  found += [
    f"{keys[name]} is missing"
    for name, value in values.items()
    if value is None
  ]
  if model_type in _BLOCK and values["attention_block"] == 0:
    found.append(f"{keys['attention_block']}=0 is not a number of tokens")
  shift = raw.get(_SHIFT, bool(usual["shift"]))
  if not isinstance(shift, bool):
    found.append(f"{_SHIFT}={shift!r} is not true or false")
  values |= {**usual, "shift": int(bool(shift)), **switches}
  known = {name: value for name, value in values.items() if value is not None}
  found += base.problems(known, keys)
  base.raise_problems("config.json", found)
  return base.Shape(
    model_type=model_type, embedding_size=values["vocab_size"], **values
  )


def _write(usual: Mapping[str, Any], shape: base.Shape) -> dict[str, Any]:
  fixed = {
    "qkv_bias": usual["qkv_bias"],
    "qk_norm": usual["qk_norm"],
    "scale_logits": False,
    "embedding_size": shape.vocab_size,
    "blocks_from": usual["blocks_from"],
  }
  wrong = [
    f"{name}={getattr(shape, name)!r}"
    for name, value in fixed.items()
    if getattr(shape, name) != value
  ]
  if wrong:
    raise errors.UserError(
      f"A model of type {shape.model_type!r} cannot have {', '.join(wrong)}. "
      "Write it as another family."
    )
  keys = _keys(shape.model_type)
  raw = {key: getattr(shape, name) for name, key in keys.items()}
  raw |= {
    "architectures": [_ARCHITECTURES[shape.model_type]],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "layer_types": ["full_attention"] * shape.num_layers,
    "model_type": shape.model_type,
    "rope_scaling": None,
    "sliding_window": None,
    "use_sliding_window": False,
    _SHIFT: bool(shape.shift),
  }
  if usual["qk_norm"]:
    raw["attention_bias"] = False
  if not shape.attention_block:
    del raw[keys["attention_block"]]
  return dict(sorted(raw.items()))


def _module_name(path: tuple[str, ...], layer: int | None) -> str:
  if layer is None:
    return _OUTSIDE[path[0]]
  return f"model.layers.{layer}.{_IN_LAYER[path[1]]}"


def _block_in_name(model_type: str, name: str) -> int:
  """Some releases tell their blocks nowhere else."""
  if model_type == "sdar":
    sized = re.search(r"-b(\d{1,3})$", name)  # SDAR-8B-Chat-b32
    return int(sized[1]) if sized else 0
  # Qwen3-0.6B-diffusion-bd3lm-v0.1
  return 32 if model_type in _A2D and "bd3lm" in name else 0


FAMILIES = {
  model_type: base.Family(
    read=functools.partial(_read, model_type, usual),
    write=functools.partial(_write, usual),
    module_name=_module_name,
    end_of_turn="<|im_end|>",
    block_key=_keys(model_type)["attention_block"],
    block_in_name=functools.partial(_block_in_name, model_type),
  )
  for model_type, usual in (
    ("a2d-qwen2", _A2D_QWEN2),
    ("a2d-qwen3", _A2D_QWEN3),
    ("Dream", _DREAM),
    ("sdar", _SDAR),
    ("Fast_dLLM_Qwen", _FAST_DLLM_V2),
  )
}
