"""Whole runs on a recorded tiny checkpoint and real GSM8K questions."""

import itertools
import json
import pathlib
import shutil

import chex
import numpy as np
import pytest

from agrpo_jax import config as config_lib
from agrpo_jax import errors
from agrpo_jax import evaluate
from agrpo_jax import settings
from agrpo_jax import sft
from agrpo_jax import train
from agrpo_jax.runs import checkpoint_read
from agrpo_jax.runs import metrics
from fixtures import recordings
from fixtures import runs


@pytest.mark.parametrize("rank", [0, 4])
def test_a_killed_run_goes_on_bit_equal(tmp_path, rank):
  c = runs.varied(tmp_path)
  c.lora.rank = rank
  c.train.keep = c.train.num_steps
  runs.train(c)
  folder = pathlib.Path(c.workdir)
  logs = [folder / name for name in ("metrics.jsonl", "samples.jsonl")]
  whole, whole_samples = runs.losses(c), logs[1].read_text()
  assert [step for step, *_ in whole] == [0, 1, 2, 3]
  assert whole[1][2] > 0
  rates = [record["learning_rate"] for record in metrics.read(logs[0])]
  np.testing.assert_allclose(rates, [1e-3] * 4)
  # As a kill in train step 3 leaves it: logged, but not saved.
  for step in checkpoint_read.Reader(c.workdir).steps():
    if step > 2:
      shutil.rmtree(folder / "checkpoints" / str(step))
  assert checkpoint_read.Reader(c.workdir).latest_step in (1, 2)
  runs.train(c)
  assert runs.losses(c) == whole
  assert logs[1].read_text() == whole_samples
  # A run that is complete does nothing more.
  runs.train(c)
  assert len(runs.losses(c)) == 4


def test_a_changed_config_is_refused_with_the_difference(tmp_path):
  c = runs.small(tmp_path)
  runs.begin(c)
  c.optimizer.learning_rate = 5e-3
  c.wandb.name = "another"  # how to log may change
  with pytest.raises(errors.UserError) as error:
    runs.begin(c)
  assert "config.optimizer.learning_rate: 0.001 before, 0.005 now" in str(
    error.value
  )
  assert "wandb" not in str(error.value)
  c.accept_changed_config = True
  runs.begin(c)


def test_not_finite_stops_before_saving(tmp_path, monkeypatch):
  c = runs.small(tmp_path)
  c.train.num_steps = 2

  calls = itertools.count()

  def blow_up(graded, group_size):
    return {"reward": float("nan") if next(calls) == 1 else 0.0}

  monkeypatch.setattr(train, "reward_scalars", blow_up)
  with pytest.raises(FloatingPointError, match=r"train step 2 .*reward=nan"):
    runs.train(c)
  # the state after train step 0
  assert checkpoint_read.Reader(c.workdir).latest_step == 1


def test_evaluation_of_model_and_checkpoint(tmp_path):
  c = runs.varied(tmp_path)
  c.train.num_steps = 3
  output = tmp_path / "records.jsonl"
  before = evaluate.run(settings.rl(c), "", str(output))
  assert len(before.records) == 5
  lines = [json.loads(line) for line in output.read_text().splitlines()]
  assert [line["id"] for line in lines] == [r["id"] for r in before.records]
  assert np.isfinite(before.standard_error)
  with pytest.raises(errors.UserError, match="not a work directory"):
    evaluate.run(settings.rl(c), str(tmp_path / "nowhere"), "")
  runs.train(c)
  after = evaluate.run(settings.rl(c), c.workdir, "")
  texts = [
    [r["completion"] for r in result.records] for result in (before, after)
  ]
  assert texts[0] != texts[1]
  # The batch size is without effect.
  c.evaluate.batch_size = 3
  again = evaluate.run(settings.rl(c), c.workdir, "")
  assert [r["completion"] for r in again.records] == texts[1]


def test_a_threshold_is_trained_on_and_its_steps_are_paid_for(tmp_path):
  c = runs.varied(tmp_path)
  c.rollout.update(unmask_rule="threshold", threshold=0.02)
  c.objective.step_price = 2.0
  c.train.num_steps = 2
  runs.train(c)
  log = list(metrics.read(pathlib.Path(c.workdir) / "metrics.jsonl"))
  assert len(log) == 2
  for record in log:
    assert record["policy_ratio/max_deviation"] < 1e-4
    assert record["grad_norm"] > 0
    num_steps = record["completions/mean_denoise_steps"]
    assert 2 < num_steps < 8
    np.testing.assert_allclose(record["step_price/mean"], num_steps / 4)


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
  c.optimizer.update(learning_rate=1e-2, schedule="constant", warmup_steps=1)
  c.train.update(num_steps=30, checkpoint_every=30)
  sft.fine_tune(settings.sft(c))
  log = list(metrics.read(tmp_path / "run/metrics.jsonl"))
  rates = [record["learning_rate"] for record in log]
  np.testing.assert_allclose(rates, [5e-3] + [1e-2] * 29)
  loss = [record["loss"] for record in log]
  assert np.mean(loss[-5:]) < 0.5 * np.mean(loss[:5])
  assert all(record["seconds/update"] > 0 for record in log)
  # The result is a checkpoint like any other.
  network, params, _ = recordings.network_at(c.sft.output)
  assert network.num_layers == 1
  chex.assert_tree_all_finite(params)


def test_lengths_end_before_whatever_ends_a_completion():
  completion = np.array([[5, 6, 0, 7], [5, 0, 7, 6]])
  for eos_ids, mean in (((0,), 4.0), ((0, 7), 3.0)):
    found = train.length_scalars(completion, eos_ids)
    assert found["completions/mean_length"] == mean
    assert found["completions/clipped_ratio"] == 0.0
