"""Masks of an objective's own: drawn completion by completion, and read.

Most published objectives do not replay what the sampler did. They mask a
completion anew and read the log-probabilities of what they masked, under the
raw logits: a likelihood of the model, not of the sampler
(`docs/objectives.md`).

The published codes draw the masks of a microbatch with one generator, so that a
completion's masks depend on its batch mates, and two passes share theirs only
if nothing is split differently. Here a completion's masks come from its own
key; policy, behaviour and reference policy read the same visits.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar
from typing import Literal

import jax
import jax.numpy as jnp

from agrpo_jax import types
from agrpo_jax.objectives import base
from agrpo_jax.samplers import rules
from agrpo_jax.samplers import sampling as sampling_lib


@dataclasses.dataclass(frozen=True)
class Masks:
  """What the objectives with masks of their own have in common.

  Attributes:
    updates_per_batch: optimizer updates per rollout; each draws masks anew.
  """

  updates_per_batch: int = 1

  replays: ClassVar[bool] = False
  is_sum_over_visits: ClassVar[bool] = True
  behaviour: ClassVar[Literal["recorded", "scored", "none"]] = "none"
  # Whether tokens behind the first EOS are scored too.
  scores_padding: ClassVar[bool] = False

  @property
  def has_reference(self) -> bool:
    return False

  @property
  def skips_zero_advantage(self) -> bool:
    return not self.has_reference

  def score(
    self,
    logits_WxV: jax.Array,
    row: types.Rollout,
    visit: base.Visits,
    sampling: sampling_lib.Sampling,
    top_k: types.TopK,
  ) -> base.Factors:
    """Returns a factor per masked position that the visit reads."""
    del top_k
    is_scored_C = visit.is_masked
    if not self.scores_padding:
      is_scored_C &= until_eos(row, sampling.eos_ids)
    return base.Factors(
      logprob=token_logprob(logits_WxV, row, visit),
      is_factor=is_scored_C[visit.offset],
    )

  def recorded(self, row: types.Rollout, visit: base.Visits) -> jax.Array:
    """Raises: a rollout records nothing of other masks than its own."""
    raise TypeError(f"{type(self).__name__} has masks of its own.")


def each(
  one: Callable[[jax.Array, types.Rollout, jax.Array], base.Visits],
  key_B: jax.Array,
  rollout: types.Rollout,
  num_updates: int,
) -> base.Visits:
  """Visits [U, B, Q, 1] of `one(key, row, update)`, which returns [Q].

  Args:
    one: draws the Q visits of a completion for an update, an int32. The key is
      the completion's, the same in all updates: `fold_in` the update for what
      is drawn anew. Of its masks those count that are of `drawn` tokens.
    key_B: a random key per completion.
    rollout: B completions.
    num_updates: U.
  """
  visits = jax.vmap(
    lambda update: jax.vmap(one, (0, 0, None))(key_B, rollout, update)
  )(jnp.arange(num_updates))
  is_masked_UxBxQxC = visits.is_masked & drawn(rollout)[None, :, None]
  visits = visits.replace(is_masked=is_masked_UxBxQxC)
  return jax.tree.map(lambda x: x[:, :, :, None], visits)


def visits(
  is_masked_QxC: jax.Array,
  weight: jax.Array | float,
  scale_Q: jax.Array | None = None,
  is_prompt_masked_QxP: jax.Array | None = None,
) -> base.Visits:
  """Visits [Q] that read every position of a completion.

  Args:
    is_masked_QxC: bool, the masks.
    weight: float32 [Q] or a number, of each visit in the loss.
    scale_Q: float32, see `base.Visits`.
    is_prompt_masked_QxP: bool, or None.
  """
  num, num_tokens = is_masked_QxC.shape
  zero_Q = jnp.zeros((num,), jnp.int32)
  return base.Visits(
    is_masked=is_masked_QxC,
    offset=jnp.broadcast_to(jnp.arange(num_tokens), (num, num_tokens)),
    block=zero_Q,
    denoise_step=zero_Q,
    weight=jnp.broadcast_to(jnp.asarray(weight, jnp.float32), (num,)),
    scale=scale_Q,
    is_prompt_masked=is_prompt_masked_QxP,
  )


def token_logprob(
  logits_WxV: jax.Array, row: types.Rollout, visit: base.Visits
) -> jax.Array:
  """float32 [W]: of the completion's tokens at `visit.offset`, raw logits."""
  token_Wx1 = row.completion[visit.offset][:, None]
  logit_W = jnp.take_along_axis(logits_WxV, token_Wx1, axis=1)[:, 0]
  return logit_W - jax.nn.logsumexp(logits_WxV, axis=1)


def value(factors: base.Factors, visits: base.Visits) -> jax.Array:
  """float32 [G]: the sum over visits of scale times the sum of the factors.

  Args:
    factors: [G, Q, S, F].
    visits: [G, Q, S], with a scale.
  """
  total_GxQxS = jnp.where(factors.is_factor, factors.logprob, 0.0).sum(axis=-1)
  return (visits.scale * total_GxQxS).sum(axis=(1, 2))


def one_factor(value_G: jax.Array) -> base.Factors:
  """Factors [G, 1]: completions that have one number each."""
  is_factor_Gx1 = jnp.ones((value_G.shape[0], 1), bool)
  return base.Factors(logprob=value_G[:, None], is_factor=is_factor_Gx1)


def row_weight(visits: base.Visits) -> jax.Array:
  """float32 [G]: the weight of completions whose visits make one value.

  Visits that would read nothing have weight 0.
  """
  return visits.weight.max(axis=(1, 2))


def drawn(rows: types.Rollout) -> jax.Array:
  """bool [..., C]: all tokens but those of the prompt (`types.Rollout`)."""
  return rows.unmask_step >= 0


def until_eos(rows: types.Rollout, eos_ids: tuple[int, ...]) -> jax.Array:
  """bool [..., C]: drawn tokens up to the first EOS, that one included."""
  is_drawn_BxC = drawn(rows)
  is_eos_BxC = is_drawn_BxC & jnp.isin(rows.completion, jnp.array(eos_ids))
  num_before_BxC = jnp.cumsum(is_eos_BxC, axis=-1) - is_eos_BxC
  return is_drawn_BxC & (num_before_BxC == 0)


def exactly(
  noise_C: jax.Array, is_token_C: jax.Array, num: jax.Array
) -> jax.Array:
  """bool [C]: `num` of the tokens, those with the smallest noise.

  Masks of the same noise are nested, and what is not masked of the tokens is
  the complement.
  """
  return is_token_C & (rules.ranks(-noise_C, is_token_C) < num)


def any_order(
  key: jax.Array, is_token_C: jax.Array, num_masks: int
) -> tuple[jax.Array, jax.Array]:
  """Masks whose values estimate the any-order lower bound without bias.

  Counts n are uniform over 1..number of tokens, and stratified over the masks;
  the scale is (number of tokens / n) / M (see `elbo`).

  Returns:
    bool [M, C] and float32 [M].
  """
  count_key, noise_key = jax.random.split(key)
  num_tokens = is_token_C.sum()
  count_M = 1 + jnp.floor(base.stratified(count_key, num_masks) * num_tokens)
  noise_MxC = jax.random.uniform(noise_key, (num_masks, len(is_token_C)))
  is_masked_MxC = jax.vmap(exactly, (0, None, 0))(
    noise_MxC, is_token_C, count_M
  )
  return is_masked_MxC, num_tokens / count_M / num_masks
