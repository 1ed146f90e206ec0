"""Cached policies are scored exactly: proved by enumeration, in float64.

The network is small but real (`fixtures/attention.py`): keys and values of the
start state stay behind while the block is unmasked. A slow program walks
through everything that can happen; the package's estimator, summed over all
rollouts and all that it may draw, must give the gradient of the expected
reward, through the start state's keys and values too.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agrpo_jax import learner as learner_lib
from agrpo_jax import types
from agrpo_jax.objectives import agrpo
from agrpo_jax.objectives import mc_steps
from agrpo_jax.policies import cached
from agrpo_jax.policies import plain
from agrpo_jax.samplers import host
from agrpo_jax.samplers import rollout as rollout_lib
from fixtures import attention
from fixtures import enumeration
from fixtures import states

PROMPT = np.array([1, 2], np.int32)
TOYS = {
  "prefix": dict(block_length=2, num_denoise_steps=4, cache="prefix"),
  "dual": dict(block_length=2, num_denoise_steps=4, cache="dual"),
  "refreshed": dict(
    block_length=4, num_denoise_steps=4, cache="dual", cache_refresh=2
  ),
}


def make_sampling(toy, rule):
  return enumeration.make_sampling(
    unmask_rule=rule,
    completion_length=4,
    **enumeration.RULES[rule],
    **TOYS[toy],
  )


def policy_of(s):
  return host.Draw(s, guidance=0.0, batch_size=1, num_slots=0).policy_for(s)


@functools.cache
def enumerated(toy, rule):
  """(records, their probabilities, gradient of the expected reward)."""
  s = make_sampling(toy, rule)
  policy, params = policy_of(s), attention.parameters()
  with jax.enable_x64(True):

    def logits(params, start_C, partial_C, block):
      """[C, V] by the network itself, of which the window's mean something."""
      tokens = jnp.concatenate([PROMPT, start_C])[None]
      begin = block * s.block_length
      net = attention.network(params)
      length = jnp.array([len(PROMPT) + 4])
      # A window that reaches the end has the whole rest of the completion.
      size = 4 if policy.reaches_end else s.block_length
      window = jax.lax.dynamic_slice_in_dim(
        jnp.pad(partial_C, (0, 4)), begin, size
      )
      found = net.window_logits(
        net.keys_values(tokens, length),
        length,
        window[None, None],
        jnp.array([len(PROMPT)]) + begin,
        jnp.arange(size)[None, None] + len(PROMPT) + begin,
      )[0, 0]
      return jnp.roll(jnp.pad(found, ((0, 4 - size), (0, 0))), begin, axis=0)

    one = jax.jit(logits)

    def logits_of(start, partial, block):
      key = start, partial, block
      found = one(params, jnp.array(start), jnp.array(partial), block)
      return key, np.asarray(found)

    rows = enumeration.walk(logits_of, s)
    total = enumeration.gradient_of(rows)
    keys = [*total]
    start, partial, block = (jnp.array(x) for x in zip(*keys, strict=True))
    weight = jnp.array([total[key] for key in keys])

    def pulled(params):
      every = jax.vmap(logits, (None, 0, 0, 0))(params, start, partial, block)
      return (every * weight).sum()

    gradient = jax.jit(jax.grad(pulled))(params)
  records = enumeration.records_of(rows, s)
  records = records.replace(
    prompt=np.tile(PROMPT, (len(rows), 1)),
    prompt_length=np.full(len(rows), len(PROMPT), np.int32),
  )
  return records, np.array([p.prob for p in rows]), flat(gradient)


def flat(tree):
  return np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(tree)])


def error(found, truth):
  return np.linalg.norm(found - truth) / np.linalg.norm(truth)


def cosine(found, truth):
  return found @ truth / np.linalg.norm(found) / np.linalg.norm(truth)


@functools.cache
def gradient_of(s, likelihood, policy, kind):
  """Compiled: the gradient of given draws, and how far ratios stray from 1."""
  objective = agrpo.Agrpo(step_rule=kind, likelihood=likelihood)
  learner = learner_lib.Learner(
    bind=lambda params, lora: attention.network(params),
    optimizer=optax.sgd(1.0),
    sampling=s,
    objective=objective,
    group_size=1,
    microbatch=32,
    policy=policy,
  )

  def gradient(params, rows, drawn, reward_B, prob_B):
    if kind in mc_steps.DRAWN_STEPS:
      visits = agrpo.visits_of(rows, drawn, s, objective)
    else:
      is_visitable = mc_steps.visitable(rows, objective, s.eos_id)
      visits = agrpo.visits_of_blocks(rows, is_visitable, drawn, s, objective)
    # The loss is a mean over rows; here it is to be the expectation.
    scale = prob_B[:, None, None] * len(prob_B)
    visits = visits.replace(weight=visits.weight * scale)
    found, terms, _ = learner.gradient(
      states.initial(learner, params), rows, reward_B, visits
    )
    return found, terms.ratio_deviation

  return jax.jit(gradient)


def every_draw(s, step_rule, records):
  """What each row may draw, with weights times M times its probability."""
  objective = agrpo.Agrpo(step_rule=step_rule, num_mc_blocks=s.num_blocks)
  is_visitable = mc_steps.visitable(records, objective, s.eos_id)
  if step_rule in mc_steps.DRAWN_STEPS:
    prob = jax.vmap(mc_steps.step_prob, (0, 0, 0, None))(
      records.entropy, records.unmask_step, is_visitable, objective
    )
    # A uniform in the middle of the stretch of each step.
    middle = jnp.cumsum(prob, axis=1) - prob / 2
    drawn = jax.vmap(mc_steps.steps_at, (0, 0, None))(middle, prob, objective)
  else:
    weight = np.zeros(is_visitable.shape)
    for row, step_C in enumerate(np.asarray(records.unmask_step)):
      for position, step in enumerate(step_C):
        if step < s.max_steps:
          weight[row, step] += records.entropy[row, position]
    weight = np.where(is_visitable, weight + 1e-8, 0.0)
    prob = weight.reshape(len(weight), s.num_blocks, -1).sum(axis=2)
    if step_rule == "blocks":
      prob = (prob > 0).astype(float)
    prob = prob / prob.sum(axis=1, keepdims=True)
    middle = np.cumsum(prob, axis=1) - prob / 2
    drawn = mc_steps.draw_blocks(records, jnp.asarray(middle), objective, s)[1]
    if step_rule == "all":
      return drawn
  return mc_steps.Drawn(
    step=drawn.step, weight=drawn.weight * prob * prob.shape[1]
  )


def estimate(toy, rule, step_rule, likelihood="exact", policy=None):
  """(expected gradient of the estimator, how far policy ratios stray)."""
  s = make_sampling(toy, rule)
  records, prob, _ = enumerated(toy, rule)
  reward = np.array(
    [enumeration.reward_of(tuple(c)) for c in records.completion]
  )
  kind = "uniform" if step_rule in mc_steps.DRAWN_STEPS else "blocks"
  if step_rule == "all":
    kind = "all"
  with jax.enable_x64(True):
    found, deviation = gradient_of(s, likelihood, policy or policy_of(s), kind)(
      jax.tree.map(jnp.asarray, attention.parameters()),
      jax.tree.map(jnp.asarray, records),
      every_draw(s, step_rule, records),
      jnp.asarray(reward),
      jnp.asarray(prob),
    )
  return -flat(found), float(deviation)


@pytest.mark.parametrize("rule", enumeration.RULES)
@pytest.mark.parametrize("toy", TOYS)
def test_every_step_rule_gives_the_enumerated_gradient(toy, rule):
  truth = enumerated(toy, rule)[2]
  for step_rule in mc_steps.STEP_RULES:
    found, deviation = estimate(toy, rule, step_rule)
    assert error(found, truth) < 1e-9, step_rule
    assert deviation < 1e-9, step_rule


@dataclasses.dataclass(frozen=True)
class Stopped(cached.Cached):
  """Its start state's keys and values are numbers, not functions."""

  def open(self, network, *args, keeps):
    return jax.lax.stop_gradient(super().open(network, *args, keeps=True))


@pytest.mark.parametrize("rule", ["random", "confidence", "threshold"])
@pytest.mark.parametrize("toy", TOYS)
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


@pytest.mark.parametrize("rule", ["confidence", "threshold"])
@pytest.mark.parametrize("toy", TOYS)
def test_rollouts_follow_the_enumerated_law(toy, rule):
  """Frequencies of 20,000 rollouts, and what each of them recorded."""
  s = make_sampling(toy, rule)
  records, prob, _ = enumerated(toy, rule)
  num = 20_000
  with jax.enable_x64(True):
    prompts = types.Prompts(
      tokens=jnp.tile(jnp.asarray(PROMPT), (num, 1)),
      length=jnp.full(num, len(PROMPT), jnp.int32),
      key=jax.random.split(jax.random.key(0), num),
    )
    drawn = jax.jit(
      lambda params: rollout_lib.sample_rollout(
        attention.network(params), prompts, s, policy=policy_of(s)
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
