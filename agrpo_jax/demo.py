"""Reinforcement learning of a tiny model, start to finish, on a laptop.

    agrpo demo --config=sudoku_tiny --config.seed=0

Trains, evaluates before and after on puzzles whose
solutions never occur in training, draws the curves, prints a table and names
the run's report: a page with everything, each completion playable.
"""

import importlib.util
import math
import pathlib
import time
from collections.abc import Sequence

import numpy as np

from agrpo_jax import command
from agrpo_jax import errors
from agrpo_jax import evaluate
from agrpo_jax import settings as settings_lib
from agrpo_jax import train
from agrpo_jax.evaluation import statistics
from agrpo_jax.parallel import processes
from agrpo_jax.runs import metrics


def run(s: settings_lib.Rl) -> None:
  """Evaluate, train, evaluate; then the picture and the table."""
  begin = time.monotonic()
  e = s.evaluate
  sampler = (
    f"{e.sampling.num_denoise_steps} denoising steps, "
    f"{e.sampling.unmask_rule} order, temperature {e.sampling.temperature:g}"
  )
  number = e.num_examples or "all"
  print(f"Held-out problems: {number}. Sampler: {sampler}.", flush=True)
  before = evaluate.run(s, "", "")
  print(f"Before: {percent(before)} solved. Training ...", flush=True)
  train.train(s)
  after = evaluate.run(s, s.workdir, "")
  workdir = pathlib.Path(s.workdir).expanduser()
  picture = workdir / "curves.png"
  if processes.is_main():
    plot(workdir / "metrics.jsonl", before, picture)
  task = s.task.name or s.task.path
  print(f"\nHeld-out problems of {task}, {sampler}, seed {s.seed}")
  print(table(before, after))
  print(
    f"  {s.train.num_steps} train steps of "
    f"{s.rollout.num_rows} completions, "
    f"{time.monotonic() - begin:.0f} s in all\n"
    f"  curves: {picture.resolve()}"
  )
  if s.report.html:
    print(f"  report: {picture.resolve().with_name('report.html')}")


def table(before: statistics.Result, after: statistics.Result) -> str:
  """Returns what was solved and, of tasks that have cells, those right."""
  gain = 100 * (after.accuracy - before.accuracy)
  rows = [
    f"  {name:<8}{solved:>18}"
    for name, solved in (
      ("", "solved"),
      ("before", percent(before)),
      ("after", percent(after)),
      ("gain", f"{gain:+.1f} points"),
    )
  ]
  grades = before.grades, after.grades
  if all("cells" in found for found in grades):
    right = [f"{100 * found['cells'].mean():.1f} %" for found in grades]
    cells = "cells right", *right, ""
    rows = [
      f"{row}{x:>14}".rstrip() for row, x in zip(rows, cells, strict=True)
    ]
  return "\n".join(rows)


def percent(result: statistics.Result) -> str:
  """Accuracy and its standard error, which a single problem does not have."""
  solved = f"{100 * result.accuracy:.1f} %"
  if math.isnan(result.standard_error):
    return solved
  return f"{solved} ± {100 * result.standard_error:.1f}"


def plot(
  log: pathlib.Path, before: statistics.Result, picture: pathlib.Path
) -> None:
  """Reward and accuracy over train steps, held-out accuracy with errors."""
  import matplotlib.figure

  records = list(metrics.read(log))
  step = [record["train_step"] + 1 for record in records]
  held_out = [(0, before.accuracy, before.standard_error)] + [
    (
      record["train_step"] + 1,
      record["eval/accuracy"],
      record.get("eval/accuracy_standard_error", math.nan),
    )
    for record in records
    if "eval/accuracy" in record
  ]
  figure = matplotlib.figure.Figure(figsize=(10, 4), layout="tight")
  left, right = figure.subplots(1, 2)
  left.plot(step, [record["reward"] for record in records])
  left.set(xlabel="train step", ylabel="mean reward", title="Reward")
  right.plot(
    step,
    [record["accuracy"] for record in records],
    alpha=0.5,
    label="training rollouts",
  )
  x, accuracy, error = np.array(held_out).T
  right.errorbar(x, accuracy, error, fmt="o-", capsize=3, label="held out")
  right.set(xlabel="train step", ylabel="solved", title="Accuracy", ylim=(0, 1))
  right.legend(loc="lower right")
  figure.savefig(picture, dpi=120)


def main(argv: Sequence[str]) -> None:
  del argv
  if importlib.util.find_spec("matplotlib") is None:
    raise errors.UserError(
      "The demo's picture needs matplotlib: pip install 'agrpo_jax[plot]'."
    )
  c = command.CONFIG.value
  if "workdir" not in command.given_keys():
    stamp = processes.exchange(time.strftime("%Y%m%d-%H%M%S"))[0]
    c.workdir = str(pathlib.Path("runs") / f"demo-{stamp}-seed{c.seed}")
  run(settings_lib.rl(c))


if __name__ == "__main__":
  command.main(main, required=["config"])
