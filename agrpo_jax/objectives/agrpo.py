"""AGRPO's loss: a clipped policy gradient on drawn denoising steps.

For one completion and one drawn denoising step (arXiv:2510.04019):

1. rebuild the partial completion as it stood before the step (`state`);
2. one forward pass, logits at the positions that the step's likelihood needs;
3. log-probability of what happened, factor by factor (`step_logprob`);
4. per factor, the clipped policy ratio times the advantage, and a KL penalty
   if asked for (`surrogate`).

`loss_terms` does it for a flat list of (completion, step) pairs.
"""

import dataclasses

import chex
import flax.struct
import jax
import jax.numpy as jnp

from agrpo_jax import types
from agrpo_jax.objectives import masked
from agrpo_jax.parallel import mesh as mesh_lib
from agrpo_jax.samplers import rollout as rollout_lib
from agrpo_jax.samplers import sampling as sampling_lib
from agrpo_jax.samplers import unmask

LIKELIHOODS = ("exact", "product")
KL_ESTIMATORS = ("k3", "k3_ratio")


@dataclasses.dataclass(frozen=True)
class Objective:
  """Settings of the loss.

  Attributes:
    likelihood: of a step under the `confidence` rule: `exact` (every position
      of the block that stayed masked has a factor) or `product` over the
      unmasked tokens (released AGRPO; biased). The same under the other rules.
    clip_low, clip_high: the policy ratio is clipped to
      [1 - clip_low, 1 + clip_high].
    kl_coef: weight of the KL penalty against the reference policy; 0: none.
    kl_estimator: `k3`: exp(d) - d - 1 with d = reference - policy logprob, or
      `k3_ratio`: that times the policy ratio, both differentiated (released).
  """

  likelihood: str = "exact"
  clip_low: float = 0.2
  clip_high: float = 0.2
  kl_coef: float = 0.0
  kl_estimator: str = "k3"


class Factors(flax.struct.PyTreeNode):
  """Log-probability of a denoising step as a sum of S + 1 factors.

  Attributes:
    logprob: float32 [S + 1]; the tokens', then the order's.
    is_factor: bool [S + 1], which of them this step has.
  """

  logprob: jax.Array
  is_factor: jax.Array


def needs_block(sampling: sampling_lib.Sampling, objective: Objective) -> bool:
  """Whether the likelihood reads the whole block, not the targets alone."""
  return (
    sampling.unmask_rule == "confidence" and objective.likelihood == "exact"
  )


def state(
  row: types.Rollout,
  denoise_step: jax.Array,
  sampling: sampling_lib.Sampling,
  objective: Objective,
) -> tuple[jax.Array, jax.Array]:
  """The completion before a step, and the completion positions to score.

  Args:
    row: one row of a rollout.
    denoise_step: int32.
    sampling: how the rollout was drawn.
    objective: the settings.

  Returns:
    tokens int32 [L], the network's input; offset int32 [S], positions within
    the completion: the block's T, or the step's U targets.
  """
  tokens_L = rollout_lib.place(
    row.prompt,
    row.prompt_length,
    row.completion,
    row.unmask_step >= denoise_step,
    sampling.mask_id,
  )
  if needs_block(sampling, objective):
    block = denoise_step // sampling.steps_per_block
    offset_S = block * sampling.block_length + jnp.arange(sampling.block_length)
  else:
    is_target_C = row.unmask_step == denoise_step
    offset_S = jax.lax.top_k(
      is_target_C.astype(jnp.int32), sampling.tokens_per_step
    )[1]
  return tokens_L, offset_S.astype(jnp.int32)


def step_logprob(
  logits_SxV: jax.Array,
  row: types.Rollout,
  denoise_step: jax.Array,
  offset_S: jax.Array,
  sampling: sampling_lib.Sampling,
  objective: Objective,
  top_k: types.TopK = jax.lax.top_k,
) -> Factors:
  """Log-likelihood of one denoising step, factor by factor.

  Args:
    logits_SxV: float32 [S, V] at `offset_S`, before the step.
    row: one row of a rollout.
    denoise_step: int32.
    offset_S: int32 [S], from `state`.
    sampling: how the rollout was drawn.
    objective: the settings.
    top_k: how the largest logits are found, see `ops.split_top_k`.

  Returns:
    `Factors` of S tokens and the order.
  """
  token_S = row.completion[offset_S]
  is_target_S = row.unmask_step[offset_S] == denoise_step
  support = None if row.support is None else row.support[offset_S]
  filtered = jax.vmap(
    lambda logits_V, kept: unmask.replay(logits_V, kept, sampling)
  )(logits_SxV, support)
  logprob_S = jax.vmap(unmask.token_logprob)(filtered, token_S)
  # At positions that are not targets the record belongs to another step.
  logprob_S = jnp.where(is_target_S, logprob_S, 0.0)
  order = jnp.float32(0.0)
  if needs_block(sampling, objective):
    # What the other positions could have drawn was cut by truncation at this
    # step, of which there is no record but the logits themselves.
    filter_all = jax.vmap(unmask.filter_logits, (0, None, None))
    others = filter_all(logits_SxV, sampling, top_k)
    confidence_of = jax.vmap(unmask.confidence, (0, 0, None))
    confidence_S = jax.vmap(unmask.token_logprob)(
      filtered._replace(logprob=confidence_of(logits_SxV, filtered, sampling)),
      token_S,
    )
    order = unmask.order_logprob(
      others.logprob,
      confidence_of(logits_SxV, others, sampling),
      confidence_S,
      is_target_S,
      row.unmask_step[offset_S] >= denoise_step,
    )
  return Factors(
    logprob=jnp.append(logprob_S, order),
    is_factor=jnp.append(is_target_S, needs_block(sampling, objective)),
  )


def behaviour_logprob(
  row: types.Rollout, denoise_step: jax.Array, offset_S: jax.Array
) -> jax.Array:
  """float32 [S + 1]: `Factors.logprob` as the rollout recorded it."""
  return jnp.append(row.logprob[offset_S], row.order_logprob[denoise_step])


class Terms(flax.struct.PyTreeNode):
  """Loss and metrics summed over pairs; metrics count factors.

  Attributes:
    loss: float32, sum over the pairs of weight times the step's loss.
    num_factors: float32, log-probabilities that entered.
    ratio: float32, sum of policy ratios.
    ratio_deviation: float32, largest |policy ratio - 1|.
    clip_low, clip_high: float32, factors whose clipping stopped the gradient.
    kl: float32, sum of the KL estimates (0 without a reference).
  """

  loss: jax.Array
  num_factors: jax.Array
  ratio: jax.Array
  ratio_deviation: jax.Array
  clip_low: jax.Array
  clip_high: jax.Array
  kl: jax.Array

  def __add__(self, other: "Terms") -> "Terms":
    largest = jnp.maximum(self.ratio_deviation, other.ratio_deviation)
    total = jax.tree.map(jnp.add, self, other)
    return total.replace(ratio_deviation=largest)

  @classmethod
  def zeros(cls) -> "Terms":
    return cls(*[jnp.zeros(())] * 7)


def surrogate(
  policy: Factors,
  behaviour_F: jax.Array,
  reference_F: jax.Array | None,
  advantage: jax.Array,
  weight: jax.Array,
  objective: Objective,
) -> Terms:
  """The loss of one drawn step.

    sum_f -min(r_f A, clip(r_f, 1 - clip_low, 1 + clip_high) A) + kl_coef KL_f

  times the draw's weight, with r_f the policy ratio of factor f. At ratio 1 its
  gradient is -A times the gradient of the step's log-likelihood.

  Args:
    policy: F = S + 1 factors under the policy.
    behaviour_F: float32 [F], recorded.
    reference_F: float32 [F] under the reference policy, or None without KL.
    advantage: float32 scalar.
    weight: float32 scalar, `mc_steps.Drawn.weight`.
    objective: the settings.
  """
  is_factor_F = policy.is_factor
  # Zero, not minus infinity, where there is no factor: 0 * inf is NaN in the
  # gradient even behind a mask.
  log_ratio_F = jnp.where(is_factor_F, policy.logprob - behaviour_F, 0.0)
  ratio_F = jnp.exp(log_ratio_F)
  clipped_F = jnp.clip(ratio_F, 1 - objective.clip_low, 1 + objective.clip_high)
  loss_F = -jnp.minimum(ratio_F * advantage, clipped_F * advantage)
  kl_F = jnp.zeros_like(loss_F)
  if reference_F is not None:
    log_ref_F = jnp.where(is_factor_F, reference_F - policy.logprob, 0.0)
    kl_F = jnp.exp(log_ref_F) - log_ref_F - 1
    if objective.kl_estimator == "k3_ratio":
      kl_F *= ratio_F
    loss_F += objective.kl_coef * kl_F
  is_low_F = (ratio_F < 1 - objective.clip_low) & (advantage < 0)
  is_high_F = (ratio_F > 1 + objective.clip_high) & (advantage > 0)
  # A pair of weight 0 fills up a microbatch; it must not show in the metrics.
  is_counted_F = is_factor_F & (weight > 0)

  def count(x_F: jax.Array) -> jax.Array:
    return masked.total(x_F.astype(jnp.float32), is_counted_F)

  return Terms(
    loss=weight * masked.total(loss_F, is_factor_F),
    num_factors=count(jnp.ones_like(ratio_F)),
    ratio=count(ratio_F),
    ratio_deviation=masked.largest(jnp.abs(ratio_F - 1), is_counted_F),
    clip_low=count(is_low_F),
    clip_high=count(is_high_F),
    kl=count(kl_F),
  )


def loss_terms(
  logits_fn: types.LogitsFn,
  reference_fn: types.LogitsFn | None,
  rows: types.Rollout,
  denoise_step_B: jax.Array,
  weight_B: jax.Array,
  advantage_B: jax.Array,
  sampling: sampling_lib.Sampling,
  objective: Objective,
  top_k: types.TopK = jax.lax.top_k,
) -> Terms:
  """Terms summed over B (completion, denoising step) pairs.

  Args:
    logits_fn: the policy's network.
    reference_fn: the reference policy's, or None when `kl_coef` is 0.
    rows: the rollout rows of the pairs.
    denoise_step_B: int32 [B].
    weight_B: float32 [B], 0 for a pair that must not count.
    advantage_B: float32 [B].
    sampling: how the rollout was drawn.
    objective: the settings.
    top_k: how the largest logits are found, see `ops.split_top_k`.

  Returns:
    Sums; divide the loss by the number of draws and of rows.
  """
  chex.assert_rank([denoise_step_B, weight_B, advantage_B], 1)
  tokens_BxL, offset_BxS = jax.vmap(
    lambda row, step: state(row, step, sampling, objective)
  )(rows, denoise_step_B)
  length_B = rows.prompt_length + sampling.completion_length
  position_BxS = rows.prompt_length[:, None] + offset_BxS

  def factors(network: types.LogitsFn) -> Factors:
    logits_BxSxV = network(tokens_BxL, length_B, position_BxS)
    return jax.vmap(
      lambda logits, row, step, offset: step_logprob(
        logits, row, step, offset, sampling, objective, top_k
      ),
      spmd_axis_name=mesh_lib.ROW_AXES,
    )(logits_BxSxV, rows, denoise_step_B, offset_BxS)

  reference_BxF = None
  if reference_fn is not None:
    reference_BxF = jax.lax.stop_gradient(factors(reference_fn).logprob)
  terms_B = jax.vmap(
    surrogate,
    in_axes=(0, 0, None if reference_BxF is None else 0, 0, 0, None),
  )(
    factors(logits_fn),
    jax.vmap(behaviour_logprob)(rows, denoise_step_B, offset_BxS),
    reference_BxF,
    advantage_B,
    weight_B,
    objective,
  )
  total = jax.tree.map(lambda x: x.sum(axis=0), terms_B)
  return total.replace(ratio_deviation=terms_B.ratio_deviation.max())
