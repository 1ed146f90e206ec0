"""Classifier-free guidance: away from what is said without a prompt."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from agrpo_jax import types
from agrpo_jax.policies import plain


@dataclasses.dataclass(frozen=True)
class Guided(plain.Plain):
  """u + (scale + 1) (l - u), with u the logits where the prompt is masked.

  As in LLaDA's `generate.py` (arXiv:2502.09992). Two passes a step.

  Attributes:
    scale: of the guidance; at 0 the plain logits come out.
    mask_id: vocabulary id of [MASK].
  """

  scale: float
  mask_id: int

  passes: ClassVar[int] = 2

  def logits(
    self,
    network: types.Network,
    memory: types.Tree,
    prompt_BxP: jax.Array,
    prompt_length_B: jax.Array,
    partial_BxSxC: jax.Array,
    block_start_BxS: jax.Array,
    offset_BxSxW: jax.Array,
    is_start: jax.Array | bool,
  ) -> jax.Array:
    """Runs every row twice, with its prompt and with a masked one."""
    run = super().logits
    rest = (
      prompt_length_B,
      partial_BxSxC,
      block_start_BxS,
      offset_BxSxW,
      is_start,
    )
    logits = run(network, memory, prompt_BxP, *rest)
    # The padding too, which stands behind the row and is without effect.
    masked_BxP = jnp.full_like(prompt_BxP, self.mask_id)
    free = run(network, memory, masked_BxP, *rest)
    return free + (self.scale + 1) * (logits - free)
