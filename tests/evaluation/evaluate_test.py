"""Evaluations of the bundled model: kept, stopped, continued, compared."""

import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from agrpo_jax import command as command_lib
from agrpo_jax import config as config_lib
from agrpo_jax import errors
from agrpo_jax import evaluate
from agrpo_jax import settings
from agrpo_jax.evaluation import statistics
from fixtures import commands
from fixtures import recordings
from fixtures import runs
from fixtures import sudoku

ROOT = pathlib.Path(__file__).parents[2]
NUM_EXAMPLES = 7


def config(batch_size: int = 3) -> config_lib.ConfigDict:
  return sudoku.config(
    NUM_EXAMPLES, block_length=8, batch_size=batch_size, temperature=1.0
  )


def run(c: config_lib.ConfigDict, *arguments, **options) -> statistics.Result:
  return evaluate.run(settings.rl(c), *arguments, **options)


@pytest.fixture(scope="module")
def whole() -> statistics.Result:
  """Two completions per puzzle, in memory."""
  return run(config(), num_samples=2)


def examples(output: pathlib.Path) -> list[bytes]:
  return (output / "examples.jsonl").read_bytes().splitlines()


def test_what_a_record_holds(whole):
  assert len(whole.records) == 2 * NUM_EXAMPLES
  order = [(line["id"], line["index"]) for line in whole.records]
  assert order == [(i, j) for i in range(NUM_EXAMPLES) for j in range(2)]
  line = whole.records[0]
  assert line["prompt"] == line["fields"]["puzzle"]
  assert set(line["grades"]) >= {"accuracy", "accuracy_tolerant", "cells"}
  assert line["num_executed_steps"] == 4
  for line in whole.records:
    if len(line["completion"]) == 16:
      assert line["answer"] in (line["completion"], "")
      assert line["num_tokens"] == 16
  assert any(line["answer"] for line in whole.records)
  # Completions of a prompt differ, and so do their keys.
  texts = [line["completion"] for line in whole.records]
  assert texts[::2] != texts[1::2]
  assert whole.problems.startswith("not a published split (7 problems")


def test_batch_size_and_number_of_samples_are_without_effect(whole):
  one = run(config(batch_size=5), num_samples=1)
  assert one.records == whole.records[::2]


def test_stopped_and_continued_is_the_same(whole, tmp_path):
  output = tmp_path / "out"
  c = config()
  model = sudoku.use_copy(c, tmp_path / "model")
  run(c, "", str(output), num_samples=2)
  sudoku.cut(output, num_records=7)
  # Whether a completion was drawn again would show.
  file = output / "examples.jsonl"
  file.write_text(file.read_text().replace('"reward": ', '"reward": 1'))
  kept = examples(output)[:7]
  c.evaluate.batch_size = 4
  run(c, "", str(output), num_samples=2)
  assert examples(output)[:7] == kept
  found = [json.loads(line) for line in examples(output)]
  assert found[7:] == whole.records[7:]
  timing = (output / "timing.jsonl").read_text().splitlines()
  sizes = [json.loads(line)["num_records"] for line in timing]
  assert sizes == [3, 3, 3, 3, 2, 4, 3]  # the other seven, once each
  result = json.loads((output / "result.json").read_text())
  assert result["accuracy"] == whole.accuracy
  assert result["num_problems"] == NUM_EXAMPLES

  # Complete: no model is loaded any more.
  shutil.rmtree(model)
  again = run(c, "", str(output), num_samples=2)
  assert again.records == found
  # A setting that changes completions is refused, one that does not is not.
  c.evaluate.batch_size = 1
  c.evaluate.temperature = 0.5
  with pytest.raises(errors.UserError) as error:
    run(c, "", str(output), num_samples=3)
  message = str(error.value)
  assert "config.evaluate.temperature: 1.0 before, 0.5 now" in message
  assert "num_samples: 2 before, 3 now" in message
  assert "batch_size" not in message


def test_records_of_something_else_are_not_continued(tmp_path):
  run(config(), "", str(tmp_path))
  sudoku.cut(tmp_path, num_records=2)
  file = tmp_path / "examples.jsonl"
  file.write_text(file.read_text().replace('{"id": 0,', '{"id": 5,'))
  with pytest.raises(errors.UserError, match="not the first ones"):
    run(config(), "", str(tmp_path))


def test_records_of_a_task_that_was_edited_are_not_those_of_this_one(tmp_path):
  c = runs.varied(tmp_path)
  task = tmp_path / "task.py"
  shutil.copy(c.task.path, task)
  c.task.path = str(task)

  def asked():
    return evaluate.record_settings(settings.rl(c), [], "", 1)["config"]["task"]

  before = asked()
  assert asked() == before
  task.write_text(task.read_text() + "\n")
  assert asked() != before


def command(*flags: str) -> list[str]:
  return [
    *("-m", "agrpo_jax.evaluate", "--config=configs/sudoku_tiny.py"),
    "--config.task.options.num_examples=60",
    "--config.grading.num_workers=1",
    "--config.evaluate.num_denoise_steps=4",
    *flags,
  ]


def test_kill_9_and_the_same_command_again(tmp_path):
  """With the real process, the real signal and the command's flags."""
  flags = [
    f"--model={sudoku.MODEL}",
    "--sampler=agrpo",
    "--config.evaluate.completion_length=16",
    "--config.evaluate.block_length=16",
    "--config.evaluate.num_denoise_steps=16",
  ]
  broken = tmp_path / "broken"
  slow = command(*flags, f"--output={broken}", "--config.evaluate.batch_size=1")
  with subprocess.Popen([sys.executable, *slow], cwd=ROOT) as process:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
      file = broken / "examples.jsonl"
      if file.exists() and file.read_bytes().count(b"\n") >= 3:
        break
      time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
  assert process.returncode == -signal.SIGKILL
  before = examples(broken)
  assert 3 <= len(before) < 60
  said = commands.alone(*command(*flags, f"--output={broken}"), devices=1)
  drawn, rest = said.split("\n", 1)
  assert drawn == (
    f"{sudoku.MODEL}: 16 tokens in blocks of 16, 16 denoising steps, unmask "
    "rule confidence, cache none, temperature 0, seed 0"
  )
  assert rest.startswith("problems: not a published split")
  assert " of 60 completions" in said
  after = examples(broken)
  assert after[: len(before)] == before
  # As if nothing had happened, in one process and another batch size.
  c = recordings.config("sudoku_tiny")
  c.task.options.num_examples = 60
  config_lib.use_sampler(c, "agrpo")
  c.evaluate.update(completion_length=16, block_length=16, num_denoise_steps=16)
  whole = run(c)
  assert [json.loads(line) for line in after] == whole.records


def test_the_command_says_what_is_wrong():
  done = commands.run(*command("--sampler=best"))
  assert done.returncode == 2
  assert (
    done.stderr.strip()
    .splitlines()[-1]
    .startswith("--sampler='best' is unknown; the known ones are config, llada")
  )
  assert "Traceback" not in done.stderr


def test_numbers_of_a_flag():
  assert command_lib.numbers("k", ["1", " 4"], int) == [1, 4]
  with pytest.raises(errors.UserError, match="--k=1,two: 'two' is no int"):
    command_lib.numbers("k", ["1", "two"], int)


def changed(**changes) -> config_lib.ConfigDict:
  c = config()
  c.update_from_flattened_dict(changes)
  return c


@pytest.mark.parametrize(
  "c, arguments, message",
  [
    (
      changed(**{"evaluate.temperature": 0.0}),
      {"num_samples": 4},
      "would draw the same completion again",
    ),
    (changed(), {"num_samples": 0}, "--num_samples=0 must be at least 1"),
    (changed(**{"evaluate.split": "dev"}), {}, "split 'dev' is unknown"),
    (
      changed(**{"data.path": "nowhere.csv"}),
      {},
      r"data\.path='nowhere\.csv' must be an existing",
    ),
    (changed(), {"checkpoint": "nowhere"}, "'nowhere' is not a work directory"),
    (changed(**{"model.path": "./nowhere"}), {}, "nowhere"),
  ],
)
def test_mistakes_of_the_user(c, arguments, message):
  with pytest.raises(errors.UserError, match=message):
    run(c, **arguments)


def test_the_mesh_is_without_effect(run_in_subprocess, whole):
  script = f"""
    import json, sys
    sys.path.insert(0, {str(ROOT / "tests")!r})
    from agrpo_jax import evaluate
    from agrpo_jax import settings
    from fixtures import sudoku
    c = sudoku.config(
      {NUM_EXAMPLES}, block_length=8, batch_size=8, temperature=1.0
    )
    c.mesh.fsdp, c.mesh.tensor = 2, 2
    print(json.dumps(evaluate.run(settings.rl(c), num_samples=2).records))
  """
  lines = run_in_subprocess(script, devices=4).splitlines()
  assert json.loads(lines[-1]) == whole.records


def test_how_completions_are_drawn_on_a_line():
  c = config()
  config_lib.use_sampler(c, "dual")
  assert evaluate.describe(settings.rl(c)) == (
    "256 tokens in blocks of 32, at most 256 denoising steps, unmask rule "
    "threshold (threshold 0.9), cache dual, temperature 0, seed 0"
  )


def test_report():
  line = {
    "grades": {"accuracy": 1.0, "accuracy_tolerant": 1.0, "cells": 0.5},
    "answer": "7",
    "num_tokens": 10,
    "num_executed_steps": 4,
    "num_whole_passes": 2,
  }
  other = {**line, "grades": {"accuracy": 0.0, "accuracy_tolerant": 1.0}}
  result = statistics.Result([line, other], 2, 5.0, "the published one")
  assert evaluate.report(result, [2]).splitlines() == [
    "problems: the published one",
    "accuracy 50.0 %",
    "accuracy_tolerant 100.0 %",
    "cells 0.2500",
    "strict and tolerant verdicts disagree on 1 of 2 completions",
    "accuracy/pass_at_2 100.0 %",
    "accuracy/majority_at_2 50.0 %",
    "accuracy_tolerant/pass_at_2 100.0 %",
    "accuracy_tolerant/majority_at_2 100.0 %",
    "1 problems x 2, mean length 10.0 tokens, 4.0 denoising steps, "
    "2.0 passes over the whole row, 5.0 s, 4 "
    "tokens/s",
  ]
