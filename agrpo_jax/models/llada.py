"""The family LLaDA: LLaDA-8B-Base and -Instruct, LLaDA-1.5.

Reading a config.json refuses what this package cannot compute exactly as the
original PyTorch code does. Keys that only concern how the original is
initialised or trained are ignored.
"""

from collections.abc import Mapping
from typing import Any

from agrpo_jax import errors
from agrpo_jax.models import base

MODEL_TYPE = "llada"

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

_ROOT = "model.transformer."

# Our module -> its name, within a layer and outside of the layers.
_IN_LAYER = {
  "attn_norm": "attn_norm",
  "q": "q_proj",
  "k": "k_proj",
  "v": "v_proj",
  "attn_out": "attn_out",
  "mlp_norm": "ff_norm",
  "gate": "ff_proj",
  "up": "up_proj",
  "down": "ff_out",
}
_OUTSIDE = {"embed": "wte", "final_norm": "ln_f", "head": "ff_out"}


def _read(raw: Mapping[str, Any], switches: Mapping[str, Any]) -> base.Shape:
  found = base.unsupported(raw, _ONLY)
  values: dict[str, Any] = {name: raw.get(key) for name, key in _KEYS.items()}
  for name in _REQUIRED:
    if values[name] is None:
      found.append(f"{_KEYS[name]} is missing")
  _fill(values, raw, found)
  values.update(switches)
  # What is missing has been named already.
  known = {name: value for name, value in values.items() if value is not None}
  found += base.problems(known, _KEYS)
  base.raise_problems("config.json", found)
  return base.Shape(model_type=MODEL_TYPE, **values)


def _write(shape: base.Shape) -> dict[str, Any]:
  is_wide = shape.head_dim * shape.num_heads != shape.width
  if shape.shift or shape.qk_norm or is_wide:
    raise errors.UserError(
      f"A LLaDA has no shifted logits, no normalised queries and keys, and "
      f"heads of width / num_heads; this network has shift={shape.shift}, "
      f"qk_norm={shape.qk_norm}, head_dim={shape.head_dim}, "
      f"num_heads={shape.num_heads} and width={shape.width}. Write it as "
      "another family."
    )
  raw = {key: getattr(shape, name) for name, key in _KEYS.items()}
  only = {key: accepted[0] for key, (accepted, _) in _ONLY.items()}
  # None is what the original takes for a key that is absent.
  raw.update({key: one for key, one in only.items() if one is not None})
  raw.update(
    model_type=MODEL_TYPE,
    architectures=["LLaDAModelLM"],
    auto_map={
      "AutoConfig": "configuration_llada.LLaDAConfig",
      "AutoModel": "modeling_llada.LLaDAModelLM",
      "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    },
    # The original reads these too; beside the keys above none of them changes
    # what is computed.
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
  width = values["width"]
  is_size = base.is_int(width) and width <= base.MAX_INT  # else found elsewhere
  if values["mlp_width"] is None and is_size:
    if not base.is_number(ratio):
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


def _module_name(path: tuple[str, ...], layer: int | None) -> str:
  if path[0] in ("layers", "last_layer"):
    return f"{_ROOT}blocks.{layer}.{_IN_LAYER[path[1]]}"
  return _ROOT + _OUTSIDE[path[0]]


FAMILY = base.Family(
  read=_read,
  write=_write,
  module_name=_module_name,
  end_of_turn="<|eot_id|>",
)
