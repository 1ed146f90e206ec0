"""One train step of any objective: from a graded rollout to new parameters.

1. Rewards, and values where the objective has any, become advantages.
2. The objective says which partial completions to visit, for each of U
   optimizer updates.
3. An update's visits are a flat list of units; those that cannot change the
   gradient are left out.
4. Microbatches of units run in one loop on device; gradients add up in float32.
5. One optimizer update.
"""

import dataclasses
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from agrpo_jax import types
from agrpo_jax.objectives import base
from agrpo_jax.objectives import objective as objective_lib
from agrpo_jax.parallel import mesh as mesh_lib
from agrpo_jax.policies import base as policies
from agrpo_jax.policies import block_causal
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
    cuts_units: whether units of fewer states than others have are run apart,
      with as few; else all are run with as many.
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
  cuts_units: bool = True
  shard_rows: Callable[[Any], Any] = lambda tree: tree

  def train_step(
    self,
    state: types.TrainState,
    rollout: types.Rollout,
    reward_B: jax.Array,
    key: jax.Array,
    row_id_Bx2: jax.Array,
    reference: types.Tree | None,
    value_BxV: jax.Array | None = None,
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
      value_BxV: float32, values of states within the completions, the price of
        steps taken off, where the objective is `objectives.Valued`.

    Returns:
      The state after, and scalars: loss, gradient norm, policy ratio, clipped
      fractions, KL, entropy, spread of rewards, draws, price of steps.

    Raises:
      ValueError: the objective asks for values, and there are none.
    """
    objective = self.objective
    price_B = self.price(rollout.num_executed_steps)
    paid_NxG = (reward_B - price_B).reshape(-1, self.group_size)
    advantage_NxG = objective.advantage(paid_NxG)
    advantage_B = advantage_NxG.reshape(-1)
    if isinstance(objective, objective_lib.Valued):
      if value_BxV is None:
        raise ValueError("the objective has values, which are to be given")
      advantage_NxGxB = objective.block_advantage(
        paid_NxG, value_BxV.reshape(*paid_NxG.shape, -1), self.sampling
      )
      advantage_B = advantage_NxGxB.reshape(len(advantage_B), -1)
    batch_key, row_key = jax.random.split(key)
    key_B = noise_lib.row_keys(row_key, row_id_Bx2)
    visits_UxBxQxS, drawn = self.visits(rollout, advantage_B, batch_key, key_B)
    behaviour_UxBxQxSxF = None
    if objective.behaviour == "scored" and objective.updates_per_batch > 1:
      # Before the first update the policy is the behaviour policy; with a
      # single update it is so throughout.
      behaviour_UxBxQxSxF = jax.lax.map(
        lambda visits: (
          self.factors(
            self.bind(state.params, state.lora), rollout, advantage_B, visits
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
    num_units, num_visits = self.asked(visits_UxBxQxS, advantage_B)
    carries_BxC = (rollout.unmask_step >= 0) & (
      rollout.unmask_step < rollout.order_logprob.shape[1]
    )
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
      "frac_reward_zero_std": (jnp.ptp(paid_NxG, axis=1) == 0).mean(),
      # Run with a gradient; of a loss that is no sum there may be fewer than
      # were asked for, and read.
      "draws/pairs": norms["num_units"].sum(),
      "draws/units": num_units,
      "draws/visits": num_visits,
      "completions/mean_denoise_steps": rollout.num_executed_steps.mean(),
      "completions/mean_whole_passes": rollout.num_whole_passes.mean(),
      # Of the steps during which a completion held a slot, those that it used.
      "slot_occupancy": rollout.num_executed_steps.sum()
      / rollout.num_slot_steps.sum(),
    }
    if self.step_price:
      metrics["step_price/mean"] = price_B.mean()
    if objective.has_reference:
      metrics["kl"] = terms.kl.sum() / num_factors
    return state, metrics | drawn

  def visits(
    self,
    rollout: types.Rollout,
    advantage_B: jax.Array,
    batch_key: jax.Array,
    key_B: jax.Array,
  ) -> tuple[base.Visits, dict[str, jax.Array]]:
    """Returns the visits [U, B, Q, S] of all updates; metrics of their draw."""
    visits, drawn = self.objective.visits(
      rollout, advantage_B, batch_key, key_B, self.sampling
    )
    # A unit has one advantage.
    if advantage_B.ndim == 1:
      visits = jax.vmap(self.shared)(visits)
    return visits, drawn

  def shared(self, visits: base.Visits) -> base.Visits:
    """Makes one unit of a completion where one memory serves all its blocks.

    Args:
      visits: [B, Q, S, ...].

    Returns:
      [B, 1, Q * S, ...]; the same under other policies.
    """
    if not (self.policy.spans and self.objective.replays):
      return visits
    visits = jax.tree.map(
      lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), visits
    )
    # A unit is run up to its last state that counts: those come first.
    order_BxS = jnp.argsort(visits.weight == 0, axis=-1, stable=True)
    return jax.tree.map(
      lambda x: jax.vmap(lambda x_S, at: x_S[at])(x, order_BxS)[:, None],
      visits,
    )

  @property
  def _reader(self) -> policies.Policy:
    """How the logits of a visit are computed."""
    if self.objective.replays:
      return self.policy
    if isinstance(self.policy, block_causal.BlockCausal):
      return block_causal.OfMasks(self.policy)
    return plain.PLAIN

  @property
  def restarts(self) -> base.Restarts | None:
    """Which states get a value; None: the objective asks for none."""
    if isinstance(self.objective, objective_lib.Valued):
      return self.objective.restarts(self.sampling)
    return None

  def price(self, num_executed_steps_B: Any) -> Any:
    """Returns float [B], what completions pay for their denoising steps."""
    return self.step_price * (num_executed_steps_B / self.sampling.max_steps)

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
      advantage_B: float32 [B]; [B, num_blocks] if they differ by block, which
        only a sum over visits can have.
      visits: [B, Q, S, ...].
      behaviour: float32 [B, Q, S, F] of a `scored` behaviour policy; None if
        it is the policy itself.
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
    advantage_BxQ = base.advantage_at(advantage_B, visits.block[..., 0])
    weight_BxQxSxF = whole = None
    if not objective.is_sum_over_visits:
      weight_BxQxSxF, whole = self._loss_weights(
        units, state, rollout, advantage_B, visits, behaviour, reference_network
      )
      # What the loss does not depend on here need not be differentiated.
      is_used_BxQxS = (weight_BxQxSxF != 0).any(axis=-1)
      visits = visits.replace(weight=is_used_BxQxS.astype(jnp.float32))
      units = self._units(visits, advantage_B)

    def microbatch_loss(
      trainable: types.Tree, at: "_Slice"
    ) -> tuple[jax.Array, base.Terms]:
      trained = state.with_trainable(trainable)
      network = self.bind(trained.params, trained.lora)
      rows, unit, advantage_P, old, weight_PxSxF = units.take(
        at, rollout, visits, advantage_BxQ, behaviour, weight_BxQxSxF
      )
      factors = self._read(network, rows, unit)
      if weight_PxSxF is not None:
        # Padding of a microbatch repeats a unit, without weight.
        is_used = factors.is_factor & (unit.weight != 0)[..., None]
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
      elif objective.behaviour == "scored" and behaviour is None:
        old = jax.lax.stop_gradient(factors.logprob)
      # A sum over visits may be formed of any of them: each unit stands for a
      # completion of its own.
      terms = objective.loss(
        _one_unit_each(factors),
        _one_unit_each(old),
        _one_unit_each(reference_PxSxF),
        advantage_P,
        _one_unit_each(unit),
        rows,
      )
      return terms.loss, terms

    def accumulate(at: "_Slice", carry: Any) -> Any:
      gradient, terms = carry
      (_, more_terms), more = jax.value_and_grad(microbatch_loss, has_aux=True)(
        state.trainable, at
      )
      gradient = jax.tree.map(
        lambda total, part: total + part.astype(total.dtype), gradient, more
      )
      return gradient, terms + more_terms

    # Summed in float32 at least: thousands of small bfloat16 terms would be
    # lost.
    zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)),
      state.trainable,
    )
    gradient, terms = units.loop(accumulate, (zeros, base.Terms.zeros()))
    return gradient, terms if whole is None else whole, units.num

  def asked(
    self, visits: base.Visits, advantage_B: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Counts what can change the gradient: int32, units and their visits.

    Args:
      visits: [U, B, Q, S, ...].
      advantage_B: float32 [B], or [B, num_blocks].
    """
    is_asked_UxBxQxS = jax.vmap(self._is_asked, (0, None))(visits, advantage_B)
    return is_asked_UxBxQxS.any(axis=-1).sum(), is_asked_UxBxQxS.sum()

  def _is_asked(self, visits: base.Visits, advantage_B: jax.Array) -> jax.Array:
    """bool [B, Q, S], which visits of an update can change the gradient."""
    is_asked_BxQxS = visits.weight != 0
    if self.objective.skips_zero_advantage:
      # All states of a unit lie in one block.
      advantage_BxQ = base.advantage_at(advantage_B, visits.block[..., 0])
      is_asked_BxQxS &= (advantage_BxQ != 0)[..., None]
    return is_asked_BxQxS

  def factors(
    self,
    network: types.Network,
    rollout: types.Rollout,
    advantage_B: jax.Array,
    visits: base.Visits,
  ) -> base.Factors:
    """Reads the visits [B, Q, S, ...] of an update under some network.

    Returns:
      Factors [B, Q, S, F]; units that cannot change the gradient are not run,
      and have none.
    """
    units = self._units(visits, advantage_B)
    return self._read_all(units, network, rollout, visits)

  def _units(self, visits: base.Visits, advantage_B: jax.Array) -> "_Units":
    num_states = visits.weight.shape[2]
    # A unit's states are cut off behind its last one that counts.
    state_S = jnp.arange(1, num_states + 1)
    is_asked_BxQxS = self._is_asked(visits, advantage_B)
    used_P = jnp.where(is_asked_BxQxS, state_S, 0).max(axis=2).reshape(-1)
    # Active units first, so that loops may stop at the last of them: their
    # number is known on device only, and differs from step to step. Those with
    # the most states come first, and are run together.
    sizes = [num_states]
    if self.cuts_units:
      sizes = _sizes(num_states, self.sampling, self.policy)
    # Sizes descend: the last of those that hold all states of a unit. What is
    # idle stands behind all groups, and is in none.
    group_P = jnp.searchsorted(-jnp.asarray(sizes), -used_P, side="right")
    group_P = jnp.where(used_P > 0, group_P - 1, len(sizes))
    # Of these, those of a block: windows that reach to the end of a completion
    # are as long as the earliest needs.
    block_P = visits.block[..., 0].reshape(-1)
    index_P = jnp.lexsort((block_P, group_P))
    # A microbatch may begin at any of them, and is whole.
    index_P = jnp.pad(index_P, (0, self.microbatch), constant_values=-1)
    end_G = jnp.searchsorted(
      jnp.sort(group_P), jnp.arange(len(sizes)), side="right"
    )
    return _Units(
      index_P=index_P,
      end_G=end_G,
      sizes=sizes,
      per_row=visits.weight.shape[1],
      microbatch=self.microbatch,
      shard_rows=self.shard_rows,
    )

  def _read(
    self, network: types.Network, rows: types.Rollout, unit: base.Visits
  ) -> base.Factors:
    """Factors [P, S, F] of the visits [P, S, ...] of P rows."""
    policy = self._reader
    mask_id = self.sampling.mask_id
    prompt = rows.prompt
    if unit.is_prompt_masked is not None:
      # Behind the prompt too, where it is without effect.
      prompt = jnp.where(unit.is_prompt_masked[:, 0], mask_id, prompt)
    partial_PxSxC = jnp.where(
      unit.is_masked, mask_id, rows.completion[:, None, :]
    )
    # A unit's states share a memory: the start of the first is that of all.
    start_step_P = policies.start_step(
      policy, unit.denoise_step[:, 0], self.sampling.steps_per_block
    )
    memory = policy.open(
      network,
      None,
      prompt,
      rows.prompt_length,
      jnp.where(
        rows.unmask_step >= start_step_P[:, None], mask_id, rows.completion
      ),
      unit.block[:, 0] * self.sampling.block_length,
      # One call of `logits` reads it: no layer's keys and values need be kept.
      keeps=False,
    )
    logits_PxSxWxV = policy.logits(
      network,
      memory,
      prompt,
      rows.prompt_length,
      partial_PxSxC,
      unit.block * self.sampling.block_length,
      unit.offset,
      # Units of several states have all those of a memory, in order.
      is_start=unit.denoise_step.shape[1] > 1
      or self.sampling.steps_per_memory == 1,
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

    def read(at: "_Slice") -> base.Factors:
      return self._read(network, *units.take(at, rollout, visits)[:2])

    # Asked for its shapes alone: units may be run with fewer states.
    whole = _Slice(jnp.int32(0), jnp.int32(0), visits.weight.shape[2])
    every = jax.tree.map(
      lambda x: jnp.zeros((num_rows * per_row, *x.shape[1:]), x.dtype),
      jax.eval_shape(lambda: read(whole)),
    )

    def fill(at: "_Slice", every: base.Factors) -> base.Factors:
      # What is not of the slice is dropped: -1 would be the last entry.
      unit_P = jnp.where(
        units.is_used(at), units.indices(at), num_rows * per_row
      )
      return jax.tree.map(
        lambda x, part: x.at[unit_P, : at.num_states].set(part, mode="drop"),
        every,
        read(at),
      )

    every = units.loop(fill, every)
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
    elif self.objective.behaviour == "scored" and behaviour is None:
      behaviour = factors.logprob

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


class _Slice(NamedTuple):
  """A microbatch: units from `start` on, of which those before `end` count.

  Attributes:
    start: int32, a position in `_Units.index_P`.
    end: int32.
    num_states: the first states of each unit, which are run.
  """

  start: jax.Array
  end: jax.Array
  num_states: int


# Numbers of states that units are run with, each a program of its own.
_MAX_SIZES = 5


def _sizes(
  num_states: int, sampling: sampling_lib.Sampling, policy: policies.Policy
) -> list[int]:
  """Returns the numbers of states that units are run with, descending."""
  sizes = [num_states]
  # Under a schedule every block has all of its steps. Else it ends after few of
  # those it may have, and running the rest would cost more than what is there;
  # and completions have blocks of their own number.
  if sampling.rule.schedule != "exact" or policy.spans:
    while sizes[-1] > 1 and len(sizes) < _MAX_SIZES:
      # Halves: few programs to compile, and less than twice the states needed.
      sizes.append(-(-sizes[-1] // 2))
  return sizes


@dataclasses.dataclass(frozen=True)
class _Units:
  """An update's units in the order in which microbatches take them.

  Attributes:
    index_P: int32, row * Q + number of the unit, active ones first and grouped
      by how many states they are run with; -1 fills the last microbatch up.
    end_G: int32, the end of each group in `index_P`.
    sizes: the number of states of each group.
    per_row: Q.
    microbatch: units taken at once.
    shard_rows: puts the leading axis of a pytree on the mesh.
  """

  index_P: jax.Array
  end_G: jax.Array
  sizes: Sequence[int]
  per_row: int
  microbatch: int
  shard_rows: Callable[[Any], Any]

  @property
  def num(self) -> jax.Array:
    """How many are active, int32."""
    return self.end_G[-1]

  def loop(self, body: Callable[["_Slice", Any], Any], carry: Any) -> Any:
    """Returns carry after `carry = body(microbatch, carry)` for all of them."""
    start = jnp.int32(0)
    # In Python, since every group has shapes of its own.
    for end, size in zip(self.end_G, self.sizes, strict=True):
      carry = self._loop_group(body, carry, start, end, size)
      start = end
    return carry

  def _loop_group(
    self,
    body: Callable[["_Slice", Any], Any],
    carry: Any,
    start: jax.Array,
    end: jax.Array,
    size: int,
  ) -> Any:
    def step(pair: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
      start, carry = pair
      carry = body(_Slice(start, end, size), carry)
      return start + self.microbatch, carry

    # No scan: where a group ends is known on device only.
    _, carry = jax.lax.while_loop(
      lambda pair: pair[0] < end, step, (start, carry)
    )
    return carry

  def indices(self, at: "_Slice") -> jax.Array:
    """The entries of `index_P` of a microbatch; behind its end, any."""
    return jax.lax.dynamic_slice_in_dim(self.index_P, at.start, self.microbatch)

  def is_used(self, at: "_Slice") -> jax.Array:
    """bool, which of the `indices` the microbatch has."""
    return at.start + jnp.arange(self.microbatch) < at.end

  def take(
    self,
    at: "_Slice",
    rollout: types.Rollout,
    visits: base.Visits,
    advantage_BxQ: jax.Array | None = None,
    *per_unit: Any,
  ) -> Any:
    """Returns what a microbatch works on, its rows on the mesh.

    Args:
      at: the microbatch.
      rollout: B completions.
      visits: [B, Q, S, ...]; what is not active comes back with weight 0.
      advantage_BxQ: float32, of each unit's block, or None.
      *per_unit: further trees whose leaves have the leading axes [B, Q, S].

    Returns:
      The same, one entry per unit of the microbatch, with its states.
    """
    # -1 fills up: any unit will do in its place, since it gets no weight.
    row, column = jnp.divmod(jnp.maximum(self.indices(at), 0), self.per_row)
    visits, *per_unit = jax.tree.map(
      lambda x: x[row, column, : at.num_states], (visits, *per_unit)
    )
    # The last microbatch of a group reaches into the next one's units.
    weight = jnp.where(self.is_used(at)[:, None], visits.weight, 0.0)
    return self.shard_rows(
      (
        jax.tree.map(lambda x: x[row], rollout),
        visits.replace(weight=weight),
        None if advantage_BxQ is None else advantage_BxQ[row, column],
        *per_unit,
      )
    )


def _one_unit_each(tree: Any) -> Any:
  """[P, S, ...] -> [P, 1, S, ...]: P completions with one unit each."""
  return jax.tree.map(lambda x: x[:, None], tree)
