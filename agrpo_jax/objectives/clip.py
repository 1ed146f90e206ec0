"""The clipped policy ratio, and the KL penalty."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from agrpo_jax import types
from agrpo_jax.objectives import base
from agrpo_jax.objectives import masks

KL_ESTIMATORS = ("k3", "k3_ratio")


@dataclasses.dataclass(frozen=True)
class Clip:
  """Settings of the surrogate.

  Attributes:
    clip_low, clip_high: the policy ratio is clipped to
      [1 - clip_low, 1 + clip_high].
    kl_coef: weight of the KL penalty against the reference policy; 0: none.
    kl_estimator: `k3`: exp(d) - d - 1 with d = reference - policy logprob, or
      `k3_ratio`: that times the policy ratio, both differentiated (released).
  """

  clip_low: float = 0.2
  clip_high: float = 0.2
  kl_coef: float = 0.0
  kl_estimator: str = "k3"

  # To which log-ratios are clamped, on both sides: exp(89) is infinite in
  # float32, and times 0, an advantage or the gradient of what is clipped, NaN.
  max_log_ratio: ClassVar[float] = 80.0

  @property
  def has_reference(self) -> bool:
    return self.kl_coef > 0

  @property
  def skips_zero_advantage(self) -> bool:
    return not self.has_reference  # the penalty stays where the advantage is 0

  def loss(
    self,
    policy: base.Factors,
    behaviour: base.Scores,
    reference: base.Scores,
    advantage_G: jax.Array,
    visits: base.Visits,
    rows: types.Rollout,
  ) -> base.Terms:
    """Returns the surrogates of all visits, each factor by itself."""
    del rows
    return over_visits(
      policy, behaviour, reference, advantage_G, visits.weight, self
    )


def problems(clip: Clip) -> list[str]:
  """Returns what is wrong with the settings, a sentence each."""
  return (
    base.positive(clip, "clip_low", "clip_high")
    + base.at_least(0, clip, "kl_coef")
    + base.one_of(clip, kl_estimator=KL_ESTIMATORS)
  )


def surrogate(
  policy: base.Factors,
  behaviour_F: jax.Array,
  reference_F: jax.Array | None,
  advantage: jax.Array,
  weight: jax.Array,
  clip: Clip,
) -> base.Terms:
  """The loss of one visit (PPO, arXiv:1707.06347, equation 7, per factor).

    sum_f -min(r_f A, clip(r_f, 1 - clip_low, 1 + clip_high) A) + kl_coef KL_f

  times the visit's weight, with r_f the policy ratio of factor f. At ratio 1
  its gradient is -A times the gradient of the sum of the factors.

  Args:
    policy: F factors under the policy.
    behaviour_F: float32 [F], under the behaviour policy.
    reference_F: float32 [F] under the reference policy, or None without KL.
    advantage: float32 scalar.
    weight: float32 scalar.
    clip: the settings.

  Returns:
    The terms; metrics count factors, and those of weight 0 do not count.
  """
  is_factor_F = policy.is_factor
  # Zero, not minus infinity, where there is no factor: 0 * inf is NaN in the
  # gradient even behind a mask.
  log_ratio_F = jnp.where(is_factor_F, policy.logprob - behaviour_F, 0.0)
  ratio_F = jnp.exp(
    jnp.clip(log_ratio_F, -clip.max_log_ratio, clip.max_log_ratio)
  )
  clipped_F = jnp.clip(ratio_F, 1 - clip.clip_low, 1 + clip.clip_high)
  loss_F = -jnp.minimum(ratio_F * advantage, clipped_F * advantage)
  kl_F = jnp.zeros_like(loss_F)
  if reference_F is not None:
    log_ref_F = jnp.where(is_factor_F, reference_F - policy.logprob, 0.0)
    kl_F = k3(log_ref_F)
    if clip.kl_estimator == "k3_ratio":
      kl_F *= ratio_F
    loss_F += clip.kl_coef * kl_F
  # Only there is the clipped side the smaller one: on the other sides of the
  # ratio, or of the advantage, the gradient passes.
  is_low_F = (ratio_F < 1 - clip.clip_low) & (advantage < 0)
  is_high_F = (ratio_F > 1 + clip.clip_high) & (advantage > 0)
  # A visit of weight 0 fills up a microbatch; it must not show in the metrics.
  is_counted_F = is_factor_F & (weight != 0)

  def count(x_F: jax.Array) -> jax.Array:
    return masked_total(x_F.astype(jnp.float32), is_counted_F)

  deviation_F = jnp.abs(ratio_F - 1)
  return base.Terms(
    loss=weight * masked_total(loss_F, is_factor_F),
    num_factors=count(jnp.ones_like(ratio_F)),
    ratio=count(ratio_F),
    ratio_deviation=jnp.where(is_counted_F, deviation_F, 0).max(),
    clip_low=count(is_low_F),
    clip_high=count(is_high_F),
    kl=count(kl_F),
  )


def k3(log_ratio: jax.Array) -> jax.Array:
  """Estimates the KL to a policy from its logprobs minus those of this one."""
  return jnp.exp(log_ratio) - log_ratio - 1


def surrogates(
  policy: base.Factors,
  behaviour_GxF: jax.Array,
  reference_GxF: jax.Array | None,
  advantage_G: jax.Array,
  weight_G: jax.Array,
  clip: Clip,
) -> base.Terms:
  """The sum of G surrogates; as `surrogate`, with a leading axis."""
  return jax.vmap(
    surrogate,
    in_axes=(0, 0, None if reference_GxF is None else 0, 0, 0, None),
  )(policy, behaviour_GxF, reference_GxF, advantage_G, weight_G, clip).total()


def of_values(
  policy: base.Factors,
  behaviour: jax.Array,
  reference: jax.Array | None,
  advantage_G: jax.Array,
  visits: base.Visits,
  rows: types.Rollout,
  clip: Clip,
  kl: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
) -> base.Terms:
  """The sum of the surrogates of G completions that have one value each.

  The ratio is of the value per token, the penalty of the value as it is.

  Args:
    policy: factors [G, Q, S, F], of which `masks.value` makes the value.
    behaviour: float32 [G, Q, S, F].
    reference: float32 [G, Q, S, F], or None.
    advantage_G: float32.
    visits: [G, Q, S].
    rows: G completions.
    clip: the settings.
    kl: (value_G, reference_G, num_tokens_G) -> kl_G, the penalty.
  """
  num_tokens_G = masks.drawn(rows).sum(axis=1)
  weight_G = masks.row_weight(visits)
  value_G, behaviour_G = (
    masks.value(policy.replace(logprob=logprob), visits)
    for logprob in (policy.logprob, behaviour)
  )
  terms = surrogates(
    masks.one_factor(value_G / num_tokens_G),
    (behaviour_G / num_tokens_G)[:, None],
    None,
    advantage_G,
    weight_G,
    clip,
  )
  if reference is None:
    return terms
  reference_G = masks.value(policy.replace(logprob=reference), visits)
  kl_G = kl(value_G, reference_G, num_tokens_G)
  # What fills up a microbatch must not show in the metric.
  kl_G = jnp.where(weight_G > 0, kl_G, 0.0)
  return terms.replace(
    loss=terms.loss + clip.kl_coef * (weight_G * kl_G).sum(), kl=kl_G.sum()
  )


def over_visits(
  policy: base.Factors,
  behaviour: jax.Array,
  reference: jax.Array | None,
  advantage_G: jax.Array,
  weight_GxQxS: jax.Array,
  clip: Clip,
) -> base.Terms:
  """The sum of the surrogates of all visits of G completions.

  Args:
    policy: factors [G, Q, S, F].
    behaviour: float32 [G, Q, S, F].
    reference: float32 [G, Q, S, F], or None.
    advantage_G: float32.
    weight_GxQxS: float32, of each visit.
    clip: the settings.
  """
  advantage = jnp.broadcast_to(advantage_G[:, None, None], weight_GxQxS.shape)

  def flat(x: jax.Array) -> jax.Array:
    # A visit is a summand by itself, whatever completion and unit it is of.
    return x.reshape(-1, *x.shape[3:])

  return surrogates(
    jax.tree.map(flat, policy),
    flat(behaviour),
    jax.tree.map(flat, reference),
    flat(advantage),
    flat(weight_GxQxS),
    clip,
  )


def reinforce(
  policy: base.Factors, advantage_G: jax.Array, weight_GxQxS: jax.Array
) -> base.Terms:
  """-A times the sum of the factors, visit by visit: no ratio, no clipping."""
  is_counted = policy.is_factor & (weight_GxQxS != 0)[..., None]
  total_GxQxS = jnp.where(is_counted, policy.logprob, 0.0).sum(axis=-1)
  num = is_counted.sum().astype(jnp.float32)
  loss_GxQxS = -advantage_G[:, None, None] * weight_GxQxS * total_GxQxS
  return base.Terms.zeros().replace(
    loss=loss_GxQxS.sum(), num_factors=num, ratio=num
  )


def masked_total(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Returns the sum of x where mask is true.

  Other entries are without effect, even NaN; their gradient is exactly zero.
  """
  return jnp.where(mask, x, 0).sum()
