"""Parameters -> logits: the transformer, adapters, families, tokenizers."""

from agrpo_jax.models import base
from agrpo_jax.models import llada


def vocabulary(network: llada.Config) -> base.Vocabulary:
  """What the tokenizer of a network must agree with."""
  return base.Vocabulary(
    size=network.vocab_size,
    mask_id=network.mask_id,
    eos_id=network.eos_id,
    pad_id=network.pad_id,
    end_of_turn=llada.END_OF_TURN,
  )
