"""Baselines, by hand and against the recordings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agrpo_jax.objectives import advantage
from fixtures import recordings

ARRAYS, META = recordings.load("advantages/advantages")


@pytest.mark.parametrize("case", sorted(META))
def test_equals_the_released_advantages(case):
  parts = ARRAYS[f"{case}/rewards_per_func"]
  reward = np.nansum(parts * META[case]["reward_weights"], axis=1)
  groups = jnp.asarray(reward, jnp.float32).reshape(
    -1, META[case]["num_generations"]
  )
  ours = jax.vmap(lambda r: advantage.group_advantage(r, "group_mean"))(groups)
  np.testing.assert_allclose(
    ours.reshape(-1), ARRAYS[f"{case}/advantages"], atol=1e-5
  )


def test_leave_one_out_by_hand():
  reward = jnp.array([1.0, 0.0, 4.0])
  np.testing.assert_allclose(
    advantage.group_advantage(reward, "leave_one_out"),
    [-1.0, -2.5, 3.5],
    rtol=1e-6,
  )
  np.testing.assert_allclose(
    advantage.group_advantage(reward, "group_mean"),
    np.array([-1.0, -2.5, 3.5]) * 2 / 3,
    rtol=1e-6,
  )


def test_a_group_without_spread_is_exactly_zero():
  # The mean of ten times 0.1 is not 0.1 in float32.
  reward = jnp.full((10,), 0.1)
  assert (
    np.asarray(advantage.group_advantage(reward, "group_mean")) == 0
  ).all()


def test_mistakes():
  with pytest.raises(ValueError, match="two completions"):
    advantage.group_advantage(jnp.ones(1), "group_mean")
  with pytest.raises(ValueError, match="median"):
    advantage.group_advantage(jnp.ones(2), "median")
