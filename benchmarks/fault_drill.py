"""Kills a training run again and again and compares it with one left alone.

    python benchmarks/fault_drill.py --kills=20 --seed=0
    python benchmarks/fault_drill.py --kills=20 --cache=dual --rank=4 \
      --processes=2

Trains the bundled Sudoku model on small batches twice: once undisturbed, once
killed by SIGKILL in a random place of a random train step and started again
with the same command until it is through. Of two processes either is killed,
and the other has to end by itself. Aimed at, in turn:

  rollout   a random moment after a rollout began,
  save      a random moment after a save began (it goes on in the background),
  log       half of a line of metrics.jsonl or samples.jsonl is written (by
            process 0),
  update    a random moment after the grades arrived,
  anywhere  a random moment after the process began, starting up included.

After each kill the run must go on from the newest save that was complete. In
the end metrics.jsonl (all but seconds), samples.jsonl (all completions) and the
checksums of the last checkpoint's arrays must be equal, bit for bit. The
killed processes share a cache of compiled programs, the undisturbed one
compiles for itself. Prints a table; the exit code is 1 if something differs.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import random
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import orbax.checkpoint as ocp
from absl import logging

from agrpo_jax.grading import shares
from agrpo_jax.runs import checkpoint_read
from agrpo_jax.runs import metrics
from agrpo_jax.samplers import host

ROOT = pathlib.Path(__file__).resolve().parents[1]

AIMS = ("rollout", "save", "log", "update", "anywhere")
# The timers of the aims run out within this many seconds.
_SPREAD = {"rollout": 0.02, "save": 0.4, "update": 0.05, "anywhere": 1.0}
_MAX_STEPS = 5  # train steps from a restart to the next kill, at most
_EVERY = 2  # train steps between saves
_SAMPLES = 8  # completions per train step, a line each
_TIMEOUT = 600.0
_HEARTBEAT_SECONDS = 10  # of two processes
_JOIN_SECONDS = 90  # one may be killed before it has come
_LOST = 4  # the exit code of a process that another one left
_VARIANTS = {"none": "", "dual": ":dual"}  # cache -> of the config
_FLAGS = (
  f"--config.train.checkpoint_every={_EVERY}",
  f"--config.train.log_samples={_SAMPLES}",
  "--config.evaluate.every=0",
  "--config.rollout.num_prompts=2",
  "--config.rollout.group_size=4",
  "--config.rollout.batch_size=8",
  "--config.rollout.num_denoise_steps=16",
  "--config.objective.microbatch=16",
  "--config.task.options.num_examples=200",
  "--config.grading.num_workers=1",
)


@dataclasses.dataclass(frozen=True)
class Kill:
  """The moment at which a process is to die.

  Attributes:
    aim: one of AIMS.
    count: at which occurrence of it after the start, from 1 (log: line).
    seconds: from there (anywhere: as a share of how long the last one lived).
    process: which one dies.
  """

  aim: str
  count: int
  seconds: float
  process: int = 0


def draw_kills(num_kills: int, seed: int, num_processes: int = 1) -> list[Kill]:
  """The aims in turn, at random places of a random process."""
  rng = random.Random(seed)
  process_rng = random.Random(f"process {seed}")
  most = {
    "save": _MAX_STEPS // _EVERY,
    "log": _MAX_STEPS * (1 + _SAMPLES),
  }
  return [
    Kill(
      aim,
      count=rng.randint(1, most.get(aim, _MAX_STEPS)),
      seconds=rng.uniform(0, _SPREAD.get(aim, 0.0)),
      # Process 0 alone writes lines.
      process=0 if aim == "log" else process_rng.randrange(num_processes),
    )
    for aim in (AIMS[i % len(AIMS)] for i in range(num_kills))
  ]


def main(argv: Sequence[str]) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  logging.set_verbosity(logging.ERROR)
  parser.add_argument("--kills", type=int, default=20)
  parser.add_argument("--seed", type=int, default=0, help="of the kills")
  parser.add_argument("--folder", help="of both runs; default: a temporary one")
  parser.add_argument("--cache", choices=[*_VARIANTS], default="none")
  parser.add_argument(
    "--rank", type=int, default=0, help="of adapters; 0: all is trained"
  )
  parser.add_argument("--processes", type=int, choices=(1, 2), default=1)
  args = parser.parse_args(argv)
  flags = [
    f"--config=configs/sudoku_tiny.py{_VARIANTS[args.cache]}",
    f"--config.lora.rank={args.rank}",
  ]
  with tempfile.TemporaryDirectory() as temporary:
    return drill(
      draw_kills(args.kills, args.seed, args.processes),
      pathlib.Path(args.folder or temporary).resolve(),
      flags,
      args.processes,
    )


def drill(
  kills: Sequence[Kill],
  folder: pathlib.Path,
  flags: Sequence[str],
  num_processes: int,
) -> int:
  """Both runs; 1 if something went wrong."""
  num_steps = _MAX_STEPS * len(kills) + _EVERY
  run = (num_steps, flags, num_processes)
  whole = Command(folder / "whole", *run)
  broken = Command(folder / "killed", *run, programs=folder / "programs")
  whole.finish()
  print(
    f"Undisturbed: {num_steps} train steps, a save every {_EVERY}; "
    f"{' '.join(flags)}, processes: {num_processes}."
  )
  row = "{:>4}  {:<8} {:<8} {:>6} {:>6} {:>6}  {}"
  print(row.format("kill", "aim", "died in", "logged", "saved", "lost", ""))
  problems: list[str] = []
  for number, kill in enumerate(kills, 1):
    before = broken.newest_save()
    out = broken.die(kill)
    problems += _wrong_start(number, out, before, num_steps)
    saved, logged = broken.newest_save(), broken.num_logged()
    notes = broken.leftovers()
    if num_processes > 1:
      notes.append(f"process {kill.process} was killed")
    print(
      row.format(
        number,
        kill.aim,
        broken.phase(),
        logged,
        saved,
        logged - saved,
        ", ".join(notes),
      ),
      flush=True,
    )
    if not before <= saved <= logged:
      problems.append(f"kill {number}: {before=}, {saved=}, {logged=}")
  before = broken.newest_save()
  problems += _wrong_start(len(kills) + 1, broken.finish(), before, num_steps)
  problems += differences(whole.workdir, broken.workdir, num_steps)
  for problem in problems:
    print(f"WRONG: {problem}")
  if not problems:
    print(
      f"{len(kills)} kills: metrics, completions and the last checkpoint equal "
      "those of the undisturbed run, bit for bit; no line is missing or double."
    )
  return min(len(problems), 1)


def _wrong_start(
  number: int, out: str, saved: int, num_steps: int
) -> Iterator[str]:
  """Returns what in a start's output speaks against a good restart."""
  found = re.search(r"after train step (\d+) of (\d+)", out)
  said = found and (int(found[1]), int(found[2]))
  died_early = found is None and "step " not in out
  if said != ((saved, num_steps) if saved else None) and not died_early:
    yield f"start {number} went on from {said}, the newest save is {saved}"


def differences(
  whole: pathlib.Path, broken: pathlib.Path, num_steps: int
) -> list[str]:
  """Returns how the files of two runs differ, but for seconds."""
  found = []
  steps = [line["train_step"] for line in _lines(broken / "metrics.jsonl")]
  if steps != list(range(num_steps)):
    found.append(f"metrics.jsonl has the train steps {steps}")
  for name in ("metrics.jsonl", "samples.jsonl"):
    ours, theirs = _lines(broken / name), _lines(whole / name)
    different = [
      a["train_step"] for a, b in zip(ours, theirs, strict=False) if a != b
    ]
    if len(ours) != len(theirs) or different:
      found.append(
        f"{name}: {len(ours)} lines and {len(theirs)}, different at "
        f"train steps {different}"
      )
  sums = []
  for workdir in (whole, broken):
    sums.append((checkpoint_read.Reader(workdir).meta() or {})["checksums"])
  if sums[0] != sums[1]:
    found.append("the last checkpoints hold other numbers")
  return found


def _lines(path: pathlib.Path) -> list[dict[str, Any]]:
  return [
    {k: v for k, v in json.loads(line).items() if "seconds/" not in k}
    for line in path.read_text().splitlines()
  ]


class Command:
  """The command of a run, to be started again and again.

  Args:
    workdir: of the run.
    num_steps: train steps.
    flags: that say what is trained.
    num_processes: that train it.
    programs: folder of compiled programs, or None: each start compiles.
    root: of the checkout whose code runs.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    num_steps: int,
    flags: Sequence[str],
    num_processes: int = 1,
    programs: pathlib.Path | None = None,
    root: pathlib.Path = ROOT,
  ):
    self.workdir = workdir
    self._root = root
    self._trace = workdir.with_suffix(".trace")
    self._seconds_lived = 10.0
    self._num_processes = num_processes
    self._words = (
      *flags,
      *_FLAGS,
      f"--config.workdir={workdir}",
      f"--config.train.num_steps={num_steps}",
    )
    paths = (str(root), os.environ.get("PYTHONPATH"))
    self.environment = {
      **os.environ,
      "PYTHONPATH": os.pathsep.join(filter(None, paths)),
      "PYTHONUNBUFFERED": "1",
    }
    if programs:
      self.environment |= {
        "JAX_COMPILATION_CACHE_DIR": str(programs),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
      }

  def start(
    self, kill: Kill | None = None, variables: Mapping[str, str] | None = None
  ) -> list[subprocess.Popen[str]]:
    """Starts the run's processes, one of them with an appointment if asked.

    Args:
      kill: the appointment.
      variables: more of the environment.
    """
    joined: dict[str, str] = {}
    if self._num_processes > 1:
      with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        joined = {
          "AGRPO_COORDINATOR": f"127.0.0.1:{free.getsockname()[1]}",
          "AGRPO_NUM_PROCESSES": str(self._num_processes),
          "AGRPO_HEARTBEAT_SECONDS": str(_HEARTBEAT_SECONDS),
          "AGRPO_JOIN_SECONDS": str(_JOIN_SECONDS),
        }
    processes = []
    for process in range(self._num_processes):
      own = {"AGRPO_PROCESS_ID": str(process)} if joined else {}
      program = ["-m", "agrpo_jax.main"]
      if kill and kill.process == process:
        program = [__file__, "--as-victim"]
        own |= {
          "FAULT_DRILL": json.dumps(dataclasses.asdict(kill)),
          "FAULT_DRILL_TRACE": str(self._trace),
        }
      processes.append(
        subprocess.Popen(
          [sys.executable, *program, *self._words],
          env={**self.environment, **joined, **own, **(variables or {})},
          cwd=self._root,
          stdout=subprocess.PIPE,
          stderr=subprocess.PIPE,
          text=True,
        )
      )
    return processes

  def finish(self) -> str:
    """Runs to the end and returns what it prints."""
    processes = self.start()
    said = wait(processes)
    for process, (_, err) in zip(processes, said, strict=True):
      if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}:\n{err}")
    return said[0][0]

  def die(self, kill: Kill) -> str:
    """Starts the run, sees it killed, and returns what it printed."""
    self._trace.unlink(missing_ok=True)
    began = time.monotonic()
    processes = self.start(kill)
    if kill.aim == "anywhere":
      delay = kill.seconds * self._seconds_lived
      threading.Timer(delay, processes[kill.process].kill).start()
    said = wait(processes)
    for number, process in enumerate(processes):
      expected = -signal.SIGKILL if number == kill.process else _LOST
      if process.returncode != expected:
        raise RuntimeError(
          f"{kill}: process {number} ended with {process.returncode}:\n"
          f"{said[number][1]}"
        )
    self._seconds_lived = time.monotonic() - began
    return said[0][0]

  def newest_save(self) -> int:
    """The train step of the newest complete checkpoint; 0 without one."""
    return checkpoint_read.Reader(self.workdir).latest_step or 0

  def num_logged(self) -> int:
    """Train steps with a whole line in metrics.jsonl."""
    path = self.workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0

  def phase(self) -> str:
    """Returns what the killed process was at."""
    phases = self._trace.read_text().split() if self._trace.exists() else []
    return phases[-1] if phases else "start"

  def leftovers(self) -> list[str]:
    """Returns what only a killed process leaves behind."""
    found = []
    if list((self.workdir / "checkpoints").glob("*tmp*")):
      found.append("an unfinished save")
    for name in ("metrics.jsonl", "samples.jsonl"):
      path = self.workdir / name
      if path.exists() and path.read_bytes()[-1:] not in (b"", b"\n"):
        found.append(f"half a line of {name}")
    return found


def wait(
  processes: Sequence[subprocess.Popen[str]],
) -> list[tuple[str, str]]:
  """Returns what processes said, on both streams, when all have ended.

  Raises:
    subprocess.TimeoutExpired: one does not end; none is left running.
  """
  try:
    # In threads: one that waits for another must not wait for its reader too.
    with concurrent.futures.ThreadPoolExecutor() as readers:
      return [
        *readers.map(lambda one: one.communicate(timeout=_TIMEOUT), processes)
      ]
  finally:
    for process in processes:
      process.kill()


def _be_victim() -> None:
  """The same program, with an appointment."""
  kill = Kill(**json.loads(os.environ["FAULT_DRILL"]))
  trace = open(os.environ["FAULT_DRILL_TRACE"], "w", buffering=1)
  count = 0

  def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)

  def enter(phase: str) -> None:
    nonlocal count
    trace.write(f"{phase}\n")
    if kill.aim == "anywhere" and phase == "rollout":
      count += 1
      if count > _MAX_STEPS:  # the appointed time is further on
        die()
    if phase != kill.aim:
      return
    count += 1
    if count == kill.count:
      timer = threading.Timer(kill.seconds, die)
      timer.daemon = True
      timer.start()

  def announce(owner: Any, name: str, before: str, after: str = "") -> None:
    original: Callable[..., Any] = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
      enter(before)
      result = original(*args, **kwargs)
      if after:
        enter(after)
      return result

    setattr(owner, name, call)

  def write_half(file: Any, record: Any) -> None:
    nonlocal count
    count += kill.aim == "log"
    if kill.aim == "log" and count == kill.count:
      text = json.dumps(record)
      file.write(text[: len(text) // 2])
      file.flush()
      die()
    write_line(file, record)

  write_line = metrics._write_line
  metrics._write_line = write_half
  announce(host.Sampler, "sample", "rollout")
  announce(shares, "collect", "grade", "update")
  announce(metrics.Writer, "scalars", "log")
  announce(ocp.CheckpointManager, "save", "save")
  sys.argv = ["agrpo_jax.main", *sys.argv[2:]]
  runpy.run_module("agrpo_jax.main", run_name="__main__")


if __name__ == "__main__":
  if sys.argv[1:2] == ["--as-victim"]:
    _be_victim()
  else:
    sys.exit(main(sys.argv[1:]))
