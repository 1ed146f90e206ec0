"""The demo as `make demo` runs it, shorter than the warm-up of its config."""

import json

import numpy as np

from agrpo_jax import demo
from agrpo_jax.evaluation import statistics
from agrpo_jax.runs import metrics
from fixtures import commands


def test_a_shorter_demo_with_its_own_seed_and_work_directory(
  tmp_path, monkeypatch
):
  monkeypatch.setenv("HOME", str(tmp_path))
  folder = tmp_path / "mine"
  said = commands.alone(
    "-m",
    "agrpo_jax.demo",
    *commands.TINY[2:],
    "--config.optimizer.schedule=cosine",  # as its config has it
    "--config.train.num_steps=3",
    "--config.evaluate.num_examples=4",
    "--config.evaluate.batch_size=4",
    "--config.seed=7",
    "--config.workdir=~/mine",
    devices=1,
  )
  assert "Held-out problems of sudoku, " in said and "cells right" in said
  assert "seed 7" in said
  assert f"curves: {folder / 'curves.png'}" in said
  assert (folder / "curves.png").exists()
  assert said.endswith(f"report: {folder / 'report.html'}\n")
  assert "<title>mine</title>" in (folder / "report.html").read_text()
  recorded = json.loads((folder / "config.json").read_text())
  assert (recorded["seed"], recorded["workdir"]) == (7, "~/mine")
  records = list(metrics.read(folder / "metrics.jsonl"))
  rates = [record["learning_rate"] for record in records]
  # By hand: of 3 updates 1 is warm-up; then half a cosine from 3e-4 to zero.
  np.testing.assert_allclose(rates, [1.5e-4, 3e-4, 1.5e-4], rtol=1e-5)


def test_a_single_held_out_problem_has_no_error(tmp_path):
  before = statistics.Result([{"grades": {"accuracy": 0.0}}], 1, 0.0)
  log = tmp_path / "metrics.jsonl"
  record = {"train_step": 0, "reward": 0.5, "accuracy": 0.5, "eval/accuracy": 1}
  log.write_text(json.dumps(record) + "\n")
  demo.plot(log, before, tmp_path / "curves.png")
  assert (tmp_path / "curves.png").exists()
  assert demo.percent(before) == "0.0 %"


def test_the_table_of_a_task_without_cells():
  def result(**grades):
    return statistics.Result([{"grades": grades}] * 2, 1, 0.0)

  plain = result(accuracy=0.0), result(accuracy=1.0)
  assert demo.table(*plain).split("\n") == [
    "                      solved",
    "  before         0.0 % ± 0.0",
    "  after        100.0 % ± 0.0",
    "  gain         +100.0 points",
  ]
  # Where all graders failed before, nothing had a name.
  failed = statistics.Result([{"grades": {}}] * 2, 1, 0.0)
  cells = result(accuracy=1.0, cells=0.5)
  assert "cells right" not in demo.table(failed, cells)
  assert demo.table(cells, cells).count("50.0 %") == 2
