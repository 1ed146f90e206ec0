"""The any-order lower bound (ELBO) of a completion's log-likelihood.

Of a completion with C tokens, draw a count n from 1..C and n positions without
replacement, mask them, and take

    C / n * sum over masked i of log p(token i | what is not masked).

Its expectation is the mean, over all orders, of the log-probability of the
tokens one after the other in that order: a lower bound of the log-likelihood
(arXiv:2502.09992, get_log_likelihood.py). Exact counts have less variance than
masking each token by chance, and the counts of a completion's M draws are
stratified: k + floor(j C / M) for j < M with one random k, modulo C.
"""

import flax.struct
import jax
import jax.numpy as jnp

from agrpo_jax import types
from agrpo_jax.policies import row
from agrpo_jax.samplers import rules


@flax.struct.dataclass
class Pairs:
  """B prompts with their completions, both padded on the right.

  Attributes:
    prompt: int32 [B, P].
    prompt_length: int32 [B].
    completion: int32 [B, C].
    length: int32 [B], tokens of each completion, at least 1.
  """

  prompt: jax.Array
  prompt_length: jax.Array
  completion: jax.Array
  length: jax.Array


def estimate(
  network: types.Network,
  pairs: Pairs,
  is_masked_BxC: jax.Array,
  mask_id: int,
) -> jax.Array:
  """float32 [B]: C / n times the log-probability of the n masked tokens.

  is_masked_BxC: at least one position in each row, within its length.
  """
  offset_C = jnp.arange(pairs.completion.shape[1])
  logits_BxCxV = row.logits_at(
    network,
    pairs.prompt,
    pairs.prompt_length,
    jnp.where(is_masked_BxC, mask_id, pairs.completion),
    jnp.broadcast_to(offset_C, pairs.completion.shape),
    pairs.length,
  )
  logprob_BxC = jnp.take_along_axis(
    jax.nn.log_softmax(logits_BxCxV), pairs.completion[..., None], axis=-1
  )[..., 0]
  total_B = jnp.where(is_masked_BxC, logprob_BxC, 0.0).sum(axis=1)
  return pairs.length / is_masked_BxC.sum(axis=1) * total_B


def count(
  shift: jax.Array, length: jax.Array, draw: jax.Array, num_draws: int
) -> jax.Array:
  """Returns how many tokens a draw masks, 1..length.

  Each count is as likely as the others if `shift` is uniform.

  shift: int32, uniform over 0..length - 1, the same for all draws of a
    completion. (Rounding where LLaDA's code has a floor would favour counts of
    one parity.)
  """
  return 1 + (shift + draw * length // num_draws) % length


def draw_mask(
  key: jax.Array,
  row_id_2: jax.Array,
  length: jax.Array,
  *,
  width: int,
  num_draws: int,
) -> jax.Array:
  """bool [width]: which positions of a completion one draw masks.

  row_id_2: uint32 [2], the completion's id and the number of the draw.
  """
  draw = row_id_2[1].astype(jnp.int32)
  id_key = jax.random.fold_in(key, row_id_2[0])
  # The draws' own keys take the numbers below; all of them share the shift.
  shift_key = jax.random.fold_in(id_key, num_draws)
  shift = jax.random.randint(shift_key, (), 0, length)
  num_masked = count(shift, length, draw, num_draws)
  draw_key = jax.random.fold_in(id_key, draw)
  is_token_C = jnp.arange(width) < length
  noise_C = jax.random.uniform(draw_key, (width,))
  return is_token_C & (rules.ranks(noise_C, is_token_C) < num_masked)
