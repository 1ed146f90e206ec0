"""Whole runs on a recorded tiny checkpoint and real GSM8K questions."""

import itertools
import json
import pathlib

import chex
import numpy as np
import pytest

import fixtures
from agrpo_jax import checkpoint
from agrpo_jax import checkpoint_read
from agrpo_jax import config as config_lib
from agrpo_jax import errors
from agrpo_jax import evaluation
from agrpo_jax import grading
from agrpo_jax import metrics
from agrpo_jax import run as run_lib
from agrpo_jax import sft
from agrpo_jax import train

DATA = pathlib.Path(__file__).parent / "testdata" / "gsm8k"


def small(tmp_path) -> config_lib.ConfigDict:
  """configs/gsm8k.py:debug, smaller still."""
  c = config_lib.rl()
  c.workdir = str(tmp_path / "run")
  c.model.path = str(fixtures.GOLDEN / "ckpt" / "tiny_mha")
  c.model.tokenizer = "bytes"
  c.model.dtype = "float32"
  config_lib.use_task(c, "gsm8k", protocol="llada")
  c.data.path = str(DATA)
  c.data.max_prompt_length = 512
  c.data.bucket = 256
  c.rollout.update(
    num_prompts=2,
    group_size=2,
    batch_size=2,
    completion_length=8,
    block_length=4,
    num_denoise_steps=4,
  )
  c.objective.update(num_mc_steps=2, microbatch=4)
  c.optimizer.update(learning_rate=1e-3, schedule="constant")
  c.train.update(num_steps=4, checkpoint_every=1)
  c.evaluate.update(
    num_examples=5,
    batch_size=2,
    completion_length=8,
    block_length=4,
    num_denoise_steps=4,
  )
  c.grading.num_workers = 1
  return c


@pytest.fixture
def any_reward(monkeypatch):
  """A tiny random network never answers; reward something it can vary."""

  def concatenate(parts):
    graded = original(parts)
    reward = np.arange(graded.reward_B.size) % 3 * 0.5
    object.__setattr__(graded, "reward_B", reward)
    return graded

  original = grading.concatenate
  monkeypatch.setattr(grading, "concatenate", concatenate)


@pytest.fixture
def patient(monkeypatch):
  """Each save waits for the one before: train steps here are too short."""
  monkeypatch.setattr(checkpoint.Checkpoints, "is_busy", False)


def losses(c) -> list[tuple]:
  names = ("train_step", "loss", "grad_norm", "reward", "entropy")
  return [
    tuple(record[name] for name in names)
    for record in metrics.read(pathlib.Path(c.workdir) / "metrics.jsonl")
  ]


class Killed(BaseException):
  pass


@pytest.mark.parametrize("rank", [0, 4])
def test_a_killed_run_goes_on_bit_equal(
  tmp_path, monkeypatch, any_reward, rank
):
  whole = small(tmp_path / "whole")
  whole.lora.rank = rank
  train.train(whole)
  broken = small(tmp_path / "broken")
  broken.lora.rank = rank
  finish_step = run_lib.Run.finish_step

  def kill_in_step_2(self, state, train_step, *args):
    if train_step == 2:
      self.writer.scalars(train_step, {"loss": 0.0})  # a line too early
      raise Killed
    finish_step(self, state, train_step, *args)

  monkeypatch.setattr(run_lib.Run, "finish_step", kill_in_step_2)
  with pytest.raises(Killed):
    train.train(broken)
  monkeypatch.setattr(run_lib.Run, "finish_step", finish_step)
  train.train(broken)
  assert [step for step, *_ in losses(broken)] == [0, 1, 2, 3]
  assert losses(broken) == losses(whole)
  assert losses(whole)[1][2] > 0
  samples = metrics.read(pathlib.Path(broken.workdir) / "samples.jsonl")
  assert [s["train_step"] for s in samples] == [0, 0, 1, 1, 2, 2, 3, 3]
  # A run that is complete does nothing more.
  train.train(broken)
  assert len(losses(broken)) == 4


def test_a_changed_config_is_refused_with_the_difference(tmp_path):
  c = small(tmp_path)
  with run_lib.start(c):
    pass
  c.optimizer.learning_rate = 5e-3
  c.wandb.name = "another"  # how to log may change
  with pytest.raises(errors.UserError) as error, run_lib.start(c):
    pass
  assert "config.optimizer.learning_rate: 0.001 before, 0.005 now" in str(
    error.value
  )
  assert "wandb" not in str(error.value)
  c.accept_changed_config = True
  with run_lib.start(c):
    pass


def test_not_finite_stops_before_saving(tmp_path, monkeypatch):
  c = small(tmp_path)
  c.train.num_steps = 2

  calls = itertools.count()

  def blow_up(graded, group_size):
    return {"reward": float("nan") if next(calls) == 1 else 0.0}

  monkeypatch.setattr(train, "reward_scalars", blow_up)
  with pytest.raises(FloatingPointError, match=r"step 1.*reward=nan"):
    train.train(c)
  # the state after train step 0
  assert checkpoint_read.Reader(c.workdir).latest_step == 1


def test_evaluation_of_model_and_checkpoint(tmp_path, any_reward):
  c = small(tmp_path)
  c.train.num_steps = 1
  output = tmp_path / "records.jsonl"
  before = evaluation.run(c, "", str(output))
  assert len(before.records) == 5
  lines = [json.loads(line) for line in output.read_text().splitlines()]
  assert [line["id"] for line in lines] == [r["id"] for r in before.records]
  assert np.isfinite(before.standard_error)
  with pytest.raises(errors.UserError, match="not a work directory"):
    evaluation.run(c, str(tmp_path / "nowhere"), "")
  train.train(c)
  after = evaluation.run(c, c.workdir, "")
  texts = [
    [r["completion"] for r in result.records] for result in (before, after)
  ]
  assert texts[0] != texts[1]
  # The batch size is without effect.
  c.evaluate.batch_size = 3
  again = evaluation.run(c, c.workdir, "")
  assert [r["completion"] for r in again.records] == texts[1]


def test_sft_learns_from_a_file_and_exports(tmp_path):
  file = tmp_path / "pairs.jsonl"
  pairs = [{"prompt": f"{n}?", "completion": str(n)} for n in range(8)]
  file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
  c = config_lib.sft()
  c.workdir = str(tmp_path / "run")
  c.model.network = dict(num_layers=1, width=32, num_heads=2, mlp_width=48)
  c.model.dtype = "float32"
  c.data.path = str(file)
  c.data.bucket = 32
  c.sft.update(
    completion_length=4,
    batch_size=8,
    microbatch=4,
    output=str(tmp_path / "out"),
  )
  c.optimizer.update(learning_rate=1e-2, schedule="constant")
  c.train.update(num_steps=30, checkpoint_every=30)
  sft.fine_tune(c)
  loss = [
    record["loss"] for record in metrics.read(tmp_path / "run/metrics.jsonl")
  ]
  assert np.mean(loss[-5:]) < 0.5 * np.mean(loss[:5])
  # The result is a checkpoint like any other.
  network, params, _ = fixtures.network_at(c.sft.output)
  assert network.num_layers == 1
  chex.assert_tree_all_finite(params)
