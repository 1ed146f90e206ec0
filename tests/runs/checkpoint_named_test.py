"""Which checkpoint a name means, and what names none."""

import jax.numpy as jnp
import pytest

from agrpo_jax import errors
from agrpo_jax import types
from agrpo_jax.runs import checkpoint
from agrpo_jax.runs import checkpoint_named


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A work directory with three checkpoints, the second the most accurate."""
  return save(tmp_path_factory.mktemp("run"), {1: 0.1, 2: 0.3, 3: 0.2})


def save(workdir, accuracies):
  """Saves a checkpoint per train step; returns the work directory."""
  with checkpoint.Checkpoints(workdir, keep=3) as checkpoints:
    for train_step, accuracy in accuracies.items():
      lora = {"a": jnp.zeros(2)}
      state = types.TrainState(jnp.int32(train_step), {}, lora, ())
      checkpoints.save(state, {}, accuracy=accuracy)
  return workdir


@pytest.mark.parametrize(
  "which,train_step", [("", 3), (":best", 2), (":1", 1), (":3", 3)]
)
def test_which_checkpoint(workdir, which, train_step):
  assert checkpoint_named.find_train_step(f"{workdir}{which}") == train_step


@pytest.mark.parametrize("name", ["run:1", "gsm8k-14:05", "a:best"])
def test_a_work_directory_whose_name_ends_like_a_checkpoint(tmp_path, name):
  save(tmp_path / name.partition(":")[0], {1: 0.1})
  own = str(save(tmp_path / name, {2: 0.1, 3: None}))
  assert checkpoint_named.split(own) == (own, "")
  assert checkpoint_named.find_train_step(own) == 3
  assert checkpoint_named.find_train_step(f"{own}:best") == 2
  assert checkpoint_named.find_train_step(f"{own}:2") == 2


def test_the_newest_is_not_pinned(workdir):
  assert checkpoint_named.find(str(workdir))[1] is None


def test_a_pinned_name_has_the_train_step(workdir):
  for name in (f"{workdir}/", f"{workdir}:best"):
    pinned = checkpoint_named.pinned(name)
    assert pinned == f"{workdir}:{checkpoint_named.find_train_step(name)}"


def test_no_name_is_no_checkpoint():
  assert checkpoint_named.find_train_step("") is None


@pytest.mark.parametrize(
  "name,part",
  [
    ("{}x", "is not a work directory"),
    ("{}:newest", ":newest' is not a work directory"),
    ("{}:7", "train steps [3, 2, 1], not of 7"),
    ("{}/empty", "holds no checkpoint yet"),
  ],
)
def test_what_is_no_checkpoint(workdir, name, part):
  (workdir / "empty" / "checkpoints").mkdir(parents=True, exist_ok=True)
  with pytest.raises(errors.UserError) as caught:
    checkpoint_named.find(name.format(workdir))
  assert part in str(caught.value)


def test_a_run_without_evaluations_has_no_best(tmp_path):
  save(tmp_path, {1: None})
  with pytest.raises(errors.UserError, match="evaluated none of its"):
    checkpoint_named.find(f"{tmp_path}:best")


def test_a_record_that_is_a_link_out_of_the_work_directory(tmp_path):
  (tmp_path / "other.json").write_text("{}")
  workdir = tmp_path / "run"
  workdir.mkdir()
  (workdir / "config.json").symlink_to("../other.json")
  with pytest.raises(errors.UserError, match="is a link out of its folder"):
    checkpoint_named.read_config(str(workdir))
