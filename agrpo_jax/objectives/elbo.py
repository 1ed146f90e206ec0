"""The any-order lower bound (ELBO) of a completion's log-likelihood.

Of a completion with C tokens, draw a count n from 1..C and n positions without
replacement, mask them, and take

    C / n * sum over masked i of log p(token i | what is not masked).

Its expectation is the mean, over all orders, of the log-probability of the
tokens one after the other in that order: a lower bound of the log-likelihood
(arXiv:2502.09992, get_log_likelihood.py). Exact counts have less variance than
masking each token by chance, and the counts of a completion's M draws are
stratified: k + floor(j C / M) for j < M with one random k, modulo C.

Where attention is block-causal the bound is a sum of such, one per block, whose
orders go through the blocks one by one; one pass has them all
(arXiv:2503.09573, equation 8). A last block that is not full is filled up with
EOS, as in training.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from agrpo_jax import types
from agrpo_jax.policies import block_causal
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
    num_given: int32 [B], of these the first that are the prompt's (`row.cut`),
      whose probability is not asked for.
    attention_block: T of block-causal attention, a divisor of C; 0: none.
  """

  prompt: jax.Array
  prompt_length: jax.Array
  completion: jax.Array
  length: jax.Array
  num_given: jax.Array
  attention_block: int = flax.struct.field(pytree_node=False, default=0)

  @property
  def is_asked(self) -> jax.Array:
    """bool [B, C], the tokens whose probability is asked for."""
    place_1xC = jnp.arange(self.completion.shape[1])[None]
    return (place_1xC >= self.num_given[:, None]) & (
      place_1xC < self.length[:, None]
    )


class Asked(Protocol):
  """What is to be known of a network: the part of its shape."""

  @property
  def prompt_multiple(self) -> int: ...
  @property
  def attention_block(self) -> int: ...
  @property
  def eos_id(self) -> int: ...


def pack(
  prompts: Sequence[Sequence[int]],
  completions: Sequence[Sequence[int]],
  bucket: int,
  network: Asked,
) -> Pairs:
  """Puts token ids into arrays of the host.

  Args:
    prompts: of each pair.
    completions: of each pair.
    bucket: both sides are padded to a multiple of this many tokens.
    network: the shape of the one that is asked.
  """
  cut, ends = row.cut(prompts, network.prompt_multiple)
  filled = [[*end, *one] for end, one in zip(ends, completions, strict=True)]
  prompt_BxP, prompt_length_B = row.pack(cut, bucket)
  completion_BxC, length_B = row.pack(
    filled, math.lcm(bucket, max(1, network.attention_block)), network.eos_id
  )
  arrays = prompt_BxP, prompt_length_B, completion_BxC, length_B
  num_given_B = np.array([len(end) for end in ends], np.int32)
  return Pairs(*arrays, num_given_B, network.attention_block)  # type: ignore


def partial_logits(
  network: types.Network, pairs: Pairs, is_masked_BxC: jax.Array, mask_id: int
) -> jax.Array:
  """Returns logits at all positions of completions, float32 [B, C, V]."""
  partial_BxC = jnp.where(is_masked_BxC, mask_id, pairs.completion)
  if pairs.attention_block:
    return block_causal.partial_logits(
      network,
      pairs.prompt,
      pairs.prompt_length,
      pairs.completion,
      partial_BxC,
    )
  offset_C = jnp.arange(partial_BxC.shape[1])
  return row.logits_at(
    network,
    pairs.prompt,
    pairs.prompt_length,
    partial_BxC,
    jnp.broadcast_to(offset_C, partial_BxC.shape),
    pairs.length,
  )


def estimate(
  network: types.Network,
  pairs: Pairs,
  is_masked_BxC: jax.Array,
  mask_id: int,
) -> jax.Array:
  """float32 [B]: C / n times the log-probability of the n masked tokens.

  Of every block, where attention is block-causal.

  is_masked_BxC: positions that are asked for, at least one in each row, or in
    each block that has some.
  """
  logits_BxCxV = partial_logits(network, pairs, is_masked_BxC, mask_id)
  logprob_BxC = jnp.take_along_axis(
    jax.nn.log_softmax(logits_BxCxV), pairs.completion[..., None], axis=-1
  )[..., 0]
  total_BxN, masked_BxN, asked_BxN = (
    x.reshape(len(x), -1, pairs.attention_block or x.shape[1]).sum(axis=2)
    for x in (
      jnp.where(is_masked_BxC, logprob_BxC, 0.0),
      is_masked_BxC,
      pairs.is_asked,
    )
  )
  return (asked_BxN / jnp.maximum(masked_BxN, 1) * total_BxN).sum(axis=1)


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
  is_asked_C: jax.Array,
  *,
  num_draws: int,
  attention_block: int = 0,
) -> jax.Array:
  """bool [C]: which positions of a completion one draw masks.

  Args:
    key: of all completions.
    row_id_2: uint32 [2], the completion's id and the number of the draw.
    is_asked_C: bool, see `Pairs`.
    num_draws: M of each completion.
    attention_block: see `Pairs`; every block has a count of its own.
  """
  draw = row_id_2[1].astype(jnp.int32)

  def of_block(key: jax.Array, is_asked_T: jax.Array) -> jax.Array:
    # The draws' own keys take the numbers below; all of them share the shift.
    shift_key = jax.random.fold_in(key, num_draws)
    num_asked = jnp.maximum(is_asked_T.sum(dtype=jnp.int32), 1)
    shift = jax.random.randint(shift_key, (), 0, num_asked)
    num_masked = count(shift, num_asked, draw, num_draws)
    draw_key = jax.random.fold_in(key, draw)
    noise_T = jax.random.uniform(draw_key, is_asked_T.shape)
    return is_asked_T & (rules.ranks(noise_T, is_asked_T) < num_masked)

  id_key = jax.random.fold_in(key, row_id_2[0])
  if not attention_block:
    return of_block(id_key, is_asked_C)
  is_asked_NxT = is_asked_C.reshape(-1, attention_block)
  keys = jax.random.split(id_key, len(is_asked_NxT))
  return jax.vmap(of_block)(keys, is_asked_NxT).reshape(-1)
