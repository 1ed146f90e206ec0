"""The draw of denoising steps, and its weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agrpo_jax import types
from agrpo_jax.objectives import mc_steps
from agrpo_jax.samplers import sampling as sampling_lib


def rollout(completion, unmask_step, entropy, num_denoise_steps, num_steps):
  completion = jnp.asarray(completion, jnp.int32)
  return types.Rollout(
    prompt=jnp.zeros((completion.shape[0], 1), jnp.int32),
    prompt_length=jnp.ones(completion.shape[0], jnp.int32),
    completion=completion,
    unmask_step=jnp.asarray(unmask_step, jnp.int32),
    logprob=jnp.zeros(completion.shape),
    entropy=jnp.asarray(entropy, jnp.float32),
    support=None,
    order_logprob=jnp.zeros((completion.shape[0], num_denoise_steps)),
    num_executed_steps=jnp.asarray(num_steps, jnp.int32),
    num_whole_passes=jnp.asarray(num_steps, jnp.int32),
    num_slot_steps=jnp.asarray(num_steps, jnp.int32),
  )


# EOS is 0. The second row ended after its first two steps; the third is all
# EOS.
ROWS = rollout(
  completion=[[5, 6, 0, 7], [5, 0, 0, 0], [0, 0, 0, 0]],
  unmask_step=[[1, 0, 3, 2], [0, 1, 4, 4], [0, 1, 4, 4]],
  entropy=[[0.5, 0.25, 0.0, 0.25], [0.3, 0.1, 0.0, 0.0], [0.2, 0.2, 0, 0]],
  num_denoise_steps=4,
  num_steps=[4, 2, 2],
)


def settings(**changes):
  return mc_steps.McSteps(**(dict(num_mc_steps=3) | changes))


# Two blocks of up to three steps: the first took two, the second one or three.
GAPS = rollout(
  completion=[[5, 6, 7, 8, 8, 8], [5, 6, 7, 8, 0, 0]],
  unmask_step=[[0, 1, 0, 3, 3, 3], [1, 0, 0, 3, 5, 4]],
  entropy=[[0.1, 0.2, 0.3, 0.1, 0.1, 0.2], [0.1] * 6],
  num_denoise_steps=6,
  num_steps=[3, 5],
)


def steps_of(is_visitable) -> list[list[int]]:
  return [np.flatnonzero(row).tolist() for row in is_visitable]


def test_which_steps_can_be_visited():
  content = settings(visited_steps="content")
  assert steps_of(mc_steps.visitable(ROWS, settings(), (0,))) == [
    [0, 1, 2, 3],
    [0, 1],
    [0, 1],
  ]
  assert steps_of(mc_steps.visitable(ROWS, content, (0,))) == [
    [0, 1, 2],
    [0],
    [],
  ]
  assert steps_of(mc_steps.visitable(GAPS, settings(), (0,))) == [
    [0, 1, 3],
    [0, 1, 3, 4, 5],
  ]
  assert steps_of(mc_steps.visitable(GAPS, content, (0,))) == [
    [0, 1, 3],
    [0, 1, 3],
  ]


def test_content_ends_before_whatever_ends_a_completion():
  """The first row's last two are EOS where 7 is one too."""
  content = settings(visited_steps="content")
  assert steps_of(mc_steps.visitable(ROWS, content, (0, 7)))[0] == [0, 1]


def test_entropy_proposal_by_hand():
  chosen = settings(step_rule="entropy")
  prob = mc_steps.step_prob(
    ROWS.entropy[0], ROWS.unmask_step[0], jnp.arange(4) < 3, chosen
  )
  # Steps 0, 1, 2 unmasked 0.25, 0.5 and 0.25 nats; step 3 is out of reach.
  np.testing.assert_allclose(prob, [0.25, 0.5, 0.25, 0.0], atol=1e-6)
  prob = mc_steps.step_prob(
    GAPS.entropy[0],
    GAPS.unmask_step[0],
    mc_steps.visitable(GAPS, chosen, (0,))[0],
    chosen,
  )
  np.testing.assert_allclose(prob, [0.4, 0.2, 0.0, 0.4, 0.0, 0.0], atol=1e-6)
  mixed = mc_steps.step_prob(
    GAPS.entropy[0], GAPS.unmask_step[0], prob > 0, chosen, mixed=True
  )
  expected = (np.asarray(prob) + np.array([1, 1, 0, 1, 0, 0]) / 3) / 2
  np.testing.assert_allclose(mixed, expected, atol=1e-6)


@pytest.mark.parametrize("step_rule", mc_steps.DRAWN_STEPS)
@pytest.mark.parametrize("steps", mc_steps.VISITED_STEPS)
@pytest.mark.parametrize("rows", [ROWS, GAPS])
@pytest.mark.parametrize("mixed", [False, True])
def test_weights_undo_the_proposal(mixed, rows, step_rule, steps):
  chosen = settings(step_rule=step_rule, visited_steps=steps)
  for row, is_visitable in enumerate(mc_steps.visitable(rows, chosen, (0,))):
    prob = mc_steps.step_prob(
      rows.entropy[row], rows.unmask_step[row], is_visitable, chosen, mixed
    )
    uniform = jnp.linspace(0.0, 0.9999, 37)
    drawn = mc_steps.steps_at(uniform, prob, chosen)
    if not is_visitable.any():
      assert drawn.weight.tolist() == [0.0] * 37
      continue
    np.testing.assert_allclose(drawn.weight * prob[drawn.step], 1.0, rtol=1e-6)
    assert is_visitable[drawn.step].all()
    if step_rule == "uniform" or mixed:
      assert drawn.weight.max() <= 2.0001 * is_visitable.sum()
      assert len({*drawn.step.tolist()}) == is_visitable.sum()
    mean = mc_steps.steps_at(
      uniform,
      prob,
      settings(step_rule=step_rule, normalize="mean", visited_steps=steps),
    )
    np.testing.assert_allclose(
      mean.weight * prob[mean.step] * is_visitable.sum(), 1.0, rtol=1e-6
    )


def test_rounding_never_leads_to_a_step_that_did_not_run():
  """Sums over many steps without probability round, and differ."""
  is_executed = jax.random.bernoulli(jax.random.key(0), 0.3, (512,))
  step = jnp.where(is_executed, jnp.arange(512), 512)
  entropy = jax.random.uniform(jax.random.key(1), (512,))
  for step_rule in mc_steps.DRAWN_STEPS:
    chosen = settings(step_rule=step_rule)
    prob = mc_steps.step_prob(entropy, step, is_executed, chosen)
    total = jnp.cumsum(prob)
    uniform = jnp.concatenate([total, jnp.nextafter(total, 1.0), total * 0])
    drawn = mc_steps.steps_at(jnp.minimum(uniform, 1 - 2**-24), prob, chosen)
    assert is_executed[drawn.step].all()


def test_the_inverse_distribution_function_never_runs_past_the_end():
  entropy = jnp.full((1000,), 0.1)
  step = jnp.arange(1000)
  chosen = settings(step_rule="entropy")
  prob = mc_steps.step_prob(entropy, step, jnp.ones(1000, bool), chosen)
  almost_one = jnp.array([1 - 2**-24, 1.0], jnp.float32)
  drawn = mc_steps.steps_at(almost_one, prob, chosen)
  assert drawn.step.tolist() == [999, 999]


def test_steps_without_entropy_have_finite_weights():
  chosen = settings(step_rule="entropy")
  every = jnp.ones(4, bool)
  prob = mc_steps.step_prob(jnp.zeros(4), jnp.arange(4), every, chosen)
  np.testing.assert_allclose(prob, 0.25)
  prob = mc_steps.step_prob(
    jnp.array([1.0, 0, 0, 0]), jnp.arange(4), every, chosen
  )
  drawn = mc_steps.steps_at(jnp.array([0.0, 0.5, 1 - 2**-24]), prob, chosen)
  assert np.isfinite(drawn.weight).all()


@pytest.mark.parametrize("stratified", mc_steps.STRATA)
def test_strata(stratified):
  num_rows, num_draws = 6, 8
  chosen = settings(num_mc_steps=num_draws, stratified=stratified)
  keys = jax.random.split(jax.random.key(1), num_rows)
  uniform = np.asarray(
    mc_steps.uniforms(jax.random.key(0), keys, chosen), np.float64
  )
  assert uniform.shape == (num_rows, num_draws)
  assert (uniform >= 0).all() and (uniform < 1).all()
  if stratified == "row":
    slices = np.sort(np.floor(uniform * num_draws), axis=1)
    np.testing.assert_array_equal(
      slices, np.arange(num_draws)[None].repeat(6, 0)
    )
    # Shuffled: a draw by itself is not tied to its slice.
    assert (np.floor(uniform * num_draws)[:, 0] != 0).any()
  if stratified == "batch":
    slices = np.sort(np.floor(uniform * 48).reshape(-1))
    np.testing.assert_array_equal(slices, np.arange(48))
  if stratified != "batch":
    # A row's draws come from its own key alone.
    alone = mc_steps.uniforms(jax.random.key(5), keys[2:3], chosen)
    np.testing.assert_array_equal(np.asarray(alone[0], np.float64), uniform[2])


@pytest.mark.parametrize("stratified", mc_steps.STRATA)
def test_every_draw_by_itself_is_uniform(stratified):
  chosen = settings(num_mc_steps=4, stratified=stratified)

  def one(key):
    batch_key, row_key = jax.random.split(key)
    return mc_steps.uniforms(batch_key, jax.random.split(row_key, 2), chosen)

  draws = jax.vmap(one)(jax.random.split(jax.random.key(0), 4000))
  draws = np.asarray(draws).reshape(4000, -1)
  for column in draws.T:
    count, _ = np.histogram(column, bins=10, range=(0, 1))
    chi2 = ((count - 400) ** 2 / 400).sum()
    assert chi2 < 35  # 9 degrees of freedom, 1 in 17,000


def test_distinct_fraction():
  step = jnp.array([[1, 1, 2, 1], [0, 1, 2, 3]])
  np.testing.assert_allclose(mc_steps.distinct_fraction(step), 6 / 8)


@pytest.mark.parametrize("step_rule", ["uniform", "entropy"])
@pytest.mark.parametrize("normalize", ["sum", "mean"])
def test_a_budget_of_the_batch_weighs_every_step_alike(step_rule, normalize):
  """Over all uniforms: 1 where there is an advantage, 0 where there is none."""
  entropy = np.random.default_rng(0).uniform(0.1, 1.0, (3, 4))
  rows = rollout(
    completion=np.full((3, 4), 5),
    unmask_step=[[0, 1, 2, 3], [3, 2, 1, 0], [0, 0, 1, 4]],
    entropy=entropy,
    num_denoise_steps=4,
    num_steps=[4, 4, 2],
  )
  num = 200_000
  weight = mc_steps.draw_of_batch(
    rows,
    jnp.array([0.5, 0.0, -2.0]),
    (jnp.arange(num) + 0.5) / num,
    settings(step_rule=step_rule, budget="batch", normalize=normalize),
    sampling_lib.Sampling(
      mask_id=9,
      eos_id=0,
      completion_length=4,
      block_length=4,
      num_denoise_steps=4,
    ),
  )
  expected = np.array([[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]], float)
  if normalize == "mean":
    expected /= np.array([[4], [4], [2]])
  np.testing.assert_allclose(weight, expected, rtol=2e-3)
