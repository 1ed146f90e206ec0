"""A model with what a run trained: which checkpoint is meant."""

import dataclasses
import shutil

import chex
import jax
import jax.numpy as jnp
import pytest

from agrpo_jax import errors
from agrpo_jax import optimizer
from agrpo_jax import settings
from agrpo_jax.port import model as model_lib
from agrpo_jax.runs import checkpoint
from fixtures import recordings
from fixtures import runs


@pytest.fixture(scope="module")
def c(tmp_path_factory):
  """A config whose work directory has three checkpoints, the second best."""
  c = runs.small(tmp_path_factory.mktemp("runs"))
  c.lora.rank = 2
  s = settings.rl(c)
  model = model_lib.load_model(s.model, s.lora, s.mesh.make())
  state = model.initial_state(
    optimizer.make(optimizer.Optimizer(learning_rate=0.1))
  )
  with checkpoint.Checkpoints(c.workdir, keep=3) as checkpoints:
    for train_step, accuracy in ((1, 0.1), (2, 0.3), (3, 0.2)):
      state = dataclasses.replace(
        state, train_step=jnp.int32(train_step), lora=filled(model, train_step)
      )
      checkpoints.save(state, {}, accuracy=accuracy)
  return c


def filled(model, value):
  return jax.tree.map(lambda x: jnp.full_like(x, value), model.lora)


def load(c, checkpoint):
  s = settings.rl(c)
  return model_lib.load_trained(s.model, s.lora, s.mesh.make(), checkpoint)


@pytest.mark.parametrize(
  "which,train_step", [("", 3), (":best", 2), (":1", 1), (":3", 3)]
)
def test_which_checkpoint(c, which, train_step):
  model = load(c, c.workdir + which)
  chex.assert_trees_all_equal(model.lora, filled(model, train_step))


def test_a_damaged_best_is_told_with_the_others(c, tmp_path):
  damaged = shutil.copytree(c.workdir, tmp_path / "damaged")
  for path in (damaged / "checkpoints/2/trainable").rglob("d/*"):
    path.write_bytes(b"")
  with pytest.raises(errors.UserError, match="checkpoints/2' is damaged") as e:
    load(c, f"{damaged}:best")
  assert "train steps [3, 2, 1]" in str(e.value)


@pytest.mark.parametrize(
  "attention, words", [("cudnn", "an NVIDIA GPU"), ("splash", "a TPU")]
)
def test_attention_is_refused_where_its_hardware_is_not(c, attention, words):
  other = c.copy_and_resolve_references()
  other.model.attention = attention
  other.model.path = "nowhere"  # nothing is looked for before
  with pytest.raises(
    errors.UserError, match=f"'{attention}' needs {words}; here .* the cpu"
  ):
    load(other, "")


def test_splash_is_refused_where_the_mesh_splits_a_head(monkeypatch):
  monkeypatch.setattr(model_lib.mesh_lib, "platform", lambda mesh: "tpu")
  shape, _ = recordings.random_network(attention="splash")  # 2 KV heads
  mesh = jax.sharding.AbstractMesh((1, 1, 4), model_lib.mesh_lib.AXES)
  with pytest.raises(errors.UserError, match=r"splits one of its 2 KV heads"):
    model_lib.describe_model(shape, None, mesh, tokenizer=None)


def cached(c):
  s = settings.rl(c)
  sampling = dataclasses.replace(s.rollout.sampling, cache="dual")
  return dataclasses.replace(s.rollout, sampling=sampling, num_slots=2)


def test_the_cache_has_the_size_that_is_told(c):
  model, draw = load(c, ""), cached(c)
  completion_length = draw.sampling.completion_length
  network = model.bind(model.params, model.lora)
  kept = jax.eval_shape(
    network.keys_values,
    jnp.zeros((2, 16 + completion_length), jnp.int32),
    jnp.full(2, 16 + completion_length),
  )
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))
  assert model.cache_bytes(16, draw) == size > 0
  plain = dataclasses.replace(draw.sampling, cache="none")
  assert model.cache_bytes(16, dataclasses.replace(draw, sampling=plain)) == 0


def test_a_cache_is_refused_with_the_arithmetic(c, monkeypatch):
  model, draw = load(c, ""), cached(c)
  held = model_lib.mesh_lib.bytes_per_device(model.params)
  needed = held + model.cache_bytes(16, draw)

  def has(memory):
    monkeypatch.setattr(model_lib.mesh_lib, "memory_bytes", lambda mesh: memory)

  has(needed)
  model.check_draw(16, draw)
  has(needed - 1)
  with pytest.raises(errors.UserError) as error:
    model.check_draw(16, draw)
  assert "cache='dual' does not fit: keys and values of 2 comp" in str(error)
  assert "x (16 + 8) tokens of float32" in str(error.value)
  assert "config.mesh" in str(error.value)
