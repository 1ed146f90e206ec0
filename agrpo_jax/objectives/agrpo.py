"""AGRPO: a clipped policy gradient on drawn denoising steps (arXiv:2510.04019).

For one completion and one drawn denoising step:

1. rebuild the partial completion as it stood before the step, and choose the
   positions that the step's likelihood needs (`state`);
2. one pass of the policy, logits at those positions (the learner's part);
3. log-probability of what happened, factor by factor (`step_logprob`);
4. per factor, the clipped policy ratio times the advantage, and a KL penalty
   if asked for (`clip.surrogate`).
"""

import dataclasses
from typing import ClassVar
from typing import Literal

import jax
import jax.numpy as jnp

from agrpo_jax import types
from agrpo_jax.objectives import advantage as advantage_lib
from agrpo_jax.objectives import base
from agrpo_jax.objectives import clip as clip_lib
from agrpo_jax.objectives import mc_steps
from agrpo_jax.samplers import draw
from agrpo_jax.samplers import rules
from agrpo_jax.samplers import sampling as sampling_lib

LIKELIHOODS = ("exact", "product")


@dataclasses.dataclass(frozen=True)
class Agrpo(mc_steps.McSteps, advantage_lib.Baseline, clip_lib.Clip):
  """Settings of AGRPO: those of the drawn steps, of the clipping, and its own.

  Attributes:
    likelihood: of a step under a rule that looks at the draws: `exact` (with a
      factor for the choice, which tells of the positions of the block that
      stayed masked) or `product` over the unmasked tokens (released AGRPO;
      biased). The same under other rules.
    baseline: one of `advantage.BASELINES`.
    updates_per_batch: optimizer updates per rollout, dividing the draws: 1 is
      the paper's algorithm; the released launcher takes one per draw. Where
      nothing is drawn every update visits every step.
  """

  likelihood: str = "exact"
  baseline: str = "leave_one_out"
  updates_per_batch: int = 1

  replays: ClassVar[bool] = True
  is_sum_over_visits: ClassVar[bool] = True
  behaviour: ClassVar[Literal["recorded"]] = "recorded"

  def problems(self, sampling: sampling_lib.Sampling) -> list[str]:
    """Returns what is wrong with the settings, a sentence each."""
    found = mc_steps.problems(self) + clip_lib.problems(self)
    for name, known in (
      ("likelihood", LIKELIHOODS),
      ("baseline", advantage_lib.BASELINES),
    ):
      value = getattr(self, name)
      if value not in known:
        found.append(f"{name}={value!r} must be one of {', '.join(known)}")
    if self.budget == "batch" and self.kl_coef:
      found.append(
        f"kl_coef={self.kl_coef:g} would act only where there is an advantage "
        "under budget='batch', which draws nothing else"
      )
    updates = self.updates_per_batch
    if self.step_rule == "all":
      if updates < 1:
        found.append(f"updates_per_batch={updates!r} must be at least 1")
    elif updates < 1 or self.num_draws % updates:
      what = "blocks" if self.step_rule in mc_steps.DRAWN_BLOCKS else "steps"
      found.append(
        f"updates_per_batch={updates!r} must be a divisor of "
        f"num_mc_{what}={self.num_draws}"
      )
    if sampling_lib.problems(sampling):
      return found  # how many steps a block has is told by legal settings only
    shares = sampling.steps_per_memory
    if (
      self.step_rule not in mc_steps.DRAWN_STEPS
      and sampling.steps_per_block % shares
    ):
      # No key of its own is named: those that replay all steps have none.
      found.append(
        f"name: whole blocks are visited, their {sampling.steps_per_block} "
        f"steps in lots of config.rollout.cache_refresh={shares}, which must "
        "be a divisor"
      )
    return found

  def visits(
    self,
    rollout: types.Rollout,
    advantage_B: jax.Array,
    batch_key: jax.Array,
    key_B: jax.Array,
    sampling: sampling_lib.Sampling,
  ) -> tuple[base.Visits, dict[str, jax.Array]]:
    """Draws M steps or blocks per completion, dealt out over the updates.

    Returns:
      Visits [U, B, M / U, 1] of steps, or [U, B, Q, S] of blocks, whose steps
      share a memory S at a time; and the metrics of the draw.
    """
    # All M at once, so that the strata cover a row's steps over all updates.
    uniform_BxM = mc_steps.uniforms(batch_key, key_B, self)
    if self.budget == "batch":
      return self._visits_of_batch(rollout, advantage_B, uniform_BxM, sampling)
    if self.step_rule in mc_steps.DRAWN_STEPS:
      drawn = mc_steps.draw(rollout, uniform_BxM, self, sampling)
      visits = jax.vmap(visits_of, (None, 0, None, None))(
        rollout, jax.tree.map(self._dealt, drawn), sampling, self
      )
    else:
      is_visitable_BxK, drawn = mc_steps.draw_blocks(
        rollout, uniform_BxM, self, sampling
      )
      # Under `all` nothing was drawn, so there is nothing to deal out.
      dealt = (
        jax.tree.map(
          lambda x: jnp.repeat(x[None], self.updates_per_batch, axis=0), drawn
        )
        if self.step_rule == "all"
        else jax.tree.map(self._dealt, drawn)
      )
      visits = jax.vmap(visits_of_blocks, (None, None, 0, None, None))(
        rollout, is_visitable_BxK, dealt, sampling, self
      )
    return visits, {
      "draws/distinct_fraction": mc_steps.distinct_fraction(drawn.step),
      "draws/max_weight": drawn.weight.max(),
    }

  def _visits_of_batch(
    self,
    rollout: types.Rollout,
    advantage_B: jax.Array,
    uniform_BxM: jax.Array,
    sampling: sampling_lib.Sampling,
  ) -> tuple[base.Visits, dict[str, jax.Array]]:
    """Visits [U, B, K, 1], of which those that were drawn have a weight."""
    num_rows = len(advantage_B)
    uniform_UxT = self._dealt(uniform_BxM).reshape(self.updates_per_batch, -1)
    weight_UxBxK = jax.vmap(
      lambda uniform_T: mc_steps.draw_of_batch(
        rollout, advantage_B, uniform_T, self, sampling
      )
    )(uniform_UxT)
    step_BxK = jnp.broadcast_to(
      jnp.arange(sampling.max_steps), weight_UxBxK.shape[1:]
    )
    visits = jax.vmap(
      lambda weight_BxK: _visits_at(
        rollout, step_BxK, weight_BxK / num_rows, sampling, self
      )
    )(weight_UxBxK)
    return jax.tree.map(lambda x: x[:, :, :, None], visits), {
      "draws/distinct_fraction": (weight_UxBxK > 0).sum() / uniform_UxT.size,
      "draws/max_weight": weight_UxBxK.max(),
    }

  def _dealt(self, x_BxM: jax.Array) -> jax.Array:
    """[B, M] -> [U, B, M / U]; strata are dealt out in turn."""
    return jnp.moveaxis(
      x_BxM.reshape(x_BxM.shape[0], -1, self.updates_per_batch), 2, 0
    )

  def score(
    self,
    logits_WxV: jax.Array,
    row: types.Rollout,
    visit: base.Visits,
    sampling: sampling_lib.Sampling,
    top_k: types.TopK,
  ) -> base.Factors:
    """Returns the W + 1 factors of a denoising step, see `step_logprob`."""
    return step_logprob(logits_WxV, row, visit, sampling, self, top_k)

  def recorded(self, row: types.Rollout, visit: base.Visits) -> jax.Array:
    """Returns float32 [W + 1]: the same factors, as the rollout recorded."""
    return jnp.append(
      row.logprob[visit.offset], row.order_logprob[visit.denoise_step]
    )


def visits_of(
  rollout: types.Rollout,
  drawn: mc_steps.Drawn,
  sampling: sampling_lib.Sampling,
  objective: Agrpo,
) -> base.Visits:
  """The visits of one optimizer update.

  Draws that fell on the same step of a row are one visit, with their weights
  added: the sum does not change, and it costs one pass. The weights make the
  loss the mean over rows and draws.

  Args:
    rollout: B completions.
    drawn: M steps of each.
    sampling: how the rollout was drawn.
    objective: the settings.

  Returns:
    Visits [B, M, 1].
  """
  num_rows, num_draws = drawn.step.shape
  merged_BxM = mc_steps.merge_repeats(drawn) / (num_rows * num_draws)
  visits = _visits_at(rollout, drawn.step, merged_BxM, sampling, objective)
  return jax.tree.map(lambda x: x[:, :, None], visits)


def visits_of_blocks(
  rollout: types.Rollout,
  is_visitable_BxK: jax.Array,
  drawn: mc_steps.Drawn,
  sampling: sampling_lib.Sampling,
  objective: Agrpo,
) -> base.Visits:
  """The visits of one optimizer update, every step of the drawn blocks.

  Args:
    rollout: B completions.
    is_visitable_BxK: bool, the steps that are visited if their block is.
    drawn: blocks of each, in place of steps.
    sampling: how the rollout was drawn.
    objective: the settings.

  Returns:
    Visits [B, Q, S]: the steps of each block, S at a time.
  """
  num_rows, num_draws = drawn.step.shape
  if objective.step_rule == "all":
    # The columns are all blocks there are, whose sum is wanted: no mean.
    num_draws = 1
  merged_BxM = mc_steps.merge_repeats(drawn) / (num_rows * num_draws)
  num_steps = sampling.steps_per_block
  step_BxMxT = (
    drawn.step[..., None] * num_steps + jnp.arange(num_steps)[None, None]
  )
  step_BxN = step_BxMxT.reshape(num_rows, -1)
  weight_BxN = jnp.repeat(merged_BxM, num_steps, axis=1)
  is_visitable_BxN = jnp.take_along_axis(is_visitable_BxK, step_BxN, axis=1)
  weight_BxN = jnp.where(is_visitable_BxN, weight_BxN, 0.0)
  visits = _visits_at(rollout, step_BxN, weight_BxN, sampling, objective)
  return jax.tree.map(
    lambda x: x.reshape(num_rows, -1, sampling.steps_per_memory, *x.shape[2:]),
    visits,
  )


def _visits_at(
  rollout: types.Rollout,
  step_BxM: jax.Array,
  weight_BxM: jax.Array,
  sampling: sampling_lib.Sampling,
  objective: Agrpo,
) -> base.Visits:
  def visit(
    row: types.Rollout, denoise_step: jax.Array, weight: jax.Array
  ) -> base.Visits:
    is_masked_C, offset_W = state(row, denoise_step, sampling, objective)
    return base.Visits(
      is_masked=is_masked_C,
      offset=offset_W,
      block=denoise_step // sampling.steps_per_block,
      denoise_step=denoise_step,
      weight=weight,
    )

  return jax.vmap(jax.vmap(visit, (None, 0, 0)))(rollout, step_BxM, weight_BxM)


def needs_block(sampling: sampling_lib.Sampling, objective: Agrpo) -> bool:
  """Returns whether the likelihood reads the whole block, not the targets."""
  return sampling.rule.looks_at == "draws" and objective.likelihood == "exact"


def state(
  row: types.Rollout,
  denoise_step: jax.Array,
  sampling: sampling_lib.Sampling,
  objective: Agrpo,
) -> tuple[jax.Array, jax.Array]:
  """The completion before a step, and the completion positions to score.

  Args:
    row: one row of a rollout.
    denoise_step: int32.
    sampling: how the rollout was drawn.
    objective: the settings.

  Returns:
    is_masked bool [C], what was masked; offset int32 [W], positions within the
    completion: the T that the step looked at, or its U targets.
  """
  if needs_block(sampling, objective):
    block = denoise_step // sampling.steps_per_block
    offset_W = sampling.window_start(block) + jnp.arange(sampling.block_length)
  else:
    # Without a factor for the others, only what was unmasked is unembedded.
    # top_k of a mask lists its positions first, in order.
    # A step that unmasked fewer has others listed behind: they are no factors.
    is_target_C = row.unmask_step == denoise_step
    offset_W = jax.lax.top_k(
      is_target_C.astype(jnp.int32), sampling.tokens_per_step
    )[1]
  # What no step unmasked has K there, and was masked before every step.
  return row.unmask_step >= denoise_step, offset_W.astype(jnp.int32)


def step_logprob(
  logits_WxV: jax.Array,
  row: types.Rollout,
  visit: base.Visits,
  sampling: sampling_lib.Sampling,
  objective: Agrpo,
  top_k: types.TopK = jax.lax.top_k,
) -> base.Factors:
  """Log-likelihood of one denoising step, factor by factor.

    log P(step) = sum_{targets i} log pi_i(o_i) + log P(targets | their tokens)

  Args:
    logits_WxV: float32 [W, V] at `visit.offset`, before the step.
    row: one row of a rollout.
    visit: the step's, see `state`.
    sampling: how the rollout was drawn.
    objective: the settings.
    top_k: see `types.Network`.

  Returns:
    Factors of the W tokens and, last, of the order, the second term
    (`rules.UnmaskRule.order_logprob`).
  """
  # At positions of other steps the record tells of tokens that were not there
  # yet; nothing of them may enter.
  token_W = row.completion[visit.offset]
  is_target_W = row.unmask_step[visit.offset] == visit.denoise_step
  support = None if row.support is None else row.support[visit.offset]
  kept = jax.vmap(
    lambda logits_V, support: draw.over_support(logits_V, support, sampling)
  )(logits_WxV, support)
  logprob_W = jax.vmap(draw.token_logprob)(kept, token_W)
  # At positions that are not targets the record belongs to another step.
  logprob_W = jnp.where(is_target_W, logprob_W, 0.0)
  order = jnp.float32(0.0)
  if needs_block(sampling, objective):
    # What the other positions could have drawn was cut by truncation at this
    # step, of which there is no record but the logits themselves.
    filter_all = jax.vmap(draw.filter_logits, (0, None, None))
    others = filter_all(logits_WxV, sampling, top_k)
    confidence_of = jax.vmap(draw.confidence, (0, 0, None))
    # Of the drawn tokens over the recorded support: truncation of now may cut
    # them, and their confidence would be minus infinity.
    confidence_W = jax.vmap(draw.token_logprob)(
      kept._replace(logprob=confidence_of(logits_WxV, kept, sampling)), token_W
    )
    is_masked_W = row.unmask_step[visit.offset] >= visit.denoise_step
    is_masked_W = rules.candidates(
      is_masked_W, visit.offset, sampling.lead_every
    )
    seen = draw.seen(logits_WxV, others, confidence_W, is_masked_W, sampling)
    order = sampling.rule.order_logprob(seen, is_target_W)
  return base.Factors(
    logprob=jnp.append(logprob_W, order),
    is_factor=jnp.append(is_target_W, needs_block(sampling, objective)),
  )
