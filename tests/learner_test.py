"""The train step: what it skips, what it adds up, what it must not change."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agrpo_jax import learner as learner_lib
from agrpo_jax import types
from agrpo_jax.models import transformer
from agrpo_jax.objectives import agrpo
from agrpo_jax.objectives import mc_steps
from agrpo_jax.samplers import noise as noise_lib
from agrpo_jax.samplers import rollout as rollout_lib
from agrpo_jax.samplers import sampling as sampling_lib
from fixtures import recordings
from fixtures import states

NUM_ROWS, GROUP_SIZE = 8, 4
ROW_ID = np.stack([np.arange(8) // 4, np.arange(8) % 4], 1).astype(np.uint32)

# Of the rules that have settings: such that steps differ in what they unmask.
OWN = {
  "threshold": dict(threshold=0.2),
  "dynamic": dict(threshold=0.2),
  "factor": dict(factor=2.4),
  "entropy_bounded": dict(gamma=3.0),
  "soft_threshold": dict(threshold=0.2, soft_width=0.5),
}


def setting(rule="random", **changes):
  """(learner, state, rollout, keys) on a recorded tiny network."""
  config, params, _ = recordings.network("tiny_loss")
  sampling = sampling_lib.Sampling(
    mask_id=config.mask_id,
    eos_id=config.eos_id,
    completion_length=8,
    block_length=4,
    num_denoise_steps=4,
    unmask_rule=rule,
    temperature=0.8,
    top_k=20,
    **OWN.get(rule, {}),
  )

  def bind(params, lora):
    return transformer.bind(config, params, lora)

  learner = learner_lib.Learner(
    bind=bind,
    optimizer=optax.adamw(1e-3),
    sampling=sampling,
    objective=agrpo.Agrpo(num_mc_steps=4, **changes),
    group_size=GROUP_SIZE,
    microbatch=8,
  )
  tokens = jax.random.randint(jax.random.key(1), (NUM_ROWS, 6), 0, 80)
  prompts = types.Prompts(
    tokens=tokens,
    length=jnp.array([6, 3, 5, 4, 6, 2, 1, 6]),
    key=noise_lib.row_keys(jax.random.key(2), ROW_ID),
  )
  rollout = jax.jit(
    lambda prompts: rollout_lib.sample_rollout(
      bind(params, None), prompts, sampling
    )
  )(prompts)
  return learner, states.initial(learner, params), rollout, prompts.key


REWARD = jnp.array([1.0, 0.0, 0.0, 2.0, 0.5, 0.5, 0.25, 0.0])


def step(learner, state, rollout, keys, reward=REWARD):
  return jax.jit(learner.train_step)(
    state, rollout, reward, jax.random.key(3), ROW_ID, None
  )


@pytest.mark.parametrize("rule", sampling_lib.RULES)
def test_the_first_policy_ratio_is_one(rule):
  """Rollout and objective agree on every log-probability, also the order's."""
  _, metrics = step(*setting(rule))
  np.testing.assert_allclose(metrics["policy_ratio/mean"], 1.0, atol=1e-5)
  assert metrics["policy_ratio/max_deviation"] < 1e-4
  assert metrics["clip_ratio/region_mean"] == 0


@pytest.mark.parametrize("rule", OWN)
def test_steps_of_rows_differ_in_number_and_lie_in_their_blocks(rule):
  learner, _, rollout, _ = setting(rule)
  per_block = learner.sampling.steps_per_block
  unmask_step = np.asarray(rollout.unmask_step)
  carries = unmask_step < learner.sampling.max_steps
  block = np.broadcast_to(np.arange(8) // 4, unmask_step.shape)
  np.testing.assert_array_equal(
    unmask_step[carries] // per_block, block[carries]
  )
  executed = [len({*row[row < 99]} - {8, per_block * 2}) for row in unmask_step]
  np.testing.assert_array_equal(rollout.num_executed_steps, executed)
  assert len({*executed}) > 1


def test_a_price_of_steps_is_taken_from_the_reward():
  learner, state, rollout, keys = setting("threshold")
  dear = dataclasses.replace(learner, step_price=0.5)
  price = 0.5 * np.asarray(rollout.num_executed_steps) / 8
  assert price.std() > 0
  after, metrics = step(dear, state, rollout, keys)
  np.testing.assert_allclose(metrics["step_price/mean"], price.mean(), 1e-6)
  # The same program, to which no step was executed: equal to the last bit.
  no_steps = jnp.zeros_like(rollout.num_executed_steps)
  by_hand, _ = step(
    dear,
    state,
    rollout.replace(num_executed_steps=no_steps),
    keys,
    REWARD - jnp.asarray(price, jnp.float32),
  )
  chex.assert_trees_all_equal(after.params, by_hand.params)
  free, other = step(learner, state, rollout, keys)
  assert "step_price/mean" not in other
  assert (
    optax.tree.norm(jax.tree.map(jnp.subtract, free.params, after.params))
    > 1e-4
  )


@pytest.mark.parametrize("microbatch", [1, 3, 32])
def test_microbatches_do_not_change_the_gradient(microbatch):
  learner, state, rollout, keys = setting()
  other = dataclasses.replace(learner, microbatch=microbatch)
  gradients, expected_loss = [], None
  for one in (learner, other):
    visits, _ = one.objective.visits(
      rollout, None, jax.random.key(0), keys, one.sampling
    )
    gradient, terms, _ = jax.jit(one.gradient)(
      state, rollout, REWARD - 0.5, jax.tree.map(lambda x: x[0], visits)
    )
    gradients.append(gradient)
    np.testing.assert_allclose(
      terms.loss, expected_loss or terms.loss, rtol=1e-4
    )
    expected_loss = terms.loss
  difference = jax.tree.map(jnp.subtract, *gradients)
  assert optax.tree.norm(difference) < 1e-5 * optax.tree.norm(gradients[0])


def test_equal_draws_run_once_with_their_weights_added():
  learner, state, rollout, _ = setting()
  once = mc_steps.Drawn(
    step=jnp.tile(jnp.array([[0, 2, 1, 3]]), (NUM_ROWS, 1)),
    weight=jnp.tile(jnp.array([[3.0, 1.0, 0.0, 0.0]]), (NUM_ROWS, 1)),
  )
  repeated = mc_steps.Drawn(
    step=jnp.tile(jnp.array([[0, 2, 0, 0]]), (NUM_ROWS, 1)),
    weight=jnp.ones((NUM_ROWS, 4)),
  )

  def gradient(drawn):
    visits = agrpo.visits_of(
      rollout, drawn, learner.sampling, learner.objective
    )
    return learner.gradient(state, rollout, REWARD, visits)

  a, _, num_once = gradient(once)
  b, _, num_repeated = gradient(repeated)
  chex.assert_trees_all_close(a, b, rtol=1e-5, atol=1e-7)
  num_active = int((REWARD != 0).sum())
  assert int(num_once) == int(num_repeated) == 2 * num_active


def test_a_batch_without_spread_changes_nothing_but_the_count():
  learner, state, rollout, keys = setting()
  state, _ = step(learner, state, rollout, keys)  # Adam has momentum now
  after, metrics = step(
    learner, state, rollout, keys, reward=jnp.full((NUM_ROWS,), 0.7)
  )
  chex.assert_trees_all_equal(after.params, state.params)
  chex.assert_trees_all_equal(after.opt_state, state.opt_state)
  assert int(after.train_step) == int(state.train_step) + 1
  assert int(metrics["updates"]) == 0
  assert float(metrics["frac_reward_zero_std"]) == 1.0
  assert np.isfinite([float(x) for x in metrics.values()]).all()


def test_updates_per_batch_share_out_the_draws():
  learner, state, rollout, keys = setting(updates_per_batch=4)
  after, metrics = step(learner, state, rollout, keys)
  assert int(metrics["updates"]) == 4
  counts = [
    int(x) for x in jax.tree.leaves(after.opt_state) if x.dtype == jnp.int32
  ]
  assert counts == [4]
  # Only the first update is on the behaviour policy.
  assert metrics["policy_ratio/max_deviation"] < 1e-4


def test_kl_needs_every_row_and_vanishes_at_the_reference():
  learner, state, rollout, _ = setting(kl_coef=0.1)
  _, metrics = jax.jit(learner.train_step)(
    state, rollout, jnp.ones(NUM_ROWS), jax.random.key(0), ROW_ID, state.params
  )
  assert int(metrics["draws/pairs"]) > 0
  np.testing.assert_allclose(metrics["kl"], 0.0, atol=1e-8)
  np.testing.assert_allclose(metrics["grad_norm"], 0.0, atol=1e-5)


def test_one_compilation_per_shape():
  learner, state, rollout, _ = setting()
  traces = []

  def counted(*args):
    traces.append(1)
    return learner.train_step(*args)

  learn = jax.jit(counted)
  for seed in range(3):
    reward = jax.random.normal(jax.random.key(seed), (NUM_ROWS,))
    state, _ = learn(state, rollout, reward, jax.random.key(seed), ROW_ID, None)
  assert len(traces) == 1


def test_a_completion_does_not_depend_on_its_batch():
  """Batch mates, slot, batch size and padding width are all without effect."""
  learner, state, rollout, keys = setting("confidence")
  order = jnp.array([5, 0, 3])
  alone = rollout_lib.sample_rollout(
    learner.bind(state.params, None),
    types.Prompts(
      tokens=jnp.pad(
        rollout.prompt[order], ((0, 0), (0, 7)), constant_values=17
      ),
      length=rollout.prompt_length[order],
      key=keys[order],
    ),
    learner.sampling,
  )
  for field in ("completion", "unmask_step", "support", "num_executed_steps"):
    np.testing.assert_array_equal(
      getattr(alone, field), getattr(rollout, field)[order]
    )
  for field in ("logprob", "entropy", "order_logprob"):
    np.testing.assert_allclose(
      getattr(alone, field), getattr(rollout, field)[order], atol=1e-4
    )
