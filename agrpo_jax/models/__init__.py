"""Parameters -> logits: the transformer, adapters, families, tokenizers."""

from collections.abc import Mapping
from typing import Any

from agrpo_jax import errors
from agrpo_jax.models import base
from agrpo_jax.models import llada
from agrpo_jax.models import qwen

# By the `model_type` of a config.json.
FAMILIES: dict[str, base.Family] = {"llada": llada.FAMILY, **qwen.FAMILIES}
# One id, or a list of those that end a completion.
_EOS = "eos_token_id"


def family_of(shape: base.Shape) -> base.Family:
  """Returns the family of a network."""
  return FAMILIES[shape.model_type]


def read_shape(
  raw: Any, attention_block: int = 0, **switches: Any
) -> base.Shape:
  """Reads the contents of a `config.json` of any family.

  Args:
    raw: the parsed file.
    attention_block: of block-causal attention, in place of what the file says
      or does not say; 0: the file's.
    **switches: `base.SWITCHES`; not stored in the file.

  Raises:
    UserError: naming every key that is missing, malformed, or asks for
      something that this package does not compute.
  """
  if not isinstance(raw, Mapping):
    raise errors.UserError(
      f"config.json holds a {type(raw).__name__}, expected an object"
    )
  model_type = raw.get("model_type")
  if not isinstance(model_type, str) or model_type not in FAMILIES:
    raise errors.UserError(
      f"config.json: model_type is {model_type!r}, which is none of the "
      f"families that can be loaded: {', '.join(sorted(FAMILIES))}. Use a "
      "checkpoint of one of these."
    )
  eos_ids = raw.get(_EOS)
  if isinstance(eos_ids, list) and eos_ids:
    # Of several the first fills up what the others end too.
    raw = {**raw, _EOS: eos_ids[0]}
    switches["stop_ids"] = tuple(eos_ids[1:])
  if attention_block:
    raw = {**raw, FAMILIES[model_type].block_key: attention_block}
  shape = FAMILIES[model_type].read(raw, switches)
  if attention_block not in (0, shape.attention_block):
    raise errors.UserError(
      f"config.model.attention_block={attention_block}: a model of type "
      f"{model_type!r} attends to whole rows; set it to 0."
    )
  return shape


def write_shape(shape: base.Shape) -> dict[str, Any]:
  """A config.json of the network's family."""
  raw = family_of(shape).write(shape)
  if shape.stop_ids:
    raw[_EOS] = [shape.eos_id, *shape.stop_ids]
  return raw


def vocabulary(shape: base.Shape) -> base.Vocabulary:
  """The vocabulary that the tokenizer of a network must agree with."""
  return base.Vocabulary(
    size=shape.vocab_size,
    mask_id=shape.mask_id,
    eos_id=shape.eos_id,
    pad_id=shape.pad_id,
    end_of_turn=family_of(shape).end_of_turn,
    stop_ids=shape.stop_ids,
  )
