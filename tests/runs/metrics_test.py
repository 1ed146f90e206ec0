"""Tests of agrpo_jax.metrics: what is written is there, once."""

import json
import math
import struct
import subprocess
import sys
import types as python_types

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from agrpo_jax import errors
from agrpo_jax.runs import metrics


def _lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def _events(workdir):
  """The records of all event files: length, its checksum, data, checksum."""
  for path in sorted((workdir / "tensorboard").iterdir()):
    data, at = path.read_bytes(), 0
    while at < len(data):
      (length,) = struct.unpack_from("<Q", data, at)
      event = event_pb2.Event()
      event.ParseFromString(data[at + 12 : at + 12 + length])
      at += 16 + length
      yield event


def test_numbers_become_plain_floats(tmp_path):
  with metrics.Writer(tmp_path) as writer:
    writer.scalars(
      3,
      {
        "reward": jnp.float32(0.5),
        "count": np.int64(2),
        "on": True,
        "one": np.ones((1, 1)),
        "kl": jnp.float32("nan"),
        "ratio": -math.inf,
      },
    )
    assert _lines(tmp_path / "metrics.jsonl") == [
      {
        "train_step": 3,
        "reward": 0.5,
        "count": 2.0,
        "on": 1.0,
        "one": 1.0,
        "kl": None,
        "ratio": None,
      }
    ]
  assert type(_lines(tmp_path / "metrics.jsonl")[0]["count"]) is float
  (record,) = metrics.read(tmp_path / "metrics.jsonl")
  assert math.isnan(record["kl"])


@pytest.mark.parametrize("value", [np.ones(2), "high", None, {}])
def test_what_is_not_one_number_is_refused(tmp_path, value):
  with metrics.Writer(tmp_path) as writer:
    with pytest.raises(ValueError, match="'reward' is not one number"):
      writer.scalars(0, {"loss": 1.0, "reward": value})


def test_samples(tmp_path):
  samples = [
    {"prompt": "1 + 1?", "completion": "zwei \u2028 2\n", "reward": np.nan},
    {"prompt": "\udc80", "completion": "", "reward": np.float32(1.0)},
  ]
  with metrics.Writer(tmp_path) as writer:
    writer.texts(4, samples)
  first, second = _read_lines(tmp_path / "samples.jsonl")
  assert first == {
    "train_step": 4,
    "prompt": "1 + 1?",
    "completion": "zwei \u2028 2\n",
    "reward": None,
  }
  assert second["reward"] == 1.0
  texts = [e for e in _events(tmp_path) if "sample/0" in str(e)]
  assert "completion: zwei" in str(texts[0])


def _read_lines(path):
  """By newline alone, as JSON lines are."""
  return [json.loads(line) for line in open(path, encoding="utf-8")]


def test_tensorboard_has_the_scalars(tmp_path):
  """Under the number of train steps done, by which checkpoints are named."""
  for start in (0, 2):  # the second goes on from train step 2
    with metrics.Writer(tmp_path, start) as writer:
      for train_step in range(start, start + 3):
        writer.scalars(train_step, {"reward": train_step / 4})
  events = list(_events(tmp_path))
  points = [
    (event.step, value.simple_value)
    for event in events
    for value in event.summary.value
  ]
  assert sorted(points) == [
    (1, 0.0),
    (2, 0.25),
    (3, 0.5),
    (3, 0.5),
    (4, 0.75),
    (5, 1.0),
  ]
  starts = [e.step for e in events if e.session_log.status]
  assert sorted(starts) == [1, 3]


def test_tensorboard_has_later_files_later_though_the_clock_was_set_back(
  tmp_path, monkeypatch
):
  for start, now in enumerate((3000.5, 1000.5, 2000.5, 4000.5)):
    monkeypatch.setattr(metrics.time, "time", lambda now=now: now)
    metrics.Writer(tmp_path, start).close()
  names = sorted(path.name for path in (tmp_path / "tensorboard").iterdir())
  parts = [name.split(".") for name in names]
  assert [one[3] for one in parts] == ["3000", "3001", "3002", "4000"]
  assert [one[-2] for one in parts] == ["0", "1", "2", "3"]


def test_a_resumed_run_has_every_train_step_once(tmp_path):
  """Five train steps, a state saved after three, killed within a line."""
  with metrics.Writer(tmp_path) as writer:
    for train_step in range(5):
      writer.scalars(train_step, {"reward": train_step})
      writer.scalars(train_step, {"eval/accuracy": train_step})
      writer.texts(train_step, [{"completion": str(train_step)}] * 2)
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"train_step": 2, "rew')
  with metrics.Writer(tmp_path, resume_step=3) as writer:
    for train_step in range(3, 6):
      writer.scalars(train_step, {"reward": -train_step})
      writer.texts(train_step, [{"completion": str(-train_step)}])
  records = _lines(tmp_path / "metrics.jsonl")
  rewards = [record["reward"] for record in records if "reward" in record]
  assert rewards == [0, 1, 2, -3, -4, -5]
  accuracy = [r["eval/accuracy"] for r in records if "eval/accuracy" in r]
  assert accuracy == [0, 1, 2]
  completions = [
    record["completion"] for record in _lines(tmp_path / "samples.jsonl")
  ]
  assert completions == ["0", "0", "1", "1", "2", "2", "-3", "-4", "-5"]
  assert sorted(path.name for path in tmp_path.iterdir()) == [
    "completions.jsonl",
    "metrics.jsonl",
    "samples.jsonl",
    "tensorboard",
  ]


def test_completions_from_before_the_first_step_are_cut_like_others(tmp_path):
  def write(resume_step, *train_steps):
    with metrics.Writer(tmp_path, resume_step=resume_step) as writer:
      for train_step in train_steps:
        writer.completions(train_step, [{"at": resume_step}])
    lines = _lines(tmp_path / "completions.jsonl")
    return [(line["train_step"], line["at"]) for line in lines]

  assert write(0, -1, 0, 1) == [(-1, 0), (0, 0), (1, 0)]
  # Killed before a checkpoint, and after one.
  assert write(0, -1, 0, 1) == [(-1, 0), (0, 0), (1, 0)]
  assert write(1, 1) == [(-1, 0), (0, 0), (1, 1)]


def test_a_line_that_only_lacks_its_end_is_kept(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"train_step": 0, "reward": 1}')
  with metrics.Writer(tmp_path, resume_step=1) as writer:
    writer.scalars(1, {"reward": 2})
  records = _lines(tmp_path / "metrics.jsonl")
  assert [record["reward"] for record in records] == [1, 2]


def test_a_fresh_start_leaves_no_old_line(tmp_path):
  with metrics.Writer(tmp_path) as writer:
    writer.scalars(0, {"reward": 1})
  with metrics.Writer(tmp_path) as writer:
    writer.scalars(0, {"reward": 2})
  assert _lines(tmp_path / "metrics.jsonl") == [{"train_step": 0, "reward": 2}]


def test_a_killed_process_loses_no_line(tmp_path, run_in_subprocess):
  script = f"""
    import os, signal
    from agrpo_jax.runs import metrics

    writer = metrics.Writer({str(tmp_path)!r})
    for train_step in range(100):
      writer.scalars(train_step, {{"reward": train_step}})
      writer.texts(train_step, [{{"completion": "x" * 1000}}])
    os.kill(os.getpid(), signal.SIGKILL)
  """
  with pytest.raises(AssertionError, match="exit code -9"):
    run_in_subprocess(script, devices=1)
  rewards = [record["reward"] for record in _lines(tmp_path / "metrics.jsonl")]
  assert rewards == list(range(100))
  assert len(_lines(tmp_path / "samples.jsonl")) == 100


def test_a_file_that_may_not_grow_is_an_error_of_the_caller(tmp_path):
  """Events need more room than JSON: a short name, a short number."""
  script = """
import resource, sys
from agrpo_jax.runs import metrics
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
try:
  with metrics.Writer(sys.argv[1]) as writer:
    for train_step in range(2000):
      writer.scalars(train_step, {name: 0.0 for name in "abcdefghijklmnop"})
except OSError as error:
  print(error.strerror)
"""
  done = subprocess.run(
    [sys.executable, "-c", script, str(tmp_path)],
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  assert done.stdout == "File too large\n"
  assert done.stderr == ""
  (events,) = (tmp_path / "tensorboard").iterdir()
  assert events.stat().st_size == 30_000
  assert (tmp_path / "metrics.jsonl").stat().st_size < 30_000


def test_other_processes_write_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(metrics.jax, "process_index", lambda: 1)
  with metrics.Writer(tmp_path) as writer:
    writer.scalars(0, {"reward": 1})
    writer.texts(0, [{"completion": ""}])
    writer.flush()
  assert list(tmp_path.iterdir()) == []


def test_close_twice(tmp_path):
  writer = metrics.Writer(tmp_path)
  writer.flush()
  writer.close()
  writer.close()


class _FakeRun:
  def __init__(self):
    self.logged = []
    self.is_finished = False

  def log(self, values, step):
    self.logged.append((step, values))

  def finish(self):
    self.is_finished = True


def test_wandb_gets_the_same_and_goes_on_in_its_run(tmp_path, monkeypatch):
  fake = python_types.SimpleNamespace(inits=[], runs=[])

  def init(**arguments):
    fake.inits.append(arguments)
    fake.runs.append(_FakeRun())
    return fake.runs[-1]

  fake.init = init
  fake.Table = lambda columns, data: (columns, data)
  monkeypatch.setitem(sys.modules, "wandb", fake)
  for start in (0, 1):
    settings = {"project": "agrpo", "config": {"rank": 4}}
    with metrics.Writer(tmp_path, start, wandb_settings=settings) as writer:
      writer.scalars(start, {"reward": jnp.float32(0.5)})
      writer.texts(start, [{"completion": "a", "reward": 1.0}])
      writer.texts(start, [])
  assert fake.runs[0].logged == [
    (1, {"reward": 0.5}),
    (1, {"samples": (["completion", "reward"], [["a", "1.0"]])}),
  ]
  assert all(run.is_finished for run in fake.runs)
  first, second = fake.inits
  assert first["id"] == second["id"]
  assert first["project"] == "agrpo"
  assert first["resume"] == "allow"


def test_wandb_missing_is_a_users_mistake(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(errors.UserError, match=r"agrpo_jax\[wandb\]"):
    metrics.Writer(tmp_path, wandb_settings={"project": "agrpo"})
  assert list(tmp_path.iterdir()) == []


def test_check_finite_names_step_metrics_and_values():
  metrics.check_finite(7, {"loss": jnp.float32(1.0), "grad_norm": 1e38})
  with pytest.raises(FloatingPointError) as caught:
    metrics.check_finite(
      7, {"loss": jnp.float32("nan"), "reward": 1.0, "grad_norm": math.inf}
    )
  assert str(caught.value) == (
    "Not finite in train step 8 (the line of metrics.jsonl with train_step 7): "
    "loss=nan, grad_norm=inf"
  )
