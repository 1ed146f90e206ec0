"""The base model of a run is known by its contents."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from agrpo_jax import errors
from agrpo_jax.runs import checkpoint_meta
from agrpo_jax.runs import metrics
from fixtures import runs


@pytest.fixture(scope="module", params=[0, 2], ids=["full", "lora"])
def finished(request, tmp_path_factory):
  """A run of one train step, whose base model is a folder of its own."""
  folder = tmp_path_factory.mktemp("finished")
  c = runs.small(folder)
  shutil.copytree(c.model.path, folder / "base")
  c.model.path = str(folder / "base")
  c.lora.rank = request.param
  c.train.num_steps = 1
  runs.train(c)
  return c


@pytest.fixture
def going_on(finished, tmp_path):
  """The same run in a copy of its work directory, to be continued."""
  c = finished.copy_and_resolve_references()
  c.workdir = str(shutil.copytree(finished.workdir, tmp_path / "run"))
  c.accept_changed_config = True
  c.train.num_steps = 2
  return c


def num_train_steps(c):
  return len([*metrics.read(pathlib.Path(c.workdir) / "metrics.jsonl")])


def test_it_may_move_without_a_word(going_on, tmp_path):
  moved = shutil.copytree(going_on.model.path, tmp_path / "moved")
  going_on.model.path = f"{moved}/"
  going_on.accept_changed_config = False
  runs.train(going_on)
  assert num_train_steps(going_on) == 2


def test_it_may_move_and_be_computed_in_another_dtype(going_on, tmp_path):
  moved = shutil.copytree(going_on.model.path, tmp_path / "moved")
  going_on.model.path = f"{moved}/"
  going_on.model.dtype = "bfloat16"
  runs.train(going_on)
  assert num_train_steps(going_on) == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_model_is_refused_and_both_are_named(going_on, tmp_path, dtype):
  other = shutil.copytree(going_on.model.path, tmp_path / "other")
  tensors = safetensors.numpy.load_file(other / "model.safetensors")
  tensors["model.transformer.ln_f.weight"][3] += 0.5
  safetensors.numpy.save_file(tensors, other / "model.safetensors")
  base = going_on.model.path
  going_on.model.path = str(other)
  going_on.model.dtype = dtype
  with pytest.raises(errors.UserError) as caught:
    runs.train(going_on)
  assert repr(base) in str(caught.value) and repr(str(other)) in str(
    caught.value
  )


def of(values, dtype, path="base"):
  params = {"kernel": jnp.asarray(values, jnp.float32).astype(dtype)}
  return checkpoint_meta.describe_base(path, "", params)


VALUES = np.linspace(-3, 3, 24, dtype=np.float32).reshape(4, 6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_record_survives_json(dtype):
  model = of(VALUES, dtype)
  assert checkpoint_meta.BaseModel.from_json(model.to_json()) == model


def test_of_two_dtypes_the_rounded_values_are_compared():
  assert of(VALUES, "float32").is_same(of(VALUES, "bfloat16", "elsewhere"))
  assert of(VALUES, "bfloat16").is_same(of(VALUES, "float32"))
  other = VALUES.copy()
  other[2, 3] += 0.1
  assert not of(other, "float32").is_same(of(VALUES, "bfloat16"))
  # What rounding hides is seen only where both are float32.
  close = VALUES * np.float32(1 + 2**-20)
  assert of(close, "float32").is_same(of(VALUES, "bfloat16"))
  assert not of(close, "float32").is_same(of(VALUES, "float32"))


def test_a_record_of_another_version_is_refused():
  model = of(VALUES, "float32")
  old = {"path": "x", "revision": "", "checksums": list(model.checksums)}
  made_with = checkpoint_meta.other_versions({"agrpo_jax": "0.0.9"})
  with pytest.raises(
    errors.UserError, match=r"lacks 'dtype'.*with agrpo_jax 0\.0\.9; here"
  ):
    checkpoint_meta.BaseModel.from_json(old, made_with)


@pytest.mark.parametrize("made_with", [checkpoint_meta.versions(), {}, None, 7])
def test_of_the_same_versions_and_of_no_record_nothing_is_said(made_with):
  assert checkpoint_meta.other_versions(made_with) == ""


def test_rounding_is_that_of_loading():
  """bfloat16 of float32 on the device, and on the host where files are read."""
  values = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
  on_host = jax.numpy.asarray(values.astype(jnp.bfloat16))
  assert of(values, "float32").is_same(
    checkpoint_meta.describe_base("", "", {"kernel": on_host})
  )
