"""Trains for hours beside a page that is watched, and says what grows.

    python benchmarks/soak.py --minutes=120 --output=benchmarks/results/soak

Runs the demo's task (`configs/sudoku_tiny.py`, evaluations, saves and logged
completions included) without end, and `agrpo_jax.report --watch` on its work
directory, stops both in good order when the time is up, and meanwhile measures,
of each with all processes below it: memory (resident or swapped out), open
files, processes and threads; of the log the seconds of every train step; and of
the run the seconds of processors per train step, which other work on the
machine moves less. The first quarter is warming up. A row grows if the median
of the last quarter is above that of the second by more than `_TOLERANCE`.
Writes a CSV and a PNG, prints the table; the exit code is 1 if something grows,
or one of both ended by itself, as a run does at a loss that is not finite.
"""

import argparse
import csv
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from collections.abc import Sequence

from agrpo_jax.report import logs

ROOT = pathlib.Path(__file__).resolve().parents[1]
_FLAGS = (
  "--config=configs/sudoku_tiny.py",
  "--config.train.num_steps=1000000",
  "--config.train.checkpoint_every=20",
  "--config.train.log_samples=8",
  "--config.evaluate.num_examples=128",
)
_TOLERANCE = {
  "memory": 0.05,
  "files": 0.0,
  "processes": 0.0,
  "threads": 0.0,
  "seconds per step": 0.15,
  "CPU seconds per step": 0.15,
}
# Train steps are counted over so many measurements at a time.
_SPAN = 12


def main(argv: Sequence[str]) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--minutes", type=float, default=120.0)
  parser.add_argument("--every", type=float, default=10.0, help="seconds")
  parser.add_argument("--output", default="soak", help="of .csv and .png")
  args = parser.parse_args(argv)
  with tempfile.TemporaryDirectory() as folder:
    rows, series, codes = _run(
      pathlib.Path(folder), 60 * args.minutes, args.every
    )
  _write(pathlib.Path(args.output), rows, series)
  return _judge(series, codes)


def _run(
  folder: pathlib.Path, seconds: float, every: float
) -> tuple[list[dict[str, float]], dict[str, list[float]], list[int | None]]:
  """Returns a row per measurement, the series that are judged, exit codes."""
  workdir = folder / "run"
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}

  def start(*words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
      [sys.executable, "-m", *words],
      cwd=ROOT,
      env=environment,
      stdout=subprocess.DEVNULL,
    )

  run = start("agrpo_jax.main", *_FLAGS, f"--config.workdir={workdir}")
  commands = {"run": run}
  rows = []
  began = time.monotonic()
  try:
    while (now := time.monotonic() - began) < seconds:
      if "report" not in commands and (workdir / "metrics.jsonl").exists():
        page = f"--html={folder / 'report.html'}"
        commands["report"] = start(
          "agrpo_jax.report", str(workdir), page, "--watch"
        )
      if any(one.poll() is not None for one in commands.values()):
        break
      row = {"seconds": now, "steps": float(_num_lines(workdir))}
      for name, command in commands.items():
        row |= {f"{name}/{k}": v for k, v in _measured(command.pid).items()}
      rows.append(row)
      time.sleep(every)
  finally:
    early = [one.poll() for one in commands.values()]
    for one in commands.values():
      one.terminate()
    for one in commands.values():
      one.wait(300)
  series: dict[str, list[float]] = {}
  for row in rows:
    for name, value in row.items():
      if "/" in name and not name.endswith("/cpu"):
        series.setdefault(name, []).append(value)
  series["CPU seconds per step"] = [
    (after["run/cpu"] - before["run/cpu"]) / (after["steps"] - before["steps"])
    for before, after in zip(rows, rows[_SPAN:], strict=False)
    if after["steps"] > before["steps"]
  ]
  records = logs.read(str(workdir)).records
  series["seconds per step"] = [
    sum(v for k, v in r.items() if k in ("seconds/rollout", "seconds/update"))
    for r in records
  ]
  return rows, series, early


def _num_lines(workdir: pathlib.Path) -> int:
  """Returns how many train steps a run has logged."""
  try:
    return (workdir / "metrics.jsonl").read_bytes().count(b"\n")
  except FileNotFoundError:
    return 0


def _measured(pid: int) -> dict[str, float]:
  """Returns what a process and all below it hold, and what they used."""
  names = ("memory", "files", "processes", "threads", "cpu")
  found = dict.fromkeys(names, 0.0)
  for one in tree(pid):
    proc = pathlib.Path(f"/proc/{one}")
    try:
      status = dict(
        line.split(":", 1)
        for line in (proc / "status").read_text().splitlines()
      )
      # Behind the name in brackets: user and system time, also of the
      # processes below that have ended.
      stat = (proc / "stat").read_text().rpartition(")")[2].split()
      num_files = len(list((proc / "fd").iterdir()))
      num_threads = len(list((proc / "task").iterdir()))
    except OSError:  # it ended meanwhile
      continue
    for held in ("VmRSS", "VmSwap"):
      found["memory"] += int(status.get(held, "0 kB").split()[0]) / 1024
    found["cpu"] += sum(map(int, stat[11:15])) / os.sysconf("SC_CLK_TCK")
    found["files"] += num_files
    found["processes"] += 1
    found["threads"] += num_threads
  return found


def tree(pid: int) -> Iterator[int]:
  """Yields a process and all below it."""
  yield pid
  for file in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
    try:
      below = file.read_text().split()
    except OSError:
      continue
    for one in below:
      yield from tree(int(one))


def _judge(series: dict[str, list[float]], codes: Sequence[int | None]) -> int:
  row = "{:<18} {:>14} {:>14} {:>9}"
  print(row.format("", "2nd quarter", "last quarter", "change"))
  wrong = [f"ended by itself with {code}" for code in codes if code is not None]
  for name, values in sorted(series.items()):
    quarter = len(values) // 4
    if not quarter:
      continue
    before = statistics.median(values[quarter : 2 * quarter])
    after = statistics.median(values[-quarter:])
    change = after / before - 1 if before else 0.0
    print(row.format(name, f"{before:.3f}", f"{after:.3f}", f"{change:+.1%}"))
    if change > _TOLERANCE[name.rpartition("/")[2]]:
      wrong.append(f"{name} grows")
  for one in wrong:
    print(f"WRONG: {one}")
  return min(len(wrong), 1)


def _write(
  output: pathlib.Path,
  rows: Sequence[dict[str, float]],
  series: dict[str, list[float]],
) -> None:
  names = list(dict.fromkeys(name for row in rows for name in row))
  with output.with_suffix(".csv").open("w", newline="") as file:
    writer = csv.DictWriter(file, names)
    writer.writeheader()
    writer.writerows(
      {name: f"{value:.1f}" for name, value in row.items()} for row in rows
    )
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(
    len(series), 1, figsize=(8, 1.6 * len(series)), constrained_layout=True
  )
  for axis, (name, values) in zip(axes, sorted(series.items()), strict=True):
    axis.plot(values, linewidth=0.8)
    axis.set_ylim(bottom=0)
    axis.set_title(name, fontsize=8, loc="left")
    axis.tick_params(labelsize=7)
  figure.savefig(output.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
