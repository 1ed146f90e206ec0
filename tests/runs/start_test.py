"""A run made longer, and a run that begins with what another one trained."""

import json
import pathlib
import shutil
import types as python_types

import chex
import jax
import numpy as np
import pytest
from absl import flags

from agrpo_jax import command
from agrpo_jax import errors
from agrpo_jax import main
from agrpo_jax import settings
from agrpo_jax import train
from agrpo_jax.port import model as model_lib
from agrpo_jax.runs import checkpoint_read
from fixtures import runs


def test_a_longer_run_is_the_one_that_was_so_from_the_beginning(
  tmp_path, capsys
):
  c = runs.varied(tmp_path)
  whole = c.copy_and_resolve_references()
  whole.workdir = str(tmp_path / "whole")
  runs.train(whole)
  c.train.num_steps = 2
  runs.train(c)
  # When to save and what to keep may change too, and who grades.
  c.train.update(num_steps=4, checkpoint_every=2, keep=1, log_samples=0)
  c.grading.num_workers = 2
  runs.train(c)
  assert runs.losses(c) == runs.losses(whole)
  assert "after train step 2 of 4. It was of 2.\n" in capsys.readouterr().out


def test_a_longer_run_says_what_its_cosine_does(tmp_path, capsys):
  c = runs.varied(tmp_path)
  c.optimizer.schedule = "cosine"
  c.train.num_steps = 1
  runs.train(c)
  c.train.num_steps = 2
  runs.train(c)
  said = capsys.readouterr().out
  assert "after train step 1 of 2. It was of 1: the learning rate, " in said


def test_a_run_does_not_get_shorter(tmp_path):
  c = runs.small(tmp_path)
  runs.begin(c)
  c.train.num_steps = 3
  with pytest.raises(errors.UserError, match="num_steps: 4 before, 3 now"):
    runs.begin(c)


@pytest.fixture(scope="module", params=[0, 4], ids=["full", "lora"])
def first(request, tmp_path_factory):
  """A run of two train steps."""
  c = runs.varied(tmp_path_factory.mktemp("first"))
  c.lora.rank = request.param
  c.train.num_steps = 2
  runs.train(c)
  return c


def trainable(c, train_step):
  """What a run had trained after so many train steps."""
  source, lora = model_lib.trained_by(c.workdir)
  model = model_lib.load_trained(
    source, lora, settings.rl(c).mesh.make(), f"{c.workdir}:{train_step}"
  )
  return jax.tree.map(np.asarray, model.trainable)


def test_it_begins_with_what_the_other_run_trained(first, tmp_path):
  c = runs.varied(tmp_path)
  c.lora.rank = first.lora.rank
  c.train.update(num_steps=1, keep=2)
  train.train(settings.rl(c), first.workdir)
  assert checkpoint_read.Reader(c.workdir).steps() == [1, 0]
  chex.assert_trees_all_equal(trainable(c, 0), trainable(first, 2))
  began = json.loads((pathlib.Path(c.workdir) / "start.json").read_text())
  name = pathlib.Path(first.workdir).name
  assert began == {"run": name, "train_step": 2}
  # By itself from here on: the same command goes on without the other run.
  c.train.num_steps = 2
  train.train(settings.rl(c), str(tmp_path / "gone"))
  assert [step for step, *_ in runs.losses(c)] == [0, 1]


def test_a_reference_that_would_be_lost_is_refused(first, tmp_path):
  c = runs.varied(tmp_path)
  c.lora.rank = first.lora.rank
  c.objective.kl_coef = 0.1
  c.train.num_steps = 1
  if first.lora.rank:  # the base stays
    train.train(settings.rl(c), first.workdir)
    return
  with pytest.raises(errors.UserError, match=r"agrpo port --checkpoint=.*--to"):
    train.train(settings.rl(c), first.workdir)
  assert not pathlib.Path(c.workdir).exists()


def test_adapters_of_another_kind_are_refused(first, tmp_path):
  c = runs.varied(tmp_path)
  c.lora.rank = 2
  with pytest.raises(errors.UserError):
    train.train(settings.rl(c), first.workdir)
  assert not pathlib.Path(c.workdir).exists()


@pytest.fixture
def start(monkeypatch):
  """`agrpo train`, given its config and --checkpoint; returns the settings."""

  def run(c, checkpoint, given=()):
    seen = []
    values = python_types.SimpleNamespace(checkpoint=checkpoint)
    monkeypatch.setattr(flags, "FLAGS", values)
    monkeypatch.setattr(
      command, "CONFIG", python_types.SimpleNamespace(value=c)
    )
    monkeypatch.setattr(command, "given_keys", lambda: {*given})
    monkeypatch.setattr(train, "train", lambda *args: seen.append(args))
    main.main([])
    ((s, found),) = seen
    assert found == checkpoint
    return s

  return run


def test_model_and_adapter_are_the_other_runs(first, tmp_path, start):
  c = runs.varied(tmp_path)
  c.model.path = "another/model"
  c.model.remat = "full"
  c.lora.rank = 8
  s = start(c, first.workdir)
  assert s.model.path == first.model.path
  assert (s.lora.rank if s.lora else 0) == first.lora.rank
  assert s.model.remat == "full"  # how it is computed is this run's business


def test_a_rank_that_contradicts_is_told(first, tmp_path, start):
  c = runs.varied(tmp_path)
  c.lora.rank = 8
  with pytest.raises(errors.UserError, match=r"config\.lora\.rank=8"):
    start(c, first.workdir, given=["lora.rank"])


def test_what_goes_on_asks_for_the_other_run_no_more(first, tmp_path, start):
  c = runs.varied(tmp_path)
  with pytest.raises(errors.UserError, match="is not a work directory"):
    start(c, str(tmp_path / "gone"))
  shutil.copytree(first.workdir, c.workdir)
  assert start(c, str(tmp_path / "gone")).model.path == first.model.path
