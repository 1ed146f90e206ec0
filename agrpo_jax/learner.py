"""One train step: from a graded rollout to new parameters.

1. Rewards become advantages, group by group.
2. M denoising steps are drawn per completion, in `updates_per_batch` portions.
3. A portion is a flat list of (completion, step) pairs. Draws that fell on the
   same step are one pair with their weights added, and pairs whose advantage is
   zero are left out: neither changes the gradient.
4. Microbatches of pairs run in one loop on device; gradients add up in float32.
5. One optimizer update per portion.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from agrpo_jax import types
from agrpo_jax.objectives import advantage as advantage_lib
from agrpo_jax.objectives import agrpo as objective_lib
from agrpo_jax.objectives import mc_steps
from agrpo_jax.samplers import noise as noise_lib
from agrpo_jax.samplers import sampling as sampling_lib

PolicyFn = Callable[[types.Tree, types.Tree | None], types.LogitsFn]
"""(params, lora) -> the network bound to them."""


@dataclasses.dataclass(frozen=True)
class Learner:
  """Everything static about a train step.

  Attributes:
    policy: binds the network to parameters and adapter.
    optimizer: the optax chain.
    sampling: how rollouts are drawn.
    objective: the loss.
    steps: the draw of denoising steps.
    baseline: one of `advantage.BASELINES`.
    group_size: G; consecutive rows of a rollout are a group.
    updates_per_batch: optimizer updates per rollout, dividing `num_mc_steps`:
      1 is the paper's algorithm; the released launcher takes one per draw.
    microbatch: (completion, step) pairs per forward and backward pass.
    shard_rows: puts the leading axis of a pytree on the mesh.
    top_k: how the largest logits are found, see `ops.split_top_k`.
  """

  policy: PolicyFn
  optimizer: optax.GradientTransformation
  sampling: sampling_lib.Sampling
  objective: objective_lib.Objective
  steps: mc_steps.McSteps
  baseline: str
  group_size: int
  updates_per_batch: int
  microbatch: int
  shard_rows: Callable[[Any], Any] = lambda tree: tree
  top_k: types.TopK = jax.lax.top_k

  def init(
    self, params: types.Tree, lora: types.Tree | None
  ) -> types.TrainState:
    """The state before the first train step; `lora` None trains `params`."""
    return types.TrainState(
      train_step=jnp.int32(0),
      params=params,
      lora=lora,
      opt_state=self.optimizer.init(params if lora is None else lora),
    )

  def train_step(
    self,
    state: types.TrainState,
    rollout: types.Rollout,
    reward_B: jax.Array,
    key: jax.Array,
    row_id_Bx2: jax.Array,
    reference: types.Tree | None,
  ) -> tuple[types.TrainState, dict[str, jax.Array]]:
    """Learns from one rollout batch. Pure; the caller jits and donates state.

    Args:
      state: before.
      rollout: B completions, groups side by side.
      reward_B: float32 [B].
      key: of the draw of denoising steps.
      row_id_Bx2: uint32 [B, 2], see `noise.row_keys`.
      reference: the reference policy's parameters when `kl_coef` > 0 and all
        parameters are trained; with adapters it is the network without them.

    Returns:
      The state after, and scalars: loss, gradient norm, policy ratio, clipped
      fractions, KL, entropy, spread of rewards, draws.
    """
    advantage_NxG = jax.vmap(
      lambda reward_G: advantage_lib.group_advantage(reward_G, self.baseline)
    )(reward_B.reshape(-1, self.group_size))
    advantage_B = advantage_NxG.reshape(-1)
    batch_key, row_key = jax.random.split(key)
    key_B = noise_lib.row_keys(row_key, row_id_Bx2)
    drawn = mc_steps.draw(
      rollout,
      mc_steps.uniforms(batch_key, key_B, self.steps),
      self.steps,
      self.sampling.eos_id,
    )

    def update(learned: Any, portion: mc_steps.Drawn) -> Any:
      # Only what is learned is carried: a frozen base must not be copied.
      trainable, opt_state = learned
      before = state.with_trainable(trainable).replace(opt_state=opt_state)
      return self._update(before, rollout, advantage_B, portion, reference)

    def portions(x_BxM: jax.Array) -> jax.Array:
      """[B, M] -> [updates, B, M / updates]; strata are dealt out in turn."""
      return jnp.moveaxis(
        x_BxM.reshape(x_BxM.shape[0], -1, self.updates_per_batch), 2, 0
      )

    (trainable, opt_state), (terms, norms) = jax.lax.scan(
      update,
      (state.trainable, state.opt_state),
      jax.tree.map(portions, drawn),
    )
    state = state.with_trainable(trainable).replace(
      opt_state=opt_state, train_step=state.train_step + 1
    )
    carries_BxC = rollout.unmask_step < rollout.order_logprob.shape[1]
    num_factors = jnp.maximum(terms.num_factors.sum(), 1)
    first = jax.tree.map(lambda x: x[0], terms)
    metrics = {
      "loss": terms.loss.mean(),
      "grad_norm": norms["grad_norm"].mean(),
      "updates": norms["is_update"].sum(),
      # On the first update after a rollout the policy is the behaviour policy:
      # both must be what rounding leaves of 1 and 0.
      "policy_ratio/mean": jnp.where(
        first.num_factors > 0,
        first.ratio / jnp.maximum(first.num_factors, 1),
        1.0,
      ),
      "policy_ratio/max_deviation": first.ratio_deviation,
      "clip_ratio/low_mean": terms.clip_low.sum() / num_factors,
      "clip_ratio/high_mean": terms.clip_high.sum() / num_factors,
      "clip_ratio/region_mean": (terms.clip_low + terms.clip_high).sum()
      / num_factors,
      "entropy": rollout.entropy.sum() / jnp.maximum(carries_BxC.sum(), 1),
      "frac_reward_zero_std": (advantage_NxG == 0).all(axis=1).mean(),
      "draws/distinct_fraction": mc_steps.distinct_fraction(drawn.step),
      "draws/pairs": norms["num_pairs"].sum(),
      "draws/max_weight": drawn.weight.max(),
      "completions/mean_denoise_steps": rollout.num_steps.mean(),
    }
    if self.objective.kl_coef > 0:
      metrics["kl"] = terms.kl.sum() / num_factors
    return state, metrics

  def _update(
    self,
    state: types.TrainState,
    rollout: types.Rollout,
    advantage_B: jax.Array,
    drawn: mc_steps.Drawn,
    reference: types.Tree | None,
  ) -> tuple[tuple[types.Tree, types.Tree], tuple[objective_lib.Terms, dict]]:
    gradient, terms, num_pairs = self.gradient(
      state, rollout, advantage_B, drawn, reference
    )
    updates, opt_state = self.optimizer.update(
      gradient, state.opt_state, state.trainable
    )
    # Without a pair there is nothing to learn from: momentum and weight decay
    # must not move the parameters either.
    is_update = num_pairs > 0
    learned = jax.tree.map(
      lambda new, old: jnp.where(is_update, new, old),
      (optax.apply_updates(state.trainable, updates), opt_state),
      (state.trainable, state.opt_state),
    )
    return learned, (
      terms,
      {
        "grad_norm": optax.tree.norm(gradient),
        "is_update": is_update.astype(jnp.int32),
        "num_pairs": num_pairs,
      },
    )

  def gradient(
    self,
    state: types.TrainState,
    rollout: types.Rollout,
    advantage_B: jax.Array,
    drawn: mc_steps.Drawn,
    reference: types.Tree | None,
  ) -> tuple[types.Tree, objective_lib.Terms, jax.Array]:
    """Gradient of the loss: the mean over rows and draws.

    Returns:
      float32 tree like the trainable one; terms, whose loss is that mean; the
      number of (completion, step) pairs that were run.
    """
    num_rows, num_draws = drawn.step.shape
    has_kl = self.objective.kl_coef > 0
    pair_weight_BxM = merge_repeats(drawn) / (num_rows * num_draws)
    is_active_BxM = pair_weight_BxM > 0
    if not has_kl:
      is_active_BxM &= (advantage_B != 0)[:, None]
    pair_P = jnp.argsort(~is_active_BxM.reshape(-1), stable=True)
    pair_P = jnp.pad(
      pair_P, (0, -pair_P.size % self.microbatch), constant_values=-1
    )
    num_pairs = is_active_BxM.sum()

    def microbatch_loss(
      trainable: types.Tree, index: jax.Array
    ) -> tuple[jax.Array, objective_lib.Terms]:
      place = index * self.microbatch + jnp.arange(self.microbatch)
      pair = jax.lax.dynamic_slice_in_dim(
        pair_P, index * self.microbatch, self.microbatch
      )
      row, draw_index = jnp.divmod(jnp.maximum(pair, 0), num_draws)
      weight = jnp.where(
        place < num_pairs, pair_weight_BxM[row, draw_index], 0.0
      )
      rows, step, weight, advantage = self.shard_rows(
        (
          jax.tree.map(lambda x: x[row], rollout),
          drawn.step[row, draw_index],
          weight,
          advantage_B[row],
        )
      )
      policy = state.with_trainable(trainable)
      reference_fn = None
      if has_kl:
        # With adapters, the frozen base without them is the reference policy.
        base = state.params if state.lora is not None else reference
        reference_fn = self.policy(base, None)
      terms = objective_lib.loss_terms(
        self.policy(policy.params, policy.lora),
        reference_fn,
        rows,
        step,
        weight,
        advantage,
        self.sampling,
        self.objective,
        self.top_k,
      )
      return terms.loss, terms

    def accumulate(carry):
      index, gradient, terms = carry
      (_, more_terms), more = jax.value_and_grad(microbatch_loss, has_aux=True)(
        state.trainable, index
      )
      gradient = jax.tree.map(
        lambda total, part: total + part.astype(jnp.float32), gradient, more
      )
      return index + 1, gradient, terms + more_terms

    zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, jnp.float32), state.trainable
    )
    _, gradient, terms = jax.lax.while_loop(
      lambda carry: carry[0] * self.microbatch < num_pairs,
      accumulate,
      (jnp.int32(0), zeros, objective_lib.Terms.zeros()),
    )
    return gradient, terms, num_pairs


def merge_repeats(drawn: mc_steps.Drawn) -> jax.Array:
  """float32 [B, M]: weights, those of equal steps of a row added to the first.

  The sum over draws of weight times summand does not change, and all but the
  first of equal draws need no forward pass.
  """
  is_same_BxMxM = drawn.step[:, :, None] == drawn.step[:, None, :]
  is_earlier_MxM = jnp.tri(drawn.step.shape[1], k=-1, dtype=bool)
  is_first_BxM = ~(is_same_BxMxM & is_earlier_MxM[None]).any(axis=2)
  total_BxM = jnp.where(is_same_BxMxM, drawn.weight[:, None, :], 0.0).sum(2)
  return jnp.where(is_first_BxM, total_BxM, 0.0)
