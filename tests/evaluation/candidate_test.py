"""Tests of agrpo_jax.candidate: which checkpoint of a run is meant."""

import dataclasses
import shutil

import chex
import jax
import jax.numpy as jnp
import pytest

from agrpo_jax import build
from agrpo_jax import errors
from agrpo_jax import optimizer
from agrpo_jax.evaluation import candidate
from agrpo_jax.runs import checkpoint
from fixtures import runs


@pytest.fixture(scope="module")
def c(tmp_path_factory):
  """A config whose work directory has three checkpoints, the second best."""
  c = runs.small(tmp_path_factory.mktemp("runs"))
  c.lora.rank = 2
  policy = build.policy(c)
  state = build.init_state(
    policy, optimizer.make(optimizer.Optimizer(learning_rate=0.1))
  )
  with checkpoint.Checkpoints(c.workdir, keep=3) as checkpoints:
    for train_step, accuracy in ((1, 0.1), (2, 0.3), (3, 0.2)):
      state = dataclasses.replace(
        state, train_step=jnp.int32(train_step), lora=filled(policy, train_step)
      )
      checkpoints.save(state, {}, accuracy=accuracy)
  return c


def filled(policy, value):
  return jax.tree.map(lambda x: jnp.full_like(x, value), policy.lora)


@pytest.mark.parametrize(
  "which,train_step", [("", 3), (":best", 2), (":1", 1), (":3", 3)]
)
def test_which_checkpoint(c, which, train_step):
  policy = candidate.policy(c, c.workdir + which)
  chex.assert_trees_all_equal(policy.lora, filled(policy, train_step))


def test_a_damaged_best_is_told_with_the_others(c, tmp_path):
  damaged = shutil.copytree(c.workdir, tmp_path / "damaged")
  for path in (damaged / "checkpoints/2/trainable").rglob("d/*"):
    path.write_bytes(b"")
  with pytest.raises(errors.UserError, match="checkpoints/2' is damaged") as e:
    candidate.policy(c, f"{damaged}:best")
  assert "train steps [3, 2, 1]" in str(e.value)
