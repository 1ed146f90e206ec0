"""Which denoising steps the estimator visits, and their weights.

The score of a completion is a sum over the denoising steps that made it. The
estimator visits M of them, drawn with replacement with probability `step_prob`,
and divides by that probability, so that its expectation is the whole sum, for
any `step_prob` that is positive where the summand is not zero.

Or it draws M blocks likewise and visits every step of those, which share what a
policy computes once per block; or it visits every step there is.
"""

import dataclasses

import chex
import flax.struct
import jax
import jax.numpy as jnp

from agrpo_jax import types
from agrpo_jax.objectives import base
from agrpo_jax.samplers import sampling as sampling_lib

DRAWN_STEPS = ("uniform", "entropy")
DRAWN_BLOCKS = ("blocks", "entropy_blocks")
_BY_ENTROPY = ("entropy", "entropy_blocks")
STEP_RULES = (*DRAWN_STEPS, *DRAWN_BLOCKS, "all")
STRATA = ("row", "batch", "none")
BUDGETS = ("completion", "batch")
VISITED_STEPS = ("executed", "content")
NORMALIZE = ("sum", "mean")

# Released AGRPO's floor of a step's entropy, in nats: a step whose
# distributions were all but deterministic keeps a positive probability.
_ENTROPY_FLOOR = 1e-8
_TINY = 1e-30


@dataclasses.dataclass(frozen=True)
class McSteps:
  """Settings of the draw.

  Attributes:
    num_mc_steps: M, steps drawn per completion under `uniform` and `entropy`.
    num_mc_blocks: M, blocks drawn under `blocks` and `entropy_blocks`.
    step_rule: `uniform`, or `entropy`: proportional to the entropy of what the
      step unmasked (arXiv:2510.04019, section on variance reduction), or half
      of it that, see `is_mixed`; `blocks` or `entropy_blocks`: whole blocks are
      drawn, each as likely or as likely as `entropy` draws one of its steps;
      `all`: nothing is drawn.
    stratified: `row`: one uniform in each of M equal slices of [0, 1) for every
      completion; `batch`: one in each of B * M slices, shuffled over the batch
      (released AGRPO, after arXiv:2409.02908 G.2); `none`: independent.
    budget: `completion`: M draws for each; `batch`: B * M for all together,
      where |advantage| times the step's probability is large, so that the
      same number of steps is scored in every update, whatever completions are
      worth (as C3PO, arXiv:2506.14731, fixes the number of trained tokens).
      Of steps only; strata are the batch's.
    visited_steps: `executed`: every denoising step that ran; `content`: those
      up to the last that unmasked a token other than EOS (released AGRPO), none
      in a completion that is all EOS.
    normalize: `sum`: estimates the sum over those steps; `mean`: the mean
      (released AGRPO), a length-normalised objective.
  """

  num_mc_steps: int = 24
  num_mc_blocks: int = 2
  step_rule: str = "uniform"
  stratified: str = "row"
  budget: str = "completion"
  visited_steps: str = "executed"
  normalize: str = "sum"

  @property
  def num_draws(self) -> int:
    """M: of steps or blocks; 1 where nothing is drawn."""
    if self.step_rule == "all":
      return 1
    is_block = self.step_rule in DRAWN_BLOCKS
    return self.num_mc_blocks if is_block else self.num_mc_steps


def problems(settings: McSteps) -> list[str]:
  """Returns what is wrong with the settings, a sentence each."""
  found = []
  for name in ("num_mc_steps", "num_mc_blocks"):
    if getattr(settings, name) < 1:
      found.append(f"{name}={getattr(settings, name)!r} must be at least 1")
  for name, known in (
    ("step_rule", STEP_RULES),
    ("stratified", STRATA),
    ("budget", BUDGETS),
    ("visited_steps", VISITED_STEPS),
    ("normalize", NORMALIZE),
  ):
    value = getattr(settings, name)
    if value not in known:
      found.append(f"{name}={value!r} must be one of {', '.join(known)}")
  if settings.budget == "batch" and settings.step_rule not in DRAWN_STEPS:
    found.append(
      f"budget='batch' draws steps, not step_rule={settings.step_rule!r}"
    )
  return found


class Drawn(flax.struct.PyTreeNode):
  """M drawn denoising steps of each of B completions.

  Attributes:
    step: int32 [B, M].
    weight: float32 [B, M]; the mean over the M draws of weight times the step's
      summand estimates the sum (or mean) over steps without bias. 0 where a
      completion has no step to visit.
  """

  step: jax.Array
  weight: jax.Array


def visitable(
  rollout: types.Rollout, settings: McSteps, eos_ids: tuple[int, ...]
) -> jax.Array:
  """bool [B, K]: the steps that the estimator may visit.

  Only steps that were executed are among them: indices that a block left out
  (`Sampling.max_steps`) unmasked nothing and have no likelihood.
  """
  num_denoise_steps = rollout.order_logprob.shape[1]

  is_visitable_BxK = jax.vmap(base.executed, (0, None))(
    rollout.unmask_step, num_denoise_steps
  )
  if settings.visited_steps == "content":
    is_content_BxC = ~jnp.isin(rollout.completion, jnp.array(eos_ids))
    # -1 comes before all steps: a completion that is all EOS has none.
    last_B = jnp.where(is_content_BxC, rollout.unmask_step, -1).max(axis=1)
    is_visitable_BxK &= jnp.arange(num_denoise_steps)[None] <= last_B[:, None]
  return is_visitable_BxK


def is_mixed(sampling: sampling_lib.Sampling) -> bool:
  """Returns whether the entropy proposal is half uniform under a sampler.

  Where the number of positions depends on what was drawn, those that stayed
  masked have a score however certain the unmasked ones were, as under a
  threshold they are: in proportion to entropy alone, such steps would be drawn
  next to never, with weights without bound.
  """
  rule = sampling.rule
  return rule.looks_at == "draws" and rule.schedule != "exact"


def step_prob(
  entropy_C: jax.Array,
  unmask_step_C: jax.Array,
  is_visitable_K: jax.Array,
  settings: McSteps,
  mixed: bool = False,
) -> jax.Array:
  """Probability of drawing each denoising step of one completion.

  Args:
    entropy_C: float32 [C], recorded entropies.
    unmask_step_C: int32 [C].
    is_visitable_K: bool [K], `visitable` of this row.
    settings: the proposal.
    mixed: see `is_mixed`; the uniform proposal is without effect on itself.

  Returns:
    float32 [K] that sums to 1, positive where visitable and 0 elsewhere; all 0
    if nothing is.
  """
  chex.assert_rank([entropy_C, unmask_step_C, is_visitable_K], 1)
  weight_K = jnp.ones(is_visitable_K.shape)
  if settings.step_rule in _BY_ENTROPY:
    weight_K = jnp.full(is_visitable_K.shape, _ENTROPY_FLOOR)
    # Dropped is K, as in `visitable`.
    weight_K = weight_K.at[unmask_step_C].add(entropy_C, mode="drop")
  weight_K = jnp.where(is_visitable_K, weight_K, 0.0)
  # 0 / 1, not 0 / 0, where nothing is visitable.
  prob_K = weight_K / jnp.where(is_visitable_K.any(), weight_K.sum(), 1.0)
  if mixed and settings.step_rule in _BY_ENTROPY:
    prob_K = (
      prob_K + is_visitable_K / jnp.maximum(is_visitable_K.sum(), 1)
    ) / 2
  return prob_K


def uniforms(key: jax.Array, key_B: jax.Array, settings: McSteps) -> jax.Array:
  """float32 [B, M] in [0, 1), each uniform; how they depend: `stratified`.

  Args:
    key: key of the batch, read by `batch` strata only.
    key_B: one key per completion, read otherwise.
    settings: the proposal.
  """
  num_rows, num_draws = key_B.shape[0], settings.num_draws
  if settings.stratified == "none":
    # Of the second key, as the strata's offsets.
    return jax.vmap(
      lambda row_key: jax.random.uniform(
        jax.random.split(row_key)[1], (num_draws,)
      )
    )(key_B)
  if "batch" in (settings.stratified, settings.budget):
    return base.stratified(key, num_rows * num_draws).reshape(num_rows, -1)
  # Draws may be dealt out over several optimizer updates: each is uniform.
  return jax.vmap(lambda row_key: base.stratified(row_key, num_draws))(key_B)


def steps_at(
  uniform_M: jax.Array, prob_K: jax.Array, settings: McSteps
) -> Drawn:
  """The inverse distribution function of one completion, and the weights.

  Args:
    uniform_M: float32 [M] in [0, 1).
    prob_K: float32 [K], `step_prob`.
    settings: the proposal.

  Returns:
    `Drawn` of this row: step int32 [M], weight float32 [M].
  """
  chex.assert_rank([uniform_M, prob_K], 1)
  # The steps that may be drawn come first, in order: rounding in sums over the
  # others must not lead to one of these.
  step_K = jnp.argsort(prob_K == 0, stable=True).astype(jnp.int32)
  prob_K = prob_K[step_K]
  num = (prob_K > 0).sum(dtype=jnp.int32)
  if settings.step_rule == "uniform" and settings.budget == "completion":
    rank_M = jnp.floor(uniform_M * num).astype(jnp.int32)
  else:
    rank_M = jnp.searchsorted(jnp.cumsum(prob_K), uniform_M).astype(jnp.int32)
  # The distribution function ends a rounding error away from 1.
  rank_M = jnp.clip(rank_M, 0, jnp.maximum(num - 1, 0))
  prob_M = prob_K[rank_M]
  # Without a step to visit the probability is 0, and infinity must not arise.
  weight_M = 1.0 / jnp.where(prob_M > 0, prob_M, 1.0)
  if settings.normalize == "mean":
    weight_M /= jnp.maximum(num, 1)
  return Drawn(step=step_K[rank_M], weight=jnp.where(num > 0, weight_M, 0.0))


def draw(
  rollout: types.Rollout,
  uniform_BxM: jax.Array,
  settings: McSteps,
  sampling: sampling_lib.Sampling,
) -> Drawn:
  """Draws M steps of every completion.

  Args:
    rollout: B completions.
    uniform_BxM: float32 [B, M] in [0, 1), see `uniforms`.
    settings: the proposal.
    sampling: how the rollout was drawn.
  """
  chex.assert_rank(uniform_BxM, 2)

  def one(entropy_C, unmask_step_C, is_visitable_K, uniform_M):
    prob_K = step_prob(
      entropy_C, unmask_step_C, is_visitable_K, settings, is_mixed(sampling)
    )
    return steps_at(uniform_M, prob_K, settings)

  return jax.vmap(one)(
    rollout.entropy,
    rollout.unmask_step,
    visitable(rollout, settings, sampling.eos_ids),
    uniform_BxM,
  )


def draw_of_batch(
  rollout: types.Rollout,
  advantage_B: jax.Array,
  uniform_T: jax.Array,
  settings: McSteps,
  sampling: sampling_lib.Sampling,
) -> jax.Array:
  """Draws T pairs of a completion and a step of it.

  A pair is as likely as |advantage| times `step_prob`: gradients of the others
  are small, or zero.

  Args:
    rollout: B completions.
    advantage_B: float32 [B], or [B, num_blocks].
    uniform_T: float32 in [0, 1).
    settings: the proposal.
    sampling: how the rollout was drawn.

  Returns:
    float32 [B, K], how much every step weighs: 1 on average over the draws (or
    1 / number of steps, where a mean is wanted), if it may be drawn.
  """
  is_visitable_BxK = visitable(rollout, settings, sampling.eos_ids)
  prob_BxK = jax.vmap(step_prob, (0, 0, 0, None, None))(
    rollout.entropy,
    rollout.unmask_step,
    is_visitable_BxK,
    settings,
    is_mixed(sampling),
  )
  block_K = jnp.arange(sampling.max_steps) // sampling.steps_per_block
  prob_BxK *= jnp.abs(
    base.advantage_at(advantage_B, jnp.broadcast_to(block_K, prob_BxK.shape))
  )
  prob_P = (prob_BxK / jnp.maximum(prob_BxK.sum(), _TINY)).reshape(-1)
  drawn = steps_at(
    uniform_T, prob_P, dataclasses.replace(settings, normalize="sum")
  )
  weight_P = jnp.zeros_like(prob_P).at[drawn.step].add(drawn.weight)
  weight_BxK = weight_P.reshape(prob_BxK.shape) / len(uniform_T)
  if settings.normalize == "mean":
    num_Bx1 = is_visitable_BxK.sum(axis=1, keepdims=True)
    weight_BxK /= jnp.maximum(num_Bx1, 1)
  return weight_BxK


def draw_blocks(
  rollout: types.Rollout,
  uniform_BxM: jax.Array,
  settings: McSteps,
  sampling: sampling_lib.Sampling,
) -> tuple[jax.Array, Drawn]:
  """Draws M blocks of every completion; all of them under `all`.

  Args:
    rollout: B completions.
    uniform_BxM: float32 [B, M] in [0, 1), see `uniforms`.
    settings: the proposal.
    sampling: how the rollout was drawn.

  Returns:
    bool [B, K], the steps that may be visited; and the blocks in place of
    steps, one column per block and no draw under `all`.
  """
  is_visitable_BxK = visitable(rollout, settings, sampling.eos_ids)

  def one(
    entropy_C: jax.Array,
    unmask_step_C: jax.Array,
    is_visitable_K: jax.Array,
    uniform_M: jax.Array,
  ) -> Drawn:
    scale = jnp.ones(())
    if settings.normalize == "mean":
      # A mean over steps, also where it is blocks that are visited.
      scale = 1.0 / jnp.maximum(is_visitable_K.sum(), 1)
    num_blocks = sampling.num_blocks
    if settings.step_rule == "all":
      every = jnp.arange(num_blocks)
      # One column per block, each with the whole weight: not a mean over draws.
      return Drawn(every, jnp.full(num_blocks, scale))
    prob_K = step_prob(
      entropy_C, unmask_step_C, is_visitable_K, settings, is_mixed(sampling)
    )
    prob_N = prob_K.reshape(num_blocks, -1).sum(axis=1)
    if settings.step_rule == "blocks":
      prob_N = (prob_N > 0) / jnp.maximum((prob_N > 0).sum(), 1)
    # From the right: 0 must not fall on a first block without steps.
    block_M = jnp.searchsorted(jnp.cumsum(prob_N), uniform_M, side="right")
    # The distribution function ends a rounding error away from 1.
    last = jnp.where(prob_N > 0, jnp.arange(num_blocks), 0).max()
    block_M = jnp.minimum(block_M, last)
    prob_M = prob_N[block_M]
    weight_M = scale / jnp.where(prob_M > 0, prob_M, 1.0)
    return Drawn(block_M, jnp.where(prob_M > 0, weight_M, 0.0))

  return is_visitable_BxK, jax.vmap(one)(
    rollout.entropy, rollout.unmask_step, is_visitable_BxK, uniform_BxM
  )


def distinct_fraction(step_BxM: jax.Array) -> jax.Array:
  """Returns the share of the draws that are the first of their step and row."""
  return 1.0 - _is_repeat(step_BxM)[1].mean()


def merge_repeats(drawn: Drawn) -> jax.Array:
  """float32 [B, M]: weights, those of equal steps of a row added to the first.

  The sum over draws of weight times summand does not change, and all but the
  first of equal draws need no forward pass.
  """
  is_same_BxMxM, is_repeat_BxM = _is_repeat(drawn.step)
  total_BxM = jnp.where(is_same_BxMxM, drawn.weight[:, None, :], 0.0).sum(2)
  return jnp.where(is_repeat_BxM, 0.0, total_BxM)


def _is_repeat(step_BxM: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns which draws of a row are equal [B, M, M], which repeat [B, M]."""
  is_same_BxMxM = step_BxM[:, :, None] == step_BxM[:, None, :]
  is_earlier_MxM = jnp.tri(step_BxM.shape[1], k=-1, dtype=bool)
  return is_same_BxMxM, (is_same_BxMxM & is_earlier_MxM[None]).any(axis=2)
