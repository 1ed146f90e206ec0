"""What must hold of every objective, and what some of them promise.

The network is a toy whose logits depend on every token of the row.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agrpo_jax import learner as learner_lib
from agrpo_jax import objectives
from agrpo_jax import types
from agrpo_jax.objectives import advantage as advantage_lib
from agrpo_jax.objectives import agrpo
from agrpo_jax.objectives import base
from agrpo_jax.objectives import bgpo
from agrpo_jax.objectives import clip
from agrpo_jax.objectives import dipo
from agrpo_jax.objectives import dmpo
from agrpo_jax.objectives import espo
from agrpo_jax.objectives import gdpo
from agrpo_jax.objectives import just_grpo
from agrpo_jax.objectives import masks
from agrpo_jax.objectives import spg
from agrpo_jax.objectives import tbrm
from agrpo_jax.objectives import trace_rl
from agrpo_jax.objectives import wd1
from agrpo_jax.policies import plain
from agrpo_jax.samplers import noise
from agrpo_jax.samplers import rollout as rollout_lib
from agrpo_jax.samplers import sampling as sampling_lib
from fixtures import states

V, P, C, GROUP_SIZE, NUM_ROWS = 6, 3, 4, 3, 6
MASK, EOS = V - 1, 0
SAMPLING = sampling_lib.Sampling(
  mask_id=MASK,
  eos_id=EOS,
  completion_length=C,
  block_length=2,
  num_denoise_steps=4,
  stop_at_eos=False,
)
NAMES = [name for name in objectives.NAMES if name != "agrpo"]


def params_of(seed: int, spread: float = 0.6) -> dict:
  keys = jax.random.split(jax.random.key(seed), 3)
  return {
    "token": spread * jax.random.normal(keys[0], (V, 5)),
    "position": spread * jax.random.normal(keys[1], (P + C, 5)),
    "head": jax.random.normal(keys[2], (5, V)),
  }


def network_of(params: dict) -> types.Network:
  def logits(tokens_BxL, length_B, positions_BxS):
    embedded = params["token"][tokens_BxL] + params["position"][None]
    is_real = jnp.arange(P + C)[None] < length_B[:, None]
    hidden = jnp.where(is_real[..., None], jnp.tanh(embedded), 0.0)
    mean_BxD = hidden.sum(axis=1) / length_B[:, None]
    own = jnp.take_along_axis(hidden, positions_BxS[..., None], axis=1)
    return (own + jnp.tanh(2 * mean_BxD)[:, None]) @ params["head"]

  return types.Network(logits)


@functools.cache
def drawn_rollout() -> types.Rollout:
  """Completions that the policy `DRAWN` drew."""
  row_id = np.stack([np.arange(NUM_ROWS)] * 2, 1).astype(np.uint32)
  prompts = types.Prompts(
    tokens=jax.random.randint(jax.random.key(1), (NUM_ROWS, P), 1, MASK),
    length=jnp.array([P, P - 1, P] * 2),
    key=noise.row_keys(jax.random.key(2), jnp.asarray(row_id)),
  )
  return jax.jit(
    lambda prompts: rollout_lib.sample_rollout(
      network_of(DRAWN), prompts, SAMPLING
    )
  )(prompts)


def keys_of() -> jax.Array:
  return jax.random.split(jax.random.key(3), NUM_ROWS)


def learner_of(objective, microbatch: int = 4) -> learner_lib.Learner:
  return learner_lib.Learner(
    bind=lambda params, lora: network_of(params),
    optimizer=optax.sgd(1.0),
    sampling=SAMPLING,
    objective=objective,
    group_size=GROUP_SIZE,
    microbatch=microbatch,
  )


REWARD = np.array([1.0, 0.0, 0.5, 2.0, 0.25, 0.0])
DRAWN = params_of(0)  # the policy that drew the rollout
POLICY = jax.tree.map(lambda x, y: x + 0.15 * y, DRAWN, params_of(5))
REFERENCE = jax.tree.map(lambda x, y: x + 0.15 * y, DRAWN, params_of(6))


def setting(name: str):
  """Objective, rollout, advantages [B], and the first update's visits."""
  objective = objectives.get(name)()
  if hasattr(objective, "kl_coef"):
    objective = dataclasses.replace(objective, kl_coef=0.1)
  assert not objective.problems(SAMPLING)
  rollout = drawn_rollout()
  advantage = objective.advantage(jnp.asarray(REWARD).reshape(-1, GROUP_SIZE))
  visits, _ = objective.visits(
    rollout, advantage.reshape(-1), jax.random.key(4), keys_of(), SAMPLING
  )
  first = jax.tree.map(lambda x: x[0], visits)
  return objective, rollout, advantage.reshape(-1), first


@functools.partial(jax.jit, static_argnums=0)
def read(objective, params: dict, rollout, visits):
  """Factors [B, Q, S, F] of all visits, in one graph."""
  network = network_of(params)

  def one(row, visit):
    prompt = row.prompt
    if visit.is_prompt_masked is not None:
      prompt = jnp.where(visit.is_prompt_masked, MASK, prompt)
    partial = jnp.where(visit.is_masked, MASK, row.completion)
    logits = plain.PLAIN.logits(
      network,
      (),
      prompt[None],
      row.prompt_length[None],
      partial[None, None],
      visit.block[None, None] * SAMPLING.block_length,
      visit.offset[None, None],
      is_start=False,
    )[0, 0]
    return objective.score(logits, row, visit, SAMPLING, jax.lax.top_k)

  each = jax.vmap(jax.vmap(jax.vmap(one, (None, 0)), (None, 0)))
  return each(rollout, visits)


def whole_loss(objective, rollout, advantage, visits, behaviour, reference):
  """A function: params -> the loss of all groups, in one graph."""

  def loss(params):
    grouped = jax.tree.map(
      lambda x: x.reshape(-1, GROUP_SIZE, *x.shape[1:]),
      (
        read(objective, params, rollout, visits),
        behaviour,
        reference,
        advantage,
        visits,
        rollout,
      ),
    )
    return jax.vmap(objective.loss)(*grouped).loss.sum()

  return jax.jit(loss)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_off_policy_is_that_of_one_graph(name):
  """Two passes, microbatches and skipped units change nothing."""
  objective, rollout, advantage, visits = setting(name)
  behaviour = reference = None
  if objective.behaviour == "scored":
    behaviour = read(objective, DRAWN, rollout, visits).logprob
  elif objective.behaviour == "recorded":
    each = jax.vmap(
      jax.vmap(jax.vmap(objective.recorded, (None, 0)), (None, 0))
    )
    behaviour = each(rollout, visits)
  if objective.has_reference:
    reference = read(objective, REFERENCE, rollout, visits).logprob
  value, expected = jax.jit(
    jax.value_and_grad(
      whole_loss(objective, rollout, advantage, visits, behaviour, reference)
    )
  )(POLICY)
  learner = learner_of(objective)
  compiled = jax.jit(learner.gradient)

  def gradient_of(params):
    return compiled(
      states.initial(learner, params),
      rollout,
      advantage,
      visits,
      behaviour=behaviour if objective.behaviour == "scored" else None,
      reference=REFERENCE,
    )

  gradient, terms, num_units = gradient_of(POLICY)
  assert optax.tree.norm(expected) > 1e-4
  np.testing.assert_allclose(terms.loss, value, rtol=1e-5, atol=1e-7)
  difference = optax.tree.norm(jax.tree.map(jnp.subtract, gradient, expected))
  assert difference < 1e-5 * optax.tree.norm(expected)
  assert int(num_units) > 0
  assert np.isfinite(float(terms.kl))
  # At the parameters that drew the rollout every policy ratio is 1.
  _, terms, _ = gradient_of(DRAWN)
  np.testing.assert_allclose(terms.ratio, terms.num_factors, rtol=1e-5)
  assert float(terms.ratio_deviation) < 1e-5


# One of each kind: one pass or two; behaviour scored, recorded, or not asked.
@pytest.mark.parametrize(
  "name", ["espo", "dmpo", "spg", "trace_rl", "cj_grpo", "wd1", "tbrm"]
)
def test_a_train_step_begins_at_ratio_one(name):
  objective = objectives.get(name)()
  if objective.updates_per_batch > 2:
    objective = dataclasses.replace(objective, updates_per_batch=2)
  learner = learner_of(objective)
  row_id = np.stack([np.arange(NUM_ROWS)] * 2, 1).astype(np.uint32)
  after, metrics = jax.jit(learner.train_step)(
    states.initial(learner, DRAWN),
    drawn_rollout(),
    jnp.asarray(REWARD, jnp.float32),
    jax.random.key(7),
    jnp.asarray(row_id),
    REFERENCE,
  )
  np.testing.assert_allclose(metrics["policy_ratio/mean"], 1.0, atol=1e-5)
  assert float(metrics["policy_ratio/max_deviation"]) < 1e-5
  assert np.isfinite(float(metrics["loss"]))
  moved = optax.tree.norm(jax.tree.map(jnp.subtract, after.params, DRAWN))
  assert moved > 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_visits_depend_on_no_batch_mate(name):
  objective, rollout, _, visits = setting(name)
  order = np.array([4, 0, 2])
  some, _ = objective.visits(
    jax.tree.map(lambda x: x[order], rollout),
    jnp.ones(3),
    jax.random.key(99),
    keys_of()[order],
    SAMPLING,
  )
  for field in ("is_masked", "is_prompt_masked", "offset", "scale"):
    ours, alone = getattr(visits, field), getattr(some, field)
    if ours is not None:
      np.testing.assert_allclose(alone[0], ours[order], err_msg=field)


@pytest.mark.parametrize("name", NAMES)
def test_settings_out_of_range_are_named(name):
  objective = objectives.get(name)()
  wrong = dataclasses.replace(objective, updates_per_batch=0)
  (problem,) = wrong.problems(SAMPLING)
  assert problem.startswith("updates_per_batch=0 must be")
  for field in dataclasses.fields(objective):
    for value in (math.nan, math.inf):
      # Without bound nothing is truncated.
      is_legal = (field.name, value) == ("max_weight", math.inf)
      if isinstance(getattr(objective, field.name), float) and not is_legal:
        wrong = dataclasses.replace(objective, **{field.name: value})
        assert any(
          problem.startswith(f"{field.name}={value}")
          for problem in wrong.problems(SAMPLING)
        ), field.name


@pytest.mark.parametrize(
  "objective,problem",
  [
    (
      clip.Clip(clip_high=math.inf),
      "clip_high=inf must be positive and finite",
    ),
    (clip.Clip(kl_coef=math.inf), "kl_coef=inf must be at least 0 and finite"),
  ],
)
def test_a_setting_without_bound_is_told_to_be_finite(objective, problem):
  assert clip.problems(objective) == [problem]


def test_masks_in_pairs_are_some():
  (problem,) = dmpo.Dmpo(num_masks=0).problems(SAMPLING)
  assert problem.startswith("num_masks=0 must be even and positive")


def any_order_bound(params: dict, row: types.Rollout) -> float:
  """The mean over all orders of the sum of log-probabilities, by hand."""
  network = network_of(params)
  total = 0.0
  orders = [*itertools.permutations(range(C))]
  for order in orders:
    is_masked = np.ones(C, bool)
    for position in order:
      partial = jnp.where(is_masked, MASK, row.completion)
      logits = plain.PLAIN.logits(
        network,
        (),
        row.prompt[None],
        row.prompt_length[None],
        partial[None, None],
        jnp.array([[0]]),
        jnp.array([[[position]]]),
        is_start=False,
      )[0, 0, 0]
      total += float(jax.nn.log_softmax(logits)[row.completion[position]])
      is_masked[position] = False
  return total / len(orders)


@pytest.mark.parametrize("record", [espo.Espo, gdpo.Gdpo])
def test_bounds_have_one_kl_estimator(record):
  """Another one would be accepted and do nothing."""
  (problem,) = record(kl_estimator="k3_ratio").problems(SAMPLING)
  assert problem == "kl_estimator='k3_ratio' must be left at k3: see kl_coef"


@pytest.mark.parametrize("objective", [bgpo.Bgpo(num_masks=4), espo.Espo()])
def test_masks_estimate_the_any_order_bound(objective):
  """Without bias: the mean over many keys is the bound, within its error."""
  rollout = jax.tree.map(lambda x: x[:3], drawn_rollout())
  num = 3000

  @jax.jit
  def estimates(keys):
    def one(key):
      keys_B = jax.random.split(key, 3)
      visits, _ = objective.visits(rollout, None, key, keys_B, SAMPLING)
      first = jax.tree.map(lambda x: x[0], visits)
      value = masks.value(read(objective, DRAWN, rollout, first), first)
      num_own = objective.num_masks if isinstance(objective, bgpo.Bgpo) else 1
      return value / num_own

    return jax.lax.map(one, keys)

  found = np.asarray(estimates(jax.random.split(jax.random.key(8), num)))
  for row in range(3):
    expected = any_order_bound(
      DRAWN, jax.tree.map(lambda x, r=row: x[r], rollout)
    )
    error = found[:, row].std() / np.sqrt(num)
    assert abs(found[:, row].mean() - expected) < 4 * error


def test_bgpo_bounds_its_objective():
  """Below it elsewhere; equal to it, with the gradient, at the start."""
  objective, rollout, advantage, visits = setting("bgpo")
  behaviour = read(objective, DRAWN, rollout, visits).logprob

  def surrogate(params):
    factors = read(objective, params, rollout, visits)
    new = masks.value(factors, visits)
    old = masks.value(factors.replace(logprob=behaviour), visits)
    difference = (new - old) / objective.num_masks
    return (advantage * jnp.exp(difference)).mean()

  bound = whole_loss(objective, rollout, advantage, visits, behaviour, None)
  np.testing.assert_allclose(-bound(DRAWN), surrogate(DRAWN), atol=1e-6)
  for ours, exact in zip(
    jax.tree.leaves(jax.grad(bound)(DRAWN)),
    jax.tree.leaves(jax.grad(surrogate)(DRAWN)),
    strict=True,
  ):
    np.testing.assert_allclose(-ours, exact, rtol=1e-4, atol=1e-6)
  for seed in range(8):
    step = jax.tree.map(lambda x, y: x + 0.2 * y, DRAWN, params_of(20 + seed))
    assert -bound(step) < surrogate(step)


def test_wd1_is_reinforce_for_small_advantages():
  reward = jnp.asarray(1e-3 * REWARD).reshape(-1, GROUP_SIZE)
  ours = wd1.Wd1().advantage(reward)
  centred = reward - reward.mean(axis=1, keepdims=True)
  np.testing.assert_allclose(
    ours, 2 * centred / GROUP_SIZE / 2, rtol=1e-3, atol=1e-7
  )


@pytest.mark.parametrize("length", [1, 2, 4])
def test_vrpo_counts_the_winners_tokens_up_to_its_eos(length):
  """Where every token has log-probability -1 its share of SFT is one weight."""
  objective, num_rows = objectives.get("vrpo")(sft_weight=0.5), 2
  completion = jnp.ones((num_rows, C), jnp.int32).at[:, length - 1 :].set(EOS)
  rows = drawn_rollout()
  rows = jax.tree.map(lambda x: x[:num_rows], rows).replace(
    completion=completion
  )
  visits, _ = objective.visits(rows, None, None, keys_of()[:num_rows], SAMPLING)
  visits = jax.tree.map(lambda x: x[0], visits)
  factors = base.Factors(
    logprob=-jnp.ones(visits.is_masked.shape), is_factor=visits.is_masked
  )
  advantage = jnp.array([0.5, -0.5])
  found = objective.loss(
    factors, None, factors.logprob, advantage, visits, rows
  )
  np.testing.assert_allclose(found.loss, math.log(2) + 0.5, rtol=1e-5)


def test_gdpo_nodes_integrate_cubics():
  for nodes in gdpo._NODES.values():
    for power in range(4):
      total = sum(weight * node**power for node, weight in nodes)
      assert abs(total - 1 / (power + 1)) < 1e-12


def test_gdpo_penalises_the_whole_bound():
  """As ported: k3 of B_ref - B, where the policy ratio has a C-th of it."""
  objective = gdpo.Gdpo(kl_coef=0.5)
  rollout = drawn_rollout()
  visits, _ = objective.visits(rollout, None, None, keys_of(), SAMPLING)
  visits = jax.tree.map(lambda x: x[0], visits)
  # Where every token has the same log-probability, B is C times it.
  of_token = -jnp.ones(visits.is_masked.shape)
  factors = base.Factors(logprob=of_token, is_factor=visits.is_masked)
  found = objective.loss(
    factors, of_token, 1.25 * of_token, jnp.zeros(NUM_ROWS), visits, rollout
  )
  expected = math.exp(-0.25 * C) + 0.25 * C - 1
  np.testing.assert_allclose(found.kl, NUM_ROWS * expected, rtol=1e-5)
  np.testing.assert_allclose(found.loss, 0.5 * expected, rtol=1e-5)


@pytest.mark.parametrize("objective", [espo.Espo(), gdpo.Gdpo(kl_coef=0.5)])
def test_what_fills_a_microbatch_up_is_not_in_the_kl(objective):
  rollout = drawn_rollout()
  visits, _ = objective.visits(rollout, None, None, keys_of(), SAMPLING)
  visits = jax.tree.map(lambda x: x[0], visits)
  of_token = -jnp.ones(visits.is_masked.shape)
  factors = base.Factors(logprob=of_token, is_factor=visits.is_masked)

  def kl(weight):
    rest = jnp.zeros(NUM_ROWS), visits.replace(weight=weight), rollout
    return objective.loss(factors, of_token, 1.25 * of_token, *rest).kl

  first = visits.weight.at[1:].set(0.0)
  assert kl(visits.weight) > kl(first) > 0
  np.testing.assert_allclose(kl(0 * first), 0)


@pytest.mark.parametrize(
  "objective,log_ratio,advantage,ratio,gradient",
  [
    # Infinity times no advantage, or times the gradient of what is clipped.
    (clip.Clip(), 90.0, 0.0, math.exp(80), 0.0),
    (clip.Clip(), 90.0, 1.0, math.exp(80), 0.0),
    (clip.Clip(), 70.0, -1.0, math.exp(70), math.exp(70)),
    (dipo.Dipo(), 12.0, -1.0, math.exp(10), 0.0),
    (dipo.Dipo(), -12.0, 1.0, math.exp(-10), 0.0),
    (dipo.Dipo(), 9.0, -1.0, math.exp(9), math.exp(9)),
  ],
)
def test_policy_ratios_do_not_overflow(
  objective, log_ratio, advantage, ratio, gradient
):
  def loss(logprob):
    factors = base.Factors(logprob[None], jnp.ones((1,), bool))
    terms = clip.surrogate(
      factors,
      jnp.zeros(1),
      factors.logprob,
      jnp.float32(advantage),
      jnp.float32(1.0),
      dataclasses.replace(objective, kl_coef=0.1),
    )
    return terms.loss, terms

  found, terms = jax.grad(loss, has_aux=True)(jnp.float32(log_ratio))
  assert np.isfinite(terms.loss)
  np.testing.assert_allclose(terms.ratio, ratio, rtol=1e-4)
  np.testing.assert_allclose(found, gradient, rtol=1e-4)


def test_visits_of_negative_weight_count():
  """Those of a user's own objective may have some."""
  factors = base.Factors(
    jnp.full((1, 2, 1, 3), -2.0), jnp.ones((1, 2, 1, 3)) > 0
  )
  weight, advantage = jnp.array([[[-0.5], [0.0]]]), jnp.array([3.0])
  found = clip.reinforce(factors, advantage, weight)
  assert (float(found.loss), float(found.num_factors)) == (-9.0, 3.0)
  found = clip.over_visits(
    factors, factors.logprob, None, advantage, weight, clip.Clip()
  )
  assert (float(found.loss), float(found.num_factors)) == (4.5, 3.0)
  assert float(found.ratio) == 3.0


def test_spg_bounds_are_in_order():
  """The upper one lies above the lower one where both read the same masks."""
  objective = spg.Spg(upper_power=1.0)
  rollout = drawn_rollout()
  visits, _ = objective.visits(rollout, None, None, keys_of(), SAMPLING)
  first = jax.tree.map(lambda x: x[0], visits)
  factors = read(objective, DRAWN, rollout, first)

  def bound(upper_weight):
    one = dataclasses.replace(objective, upper_weight=upper_weight)
    terms = one.loss(factors, None, None, -jnp.ones(NUM_ROWS), first, rollout)
    return float(terms.loss)

  assert bound(1.0) > bound(0.5) > bound(0.0)


def test_spg_masks_a_block_and_what_follows_it():
  objective = spg.Spg(num_masks=2, prompt_mask_ratio=0.0)
  rollout = drawn_rollout()
  visits, _ = objective.visits(rollout, None, None, keys_of(), SAMPLING)
  content = np.asarray(masks.until_eos(rollout, (EOS,)))
  for row in range(NUM_ROWS):
    seen = set()
    for mask in np.asarray(visits.is_masked)[0, row, :, 0]:
      assert mask[~content[row]].all()
      partly = [
        block
        for block in range(2)
        if mask[2 * block : 2 * block + 2][
          content[row, 2 * block : 2 * block + 2]
        ].any()
      ]
      first = partly[0]
      assert mask[2 * first + 2 :].all() and not mask[: 2 * first].any()
      seen.add(first)
    assert len(seen) == min(2, -(-content[row].sum() // 2))


def test_just_grpo_is_the_policy_gradient_from_left_to_right():
  """Of blocks of one token, where no order is left to choose."""
  sampling = dataclasses.replace(SAMPLING, block_length=1)
  ours, exact = just_grpo.JustGrpo(), agrpo.Agrpo(step_rule="all")
  rollout = drawn_rollout()
  rollout = rollout.replace(
    unmask_step=jnp.broadcast_to(jnp.arange(C), (NUM_ROWS, C)),
    entropy=jnp.zeros((NUM_ROWS, C)),  # so that it visits them in order
  )
  gradients = {}
  for objective in (ours, exact):
    visits, _ = objective.visits(rollout, None, None, keys_of(), sampling)
    first = jax.tree.map(lambda x: x[0], visits)
    if objective is ours:
      logprob = read(ours, DRAWN, rollout, first).logprob[..., 0, 0]
      rollout = rollout.replace(logprob=logprob)
    learner = dataclasses.replace(learner_of(objective), sampling=sampling)
    gradients[objective], _, _ = learner.gradient(
      states.initial(learner, DRAWN), rollout, jnp.asarray(REWARD), first
    )
  jax.tree.map(
    # A mean over C tokens, and a sum over completions.
    lambda x, y: np.testing.assert_allclose(
      x * C / NUM_ROWS, y, rtol=1e-4, atol=1e-6
    ),
    gradients[ours],
    gradients[exact],
  )


def test_trace_rl_without_merging_scores_what_agrpo_scores():
  rollout = drawn_rollout()
  ours = trace_rl.TraceRl(shrink=1)
  theirs = agrpo.Agrpo(step_rule="all", likelihood="product")
  total = {}
  for objective in (ours, theirs):
    visits, _ = objective.visits(rollout, None, None, keys_of(), SAMPLING)
    first = jax.tree.map(lambda x: x[0], visits)
    factors = read(objective, DRAWN, rollout, first)
    used = factors.is_factor & (first.weight > 0)[..., None]
    total[objective] = jnp.where(used, factors.logprob, 0.0).sum(axis=(1, 2, 3))
  # All but the EOS that are one too many, which TraceRL does not score.
  is_scored = np.asarray(ours.is_scored(rollout, (EOS,)))
  left_out = np.where(is_scored, 0.0, rollout.logprob).sum(axis=1)
  np.testing.assert_allclose(total[ours] + left_out, total[theirs], rtol=1e-5)


def test_tbrm_is_at_rest_at_its_optimum():
  """Where the log-ratios are the rewards over beta, up to a constant."""
  objective = tbrm.Tbrm(beta=0.5)
  rollout = drawn_rollout()
  visits, _ = objective.visits(rollout, None, None, keys_of(), SAMPLING)
  first = jax.tree.map(lambda x: x[0][:GROUP_SIZE], visits)
  rows = jax.tree.map(lambda x: x[:GROUP_SIZE], rollout)
  factors = read(objective, DRAWN, rows, first)
  advantage = advantage_lib.group_advantage(
    jnp.asarray(REWARD[:GROUP_SIZE]), "group_mean"
  )
  used = factors.is_factor & (first.weight > 0)[..., None]
  num = used.sum(axis=(1, 2, 3))
  # A reference whose log-ratio to the policy is what the optimum asks for, with
  # some value of the prompt.
  log_ratio = (advantage + 0.7) / objective.beta
  reference = factors.logprob - (log_ratio / num)[:, None, None, None] * used
  terms = objective.loss(factors, None, reference, advantage, first, rows)
  np.testing.assert_allclose(terms.loss, 0.0, atol=1e-9)
  worse = objective.loss(
    factors,
    None,
    reference,
    advantage + jnp.array([1.0, -1.0, 0.0]),
    first,
    rows,
  )
  assert worse.loss > 0.1
