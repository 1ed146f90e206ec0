"""The gradient is unbiased: proved by enumeration on a toy.

The toy's network is a table: every partial completion has its own logits at
every position. A slow float64 program, `fixtures/enumeration.py`, walks
through everything that can happen in a rollout, down to the tokens drawn and
discarded, and knows the expected reward and its gradient. The package's
estimator, summed over all rollouts and all drawn steps with their
probabilities, must give the same gradient.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agrpo_jax import learner as learner_lib
from agrpo_jax import types
from agrpo_jax.objectives import advantage as advantage_lib
from agrpo_jax.objectives import agrpo
from agrpo_jax.objectives import base
from agrpo_jax.objectives import mc_steps
from agrpo_jax.policies import row as row_lib
from agrpo_jax.samplers import rollout as rollout_lib
from agrpo_jax.samplers import rules
from agrpo_jax.samplers import sampling as sampling_lib
from fixtures import enumeration
from fixtures import states

V, MASK, RULES = enumeration.V, enumeration.MASK, enumeration.RULES
make_sampling, reward_of = enumeration.make_sampling, enumeration.reward_of


def make_table(num_tokens: int, seed: int = 0) -> np.ndarray:
  """float64 [states, C, V]: logits of every partial completion."""
  rng = np.random.default_rng(seed)
  return rng.normal(size=((V + 1) ** num_tokens, num_tokens, V)) * 1.2


def table_network(table: jax.Array) -> types.Network:
  """The network that looks its logits up."""
  num_tokens = table.shape[1]

  def logits(tokens_BxL, length_B, position_BxS):
    start_B = length_B - num_tokens
    column_BxC = start_B[:, None] + jnp.arange(num_tokens)[None]
    completion_BxC = jnp.take_along_axis(tokens_BxL, column_BxC, axis=1)
    place_C = (V + 1) ** jnp.arange(num_tokens)
    state_B = (completion_BxC * place_C[None]).sum(axis=1)
    return table[state_B[:, None], position_BxS - start_B[:, None]]

  return types.Network(logits)


def walk(table: np.ndarray, s: sampling_lib.Sampling):
  """All paths of a table's rollouts; the keys are states."""

  def logits_of(start, partial, block):
    del start, block
    state = sum(t * (V + 1) ** c for c, t in enumerate(partial))
    return state, table[state]

  return enumeration.walk(logits_of, s)


def enumerate_table(table: np.ndarray, s: sampling_lib.Sampling):
  """(value, gradient, records, prob of each record) of a table."""
  rows = walk(table, s)
  prob = np.array([p.prob for p in rows])
  np.testing.assert_allclose(prob.sum(), 1.0, atol=1e-12)
  value = sum(p.prob * reward_of(p.completion) for p in rows)
  gradient = np.zeros_like(table)
  for state, part in enumeration.gradient_of(rows).items():
    gradient[state] = part
  records = jax.tree.map(jnp.asarray, enumeration.records_of(rows, s))
  return value, gradient, records, prob


@functools.cache
def enumerated(s: sampling_lib.Sampling):
  """(value, gradient, records, prob of each record) of the toy."""
  return enumerate_table(make_table(s.completion_length), s)


def expected_estimate(
  s: sampling_lib.Sampling, objective: agrpo.Agrpo
) -> np.ndarray:
  """Minus the gradient of the loss, over all rollouts and drawn steps."""
  _, _, records, prob = enumerated(s)
  reward = np.array(
    [reward_of(tuple(c)) for c in np.asarray(records.completion)]
  )
  is_visitable_BxK = mc_steps.visitable(records, objective, s.eos_ids)

  def visits(entropy_C, unmask_step_C, is_visitable_K):
    prob_K = mc_steps.step_prob(
      entropy_C,
      unmask_step_C,
      is_visitable_K,
      objective,
      mc_steps.is_mixed(s),
    )
    # One uniform in the middle of each stretch of the inverse distribution
    # function, counted by the stretch's length: the integral over [0, 1).
    middle_K = jnp.cumsum(prob_K) - prob_K / 2
    return prob_K, mc_steps.steps_at(middle_K, prob_K, objective)

  prob_BxK, drawn = jax.jit(jax.vmap(visits))(
    records.entropy, records.unmask_step, is_visitable_BxK
  )
  rows, columns = np.nonzero(np.asarray(prob_BxK))
  drawn_steps = np.asarray(drawn.step)[rows, columns]
  weights = prob[rows] * np.asarray(prob_BxK * drawn.weight)[rows, columns]
  pairs = jax.tree.map(lambda x: x[rows], records)
  # What is drawn is given: one program serves all rules that draw steps.
  compiled = estimator(s, dataclasses.replace(objective, step_rule="uniform"))
  gradient, deviation = compiled(
    jnp.asarray(make_table(s.completion_length), jnp.float32),
    pairs,
    jnp.asarray(drawn_steps, jnp.int32),
    jnp.asarray(weights, jnp.float32),
    jnp.asarray(reward[rows], jnp.float32),
  )
  assert float(deviation) < 1e-4
  return -np.asarray(gradient, np.float64)


@functools.cache
def estimator(s: sampling_lib.Sampling, objective: agrpo.Agrpo):
  """Compiled: gradient of the loss of many visits, how far ratios stray.

  The loss is their sum; the learner's is the mean over rows.
  """
  learner = learner_lib.Learner(
    bind=lambda table, lora: table_network(table),
    optimizer=optax.sgd(1.0),
    sampling=s,
    objective=objective,
    group_size=1,
    microbatch=64,
  )

  def gradient(table, rows, step_B, weight_B, reward_B):
    drawn = mc_steps.Drawn(
      step=step_B[:, None], weight=weight_B[:, None] * weight_B.size
    )
    visits = agrpo.visits_of(rows, drawn, s, objective)
    found, terms, _ = learner.gradient(
      states.initial(learner, table), rows, reward_B, visits
    )
    return found, terms.ratio_deviation

  return jax.jit(gradient)


def exact_gradient(
  s: sampling_lib.Sampling,
  objective: agrpo.Agrpo,
  table: np.ndarray,
  records: types.Rollout,
  prob: np.ndarray,
) -> np.ndarray:
  """float64: the sum of the package's scores of all steps, times the reward."""
  rows, steps = np.nonzero(mc_steps.visitable(records, objective, s.eos_ids))
  reward = [reward_of(tuple(c)) for c in np.asarray(records.completion)]
  weight = (prob * np.array(reward))[rows]
  records = jax.tree.map(lambda x: np.asarray(x)[rows], records)
  with jax.enable_x64(True):

    def one(table, row, denoise_step):
      is_masked_C, offset_W = agrpo.state(row, denoise_step, s, objective)
      visit = base.Visits(
        is_masked=is_masked_C,
        offset=offset_W,
        block=denoise_step // s.steps_per_block,
        denoise_step=denoise_step,
        weight=jnp.float64(1.0),
      )
      logits_BxWxV = row_lib.logits_at(
        table_network(table),
        row.prompt[None],
        row.prompt_length[None],
        jnp.where(is_masked_C, MASK, row.completion)[None],
        offset_W[None],
      )
      factors = agrpo.step_logprob(logits_BxWxV[0], row, visit, s, objective)
      return jnp.where(factors.is_factor, factors.logprob, 0.0).sum()

    def total(table):
      score = jax.vmap(one, (None, 0, 0))(
        table, records, jnp.asarray(steps, jnp.int32)
      )
      return (jnp.asarray(weight) * score).sum()

    gradient = jax.jit(jax.grad(total))(jnp.asarray(table, jnp.float64))
    assert gradient.dtype == jnp.float64
    return np.asarray(gradient)


def error(estimate: np.ndarray, truth: np.ndarray) -> float:
  return float(np.linalg.norm(estimate - truth) / np.linalg.norm(truth))


PARALLEL = ("threshold", "dynamic", "factor", "soft_threshold")
TOYS = {
  "one_block": dict(completion_length=3, block_length=3, num_denoise_steps=3),
  "two_at_once": dict(completion_length=4, block_length=4, num_denoise_steps=2),
  "blocks": dict(completion_length=4, block_length=2, num_denoise_steps=4),
  # 3 positions in 2 steps, then 1.
  "short_last": dict(completion_length=4, block_length=3, num_denoise_steps=4),
  "cold": dict(
    completion_length=3, block_length=3, num_denoise_steps=3, temperature=0.6
  ),
  "top_k": dict(
    completion_length=4, block_length=2, num_denoise_steps=4, top_k=2
  ),
  "top_p": dict(
    completion_length=3, block_length=3, num_denoise_steps=3, top_p=0.8
  ),
  "top_k_and_p": dict(
    completion_length=4,
    block_length=2,
    num_denoise_steps=2,
    top_k=3,
    top_p=0.9,
    top_p_rule="drop",
    temperature=2.0,
  ),
  "single_token_blocks": dict(
    completion_length=2, block_length=1, num_denoise_steps=2
  ),
  # Dream's schedule: steps unmask 0, 1, 2; in blocks 0, 0, 2.
  "dream": dict(
    completion_length=3, block_length=3, num_denoise_steps=3, schedule="dream"
  ),
  "dream_blocks": dict(
    completion_length=4,
    block_length=2,
    num_denoise_steps=6,
    schedule="dream",
    last_time=0.1,
    temperature=0.7,
    top_k=2,
  ),
  "dream_top_p": dict(
    completion_length=3,
    block_length=3,
    num_denoise_steps=2,
    schedule="dream",
    top_k=2,
    top_p=0.8,
    truncate_first="top_p",
    temperature=3.0,
  ),
}


DREAM_CASES = [
  (toy, rule)
  for toy in ("dream", "dream_blocks")
  for rule in ("random", "origin", "confidence", "entropy", "margin")
]
# Through the whole learner, which takes a while: the scores of all rules on
# more toys are proved below.
CASES = [
  (toy, rule)
  for toy in TOYS
  for rule in RULES
  if rule in ("random", "confidence", "entropy") or toy == "top_k_and_p"
] + [("dream", "origin")]


@pytest.mark.parametrize("step_rule", mc_steps.DRAWN_STEPS)
@pytest.mark.parametrize("toy,rule", CASES)
def test_the_estimator_is_unbiased(toy, rule, step_rule):
  s = make_sampling(unmask_rule=rule, **RULES[rule], **TOYS[toy])
  _, gradient, _, _ = enumerated(s)
  estimate = expected_estimate(
    s, agrpo.Agrpo(num_mc_steps=1, step_rule=step_rule)
  )
  assert error(estimate, gradient) < 2e-5


@pytest.mark.parametrize(
  "toy,rule",
  [
    *itertools.product(("one_block", "short_last", "top_k"), RULES),
    *DREAM_CASES,
  ],
)
def test_the_scores_of_all_steps_are_the_gradient_in_float64(toy, rule):
  s = make_sampling(unmask_rule=rule, **RULES[rule], **TOYS[toy])
  _, gradient, records, prob = enumerated(s)
  table = make_table(s.completion_length)
  found = exact_gradient(s, agrpo.Agrpo(), table, records, prob)
  assert error(found, gradient) < 1e-9


@pytest.mark.parametrize("rule", [*PARALLEL, "entropy_bounded"])
def test_blocks_take_one_step_or_two_and_keep_their_indices(rule):
  """What the toys are to prove is there to be seen."""
  s = make_sampling(unmask_rule=rule, **RULES[rule], **TOYS["blocks"])
  _, _, records, prob = enumerated(s)
  step = np.asarray(records.unmask_step)
  is_quick = (step[:, :2] == 0).all(axis=1)
  goes_on = step[:, 2] < s.max_steps
  assert prob[is_quick & goes_on].sum() > 0.02
  # The first state is the same always, which is all that one of them looks at;
  # and of two positions the factor takes both.
  if rule not in ("entropy_bounded", "factor"):
    assert prob[~is_quick & goes_on].sum() > 0.02
  # The second block begins with its own first index in any case.
  assert {*step[goes_on, 2:].min(axis=1).tolist()} == {2}


@pytest.mark.parametrize(
  "toy,rule",
  [
    *itertools.product(("blocks", "top_k_and_p"), RULES),
    ("dream", "origin"),
    ("dream_blocks", "confidence"),
  ],
)
def test_the_enumerated_gradient_is_the_slope_of_the_expected_reward(toy, rule):
  s = make_sampling(unmask_rule=rule, **RULES[rule], **TOYS[toy])
  table = make_table(s.completion_length)
  _, gradient, _, _ = enumerated(s)
  direction = np.random.default_rng(1).normal(size=table.shape)

  def value(shift):
    paths = walk(table + shift * direction, s)
    return sum(p.prob * reward_of(p.completion) for p in paths)

  slope = (value(1e-5) - value(-1e-5)) / 2e-5
  np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-6)


@pytest.mark.parametrize("rule", ["confidence", *PARALLEL])
@pytest.mark.parametrize("toy", ["one_block", "two_at_once"])
def test_the_released_product_is_biased_under_rules_that_see_draws(toy, rule):
  s = make_sampling(unmask_rule=rule, **RULES[rule], **TOYS[toy])
  _, gradient, _, _ = enumerated(s)
  estimate = expected_estimate(
    s, agrpo.Agrpo(num_mc_steps=1, likelihood="product")
  )
  assert error(estimate, gradient) > 0.05


@pytest.mark.parametrize(
  "rule", ["random", "origin", "entropy", "margin", "entropy_bounded"]
)
def test_the_product_is_exact_where_the_order_ignores_the_draws(rule):
  s = make_sampling(unmask_rule=rule, **RULES[rule], **TOYS["blocks"])
  _, gradient, _, _ = enumerated(s)
  estimate = expected_estimate(
    s, agrpo.Agrpo(num_mc_steps=1, likelihood="product")
  )
  assert error(estimate, gradient) < 2e-5


def at_the_threshold(threshold: float) -> np.ndarray:
  """A table in which one confidence of the first step is the threshold."""
  table = make_table(3)
  start = sum(MASK * (V + 1) ** c for c in range(3))
  rest = 1 - threshold
  table[start, 0] = np.log([threshold, rest * 0.6, rest * 0.4])
  return table


@pytest.mark.parametrize("rule", ["threshold", "soft_threshold"])
def test_at_the_threshold_only_a_soft_one_has_a_gradient(rule):
  """Where a hard threshold jumps the slope grows as the shift goes to zero."""
  s = make_sampling(unmask_rule=rule, **RULES[rule], **TOYS["one_block"])
  table = at_the_threshold(s.threshold)
  _, _, records, prob = enumerate_table(table, s)
  gradient = exact_gradient(s, agrpo.Agrpo(), table, records, prob)
  direction = np.random.default_rng(1).normal(size=table.shape)

  def value(shift):
    paths = walk(table + shift * direction, s)
    return sum(p.prob * reward_of(p.completion) for p in paths)

  slope, closer = ((value(h) - value(-h)) / (2 * h) for h in (1e-4, 1e-5))
  ours = (gradient * direction).sum()
  if rule == "soft_threshold":
    np.testing.assert_allclose(ours, closer, rtol=1e-6)
    np.testing.assert_allclose(slope, closer, rtol=1e-5)
  else:
    assert abs(closer) > 5 * abs(slope) > 50 * abs(ours)


def test_the_gradient_through_the_passes_is_needed():
  """Stopped at the confidences, the soft threshold's score is another."""
  rule = "soft_threshold"
  s = make_sampling(unmask_rule=rule, **RULES[rule], **TOYS["one_block"])
  _, gradient, records, prob = enumerated(s)

  class Stopped(rules.SoftThreshold):
    def _height(self, confidence):
      return jax.lax.stop_gradient(super()._height(confidence))

  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(sampling_lib.RULES, rule, Stopped)
    table = make_table(s.completion_length)
    found = exact_gradient(s, agrpo.Agrpo(), table, records, prob)
  assert error(found, gradient) > 0.05


def test_confidence_of_the_untempered_model_is_unbiased_too():
  # The order of confidences does not change with temperature at one position,
  # but it does between positions.
  s = make_sampling(
    unmask_rule="confidence", confidence="model", **TOYS["one_block"]
  )
  _, gradient, _, _ = enumerated(s)
  estimate = expected_estimate(s, agrpo.Agrpo(num_mc_steps=1))
  assert error(estimate, gradient) < 2e-5


def test_released_switches_estimate_another_objective():
  """`content` steps drop real ones, `mean` divides by their number."""
  s = make_sampling(unmask_rule="random", **TOYS["blocks"])
  _, gradient, _, _ = enumerated(s)
  for change in (dict(visited_steps="content"), dict(normalize="mean")):
    estimate = expected_estimate(s, agrpo.Agrpo(num_mc_steps=1, **change))
    assert error(estimate, gradient) > 0.05


@pytest.mark.parametrize("baseline", ["leave_one_out", "group_mean"])
def test_the_whole_train_step_is_unbiased(baseline):
  """All pairs of rollouts as groups of two, through `Learner.gradient`."""
  s = make_sampling(completion_length=2, block_length=2, num_denoise_steps=2)
  _, gradient, records, prob = enumerated(s)
  num = len(prob)
  first, second = np.divmod(np.arange(num * num), num)
  pair = np.stack([first, second], axis=1).reshape(-1)
  reward = np.array(
    [reward_of(tuple(c)) for c in np.asarray(records.completion)]
  )
  table = jnp.asarray(make_table(2), jnp.float32)
  objective = agrpo.Agrpo(num_mc_steps=2, baseline=baseline)
  learner = learner_lib.Learner(
    bind=lambda table, lora: table_network(table),
    optimizer=optax.sgd(1.0),
    sampling=s,
    objective=objective,
    group_size=2,
    microbatch=64,
  )
  rollout = jax.tree.map(lambda x: x[pair], records)
  advantage = advantage_lib.group_advantage(
    jnp.asarray(reward[pair], jnp.float32).reshape(-1, 2), baseline
  ).reshape(-1)
  chance = np.repeat(prob[first] * prob[second], 2)
  # Uniform over the two steps: visiting each once is the mean over the draw.
  drawn = mc_steps.Drawn(
    step=jnp.tile(jnp.arange(2), (num * num * 2, 1)),
    weight=jnp.asarray(2.0 * chance[:, None] * num * num, jnp.float32)
    * jnp.ones((1, 2)),
  )
  estimate, _, _ = learner.gradient(
    states.initial(learner, table),
    rollout,
    advantage,
    agrpo.visits_of(rollout, drawn, s, objective),
  )
  scale = {"leave_one_out": 1.0, "group_mean": 0.5}[baseline]
  assert error(-np.asarray(estimate) / scale, gradient) < 2e-5


@pytest.mark.parametrize(
  "toy,rule",
  [
    *itertools.product(["top_k"], RULES),
    *DREAM_CASES,
    ("dream_top_p", "confidence"),
    ("dream_top_p", "entropy"),
  ],
)
def test_rollouts_follow_the_enumerated_law(toy, rule):
  """Frequencies of 20,000 rollouts, and what each of them recorded."""
  s = make_sampling(unmask_rule=rule, **RULES[rule], **TOYS[toy])
  _, _, records, prob = enumerated(s)
  num = 20_000
  prompts = types.Prompts(
    tokens=jnp.ones((num, 2), jnp.int32),
    length=jnp.ones((num,), jnp.int32),
    key=jax.random.split(jax.random.key(7), num),
  )
  table = jnp.asarray(make_table(s.completion_length), jnp.float32)
  rollout = jax.jit(
    lambda prompts: rollout_lib.sample_rollout(table_network(table), prompts, s)
  )(prompts)

  def names(r):
    return [
      (tuple(c), tuple(u))
      for c, u in zip(
        np.asarray(r.completion).tolist(),
        np.asarray(r.unmask_step).tolist(),
        strict=True,
      )
    ]

  place = {name: i for i, name in enumerate(names(records))}
  index = np.array([place[name] for name in names(rollout)])  # none unheard of
  for field in ("logprob", "entropy", "num_executed_steps"):
    np.testing.assert_allclose(
      getattr(rollout, field), getattr(records, field)[index], atol=1e-5
    )
  count = np.bincount(index, minlength=len(prob))
  enough = prob * num > 5
  chi2 = ((count - prob * num) ** 2 / (prob * num))[enough].sum()
  freedom = enough.sum() - 1
  assert chi2 < freedom + 4 * np.sqrt(2 * freedom), (chi2, freedom)

  # The recorded factors multiply to the probability of the outcome.
  if s.rule.looks_at != "nothing":
    total = np.asarray(rollout.logprob.sum(1) + rollout.order_logprob.sum(1))
    np.testing.assert_allclose(np.exp(total), prob[index], rtol=1e-4)
