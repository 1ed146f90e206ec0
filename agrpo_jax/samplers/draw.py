"""The draw at one position: temperature, top-k, top-p, Gumbel-max; its record.

Everything here is written for one position; callers `vmap`.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from agrpo_jax import types
from agrpo_jax.samplers import rules
from agrpo_jax.samplers import sampling as sampling_lib

# Slots of a support beyond top_k: low-precision logits tie often.
_MIN_TIE_SLOTS = 48
_SUPPORT_MULTIPLE = 32


class Filtered(NamedTuple):
  """The distribution a token is drawn from, over S candidates.

  Attributes:
    logprob: float32 [S], minus infinity where truncation cut the candidate.
    ids: int32 [S], the candidates' vocabulary ids.
  """

  logprob: jax.Array
  ids: jax.Array

  @property
  def entropy(self) -> jax.Array:
    """In nats; the term of a cut candidate is 0, in the gradient too."""
    # Masked before the product and after: behind the second mask alone the
    # gradient of 0 * infinity would be NaN.
    kept = jnp.isfinite(self.logprob)
    logprob = jnp.where(kept, self.logprob, 0.0)
    return -jnp.where(kept, jnp.exp(logprob) * logprob, 0.0).sum()


def _temper(logits: jax.Array, sampling: sampling_lib.Sampling) -> jax.Array:
  if sampling.temperature > 0:
    return logits / sampling.temperature
  return logits


def _cut_by_p(logits: jax.Array, sampling: sampling_lib.Sampling) -> jax.Array:
  """Returns the logits, minus infinity where top-p cuts them."""
  if sampling.top_p == 1:
    return logits
  return jnp.where(_nucleus(logits, sampling), logits, -jnp.inf)


def _nucleus(logits: jax.Array, sampling: sampling_lib.Sampling) -> jax.Array:
  """bool [S]: what top-p keeps of logits in any order.

  Of equal logits the first come first. Two bisections take the place of a sort,
  which would need the whole vocabulary in one place: of the least logit that is
  kept, and among those equal to it, of the last.
  """
  prob = jax.nn.softmax(logits)
  # Integers in the order of the floats. The two zeros are one; compilers take
  # away an addition of 0, which would make them so.
  bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
  bits = jnp.where(logits == 0, 0, bits)
  rank = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)

  def mass_above(least: jax.Array) -> jax.Array:
    return jnp.where(rank > least, prob, 0.0).sum()

  least = _bisect(
    lambda x: mass_above(x) < sampling.top_p, rank.min(), rank.max()
  )
  is_least = rank == least
  before, own = mass_above(least), jnp.where(is_least, prob, 0.0).max()
  room = (sampling.top_p - before) / own
  count = (jnp.ceil if sampling.top_p_rule == "keep" else jnp.floor)(room)
  # The very first stays, even if it crosses or top_p is 0 in float32.
  count = jnp.maximum(count, before == 0)
  index = jnp.arange(logits.size, dtype=jnp.int32)
  last = _bisect(
    lambda x: (is_least & (index <= x)).sum() >= count,
    jnp.int32(0),
    jnp.int32(logits.size - 1),
  )
  return (rank > least) | (is_least & (index <= last) & (count > 0))


def _bisect(
  is_enough: Callable[[jax.Array], jax.Array], low: jax.Array, high: jax.Array
) -> jax.Array:
  """The least int32 from low to high that is enough; `high` is taken to be."""

  def halve(_, ends):
    low, high = ends
    # Not (low + high) // 2, nor high - low: either could overflow.
    middle = (low & high) + ((low ^ high) >> 1)
    enough = is_enough(middle)
    return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

  return jax.lax.fori_loop(0, 32, halve, (low, high))[1]


def filter_logits(
  logits_V: jax.Array,
  sampling: sampling_lib.Sampling,
  top_k: types.TopK = jax.lax.top_k,
) -> Filtered:
  """Temperature, then top-k, then top-p, or top-p first if the settings say so.

  With top-k the candidates are the largest logits in descending order, a few
  more than k to hold ties with the k-th (released AGRPO keeps all of those);
  otherwise they are the whole vocabulary in its own order.

  Args:
    logits_V: float32 [V].
    sampling: the settings.
    top_k: how the largest are found, see `types.Network`.

  Returns:
    The normalised distribution over what is kept.
  """
  chex.assert_rank(logits_V, 1)
  vocab_size = logits_V.shape[0]
  logits_V = _temper(logits_V, sampling)
  if not sampling.is_truncated:
    return Filtered(
      jax.nn.log_softmax(logits_V), jnp.arange(vocab_size, dtype=jnp.int32)
    )
  is_p_first = sampling.truncate_first == "top_p"
  if is_p_first:
    logits_V = _cut_by_p(logits_V, sampling)
  if 0 < sampling.top_k < vocab_size:
    logits_S, ids_S = top_k(logits_V, support_size(sampling, vocab_size))
    kept_S = logits_S >= logits_S[sampling.top_k - 1]
    logits_S = jnp.where(kept_S, logits_S, -jnp.inf)
  else:
    logits_S, ids_S = logits_V, jnp.arange(vocab_size, dtype=jnp.int32)
  if not is_p_first:
    logits_S = _cut_by_p(logits_S, sampling)
  return Filtered(jax.nn.log_softmax(logits_S), ids_S)


def support_size(sampling: sampling_lib.Sampling, vocab_size: int) -> int:
  """Returns S, the candidates that top-k looks at, room for ties included."""
  room = sampling.top_k + max(_MIN_TIE_SLOTS, sampling.top_k // 4)
  return min(-(-room // _SUPPORT_MULTIPLE) * _SUPPORT_MULTIPLE, vocab_size)


def pack_support(
  filtered: Filtered, sampling: sampling_lib.Sampling
) -> jax.Array | None:
  """Returns what `Rollout.support` records: ids, packed bits or None."""
  if not sampling.is_truncated:
    return None
  kept = jnp.isfinite(filtered.logprob)
  if sampling.top_k > 0:
    return jnp.where(kept, filtered.ids, -1)
  return jnp.packbits(kept)


def over_support(
  logits_V: jax.Array,
  support: jax.Array | None,
  sampling: sampling_lib.Sampling,
) -> Filtered:
  """Returns the distribution over a recorded support, from logits of now.

  Renormalising over the recorded support, not over what truncation would keep
  now, makes numerator and denominator of the policy ratio one distribution
  family; a ratio against the full vocabulary would be off by the mass cut.
  """
  logits_V = _temper(logits_V, sampling)
  vocab_size = logits_V.shape[0]
  if support is None:
    ids = jnp.arange(vocab_size, dtype=jnp.int32)
    return Filtered(jax.nn.log_softmax(logits_V), ids)
  if support.dtype == jnp.uint8:
    kept = jnp.unpackbits(support, count=vocab_size).astype(bool)
    ids, logits = jnp.arange(vocab_size, dtype=jnp.int32), logits_V
  else:
    kept = support >= 0
    # -1 fills the record up; what is read for it is cut below.
    ids, logits = support, logits_V[jnp.maximum(support, 0)]
  # A position that carries no step has an empty support; keep it finite.
  kept = kept | ~kept.any()
  return Filtered(jax.nn.log_softmax(jnp.where(kept, logits, -jnp.inf)), ids)


def token_logprob(filtered: Filtered, token: jax.Array) -> jax.Array:
  """Log-probability of vocabulary id `token`; minus infinity if it was cut."""
  is_token_S = filtered.ids == token
  return jnp.where(
    is_token_S.any(), filtered.logprob[jnp.argmax(is_token_S)], -jnp.inf
  )


class Draw(NamedTuple):
  """A token drawn at one position, and what a record of it needs."""

  token: jax.Array  # int32
  logprob: jax.Array  # float32, under the policy
  entropy: jax.Array  # float32, nats
  confidence: jax.Array  # float32, log-odds to rank by
  support: jax.Array | None


def draw_token(
  logits_V: jax.Array,
  filtered: Filtered,
  gumbel_S: jax.Array,
  sampling: sampling_lib.Sampling,
) -> Draw:
  """Draws one token by the Gumbel-max trick, in log space.

  Args:
    logits_V: float32 [V], as the network gave them.
    filtered: `filter_logits(logits_V, sampling)`.
    gumbel_S: float32 [S], standard Gumbel noise for the candidates; unused at
      temperature 0.
    sampling: the settings.
  """
  if sampling.temperature > 0:
    pick = jnp.argmax(filtered.logprob + gumbel_S)
  else:
    pick = jnp.argmax(filtered.logprob)
  return Draw(
    token=filtered.ids[pick],
    logprob=filtered.logprob[pick],
    entropy=filtered.entropy,
    confidence=confidence(logits_V, filtered, sampling)[pick],
    support=pack_support(filtered, sampling),
  )


def confidence(
  logits_V: jax.Array, filtered: Filtered, sampling: sampling_lib.Sampling
) -> jax.Array:
  """Returns float32 [S], what each candidate would rank by if it were drawn."""
  if sampling.confidence == "policy":
    return rules.log_odds(filtered.logprob)
  kept_S = jnp.isfinite(filtered.logprob)
  of_model_V = rules.log_odds(jax.nn.log_softmax(logits_V))
  return jnp.where(kept_S, of_model_V[filtered.ids], -jnp.inf)


def seen(
  logits_TxV: jax.Array,
  filtered: Filtered,
  drawn_T: jax.Array,
  is_masked_T: jax.Array,
  sampling: sampling_lib.Sampling,
) -> rules.Seen:
  """Returns what the unmask rule knows of the T positions of a block.

  Args:
    logits_TxV: float32, as the network gave them.
    filtered: [T, S], `filter_logits` of each position.
    drawn_T: float32, confidence of the tokens drawn, see `rules.Seen`.
    is_masked_T: bool, masked before the step.
    sampling: the settings.
  """
  return rules.Seen(
    is_masked=is_masked_T,
    logprob=filtered.logprob,
    confidence=jax.vmap(confidence, (0, 0, None))(
      logits_TxV, filtered, sampling
    ),
    drawn=drawn_T,
    entropy=jax.vmap(lambda one: one.entropy)(filtered),
  )
