"""Rollouts with a cache: their record, slots, the first policy ratio."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agrpo_jax import learner as learner_lib
from agrpo_jax import types
from agrpo_jax.models import transformer
from agrpo_jax.objectives import agrpo
from agrpo_jax.policies import block_causal
from agrpo_jax.policies import cached
from agrpo_jax.policies import plain
from agrpo_jax.samplers import host
from agrpo_jax.samplers import noise
from agrpo_jax.samplers import rollout as rollout_lib
from agrpo_jax.samplers import sampling as sampling_lib
from fixtures import recordings
from fixtures import states

B = 12
ROW_ID = np.stack([np.arange(B) // 4, np.arange(B) % 4], 1).astype(np.uint32)


@functools.cache
def toy(certainty=1.0):
  """A random network; the greater the certainty, the less is left to chance."""
  shape, params = recordings.random_network()
  rng = np.random.default_rng(1)

  # Attention that is sharp, so that stale keys and values show.
  def sharp(x: jax.Array) -> jax.Array:
    wide = rng.normal(0.0, 0.4, x.shape).astype(np.float32)
    return jnp.asarray(wide) if x.ndim > 1 and x.shape[-1] > 1 else x

  params = jax.tree.map(sharp, params)
  params["head"]["kernel"] *= certainty
  return shape, params


def make_sampling(rule, **settings):
  of_rule = {
    "threshold": dict(threshold=0.1),
    "soft_threshold": dict(threshold=0.1, soft_width=0.5),
  }
  shape, _ = toy()
  return sampling_lib.Sampling(
    **{
      "mask_id": shape.mask_id,
      "eos_id": shape.eos_id,
      "completion_length": 12,
      "block_length": 4,
      "num_denoise_steps": 12,
      "unmask_rule": rule,
      **of_rule.get(rule, {}),
      **settings,
    }
  )


def policy_of(s):
  return host.Draw(s, guidance=0.0, batch_size=1, num_slots=0).policy_for(s)


def sample(s, num_slots=0, certainty=1.0):
  shape, params = toy(certainty)
  rng = np.random.default_rng(0)
  prompts = types.Prompts(
    tokens=jnp.asarray(rng.integers(0, 30, (B, 6)), jnp.int32),
    length=jnp.asarray(rng.integers(2, 7, B), jnp.int32),
    key=noise.row_keys(jax.random.key(1), ROW_ID),
  )
  return jax.jit(
    lambda params: rollout_lib.sample_rollout(
      transformer.bind(shape, params),
      prompts,
      s,
      policy=policy_of(s),
      num_slots=num_slots,
    )
  )(params)


CACHES = {
  "none": {},
  "prefix": dict(cache="prefix"),
  "dual": dict(cache="dual"),
  "refreshed": dict(cache="dual", cache_refresh=2),
}


def learner_of(s, policy, microbatch=4):
  """One that scores every denoising step."""
  shape, _ = toy()
  return learner_lib.Learner(
    bind=lambda params, lora: transformer.bind(shape, params),
    optimizer=optax.sgd(1.0),
    sampling=s,
    objective=agrpo.Agrpo(step_rule="all"),
    group_size=4,
    microbatch=microbatch,
    policy=policy,
  )


def first_step(s, rollout, policy, certainty=1.0):
  """The metrics of a train step."""
  _, params = toy(certainty)
  return states.first_step(learner_of(s, policy), params, rollout, ROW_ID)[1]


@pytest.mark.parametrize(
  "cache,rule",
  [
    ("none", "threshold"),
    ("prefix", "random"),
    ("dual", "random"),
    ("dual", "soft_threshold"),
    ("refreshed", "threshold"),
  ],
)
def test_the_first_policy_ratio_is_one(cache, rule):
  s = make_sampling(rule, **CACHES[cache])
  rollout = sample(s)
  metrics = first_step(s, rollout, policy_of(s))
  assert metrics["policy_ratio/max_deviation"] < 1e-4
  assert metrics["grad_norm"] > 0
  num_steps = np.asarray(rollout.num_executed_steps)
  if rule != "random":
    assert num_steps.min() < 12
  memories = {"none": num_steps.sum(), "refreshed": 6 * B}.get(cache, 3 * B)
  assert np.asarray(rollout.num_whole_passes).sum() <= memories
  if cache == "dual" and rule == "random":
    other = first_step(s, rollout, plain.PLAIN)
    assert other["policy_ratio/max_deviation"] > 1e-3


@pytest.mark.parametrize(
  "cache,rule,settings",
  [
    # A probability next to 1 is mostly rounding, and who is first hangs on it.
    ("none", "confidence", dict(block_length=12)),
    # Two positions, then one, then one.
    ("dual", "confidence", dict(num_denoise_steps=9)),
    ("none", "random", dict(num_denoise_steps=9)),
  ],
)
def test_it_is_one_where_little_is_left_to_chance(cache, rule, settings):
  s = make_sampling(rule, **CACHES[cache], **settings)
  rollout = sample(s, certainty=30.0)
  metrics = first_step(s, rollout, policy_of(s), certainty=30.0)
  assert metrics["policy_ratio/max_deviation"] < 1e-4


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_completions_do_not_depend_on_the_slots(cache):
  s = make_sampling("threshold", **CACHES[cache])
  whole = sample(s)
  # Rows end early at different times, and others take their slots.
  num = np.asarray(whole.num_executed_steps)
  assert len({*num.tolist()}) > 2
  for num_slots in (1, 3, 5):
    found = sample(s, num_slots)
    for name in ("completion", "unmask_step", "num_executed_steps"):
      np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
    np.testing.assert_allclose(found.logprob, whole.logprob, atol=1e-5)
    used = np.asarray(found.num_slot_steps).sum()
    assert used >= num.sum()
    if num_slots == 1:
      np.testing.assert_array_equal(found.num_slot_steps, num)


def test_a_cache_that_is_renewed_at_every_step_is_none():
  """Up to rounding: a window of the state that it shares is a whole pass."""
  s = make_sampling("confidence", cache="dual", cache_refresh=1)
  found, whole = sample(s), sample(make_sampling("confidence"))
  np.testing.assert_array_equal(found.completion, whole.completion)
  np.testing.assert_array_equal(found.unmask_step, whole.unmask_step)
  np.testing.assert_allclose(found.logprob, whole.logprob, atol=1e-4)
  other = sample(make_sampling("confidence", cache="dual"))
  assert np.abs(other.logprob - whole.logprob).max() > 0.01


def test_windows_to_the_end_have_few_lengths():
  assert cached._lengths(12, 4) == [4, 8, 12]
  assert cached._lengths(256, 32) == [64, 128, 192, 256]
  assert cached._lengths(384, 12) == [96, 192, 288, 384]
  assert cached._lengths(20, 4) == [8, 12, 16, 20]


def test_few_numbers_of_states_are_compiled_for(monkeypatch):
  """None but the whole under a schedule, whose blocks use up all steps."""
  monkeypatch.setattr(learner_lib, "_MAX_SIZES", 5)
  s = make_sampling("threshold", cache="dual")
  policy = policy_of(s)
  assert learner_lib._sizes(20, s, policy) == [20, 10, 5, 3, 2]
  assert learner_lib._sizes(3, s, policy) == [3, 2, 1]
  s = make_sampling("confidence", cache="dual")
  assert learner_lib._sizes(20, s, policy) == [20]
  # Where completions end early, each has states of its own number.
  spans = block_causal.BlockCausal(4)
  assert learner_lib._sizes(20, s, spans) == [20, 10, 5, 3, 2]


def test_units_are_cut_off_behind_their_last_state():
  """Few of a block's possible steps run; the gradient is that of all."""
  s = make_sampling("threshold", cache="dual")
  rollout = sample(s)
  _, params = toy()

  def gradient(sizes):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(learner_lib, "_sizes", lambda *_: sizes)
      learner = learner_of(s, policy_of(s), microbatch=2)
      visits, _ = learner.objective.visits(
        rollout,
        None,
        jax.random.key(0),
        jax.random.split(jax.random.key(0), B),
        s,
      )
      visits = jax.tree.map(lambda x: x[0], visits)
      advantage_B = jnp.arange(B) % 3 - 1.0
      return jax.jit(learner.gradient)(
        states.initial(learner, params), rollout, advantage_B, visits
      )

  whole, terms, num = gradient([4])
  cut, cut_terms, cut_num = gradient([4, 2, 1])
  assert int(num) == int(cut_num)
  np.testing.assert_allclose(cut_terms.loss, terms.loss, rtol=1e-5)
  for one, other in zip(
    jax.tree.leaves(whole), jax.tree.leaves(cut), strict=True
  ):
    np.testing.assert_allclose(other, one, atol=1e-3 * np.abs(one).max())
