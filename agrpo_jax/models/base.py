"""The records of a network, whatever its family.

`Shape` says what `transformer` computes, `Vocabulary` what a tokenizer must
agree with, and `Family` how both follow from a model's folder.
"""

import dataclasses
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

from agrpo_jax import errors

DTYPES = ("float32", "bfloat16")
REMAT = ("none", "dots", "full")
BLOCKS_FROM = ("start", "end")
ATTENTION = ("auto", "xla", "cudnn", "splash")
QUANTIZE = ("none", "int8")

# The fields of `Shape` that say how to compute, not what.
SWITCHES = ("dtype", "remat", "attention", "unroll")


@dataclasses.dataclass(frozen=True)
class Source:
  """A model by name, and how it is computed.

  Attributes:
    path: a model folder, or its hub id.
    revision: of the hub id; "": the newest.
    tokenizer: another folder or hub id, "bytes", or "": the model's own.
    dtype: of activations, and of frozen parameters; see `Shape`.
    remat: see `Shape`.
    attention: see `Shape`.
    unroll: see `Shape`.
    attention_block: see `Shape`, in place of what the model's folder says; 0:
      as that says.
    quantize: how the kernels of frozen layers are kept: "none", as `dtype`
      says, or "int8" (`quantized`).
  """

  path: str
  revision: str = ""
  tokenizer: str = ""
  dtype: str = "bfloat16"
  remat: str = "none"
  attention: str = "auto"
  unroll: int = 1
  attention_block: int = 0
  quantize: str = "none"


@dataclasses.dataclass(frozen=True)
class Shape:
  """Shape of a network, its special ids, and how it is computed.

  Attributes:
    model_type: key of `models.FAMILIES`.
    vocab_size: token ids are below it.
    embedding_size: rows of the embedding table and columns of the head; at
      least `vocab_size`, the rest is never a token.
    num_layers: transformer layers.
    width: size of the residual stream.
    num_heads: query heads.
    num_kv_heads: key and value heads; divides `num_heads`.
    mlp_width: hidden size of the MLP.
    rope_theta: base of the rotary frequencies.
    norm_eps: added to the mean square in RMSNorm.
    qkv_bias: whether q, k and v have biases.
    tied_head: whether the head is the transposed embedding table.
    max_length: longest sequence, prompt and completion together.
    mask_id: id of the mask token.
    eos_id: id of the token that ends a completion.
    pad_id: id that fills padding; never attended to.
    head_dim: size of a head, even; 0 stands for `width / num_heads`, which
      takes its place.
    scale_logits: whether logits are divided by sqrt(width).
    qk_norm: whether queries and keys are normalised, head by head, before they
      are rotated.
    stop_ids: further ids that end a completion, as `eos_id` does.
    shift: the logits of the token at position i come from the output at
      i - shift; 0 or 1. Position 0 keeps its own.
    attention_block: T of block-causal attention: a position attends to its own
      block of T positions and to those before it; 0: to the whole row.
    blocks_from: where these blocks are counted from: the "start" of the row
      (position 0, the prompt included), or its "end", where the first one is
      incomplete; for windows, from where these begin, and the last one may be.
    dtype: of the matrix products and the residual stream: "float32" or
      "bfloat16" (sums, norms, softmax, RoPE and logits are float32 anyway).
    remat: what the forward pass keeps for the backward pass: "none" recomputes
      nothing, "dots" keeps the outputs of the projections, "full" keeps only
      the input of each layer.
    attention: "xla", "cudnn", "splash" (a TPU kernel), or "auto": for bfloat16
      the kernel of a GPU or TPU, except where there are few queries.
    unroll: layers that one iteration of the loop over them has, at least 1:
      more are more to compile, and what a layer keeps for the backward pass is
      not copied in between.
  """

  model_type: str
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
  head_dim: int = 0
  scale_logits: bool = False
  qk_norm: bool = False
  stop_ids: tuple[int, ...] = ()
  shift: int = 0
  attention_block: int = 0
  blocks_from: str = "start"
  dtype: str = "float32"
  remat: str = "none"
  attention: str = "auto"
  unroll: int = 1

  def __post_init__(self) -> None:
    if isinstance(self.stop_ids, list):  # as JSON has it
      object.__setattr__(self, "stop_ids", tuple(self.stop_ids))
    values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    raise_problems("the network's settings", problems(values, {}))
    # A shape is a static argument: with the number filled in, two spellings of
    # one network are equal, and compile once.
    if not self.head_dim:
      object.__setattr__(self, "head_dim", self.width // self.num_heads)

  @property
  def prompt_multiple(self) -> int:
    """Tokens of a block that a prompt may share with its completion; else 1."""
    return max(1, self.attention_block * (self.blocks_from == "start"))


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """The sizes, ids and names that a tokenizer shares with its network.

  Attributes:
    size: token ids are below it.
    mask_id: id of the mask token.
    eos_id: id of the token that ends a completion.
    pad_id: id that fills padding.
    end_of_turn: name of the token that ends a turn of a chat.
    stop_ids: further ids that end a completion.
  """

  size: int
  mask_id: int
  eos_id: int
  pad_id: int
  end_of_turn: str
  stop_ids: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Family:
  """A kind of network, as its checkpoints describe it.

  Attributes:
    read: (the parsed config.json, switches of `Shape` by name) -> Shape. Raises
      one UserError that names everything that is missing, malformed, or asks
      for what `transformer` does not compute.
    write: Shape -> config.json with every key that the original code reads.
      Raises UserError for a shape that the family cannot have.
    module_name: (path of a module in our tree, its layer or None) -> its name
      in the original, e.g. ("layers", "q"), 3 -> "model.layers.3.self_attn.
      q_proj". The layer counts from 0; ("last_layer", ...) has one too.
    end_of_turn: name of the token that ends a turn of a chat.
    block_key: of config.json, that tells `Shape.attention_block`.
    block_in_name: name of a released model -> the `attention_block` that it
      speaks of; 0: of none.
  """

  read: Callable[[Mapping[str, Any], Mapping[str, Any]], Shape]
  write: Callable[[Shape], dict[str, Any]]
  module_name: Callable[[tuple[str, ...], int | None], str]
  end_of_turn: str
  block_key: str = "block_size"
  block_in_name: Callable[[str], int] = lambda name: 0


MAX_INT = 2**31 - 1  # of an index
_MAX_FLOAT32 = 3.4028234663852886e38
# The least value of a whole number; 1 for the others.
_LEAST = dict.fromkeys(
  ("mask_id", "eos_id", "pad_id", "head_dim", "shift", "attention_block"), 0
)


def problems(values: Mapping[str, Any], labels: Mapping[str, str]) -> list[str]:
  """Everything wrong with the values of `Shape`, one sentence each.

  Args:
    values: field -> value; a field that is absent is not judged.
    labels: field -> the name that the reader of the message knows it by.
  """
  found = []
  # Values are compared with each other only if each is right by itself: one
  # mistake, one sentence.
  good = {}
  for field in dataclasses.fields(Shape):
    name, kind = field.name, field.type
    if name not in values:
      continue
    value, label = values[name], labels.get(name, name)
    if kind is bool:
      if not isinstance(value, bool):
        found.append(f"{label}={value!r} is not true or false")
    elif kind is int:
      least = _LEAST.get(name, 1)
      if not is_int(value) or value < least:
        found.append(f"{label}={value!r} is not a whole number >= {least}")
      elif value > MAX_INT:
        found.append(f"{label}={value!r} is above 2^31 - 1")
      else:
        good[name] = value
    elif kind is float and not (is_number(value) and value > 0):
      found.append(f"{label}={value!r} is not a number > 0 that float32 holds")
  for name, choices in (
    ("shift", (0, 1)),
    ("blocks_from", BLOCKS_FROM),
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

  if good.get("head_dim"):
    if good["head_dim"] % 2:
      found.append(f"{say('head_dim')} is odd; RoPE needs an even size")
  elif both("width", "num_heads"):
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
  stop_ids = values.get("stop_ids", ())
  if not isinstance(stop_ids, tuple):
    found.append(f"stop_ids={stop_ids!r} is not a tuple of ids")
    stop_ids = ()
  for at in stop_ids:
    of = f"{labels.get('eos_id', 'eos_id')} has {at!r}"
    if not is_int(at) or at < 0:
      found.append(f"{of}, which is not a whole number >= 0")
    elif "vocab_size" in good and at >= good["vocab_size"]:
      found.append(f"{of}, which is not below {say('vocab_size')}")
    elif at == good.get("mask_id"):
      found.append(f"{of}, which is also {say('mask_id')}")
  return found


def unsupported(
  raw: Mapping[str, Any], only: Mapping[str, tuple[tuple[Any, ...], Any]]
) -> list[str]:
  """The keys of a config.json that ask for what is not computed.

  Args:
    raw: the parsed file.
    only: key -> (values that are computed, what the original code takes if the
      key is absent).
  """
  found = []
  for key, (accepted, default) in only.items():
    value = raw.get(key, default)
    if not any(_same(value, one) for one in accepted):
      absent = "" if key in raw else " (what the original takes if absent)"
      found.append(f"{key}={value!r}{absent}: only {accepted[0]!r} works")
  return found


def is_int(value: Any) -> bool:
  """True for whole numbers; JSON's true and false are none."""
  return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
  """True for numbers that float32 holds; NaN, true and false are none."""
  return (
    isinstance(value, (int, float))
    and not isinstance(value, bool)
    # For NaN no comparison holds.
    and abs(value) <= _MAX_FLOAT32
  )


def _same(value: Any, accepted: Any) -> bool:
  # Type-strict where it matters: JSON `0` is not `false`, but `0` is `0.0`.
  if isinstance(value, bool) or isinstance(accepted, bool):
    return value is accepted
  return value == accepted


def raise_problems(where: str, found: list[str]) -> None:
  """Raises one UserError with all that was found, if anything was."""
  if found:
    raise errors.UserError(
      f"{where}: " + "; ".join(found) + ". Correct these values, or use a "
      "checkpoint that this package can compute."
    )
