"""One train step of any objective: from a graded rollout to new parameters.

1. Rewards become advantages, group by group.
2. The objective says which partial completions to visit, for each of U
   optimizer updates.
3. An update's visits are a flat list of units; those that cannot change the
   gradient are left out.
4. Microbatches of units run in one loop on device; gradients add up in float32.
5. One optimizer update.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from agrpo_jax import types
from agrpo_jax.objectives import base
from agrpo_jax.objectives import objective as objective_lib
from agrpo_jax.parallel import mesh as mesh_lib
from agrpo_jax.policies import base as policies
from agrpo_jax.policies import plain
from agrpo_jax.samplers import noise as noise_lib
from agrpo_jax.samplers import sampling as sampling_lib


@dataclasses.dataclass(frozen=True)
class Learner:
  """Everything static about a train step.

  Attributes:
    bind: binds the network to parameters and adapter.
    optimizer: the optax chain.
    sampling: how rollouts are drawn.
    objective: what is visited, and the loss.
    group_size: G; consecutive rows of a rollout are a group.
    microbatch: units per forward and backward pass.
    step_price: what a completion pays for all K denoising steps; it pays for
      those that it executed, out of its reward.
    policy: how the logits of a step were computed in the rollout.
    shard_rows: puts the leading axis of a pytree on the mesh.
  """

  bind: types.BindFn
  optimizer: optax.GradientTransformation
  sampling: sampling_lib.Sampling
  objective: objective_lib.Objective
  group_size: int
  microbatch: int
  step_price: float = 0.0
  policy: policies.Policy = plain.PLAIN
  shard_rows: Callable[[Any], Any] = lambda tree: tree

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
      reward_B: float32 [B], the task's.
      key: of what the objective draws.
      row_id_Bx2: uint32 [B, 2], see `noise.row_keys`.
      reference: the reference policy's parameters when the objective has one
        and all parameters are trained; with adapters it is the network without
        them.

    Returns:
      The state after, and scalars: loss, gradient norm, policy ratio, clipped
      fractions, KL, entropy, spread of rewards, draws, price of steps.
    """
    objective = self.objective
    share_B = rollout.num_executed_steps / self.sampling.max_steps
    price_B = self.step_price * share_B
    advantage_NxG = jax.vmap(objective.advantage)(
      (reward_B - price_B).reshape(-1, self.group_size)
    )
    advantage_B = advantage_NxG.reshape(-1)
    batch_key, row_key = jax.random.split(key)
    key_B = noise_lib.row_keys(row_key, row_id_Bx2)
    visits_UxBxQxS, drawn = objective.visits(
      rollout, batch_key, key_B, self.sampling
    )
    behaviour_UxBxQxSxF = None
    if objective.behaviour == "scored":
      # Before the first update the policy is the behaviour policy.
      behaviour_UxBxQxSxF = jax.lax.map(
        lambda visits: (
          self._read_all(
            self._units(visits, advantage_B),
            self.bind(state.params, state.lora),
            rollout,
            visits,
          ).logprob
        ),
        visits_UxBxQxS,
      )

    # One compiled update runs U times; a Python loop would compile U of them.
    def update(learned: Any, portion: Any) -> Any:
      # Only what is learned is carried: a frozen base must not be copied.
      trainable, opt_state = learned
      visits, behaviour = portion
      gradient, terms, num_units = self.gradient(
        state.with_trainable(trainable),
        rollout,
        advantage_B,
        visits,
        behaviour,
        reference,
      )
      updates, new_opt_state = self.optimizer.update(
        gradient, opt_state, trainable
      )
      # Without a unit there is nothing to learn from: momentum and weight decay
      # must not move the parameters either.
      is_update = num_units > 0
      learned = jax.tree.map(
        lambda new, old: jnp.where(is_update, new, old),
        (optax.apply_updates(trainable, updates), new_opt_state),
        learned,
      )
      norms = {
        "grad_norm": optax.tree.norm(gradient),
        "is_update": is_update.astype(jnp.int32),
        "num_units": num_units,
      }
      return learned, (terms, norms)

    (trainable, opt_state), (terms, norms) = jax.lax.scan(
      update,
      (state.trainable, state.opt_state),
      (visits_UxBxQxS, behaviour_UxBxQxSxF),
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
      "draws/pairs": norms["num_units"].sum(),
      "completions/mean_denoise_steps": rollout.num_executed_steps.mean(),
    }
    if self.step_price:
      metrics["step_price/mean"] = price_B.mean()
    if objective.has_reference:
      metrics["kl"] = terms.kl.sum() / num_factors
    return state, metrics | drawn

  def gradient(
    self,
    state: types.TrainState,
    rollout: types.Rollout,
    advantage_B: jax.Array,
    visits: base.Visits,
    behaviour: jax.Array | None = None,
    reference: types.Tree | None = None,
  ) -> tuple[types.Tree, base.Terms, jax.Array]:
    """Gradient of an update's loss, in constant memory.

    Where the loss is a sum over visits, each microbatch has a loss and a
    gradient of its own. Else the loss l of all factors f_i(theta) is
    differentiated in two passes, by the chain rule:

      dl/dtheta = sum_i (dl/df_i) (df_i/dtheta)

    The first pass reads the factors without gradient; the second adds up the
    gradients of `stop_gradient(dl/df_i) * f_i`.

    Args:
      state: with the parameters to differentiate by.
      rollout: B completions.
      advantage_B: float32 [B].
      visits: [B, Q, S, ...].
      behaviour: float32 [B, Q, S, F] of a `scored` behaviour policy, or None.
      reference: see `train_step`.

    Returns:
      float32 tree like the trainable one; terms; the number of units run.
    """
    objective = self.objective
    reference_network = None
    if objective.has_reference:
      # With adapters, the frozen base without them is the reference policy.
      frozen = state.params if state.lora is not None else reference
      reference_network = self.bind(frozen, None)
    units = self._units(visits, advantage_B)
    weight_BxQxSxF = whole = None
    if not objective.is_sum_over_visits:
      weight_BxQxSxF, whole = self._loss_weights(
        units, state, rollout, advantage_B, visits, behaviour, reference_network
      )

    def microbatch_loss(
      trainable: types.Tree, index: jax.Array
    ) -> tuple[jax.Array, base.Terms]:
      trained = state.with_trainable(trainable)
      network = self.bind(trained.params, trained.lora)
      rows, unit, advantage_P, old, weight_PxSxF = units.take(
        index, rollout, visits, advantage_B, behaviour, weight_BxQxSxF
      )
      factors = self._read(network, rows, unit)
      if weight_PxSxF is not None:
        # Padding of a microbatch repeats a unit, without weight.
        is_used = factors.is_factor & (unit.weight > 0)[..., None]
        loss = jnp.where(is_used, weight_PxSxF * factors.logprob, 0.0).sum()
        return loss, base.Terms.zeros()
      reference_PxSxF = None
      # Scored here, next to the policy, so that nothing per unit is stored.
      if reference_network is not None:
        reference_PxSxF = jax.lax.stop_gradient(
          self._read(reference_network, rows, unit).logprob
        )
      if objective.behaviour == "recorded":
        old = self._recorded(rows, unit)
      terms = objective.loss(
        _one_unit_each(factors),
        _one_unit_each(old),
        _one_unit_each(reference_PxSxF),
        advantage_P,
        _one_unit_each(unit),
        rows,
      )
      return terms.loss, terms

    def accumulate(carry: Any) -> Any:
      index, gradient, terms = carry
      (_, more_terms), more = jax.value_and_grad(microbatch_loss, has_aux=True)(
        state.trainable, index
      )
      # Summed in float32: thousands of small bfloat16 terms would be lost.
      gradient = jax.tree.map(
        lambda total, part: total + part.astype(jnp.float32), gradient, more
      )
      return index + 1, gradient, terms + more_terms

    zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, jnp.float32), state.trainable
    )
    _, gradient, terms = jax.lax.while_loop(
      lambda carry: carry[0] * self.microbatch < units.num,
      accumulate,
      (jnp.int32(0), zeros, base.Terms.zeros()),
    )
    return gradient, terms if whole is None else whole, units.num

  def _units(self, visits: base.Visits, advantage_B: jax.Array) -> "_Units":
    is_active_BxQ = (visits.weight > 0).any(axis=2)
    if self.objective.skips_zero_advantage:
      is_active_BxQ &= (advantage_B != 0)[:, None]
    # Active units first, so that a loop may stop at the last of them: their
    # number is known on device only, and differs from step to step.
    index_P = jnp.argsort(~is_active_BxQ.reshape(-1), stable=True)
    index_P = jnp.pad(
      index_P, (0, -index_P.size % self.microbatch), constant_values=-1
    )
    return _Units(
      index_P=index_P,
      num=is_active_BxQ.sum(),
      per_row=is_active_BxQ.shape[1],
      microbatch=self.microbatch,
      shard_rows=self.shard_rows,
    )

  def _read(
    self, network: types.Network, rows: types.Rollout, unit: base.Visits
  ) -> base.Factors:
    """Factors [P, S, F] of the visits [P, S, ...] of P rows."""
    policy = self.policy if self.objective.replays else plain.PLAIN
    mask_id = self.sampling.mask_id
    partial_PxSxC = jnp.where(
      unit.is_masked, mask_id, rows.completion[:, None, :]
    )
    block_start_P = unit.block[:, 0] * self.sampling.block_length
    # The start state is the present one with the block masked again, and what
    # comes after it, which no step has touched yet.
    position_C = jnp.arange(rows.completion.shape[1])
    is_late_PxC = position_C[None, :] >= block_start_P[:, None]
    memory = policy.open(
      network,
      rows.prompt,
      rows.prompt_length,
      jnp.where(is_late_PxC, mask_id, partial_PxSxC[:, 0]),
      block_start_P,
    )
    logits_PxSxWxV = policy.logits(
      network,
      memory,
      rows.prompt,
      rows.prompt_length,
      partial_PxSxC,
      unit.offset,
    )

    # The rows keep their place on the mesh; the states of a unit are together.
    def score(
      logits_SxWxV: jax.Array, row: types.Rollout, unit: base.Visits
    ) -> base.Factors:
      return jax.vmap(
        lambda logits_WxV, visit: self.objective.score(
          logits_WxV, row, visit, self.sampling, network.top_k
        )
      )(logits_SxWxV, unit)

    return mesh_lib.vmap_rows(score)(logits_PxSxWxV, rows, unit)

  def _recorded(self, rows: types.Rollout, unit: base.Visits) -> jax.Array:
    """float32 [P, S, F], the behaviour policy's factors of P units."""
    recorded = self.objective.recorded
    return jax.vmap(
      lambda row, unit: jax.vmap(lambda visit: recorded(row, visit))(unit)
    )(rows, unit)

  def _read_all(
    self,
    units: "_Units",
    network: types.Network,
    rollout: types.Rollout,
    visits: base.Visits,
  ) -> base.Factors:
    """Factors [B, Q, S, F] without gradient; those of idle units are none."""
    num_rows, per_row = visits.weight.shape[:2]

    def read(index: jax.Array) -> base.Factors:
      return self._read(network, *units.take(index, rollout, visits)[:2])

    shapes = jax.eval_shape(read, jnp.int32(0))
    every = jax.tree.map(
      lambda x: jnp.zeros((num_rows * per_row, *x.shape[1:]), x.dtype), shapes
    )

    def fill(carry: Any) -> Any:
      index, every = carry
      at = units.indices(index)
      # Padding is dropped: -1 would be the last entry.
      at = jnp.where(at < 0, num_rows * per_row, at)
      every = jax.tree.map(
        lambda x, part: x.at[at].set(part, mode="drop"), every, read(index)
      )
      return index + 1, every

    _, every = jax.lax.while_loop(
      lambda carry: carry[0] * self.microbatch < units.num,
      fill,
      (jnp.int32(0), every),
    )
    return jax.tree.map(
      lambda x: x.reshape(num_rows, per_row, *x.shape[1:]), every
    )

  def _loss_weights(
    self,
    units: "_Units",
    state: types.TrainState,
    rollout: types.Rollout,
    advantage_B: jax.Array,
    visits: base.Visits,
    behaviour: jax.Array | None,
    reference_network: types.Network | None,
  ) -> tuple[jax.Array, base.Terms]:
    """dl/df of every factor, float32 [B, Q, S, F], and the terms of l."""
    network = self.bind(state.params, state.lora)
    factors = self._read_all(units, network, rollout, visits)
    reference = None
    if reference_network is not None:
      reference = self._read_all(
        units, reference_network, rollout, visits
      ).logprob
    if self.objective.behaviour == "recorded":
      behaviour = jax.vmap(self._recorded, in_axes=(None, 1), out_axes=1)(
        rollout, visits
      )

    # A group's completions are side by side; its loss may compare them.
    def grouped(tree: Any) -> Any:
      return jax.tree.map(
        lambda x: x.reshape(-1, self.group_size, *x.shape[1:]), tree
      )

    def loss(logprob: jax.Array) -> tuple[jax.Array, base.Terms]:
      terms_N = jax.vmap(self.objective.loss)(
        *grouped(
          (
            factors.replace(logprob=logprob),
            behaviour,
            reference,
            advantage_B,
            visits,
            rollout,
          )
        )
      )
      terms = terms_N.total()
      return terms.loss, terms

    return jax.grad(loss, has_aux=True)(factors.logprob)


@dataclasses.dataclass(frozen=True)
class _Units:
  """An update's units in the order in which microbatches take them.

  Attributes:
    index_P: int32, row * Q + number of the unit, active ones first; -1 fills
      the last microbatch up.
    num: int32, how many are active.
    per_row: Q.
    microbatch: units taken at once.
    shard_rows: puts the leading axis of a pytree on the mesh.
  """

  index_P: jax.Array
  num: jax.Array
  per_row: int
  microbatch: int
  shard_rows: Callable[[Any], Any]

  def indices(self, index: jax.Array) -> jax.Array:
    """The entries of `index_P` in microbatch number `index`."""
    return jax.lax.dynamic_slice_in_dim(
      self.index_P, index * self.microbatch, self.microbatch
    )

  def take(
    self,
    index: jax.Array,
    rollout: types.Rollout,
    visits: base.Visits,
    advantage_B: jax.Array | None = None,
    *per_unit: Any,
  ) -> Any:
    """Returns what microbatch number `index` works on, its rows on the mesh.

    Args:
      index: int32.
      rollout: B completions.
      visits: [B, Q, S, ...]; what is not active comes back with weight 0.
      advantage_B: float32 [B], or None.
      *per_unit: further trees whose leaves have the leading axes [B, Q].

    Returns:
      The same, one entry per unit of the microbatch.
    """
    row, column = jnp.divmod(jnp.maximum(self.indices(index), 0), self.per_row)
    visits, *per_unit = jax.tree.map(
      lambda x: x[row, column], (visits, *per_unit)
    )
    number = index * self.microbatch + jnp.arange(self.microbatch)
    weight = jnp.where((number < self.num)[:, None], visits.weight, 0.0)
    return self.shard_rows(
      (
        jax.tree.map(lambda x: x[row], rollout),
        visits.replace(weight=weight),
        None if advantage_B is None else advantage_B[row],
        *per_unit,
      )
    )


def _one_unit_each(tree: Any) -> Any:
  """[P, S, ...] -> [P, 1, S, ...]: P completions with one unit each."""
  return jax.tree.map(lambda x: x[:, None], tree)
