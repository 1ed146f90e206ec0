"""Every denoising step is a full pass of the network over the whole row."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from agrpo_jax import types
from agrpo_jax.policies import row


@dataclasses.dataclass(frozen=True)
class Plain:
  """The exact bidirectional pass; a `base.Policy` without memory."""

  # Where nothing is shared a round is one step, and no row waits for others.
  refresh: ClassVar[int] = 1
  spans: ClassVar[bool] = False
  passes: ClassVar[int] = 1

  def open(
    self,
    network: types.Network,
    before: types.Tree | None,
    prompt_BxP: jax.Array,
    prompt_length_B: jax.Array,
    start_BxC: jax.Array,
    block_start_B: jax.Array,
    keeps: bool,
  ) -> types.Tree:
    """Returns the empty memory."""
    del network, before, prompt_BxP, prompt_length_B, start_BxC, block_start_B
    del keeps
    return ()

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
    """Runs B * S whole rows; see `base.Policy.logits`."""
    del memory, block_start_BxS, is_start
    num_rows, num_states = partial_BxSxC.shape[:2]
    logits = row.logits_at(
      network,
      jnp.repeat(prompt_BxP, num_states, axis=0),
      jnp.repeat(prompt_length_B, num_states),
      partial_BxSxC.reshape(num_rows * num_states, -1),
      offset_BxSxW.reshape(num_rows * num_states, -1),
    )
    return logits.reshape(num_rows, num_states, *logits.shape[1:])


PLAIN = Plain()
