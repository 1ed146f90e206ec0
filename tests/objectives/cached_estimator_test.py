"""Cached policies are scored exactly: proved by enumeration, in float64.

The estimator must give the gradient of the expected reward, through the start
state's keys and values too (`fixtures/cached_gradients.py`). Every cache with
every rule and every step rule is a proof of its own, beside this file:

    python -m pytest tests/objectives/cached_estimator_proof.py
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agrpo_jax import types
from agrpo_jax.policies import cached
from agrpo_jax.policies import plain
from agrpo_jax.samplers import rollout as rollout_lib
from fixtures import attention
from fixtures import cached_gradients

PROMPT, TOYS = cached_gradients.PROMPT, cached_gradients.TOYS
enumerated = cached_gradients.enumerated
estimate = cached_gradients.estimate
error = cached_gradients.error
make_sampling = cached_gradients.make_sampling
policy_of = cached_gradients.policy_of


@pytest.mark.parametrize("rule", ["confidence", "threshold"])
def test_the_estimator_is_the_enumerated_gradient(rule):
  truth = enumerated("dual", rule)[2]
  for step_rule in ("entropy", "entropy_blocks", "all"):
    found, deviation = estimate("dual", rule, step_rule)
    assert error(found, truth) < 1e-9, step_rule
    assert deviation < 1e-9, step_rule


@pytest.mark.parametrize(
  "toy,rule",
  [
    ("prefix", "random"),
    ("refreshed", "soft_threshold"),
    ("shifted_prefix", "threshold"),
    ("shifted_dual", "confidence"),
    # Whose last block is shorter.
    ("short", "confidence"),
    ("short_prefix", "random"),
    ("short_dual", "threshold"),
    ("shifted_short", "confidence"),
    ("short_block", "dynamic"),
  ],
)
def test_all_steps_under_other_caches(toy, rule):
  found, deviation = estimate(toy, rule, "all")
  assert error(found, enumerated(toy, rule)[2]) < 1e-9
  assert deviation < 1e-9


@pytest.mark.parametrize("rule", ["origin", "confidence", "entropy"])
def test_shifted_logits_under_the_schedule_of_dream(rule):
  """No cache, but a network of which keys that are seen make a difference."""
  truth = enumerated("shifted", rule)[2]
  for step_rule in ("uniform", "entropy", "all"):
    found, deviation = estimate("shifted", rule, step_rule)
    assert error(found, truth) < 1e-9, step_rule
    assert deviation < 1e-9, step_rule


@pytest.mark.parametrize("rule", ["sequential", "confidence", "dynamic"])
def test_block_causal_attention_with_its_cache_and_without(rule):
  truth = enumerated("block", rule)[2]
  np.testing.assert_allclose(enumerated("uncached", rule)[2], truth, atol=1e-12)
  for toy, step_rule in (
    ("block", "uniform"),
    ("block", "blocks"),
    ("block", "all"),
    ("uncached", "all"),
  ):
    found, deviation = estimate(toy, rule, step_rule)
    assert error(found, truth) < 1e-9, (toy, step_rule)
    assert deviation < 1e-9, (toy, step_rule)


@pytest.mark.parametrize(
  "toy, rule", [("led", "confidence"), ("parts", "dynamic")]
)
def test_shifted_logits_in_blocks_with_their_cache_and_without(toy, rule):
  """A block's first position leads; in parts of a block and in whole ones."""
  truth = enumerated(toy, rule)[2]
  uncached = f"{toy}_uncached"
  np.testing.assert_allclose(enumerated(uncached, rule)[2], truth, atol=1e-12)
  for name, step_rule in ((toy, "blocks"), (toy, "all"), (uncached, "all")):
    found, deviation = estimate(name, rule, step_rule)
    assert error(found, truth) < 1e-9, (name, step_rule)
    assert deviation < 1e-9, (name, step_rule)


@dataclasses.dataclass(frozen=True)
class Stopped(cached.Cached):
  """Its start state's keys and values are numbers, not functions."""

  def open(self, network, *args, keeps):
    return jax.lax.stop_gradient(super().open(network, *args, keeps=True))


@pytest.mark.parametrize(
  "toy,rule",
  [("dual", "confidence"), ("dual", "threshold"), ("prefix", "random")],
)
def test_what_others_do_does_not_pass(toy, rule):
  """Scored without the cache, stopped at the cache, without the order."""
  s = make_sampling(toy, rule)
  truth = enumerated(toy, rule)[2]
  found, deviation = estimate(toy, rule, "all", policy=plain.PLAIN)
  assert error(found, truth) > 0.05
  assert deviation > 0.05
  policy = policy_of(s)
  stopped = Stopped(policy.block_length, policy.reaches_end, policy.refresh)
  found, deviation = estimate(toy, rule, "all", policy=stopped)
  assert error(found, truth) > 0.05
  assert deviation < 1e-9  # the same function, of which a part has no gradient
  if rule != "random":
    found, _ = estimate(toy, rule, "all", likelihood="product")
    assert error(found, truth) > 0.05


@pytest.mark.parametrize(
  "toy,rule",
  [
    ("dual", "threshold"),
    ("refreshed", "confidence"),
    ("shifted", "origin"),
    ("block", "dynamic"),
    ("led", "random"),
    ("parts", "threshold"),
    ("short", "origin"),
    ("short_dual", "confidence"),
    ("short_block", "soft_threshold"),
  ],
)
def test_rollouts_follow_the_enumerated_law(toy, rule):
  """Frequencies of 20,000 rollouts, and what each of them recorded."""
  s = make_sampling(toy, rule)
  records, prob, _ = enumerated(toy, rule)
  num = 20_000
  prompt = cached_gradients.prompt_of(toy)
  with jax.enable_x64(True):
    prompts = types.Prompts(
      tokens=jnp.tile(jnp.asarray(prompt), (num, 1)),
      length=jnp.full(num, len(prompt), jnp.int32),
      key=jax.random.split(jax.random.key(0), num),
    )
    drawn = jax.jit(
      lambda params: rollout_lib.sample_rollout(
        cached_gradients.network_of(toy, params),
        prompts,
        s,
        policy=policy_of(s),
      )
    )(jax.tree.map(jnp.asarray, attention.parameters()))
  index = {
    (tuple(c), tuple(u)): row
    for row, (c, u) in enumerate(
      zip(
        records.completion.tolist(), records.unmask_step.tolist(), strict=True
      )
    )
  }
  found = np.array(
    [
      index[tuple(c), tuple(u)]
      for c, u in zip(
        np.asarray(drawn.completion).tolist(),
        np.asarray(drawn.unmask_step).tolist(),
        strict=True,
      )
    ]
  )
  count, expected = np.bincount(found, minlength=len(prob)), num * prob
  is_common = expected > 5
  chi_square = ((count - expected)[is_common] ** 2 / expected[is_common]).sum()
  degrees = is_common.sum() - 1
  assert abs(chi_square - degrees) < 4 * np.sqrt(2 * degrees)
  np.testing.assert_allclose(drawn.logprob, records.logprob[found], atol=1e-12)
  np.testing.assert_allclose(
    drawn.order_logprob, records.order_logprob[found], atol=1e-12
  )
  np.testing.assert_array_equal(
    drawn.num_executed_steps, records.num_executed_steps[found]
  )
