"""What a LLaDA network is: read from, and written to, its `config.json`.

`from_json` refuses what this package cannot compute exactly as the original
PyTorch code does, and names every such key at once. Keys that only concern how
the original is initialised or trained are ignored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from agrpo_jax import errors

# The token that ends a turn of a chat.
END_OF_TURN = "<|eot_id|>"

DTYPES = ("float32", "bfloat16")
REMAT = ("none", "dots", "full")
ATTENTION = ("auto", "xla", "cudnn")

# Our field -> the key of config.json.
_KEYS = {
  "vocab_size": "vocab_size",
  "embedding_size": "embedding_size",
  "num_layers": "n_layers",
  "width": "d_model",
  "num_heads": "n_heads",
  "num_kv_heads": "n_kv_heads",
  "mlp_width": "mlp_hidden_size",
  "rope_theta": "rope_theta",
  "norm_eps": "rms_norm_eps",
  "qkv_bias": "include_qkv_bias",
  "tied_head": "weight_tying",
  "scale_logits": "scale_logits",
  "max_length": "max_sequence_length",
  "mask_id": "mask_token_id",
  "eos_id": "eos_token_id",
  "pad_id": "pad_token_id",
}

_REQUIRED = (
  "vocab_size",
  "num_layers",
  "width",
  "num_heads",
  "rope_theta",
  "norm_eps",
  "tied_head",
  "max_length",
  "mask_id",
  "eos_id",
)

# Key -> (values that we compute, what the original code takes if it is absent).
_ONLY: dict[str, tuple[tuple[Any, ...], Any]] = {
  "block_type": (("llama",), "sequential"),
  "block_group_size": ((1,), 1),
  "activation_type": (("silu",), "swiglu"),
  "rope": ((True,), False),
  "rope_full_precision": ((True,), True),
  "alibi": ((False,), False),
  "layer_norm_type": (("rms",), "default"),
  "layer_norm_with_affine": ((True,), True),
  "bias_for_layer_norm": ((False, None), None),
  "attention_layer_norm": ((False,), False),
  "input_emb_norm": ((False,), False),
  "include_bias": ((False,), False),
  "clip_qkv": ((None,), None),
  "attention_dropout": ((0.0,), 0.1),
  "residual_dropout": ((0.0,), 0.1),
  "embedding_dropout": ((0.0,), 0.1),
}


@dataclasses.dataclass(frozen=True)
class Config:
  """Shape of the network, its special ids, and how it is computed.

  Attributes:
    vocab_size: token ids are below it.
    embedding_size: rows of the embedding table and columns of the head; at
      least `vocab_size`, the rest is never a token.
    num_layers: transformer layers.
    width: size of the residual stream.
    num_heads: query heads; `head_dim = width / num_heads` is even.
    num_kv_heads: key and value heads; divides `num_heads`.
    mlp_width: hidden size of the MLP.
    rope_theta: base of the rotary frequencies.
    norm_eps: added to the mean square in RMSNorm.
    qkv_bias: whether q, k and v have biases.
    tied_head: whether the head is the transposed embedding table.
    scale_logits: whether logits are divided by sqrt(width).
    max_length: longest sequence, prompt and completion together.
    mask_id: id of the mask token.
    eos_id: id of the token that ends a completion.
    pad_id: id that fills padding; never attended to.
    dtype: of the matrix products and the residual stream: "float32" or
      "bfloat16" (sums, norms, softmax, RoPE and logits are float32 anyway).
    remat: what the forward pass keeps for the backward pass: "none" recomputes
      nothing, "dots" keeps the outputs of the projections, "full" keeps only
      the input of each layer.
    attention: "xla", "cudnn", or "auto": cuDNN for bfloat16 on a GPU.
  """

  vocab_size: int
  embedding_size: int
  num_layers: int
  width: int
  num_heads: int
  num_kv_heads: int
  mlp_width: int
  rope_theta: float
  norm_eps: float
  qkv_bias: bool
  tied_head: bool
  max_length: int
  mask_id: int
  eos_id: int
  pad_id: int
  scale_logits: bool = False
  dtype: str = "float32"
  remat: str = "none"
  attention: str = "auto"

  def __post_init__(self) -> None:
    values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    _raise("the network's settings", _problems(values, {}))

  @property
  def head_dim(self) -> int:
    return self.width // self.num_heads

  @classmethod
  def from_json(cls, raw: Mapping[str, Any], **switches: str) -> Config:
    """Reads the contents of a LLaDA `config.json`.

    Args:
      raw: the parsed file.
      **switches: `dtype`, `remat`, `attention`; not stored in the file.

    Raises:
      UserError: naming every key that is missing, malformed, or asks for
        something that this package does not compute.
    """
    if not isinstance(raw, Mapping):
      raise errors.UserError(
        f"config.json holds a {type(raw).__name__}, expected an object"
      )
    if raw.get("model_type") != "llada":
      raise errors.UserError(
        f"config.json: model_type is {raw.get('model_type')!r}, expected "
        "'llada': only LLaDA checkpoints can be loaded"
      )
    found = []
    for key, (accepted, default) in _ONLY.items():
      value = raw.get(key, default)
      if not any(_same(value, one) for one in accepted):
        absent = "" if key in raw else " (what the original takes if absent)"
        found.append(f"{key}={value!r}{absent}: only {accepted[0]!r} works")
    values: dict[str, Any] = {name: raw.get(key) for name, key in _KEYS.items()}
    for name in _REQUIRED:
      if values[name] is None:
        found.append(f"{_KEYS[name]} is missing")
    _fill(values, raw, found)
    values.update(switches)
    known = {name: value for name, value in values.items() if value is not None}
    found += _problems(known, _KEYS)
    _raise("config.json", found)
    return cls(**values)

  def to_json(self) -> dict[str, Any]:
    """A config.json with every key that the original code reads."""
    raw = {key: getattr(self, name) for name, key in _KEYS.items()}
    only = {key: accepted[0] for key, (accepted, _) in _ONLY.items()}
    raw.update({key: one for key, one in only.items() if one is not None})
    raw.update(
      model_type="llada",
      architectures=["LLaDAModelLM"],
      auto_map={
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModel": "modeling_llada.LLaDAModelLM",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
      },
      alibi_bias_max=8.0,
      attention_layer_norm_with_affine=True,
      flash_attention=False,
      init_cutoff_factor=None,
      init_device="meta",
      init_fn="mitchell",
      init_std=0.02,
      mlp_ratio=4,
      multi_query_attention=None,
      precision="amp_bf16",
      use_cache=False,
    )
    return dict(sorted(raw.items()))


def _fill(
  values: dict[str, Any], raw: Mapping[str, Any], found: list[str]
) -> None:
  """Fills what the file may leave out with what the original code takes."""
  if values["embedding_size"] is None:
    values["embedding_size"] = values["vocab_size"]
  multi_query = raw.get("multi_query_attention")
  if values["num_kv_heads"] is None:
    values["num_kv_heads"] = 1 if multi_query else values["num_heads"]
  elif multi_query is not None:
    implied = 1 if multi_query else values["num_heads"]
    if values["num_kv_heads"] != implied:
      found.append(
        f"multi_query_attention={multi_query!r} contradicts n_kv_heads="
        f"{values['num_kv_heads']!r}"
      )
  ratio = raw.get("mlp_ratio", 4)
  if values["mlp_width"] is None and _is_int(values["width"]):
    if not isinstance(ratio, (int, float)) or isinstance(ratio, bool):
      found.append(f"mlp_ratio={ratio!r} is not a number")
    elif ratio * values["width"] != int(ratio * values["width"]):
      found.append(
        f"mlp_ratio={ratio!r} times d_model={values['width']} is not whole"
      )
    else:
      values["mlp_width"] = int(ratio * values["width"])
  for name in ("qkv_bias", "scale_logits"):
    if values[name] is None:
      values[name] = False
  if values["pad_id"] is None:
    values["pad_id"] = values["eos_id"]


def _problems(
  values: Mapping[str, Any], labels: Mapping[str, str]
) -> list[str]:
  """Everything wrong with the values that are there, one sentence each.

  Args:
    values: field -> value; a field that is absent is not judged.
    labels: field -> the name that the reader of the message knows it by.
  """
  found = []
  good = {}
  for field in dataclasses.fields(Config):
    name, kind = field.name, field.type
    if name not in values:
      continue
    value, label = values[name], labels.get(name, name)
    if kind == "bool":
      if not isinstance(value, bool):
        found.append(f"{label}={value!r} is not true or false")
    elif kind == "int":
      least = 0 if name in ("mask_id", "eos_id", "pad_id") else 1
      if not _is_int(value) or value < least:
        found.append(f"{label}={value!r} is not a whole number >= {least}")
      else:
        good[name] = value
    elif kind == "float" and (
      isinstance(value, bool)
      or not isinstance(value, (int, float))
      or not 0 < value < float("inf")
    ):
      found.append(f"{label}={value!r} is not a number > 0")
  for name, choices in (
    ("dtype", DTYPES),
    ("remat", REMAT),
    ("attention", ATTENTION),
  ):
    if name in values and values[name] not in choices:
      found.append(f"{name}={values[name]!r}: choose one of {choices}")

  def say(name: str) -> str:
    return f"{labels.get(name, name)}={good[name]}"

  def both(first: str, second: str) -> bool:
    return first in good and second in good

  if both("width", "num_heads"):
    if good["width"] % good["num_heads"]:
      found.append(f"{say('width')} is not divisible by {say('num_heads')}")
    elif good["width"] // good["num_heads"] % 2:
      found.append(
        f"{say('width')} / {say('num_heads')} is odd; RoPE needs an even size"
      )
  if both("num_heads", "num_kv_heads") and (
    good["num_heads"] % good["num_kv_heads"]
  ):
    found.append(
      f"{say('num_heads')} is not divisible by {say('num_kv_heads')}"
    )
  if both("embedding_size", "vocab_size") and (
    good["embedding_size"] < good["vocab_size"]
  ):
    found.append(f"{say('embedding_size')} is smaller than {say('vocab_size')}")
  for name in ("mask_id", "eos_id", "pad_id"):
    if both(name, "vocab_size") and good[name] >= good["vocab_size"]:
      found.append(f"{say(name)} is not below {say('vocab_size')}")
  if both("mask_id", "eos_id") and good["mask_id"] == good["eos_id"]:
    found.append(f"{say('mask_id')} is also {labels.get('eos_id', 'eos_id')}")
  return found


def _is_int(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _same(value: Any, accepted: Any) -> bool:
  # Type-strict where it matters: JSON `0` is not `false`, but `0` is `0.0`.
  if isinstance(value, bool) or isinstance(accepted, bool):
    return value is accepted
  return value == accepted


def _raise(where: str, problems: list[str]) -> None:
  if problems:
    raise errors.UserError(
      f"{where}: " + "; ".join(problems) + ". Correct these values, or use a "
      "checkpoint that this package can compute."
    )
