"""Whether greedy decoding gives a completion, without decoding all of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from agrpo_jax import types
from agrpo_jax.objectives import elbo
from agrpo_jax.policies import row


def match(network: types.Network, pairs: elbo.Pairs, mask_id: int) -> jax.Array:
  """bool [B]: is the completion what greedy decoding gives?

  Of the masked positions the one with the most probable token gets it, one a
  denoising step. Where that is not the completion's own token, the answer is
  no and the rest need not be decoded.
  """
  size = pairs.completion.shape[1]
  place_C = jnp.arange(size)

  def is_undecided(state: tuple[jax.Array, jax.Array]) -> jax.Array:
    is_masked_BxC, matches_B = state
    return (is_masked_BxC.any(axis=1) & matches_B).any()

  def denoise(
    state: tuple[jax.Array, jax.Array],
  ) -> tuple[jax.Array, jax.Array]:
    is_masked_BxC, matches_B = state
    logits_BxCxV = row.logits_at(
      network,
      pairs.prompt,
      pairs.prompt_length,
      jnp.where(is_masked_BxC, mask_id, pairs.completion),
      jnp.broadcast_to(place_C, pairs.completion.shape),
      pairs.length,
    )
    confidence_BxC = jax.nn.log_softmax(logits_BxCxV).max(axis=-1)
    chosen_B = jnp.where(is_masked_BxC, confidence_BxC, -jnp.inf).argmax(axis=1)
    is_chosen_BxC = (place_C[None, :] == chosen_B[:, None]) & is_masked_BxC
    is_same_BxC = logits_BxCxV.argmax(axis=-1) == pairs.completion
    return (
      is_masked_BxC & ~is_chosen_BxC,
      matches_B & (is_same_BxC | ~is_chosen_BxC).all(axis=1),
    )

  is_masked_BxC = place_C[None, :] < pairs.length[:, None]
  state = (is_masked_BxC, jnp.ones(pairs.length.shape, bool))
  return jax.lax.while_loop(is_undecided, denoise, state)[1]
