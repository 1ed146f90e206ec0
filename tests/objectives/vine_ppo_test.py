"""VinePPO: unbiased with values by restarts, and by nothing less than these.

Proved by enumeration in float64, as AGRPO is: a slow program walks through all
that can happen in a rollout, and in those that are taken up within it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agrpo_jax import types
from agrpo_jax.objectives import mc_steps
from agrpo_jax.objectives import vine_ppo
from agrpo_jax.samplers import rollout as rollout_lib
from fixtures import attention
from fixtures import cached_gradients
from fixtures import enumeration

PROMPT = cached_gradients.PROMPT
# The reward of another completion of the group: any number, since it knows
# nothing of this one.
OTHER = 0.3
CASES = [("hot", "threshold"), ("tokens", "confidence")]


@functools.cache
def continuations(toy, rule):
  """[V, B, B]: probability that path j goes on from path i's state.

  And bool [V, B], which paths come to the state: others ended before.
  """
  s = cached_gradients.make_sampling(toy, rule)
  records, prob, _ = cached_gradients.enumerated(toy, rule)
  chance, is_state = [], []
  for block in range(1, s.num_blocks):
    given = block * s.block_length
    is_here = records.unmask_step[:, given] < s.max_steps
    start = records.completion[:, :given]
    is_same = (start[:, None] == start[None]).all(axis=2)
    weight = prob[None] * (is_same & is_here[:, None] & is_here[None])
    chance.append(
      weight / np.maximum(weight.sum(axis=1, keepdims=True), 1e-300)
    )
    is_state.append(is_here)
  return np.array(chance), np.array(is_state)


def advantages(toy, rule, objective, value):
  """float64 [..., B, num_blocks], of all paths, given values [..., V, B].

  Each path has another completion in its group.
  """
  s = cached_gradients.make_sampling(toy, rule)
  value = np.moveaxis(value, -2, -1)
  reward = np.broadcast_to(rewards(toy, rule), value.shape[:-1])
  pair = np.stack([reward, np.full_like(reward, OTHER)], axis=-1)
  with jax.enable_x64(True):
    found = objective.block_advantage(
      jnp.asarray(pair), jnp.asarray(np.stack([value, value], axis=-2)), s
    )
    return np.asarray(found[..., 0, :])


def rewards(toy, rule):
  records, _, _ = cached_gradients.enumerated(toy, rule)
  return np.array([enumeration.reward_of(tuple(c)) for c in records.completion])


def mean_advantages(toy, rule, objective):
  """The same, averaged over every restart there may be, one of each state.

  State by state: an advantage is a sum of a part of each.
  """
  reward = rewards(toy, rule)
  chance, is_state = continuations(toy, rule)
  own = np.tile(reward, (len(chance), 1))
  base = advantages(toy, rule, objective, own)
  total = base.copy()
  for v, chance_BxB in enumerate(chance):
    # Restart j, in place of the completion's own reward.
    value = np.tile(own, (len(reward), 1, 1))
    value[:, v] = np.where(is_state[v], reward[:, None], reward)
    more = advantages(toy, rule, objective, value) - base
    total += (chance_BxB.T[..., None] * more).sum(axis=0)
  return total


def expected_gradient(toy, rule, advantage_BxN):
  """Minus the gradient of the loss, over all rollouts and all their steps."""
  s = cached_gradients.make_sampling(toy, rule)
  records, prob, _ = cached_gradients.enumerated(toy, rule)
  with jax.enable_x64(True):
    found, _ = cached_gradients.gradient_of(
      toy, s, "exact", cached_gradients.policy_of(s), "all"
    )(
      jax.tree.map(jnp.asarray, attention.parameters()),
      jax.tree.map(jnp.asarray, records),
      cached_gradients.every_draw(s, "all", records),
      jnp.asarray(advantage_BxN),
      jnp.asarray(prob),
    )
  return -cached_gradients.flat(found)


@pytest.mark.parametrize("target", vine_ppo.TARGETS)
@pytest.mark.parametrize("toy,rule", CASES)
def test_the_gradient_is_unbiased_with_one_restart(toy, rule, target):
  truth = cached_gradients.enumerated(toy, rule)[2]
  objective = vine_ppo.VinePpo(target=target)
  found = expected_gradient(toy, rule, mean_advantages(toy, rule, objective))
  assert cached_gradients.error(found, truth) < 1e-9


def test_it_is_unbiased_with_values_of_some_states():
  toy, rule = "tokens", "confidence"
  s = cached_gradients.make_sampling(toy, rule)
  truth = cached_gradients.enumerated(toy, rule)[2]
  chance, _ = continuations(toy, rule)
  reward = rewards(toy, rule)
  value = np.where(chance.any(axis=2), chance @ reward, reward)
  for target in vine_ppo.TARGETS:
    objective = vine_ppo.VinePpo(target=target, num_states=2)
    blocks = objective.restarts(s).blocks
    assert blocks == (1, 2)
    some = value[np.array(blocks) - 1]
    found = expected_gradient(toy, rule, advantages(toy, rule, objective, some))
    assert cached_gradients.error(found, truth) < 1e-9, target


@pytest.mark.parametrize("target", vine_ppo.TARGETS)
@pytest.mark.parametrize("toy,rule", CASES)
def test_common_mistakes_do_not_pass(toy, rule, target):
  truth = cached_gradients.enumerated(toy, rule)[2]
  objective = vine_ppo.VinePpo(target=target)

  def bias(advantage_BxN):
    found = expected_gradient(toy, rule, advantage_BxN)
    return cached_gradients.error(found, truth)

  reward = rewards(toy, rule)
  chance, is_state = continuations(toy, rule)
  # The completion's own continuation, in place of one drawn anew.
  own = np.tile(reward, (len(chance), 1))
  assert bias(advantages(toy, rule, objective, own)) > 0.05
  # Every block is given the advantage of the one behind it.
  right = mean_advantages(toy, rule, objective)
  assert bias(np.roll(right, -1, axis=1)) > 0.05
  # Every state is given the value of the next.
  value = np.where(is_state, chance @ reward, reward)
  later = np.concatenate([value[1:], reward[None]])
  assert bias(advantages(toy, rule, objective, later)) > 0.05


def test_advantages_by_hand():
  s = enumeration.make_sampling(
    completion_length=5, block_length=1, num_denoise_steps=5
  )
  reward = jnp.array([[1.0, 0.0, 0.5]])
  value = jnp.array([[[0.75, 0.25], [0.5, 0.0], [0.5, 0.5]]])
  objective = vine_ppo.VinePpo(num_states=2)
  assert objective.restarts(s).blocks == (1, 3)
  np.testing.assert_allclose(
    objective.block_advantage(reward, value, s)[0],
    [
      # V(s_0) is 0.25, 0.75 and 0.5: the mean of the two others.
      [0.5, -0.5, -0.5, 0.75, 0.75],
      [-0.25, -0.5, -0.5, 0.0, 0.0],
      [0.0, 0.0, 0.0, 0.0, 0.0],
    ],
  )
  objective = dataclasses.replace(objective, target="reward")
  np.testing.assert_allclose(
    objective.block_advantage(reward, value, s)[0, 0],
    [0.75, 0.25, 0.25, 0.75, 0.75],
  )


@pytest.mark.parametrize("num_states", range(5))
def test_states_are_spread_evenly(num_states):
  s = enumeration.make_sampling(
    completion_length=20, block_length=4, num_denoise_steps=5
  )
  objective = vine_ppo.VinePpo(num_states=num_states)
  assert not objective.problems(s)
  blocks = (0, *objective.restarts(s).blocks, 5)
  assert len(blocks) == 2 + (num_states or 4)
  assert {*np.diff(blocks)} <= {
    5 // (len(blocks) - 1),
    5 // (len(blocks) - 1) + 1,
  }


@pytest.mark.parametrize(
  "settings,problem",
  [
    (
      dict(num_states=3),
      "num_states=3 must be from 1 to 2, one less than the 3",
    ),
    (dict(num_states=-1), "num_states=-1 must be from 1 to 2"),
    (dict(num_restarts=0), "num_restarts=0 must be at least 1"),
    (
      dict(target="values"),
      "target='values' must be one of next_value, reward",
    ),
  ],
)
def test_settings_that_mean_nothing_are_refused(settings, problem):
  s = enumeration.make_sampling(
    completion_length=6, block_length=2, num_denoise_steps=3
  )
  (found,) = vine_ppo.VinePpo(**settings).problems(s)
  assert found.startswith(problem)


def test_a_single_block_has_no_state_to_value():
  s = enumeration.make_sampling(
    completion_length=6, block_length=6, num_denoise_steps=3
  )
  (found,) = vine_ppo.VinePpo().problems(s)
  assert "block_length=6 is the whole completion" in found
  # What is wrong with the sampler is told once, by others.
  assert not vine_ppo.VinePpo().problems(dataclasses.replace(s, block_length=0))


def test_a_budget_of_the_batch_goes_to_blocks_with_an_advantage():
  toy, rule = "tokens", "confidence"
  s = cached_gradients.make_sampling(toy, rule)
  records, _, _ = cached_gradients.enumerated(toy, rule)
  is_whole = (records.unmask_step < s.max_steps).all(axis=1)
  rows = jax.tree.map(lambda x: jnp.asarray(x[is_whole][:3]), records)
  advantage = jnp.zeros((3, 4)).at[1, 2].set(0.5).at[2, 0].set(-0.5)
  draw = jax.jit(mc_steps.draw_of_batch, static_argnums=(3, 4))
  settings = mc_steps.McSteps(budget="batch")
  weight = draw(rows, advantage, (jnp.arange(8) + 0.5) / 8, settings, s)
  np.testing.assert_array_equal(weight > 0, advantage != 0)


# Taking up completions.


@functools.cache
def program(toy, rule, num_slots=0):
  s = cached_gradients.make_sampling(toy, rule)
  return jax.jit(
    lambda params, prompts: rollout_lib.sample_rollout(
      attention.network(params),
      prompts,
      s,
      policy=cached_gradients.policy_of(s),
      num_slots=num_slots,
    )
  )


def draw(program, key_B, start=None):
  num = len(key_B)
  prompts = types.Prompts(
    tokens=jnp.tile(jnp.asarray(PROMPT), (num, 1)),
    length=jnp.full(num, len(PROMPT), jnp.int32),
    key=key_B,
    start=start,
  )
  return program(jax.tree.map(jnp.asarray, attention.parameters()), prompts)


def start_of(rollout, block_B):
  return types.Start(
    completion=jnp.asarray(rollout.completion),
    unmask_step=jnp.asarray(rollout.unmask_step),
    block=jnp.asarray(block_B, jnp.int32),
  )


@pytest.mark.parametrize(
  "toy,rule,num_slots", [("none", "random", 0), ("prefix", "threshold", 3)]
)
def test_with_its_own_key_a_completion_goes_on_as_it_did(toy, rule, num_slots):
  """Which makes it no draw anew: values have keys of their own."""
  key_B = jax.random.split(jax.random.key(3), 12)
  whole = draw(program(toy, rule), key_B)
  again = program(toy, rule, num_slots)
  s = cached_gradients.make_sampling(toy, rule)
  is_both = np.asarray(whole.unmask_step < s.max_steps).all(axis=1)
  assert 6 < is_both.sum()
  block_B = np.where(is_both, np.arange(12) % 2, 0)
  taken_up = draw(again, key_B, start_of(whole, block_B))
  for name in ("completion", "unmask_step"):
    np.testing.assert_array_equal(getattr(taken_up, name), getattr(whole, name))
  is_new = np.arange(4) >= 2 * block_B[:, None]
  np.testing.assert_allclose(
    taken_up.logprob, np.where(is_new, whole.logprob, 0.0), atol=1e-6
  )
  # What was given is no step of this row.
  given = [len({*row[:2].tolist()}) for row in np.asarray(whole.unmask_step)]
  np.testing.assert_array_equal(
    taken_up.num_executed_steps,
    whole.num_executed_steps - np.where(block_B, given, 0),
  )
  # At block 0 it is a fresh draw: of what stands in a start at the block and
  # behind it nothing is seen.
  other = jax.tree.map(lambda x: x[::-1], whole)
  fresh = draw(again, key_B, start_of(other, np.zeros(12)))
  for name in ("completion", "unmask_step", "num_executed_steps"):
    np.testing.assert_array_equal(getattr(fresh, name), getattr(whole, name))


def test_restarts_follow_the_enumerated_law():
  """Frequencies of 20,000, among the paths that go on from the same state."""
  num, toy, rule = 20_000, *CASES[0]
  records, prob, _ = cached_gradients.enumerated(toy, rule)
  chance, is_state = continuations(toy, rule)
  start_B = np.flatnonzero(is_state[0])
  row_R = np.resize(start_B, num)
  with jax.enable_x64(True):
    drawn = draw(
      program(toy, rule),
      jax.random.split(jax.random.key(0), num),
      start_of(jax.tree.map(lambda x: x[row_R], records), np.ones(num)),
    )
  found = np.asarray(drawn.completion)
  np.testing.assert_array_equal(found[:, :2], records.completion[row_R, :2])
  np.testing.assert_array_equal(
    drawn.unmask_step[:, :2], records.unmask_step[row_R, :2]
  )
  # How a state was come to is not looked at: paths are told apart by tokens and
  # by the steps from there on.
  place = {}
  for row, (c, u) in enumerate(
    zip(records.completion, records.unmask_step, strict=True)
  ):
    place.setdefault((*c.tolist(), *u[2:].tolist()), []).append(row)
  names = np.concatenate([found, np.asarray(drawn.unmask_step)[:, 2:]], axis=1)
  kind = {name: number for number, name in enumerate(place)}
  index = np.array([kind[tuple(name)] for name in names.tolist()])
  mean_B = chance[0][start_B].mean(axis=0)
  prob_K = np.array([mean_B[rows].sum() for rows in place.values()])
  count, expected = np.bincount(index, minlength=len(place)), num * prob_K
  assert count[prob_K == 0].sum() == 0
  is_common = expected > 5
  chi_square = ((count - expected)[is_common] ** 2 / expected[is_common]).sum()
  degrees = is_common.sum() - 1
  assert degrees > 20
  assert chi_square < degrees + 4 * np.sqrt(2 * degrees)
  # And not that of completions drawn whole.
  blind = num * np.array([prob[rows].sum() for rows in place.values()])
  assert ((count - blind) ** 2 / blind)[blind > 5].sum() > 10 * degrees
