"""Tests of agrpo_jax.optimizer against a numpy AdamW."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agrpo_jax import errors
from agrpo_jax import optimizer
from agrpo_jax.parallel import mesh

SETTINGS = optimizer.Optimizer(
  learning_rate=0.1,
  warmup_steps=2,
  schedule="cosine",
  num_updates=6,
  b1=0.9,
  b2=0.99,
  eps=1e-8,
  weight_decay=0.5,
  clip_norm=1.0,
)


def _params():
  return {
    "q": {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([3.0])},
    "norm": {"scale": jnp.array([4.0])},
    "adapter": {"a": jnp.array([[0.5]]), "b": jnp.array([[-0.5]])},
  }


def _gradients(update: int):
  """Of different sizes: the first is clipped, the others are not."""
  scale = 10.0 if update == 0 else 0.01 * (update + 1)
  return jax.tree.map(lambda p: scale * jnp.cos(p + update), _params())


def _numpy_adamw(num_updates: int):
  """The same arithmetic written out, on flat lists of float64 arrays."""
  paths, leaves = zip(
    *jax.tree_util.tree_leaves_with_path(_params()), strict=True
  )
  params = [np.asarray(leaf, np.float64) for leaf in leaves]
  mean = [np.zeros_like(p) for p in params]
  square = [np.zeros_like(p) for p in params]
  # (u + 1) / 3 for two updates of warm-up, then a quarter of a cosine each.
  rates = [0.1 / 3, 0.2 / 3] + [
    0.05 * (1 + math.cos(math.pi * i / 4)) for i in range(4)
  ]
  for update in range(num_updates):
    gradients = [
      np.asarray(g, np.float64) for g in jax.tree.leaves(_gradients(update))
    ]
    norm = math.sqrt(sum((g**2).sum() for g in gradients))
    for i, g in enumerate(gradients):
      g = g / max(norm, 1.0)
      mean[i] = 0.9 * mean[i] + 0.1 * g
      square[i] = 0.99 * square[i] + 0.01 * g**2
      step = (mean[i] / (1 - 0.9 ** (update + 1))) / (
        np.sqrt(square[i] / (1 - 0.99 ** (update + 1))) + 1e-8
      )
      is_decayed = paths[i][-1].key not in ("bias", "scale")
      params[i] = params[i] - rates[update] * (
        step + (0.5 * params[i] if is_decayed else 0.0)
      )
  return jax.tree.unflatten(jax.tree.structure(_params()), params)


def test_matches_numpy_adamw():
  transformation = optimizer.make(SETTINGS)
  params, state = _params(), transformation.init(_params())
  update_fn = jax.jit(transformation.update)
  for update in range(6):
    updates, state = update_fn(_gradients(update), state, params)
    params = optax.apply_updates(params, updates)
    chex.assert_trees_all_close(
      params, _numpy_adamw(update + 1), rtol=1e-5, atol=1e-6
    )


def test_schedule_warms_up_from_above_zero_then_decays_to_zero():
  rate = optimizer.schedule(SETTINGS)
  got = [float(rate(update)) for update in range(7)]
  want = [0.1 / 3, 0.2 / 3, 0.1, 0.085355, 0.05, 0.014645, 0.0]
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_constant_schedule():
  settings = optimizer.Optimizer(learning_rate=2.0, warmup_steps=1)
  rate = optimizer.schedule(settings)
  assert [float(rate(update)) for update in range(4)] == [1.0, 2.0, 2.0, 2.0]
  settings = optimizer.Optimizer(learning_rate=2.0)
  assert float(optimizer.schedule(settings)(0)) == 2.0


@pytest.mark.parametrize("schedule", optimizer.SCHEDULES)
@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_the_rate_of_the_newest_update_is_known(schedule, warmup_steps):
  """By hand: weight 1, gradient 1; Adam's first update is the rate itself."""
  settings = dataclasses.replace(
    SETTINGS,
    schedule=schedule,
    warmup_steps=warmup_steps,
    weight_decay=0.0,
    b1=0.0,
    b2=0.0,
  )
  transformation = optimizer.make(settings)
  params = {"kernel": jnp.ones(())}
  state = transformation.init(params)
  rise = [0.1 / 4, 0.2 / 4, 0.3 / 4] if warmup_steps else []
  falls = {"constant": [0.1], "cosine": [0.1, None]}[schedule]
  before = optimizer.last_learning_rate(settings, state)
  np.testing.assert_allclose(before, (rise + falls)[0], rtol=1e-6)
  for rate in rise + falls:
    updates, state = transformation.update(params, state, params)
    got = float(optimizer.last_learning_rate(settings, state))
    # The gradient is clipped to norm 1; without momentum its sign is left.
    np.testing.assert_allclose(got, -updates["kernel"], rtol=1e-6)
    if rate is not None:
      np.testing.assert_allclose(got, rate, rtol=1e-6)


def test_infinite_clip_norm_changes_nothing():
  settings = optimizer.Optimizer(learning_rate=1.0, clip_norm=math.inf)
  transformation = optimizer.make(settings)
  state = transformation.init(_params())
  gradients = jax.tree.map(lambda p: 1e4 * p, _params())
  updates, _ = transformation.update(gradients, state, _params())
  # Adam's first update is the sign of the gradient times the rate.
  chex.assert_trees_all_close(
    updates, jax.tree.map(lambda p: -jnp.sign(p), _params()), rtol=1e-5
  )


def test_every_wrong_setting_is_reported_at_once():
  settings = optimizer.Optimizer(
    learning_rate=-1.0,
    warmup_steps=5,
    schedule="cosine",
    num_updates=5,
    b1=1.0,
    b2=1.0,
    eps=0.0,
    weight_decay=-0.1,
    clip_norm=0.0,
  )
  with pytest.raises(errors.UserError) as caught:
    optimizer.make(settings)
  message = str(caught.value)
  for name in ("learning_rate", "b1", "b2", "eps"):
    assert f"optimizer.{name}=" in message
  assert "optimizer.weight_decay=-0.1 must be in [0, 100]" in message
  assert "optimizer.clip_norm=0.0 must be positive" in message
  wrong = dataclasses.replace(SETTINGS, schedule="linear", warmup_steps=-1)
  with pytest.raises(errors.UserError, match="'linear' must be constant or"):
    optimizer.make(wrong)


def test_a_warm_up_before_a_decay_takes_at_most_half_of_the_run():
  settings = optimizer.Optimizer(
    learning_rate=0.1, warmup_steps=5, schedule="cosine", num_updates=4
  )
  rate = optimizer.schedule(settings)
  expected = [0.1 / 3, 0.2 / 3, 0.1, 0.05]
  np.testing.assert_allclose([rate(u) for u in range(4)], expected, rtol=1e-6)


def test_bfloat16_parameters_are_refused():
  params = {"kernel": jnp.ones((2, 2), jnp.bfloat16)}
  with pytest.raises(ValueError, match=r"float32.*kernel.*bfloat16"):
    optimizer.make(SETTINGS).init(params)


def test_moments_lie_with_their_parameters():
  one = mesh.make()
  params = _params()
  split = jax.sharding.NamedSharding(one, jax.P("fsdp"))
  transformation = optimizer.make(SETTINGS)
  where = optimizer.state_shardings(
    transformation,
    jax.eval_shape(lambda: params),
    jax.tree.map(lambda _: split, params),
    mesh.replicated(one),
  )
  state = transformation.init(params)
  chex.assert_trees_all_equal_structs(where, state)
  placed = jax.device_put(state, where)
  specs = {leaf.sharding.spec for leaf in jax.tree.leaves(placed)}
  assert specs == {split.spec, jax.P()}
  num_split = sum(leaf is split for leaf in jax.tree.leaves(where))
  assert num_split == 2 * len(jax.tree.leaves(params))
