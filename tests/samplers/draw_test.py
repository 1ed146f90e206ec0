"""The draw against recordings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agrpo_jax.samplers import draw
from agrpo_jax.samplers import sampling as sampling_lib
from fixtures import recordings


def make(**settings) -> sampling_lib.Sampling:
  defaults = dict(
    mask_id=9,
    eos_id=0,
    completion_length=8,
    block_length=4,
    num_denoise_steps=4,
  )
  return sampling_lib.Sampling(**(defaults | settings))


ARRAYS, META = recordings.load("sampling/gumbel_sample")
COMBOS = list(enumerate(META["combos"]))


@pytest.mark.parametrize("kind", ["random", "edge"])
@pytest.mark.parametrize("index,combo", COMBOS)
def test_equals_the_released_draw(index, combo, kind):
  sampling = make(top_p_rule="drop", **combo)
  logits = jnp.asarray(ARRAYS[f"{kind}_logits"])
  gumbel = -np.log(-np.log(ARRAYS[f"{kind}_noise"]))
  rows = np.ones(logits.shape[:2], bool)
  if kind == "edge":
    # There the released code leaves float32's range; ours stays in log space.
    for name in ("shifted_minus_300_underflow", "two_huge_overflow"):
      rows[:, META["edge_rows"].index(name)] = False

  def one(logits_V, gumbel_V):
    filtered = draw.filter_logits(logits_V, sampling)
    noise_S = jnp.asarray(gumbel_V, jnp.float32)[filtered.ids]
    return draw.draw_token(logits_V, filtered, noise_S, sampling)

  drawn = jax.jit(jax.vmap(jax.vmap(one)))(logits, jnp.asarray(gumbel))
  name = f"{kind}_{index}"
  sure = rows & ~ARRAYS[f"{name}_sensitive"].astype(bool)
  if sampling.is_truncated:
    kept = recordings.keep_mask(drawn.support, META["V"])
    expected = np.unpackbits(ARRAYS[f"{name}_keep_packed"], axis=-1)
    # A logit of minus infinity has no probability, whether it is said to be
    # kept (when the k-th is one, the released code keeps them all) or not.
    has_prob = np.isfinite(np.asarray(logits))
    expected = expected[..., : META["V"]].astype(bool) & has_prob
    np.testing.assert_array_equal(kept[sure], expected[sure])
    difference = kept.sum(-1) - ARRAYS[f"{name}_keep_count"]
    finite = has_prob.all(axis=-1)
    assert (np.abs(difference[rows & finite]) <= 1).all()
  np.testing.assert_array_equal(
    drawn.token[sure], ARRAYS[f"{name}_tokens"][sure]
  )
  np.testing.assert_allclose(
    drawn.logprob[sure], ARRAYS[f"{name}_logps"][sure], atol=2e-4
  )
  np.testing.assert_allclose(
    drawn.entropy[sure], ARRAYS[f"{name}_entropies"][sure], atol=2e-4
  )


def test_top_p_keeps_or_drops_the_token_that_crosses():
  logits = jnp.log(jnp.array([0.1, 0.5, 0.15, 0.25]))
  for rule, expected in (("keep", [1, 3]), ("drop", [1])):
    sampling = make(top_p=0.6, top_p_rule=rule)
    filtered = draw.filter_logits(logits, sampling)
    kept = np.flatnonzero(np.isfinite(filtered.logprob)).tolist()
    assert kept == expected
  # Exactly reached: nothing crosses, both keep it.
  logits = jnp.log(jnp.array([0.5, 0.25, 0.25]))
  for rule in ("keep", "drop"):
    filtered = draw.filter_logits(logits, make(top_p=0.5, top_p_rule=rule))
    assert np.isfinite(filtered.logprob).tolist() == [True, False, False]


@pytest.mark.parametrize("rule", ["keep", "drop"])
@pytest.mark.parametrize("top_k", [0, 30])
def test_top_p_equals_a_sort(top_k, rule):
  """Ties included: of equal logits the first come first."""
  sampling = make(top_p=0.8, top_p_rule=rule, top_k=top_k)
  for seed in range(40):
    generator = np.random.default_rng(seed)
    # Sixteenths of probability: sums are exact, and ties many.
    with np.errstate(divide="ignore"):
      logits = np.log(generator.integers(0, 4, 50) / 16, dtype=np.float32)
    filtered = draw.filter_logits(jnp.asarray(logits), sampling)
    kept = np.asarray(filtered.ids)[np.isfinite(filtered.logprob)]
    order = np.argsort(-logits, kind="stable")
    if top_k:
      order = order[logits[order] >= logits[order[top_k - 1]]]
    weight = np.round(np.exp(logits[order]) * 16)
    before = np.cumsum(weight) - weight
    limit = np.float32(0.8) * weight.sum()
    if rule == "keep":
      expected = before < limit
    else:
      expected = before + weight <= limit
    expected[0] = True
    # A sum that is the limit itself is rounded to either side.
    if not np.isclose(before, limit).any():
      assert {*kept.tolist()} == {*order[expected].tolist()}


@pytest.mark.parametrize(
  "first,expected",
  # Top-k leaves 0.4 and 0.3 of 0.7, of which the larger is 0.57 alone.
  [("top_k", [1]), ("top_p", [1, 3])],
)
def test_which_truncation_comes_first(first, expected):
  logits = jnp.log(jnp.array([0.2, 0.4, 0.1, 0.3]))
  sampling = make(top_k=2, top_p=0.55, truncate_first=first)
  filtered = draw.filter_logits(logits, sampling)
  kept = np.isfinite(filtered.logprob)
  assert sorted(np.asarray(filtered.ids)[kept].tolist()) == expected
  # And top-k cuts what top-p has left.
  sampling = make(top_k=2, top_p=0.95, truncate_first=first)
  filtered = draw.filter_logits(logits, sampling)
  assert np.isfinite(filtered.logprob).sum() == 2


@pytest.mark.parametrize("rule", ["keep", "drop"])
def test_top_p_at_its_edges(rule):
  """Compiled, as it always runs."""

  def kept(logits, top_p):
    sampling = make(top_p=top_p, top_p_rule=rule)
    filtered = jax.jit(lambda x: draw.filter_logits(x, sampling))(logits)
    return np.flatnonzero(np.isfinite(filtered.logprob)).tolist()

  zeros = jnp.array([-0.0, 0.0, -0.0, 0.0])
  assert kept(zeros, 0.5) == [0, 1]  # two zeros are equal logits
  assert kept(jnp.array([1.0, 3.0, 2.0]), 1e-45) == [1]
  assert kept(jnp.array([-jnp.inf, 5.0, -jnp.inf]), 0.9) == [1]
  assert kept(jnp.array([2.0]), 0.3) == [0]


def test_ties_at_the_kth_logit_all_stay():
  logits = jnp.array([0.0, 1.0, 1.0, 1.0, -1.0, 2.0])
  filtered = draw.filter_logits(logits, make(top_k=2))
  kept = set(np.asarray(filtered.ids)[np.isfinite(filtered.logprob)].tolist())
  assert kept == {1, 2, 3, 5}
  np.testing.assert_allclose(jnp.exp(filtered.logprob).sum(), 1.0, rtol=1e-6)


@pytest.mark.parametrize(
  "settings",
  [
    dict(temperature=0.7),
    dict(top_k=5, temperature=0.7),
    dict(top_p=0.8),
    dict(top_k=20, top_p=0.9),
  ],
)
def test_replaying_a_recorded_support_gives_the_same_distribution(settings):
  sampling = make(**settings)
  logits = jax.random.normal(jax.random.key(0), (37,)) * 2
  filtered = draw.filter_logits(logits, sampling)
  support = draw.pack_support(filtered, sampling)
  again = draw.over_support(logits, support, sampling)
  for token in range(37):
    np.testing.assert_allclose(
      draw.token_logprob(again, jnp.int32(token)),
      draw.token_logprob(filtered, jnp.int32(token)),
      rtol=1e-6,
    )
  # Other logits cannot bring a cut token back, nor lose a kept one.
  moved = draw.over_support(logits[::-1], support, sampling)
  for token in range(37):
    was_kept = np.isfinite(draw.token_logprob(filtered, jnp.int32(token)))
    is_kept = np.isfinite(draw.token_logprob(moved, jnp.int32(token)))
    assert was_kept == is_kept


def test_gradients_through_a_cut_distribution_are_finite():
  sampling = make(top_k=3)
  logits = jax.random.normal(jax.random.key(0), (80,))

  def score(logits):
    filtered = draw.filter_logits(logits, sampling)
    return filtered.logprob[0] + filtered.entropy

  gradient = jax.grad(score)(logits)
  assert np.isfinite(gradient).all()
  assert (np.asarray(gradient) != 0).sum() == 3
