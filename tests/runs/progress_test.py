"""Tests of agrpo_jax.progress."""

import io

from agrpo_jax.runs import progress


class _Clock:
  """Gives the times it was made with, one per call."""

  def __init__(self, *times):
    self._times = list(times)

  def __call__(self):
    return self._times.pop(0)


def _step(line_of, train_step):
  return line_of.step(
    train_step,
    {"accuracy": 0.25, "reward": 0.5, "loss": 3.0},
    {"rollout": 1.5, "grade": 0.01, "update": 0.5},
    num_tokens=300,
  )


def test_lines_of_a_run_that_goes_on():
  """The first train step compiles for 90 s, which predicts nothing."""
  out = io.StringIO()
  clock = _Clock(0.0, 90.0, 92.0, 96.0, 100.0)
  line_of = progress.Progress(1010, first_step=1006, out=out, clock=clock)
  lines = [_step(line_of, train_step) for train_step in range(1006, 1010)]
  middle = "reward 0.500  accuracy 0.250  rollout 1.50s  grade 0.01s  "
  assert lines == [
    f"step 1007/1010  {middle}update 0.50s  3 tok/s  ETA ?",
    f"step 1008/1010  {middle}update 0.50s  150 tok/s  ETA 0:00:04",
    f"step 1009/1010  {middle}update 0.50s  75 tok/s  ETA 0:00:03",
    f"step 1010/1010  {middle}update 0.50s  75 tok/s  ETA 0:00:00",
  ]
  assert out.getvalue() == "\n".join(lines) + "\n"


def test_held_out_accuracy_is_shown_where_it_was_measured():
  line = progress.progress_line(
    2,
    9,
    scalars={"reward": 0.5, "accuracy": 0.125, "eval/accuracy": 0.25},
    seconds={"evaluate": 2.0},
    tokens_per_second=3.0,
    eta_seconds=0.0,
  )
  assert line == (
    "step 3/9  reward 0.500  accuracy 0.125  held out 0.250  evaluate 2.00s  "
    "3 tok/s  ETA 0:00:00"
  )


def test_lines_stand_under_each_other():
  line = progress.progress_line(
    8,
    1000,
    scalars={},
    seconds={},
    tokens_per_second=0.4,
    eta_seconds=90061.4,
  )
  assert line == "step    9/1000  0 tok/s  ETA 1d 1:01:01"


def test_durations():
  assert progress.duration(0) == "0:00:00"
  assert progress.duration(59.6) == "0:01:00"
  assert progress.duration(11109) == "3:05:09"


class _Terminal(io.StringIO):
  def isatty(self):
    return True


def test_a_bar_on_a_terminal_and_nothing_left_of_it():
  out = _Terminal()
  with progress.bar(3, "scoring", out=out) as bar:
    for _ in range(3):
      bar.update()
  assert "scoring:" in out.getvalue()
  assert out.getvalue().endswith("\r")


def test_lines_in_a_file():
  """Of the first update, then one in 30 s at most, and of the last."""
  out = io.StringIO()
  clock = _Clock(0.0, 5.0, 20.0, 34.0, 36.0, 70.0, 71.0)
  bar = progress.bar(12, "evaluating", out=out, clock=clock)
  bar.update(2)
  for _ in range(5):
    bar.update(2)
  bar.close()
  assert out.getvalue() == (
    "evaluating: 2 of 12 after 0:00:05\n"
    "evaluating: 8 of 12 after 0:00:36\n"
    "evaluating: 10 of 12 after 0:01:10\n"
    "evaluating: 12 of 12 after 0:01:11\n"
  )


def test_standard_output_holds_results_alone(capsys):
  with progress.bar(1, "scoring") as bar:
    bar.update()
  captured = capsys.readouterr()
  assert captured.out == ""
  assert captured.err == "scoring: 1 of 1 after 0:00:00\n"
