"""What a training run survives beside kills: clocks, moves, disks, stops.

    python benchmarks/hardships.py
    python benchmarks/hardships.py --only=clock,moved,stopped --stop_seconds=20

and, with the checkout of an earlier commit (`git worktree add --detach`),

    python benchmarks/hardships.py --only=previous --previous=FOLDER

Trains what `fault_drill.py` trains, once undisturbed, and once for each
hardship, which ends it or does not:

  clock     the wall clock leaps a day back, or a year ahead, in mid-run, and is
            right again at the next start (`hardships.c`, preloaded; clocks that
            only run on are left alone),
  moved     the work directory is moved between two starts,
  disk      no space at each kind of write (`hardships.c` too): files
            of the log, of the start, of a checkpoint, its commit; the page, the
            cache of compiled programs, records of an evaluation, an export,
  readonly  the work directory is read-only from some write on,
  stopped   SIGSTOP for a while: the process, either of two under a patience
            shorter and longer than that, both halves of a grading worker,
  previous  a run that an earlier version began: trained on, evaluated, exported
            and read by this one (equal in what both versions log, and as long
            as neither rounds otherwise).

Where a run ends it has to say why in one message, without a traceback, with the
path and what to do. The same command then has to come to the same metrics (all
but seconds), completions and checksums of the last checkpoint's arrays as the
undisturbed run, bit for bit. A completion whose grading worker was stopped
loses its points, as documented. Prints a line for each; the exit code is 1 if
something went wrong. Needs Linux and a C compiler.
"""

import argparse
import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence

import fault_drill
import soak
from absl import logging

from agrpo_jax.report import logs

_NUM_STEPS = 60
_EARLY, _LATE = 8, 20  # train steps at which something happens
_HEARTBEAT = "AGRPO_HEARTBEAT_SECONDS"
_ROW = "{:<9} {:<30} {:<34} {}"
# What is full -> FAILING_DISK, what the message has to name, the exit code.
_FULL = ("There is no room to write", "Make room", "No space left on device")
_NO_PAGE = ("could not be written", "agrpo_jax.report")
_DISKS = {
  "lock.json": ("28 w 0 */lock.json", _FULL, 2),
  "config.json": ("28 w 0 */config.json.tmp", _FULL, 2),
  "environment.json": ("28 w 0 */environment.json.tmp", _FULL, 2),
  "metrics.jsonl": ("28 w 9 */metrics.jsonl", _FULL, 2),
  "samples.jsonl": ("28 w 75 */samples.jsonl", _FULL, 2),
  "completions.jsonl": ("28 w 5 */completions.jsonl", _FULL, 2),
  "the log, late (fsync)": ("28 s 2 */metrics.jsonl", _FULL, 2),
  "TensorBoard's events": ("28 w 0 */tensorboard/*", _FULL, 2),
  "a checkpoint's arrays": ("28 w 60 */checkpoints/*", _FULL, 2),
  "a checkpoint's folders": ("28 m 9 */checkpoints/*", _FULL, 2),
  "a checkpoint's commit": ("28 r 3 */checkpoints/*[0-9]", _FULL, 2),
  "report.html": ("28 w 0 */report.html.tmp", _NO_PAGE, 0),
  "compiled programs": ("28 owm 0 */full_programs/*", (), 0),
}


class Drill:
  """The training that all hardships disturb.

  Args:
    folder: of all runs.
    stop_seconds: how long a process is stopped.
    previous: the checkout of an earlier commit, or None.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    stop_seconds: float,
    previous: pathlib.Path | None,
  ):
    self.folder = folder
    self.stop_seconds = stop_seconds
    self.previous = previous

  def command(
    self,
    name: str,
    num_processes: int = 1,
    rank: int = 0,
    **options: pathlib.Path,
  ) -> fault_drill.Command:
    """The command of the training, in a work directory of that name."""
    return fault_drill.Command(
      self.folder / name,
      _NUM_STEPS,
      ("--config=configs/sudoku_tiny.py", f"--config.lora.rank={rank}"),
      num_processes,
      **{"programs": self.folder / "programs", **options},
    )

  @functools.cache  # noqa: B019 (there is one drill)
  def whole(self, num_processes: int = 1) -> pathlib.Path:
    """Returns the work directory of the undisturbed run."""
    command = self.command(f"whole_{num_processes}", num_processes)
    command.finish()
    return command.workdir

  def differences(
    self, command: fault_drill.Command, num_processes: int = 1
  ) -> list[str]:
    """Returns how a run that has ended differs from the undisturbed one."""
    found = fault_drill.differences(
      self.whole(num_processes), command.workdir, _NUM_STEPS
    )
    if not (command.workdir / "report.html").exists():
      found.append("there is no report.html")
    return found

  @functools.cached_property
  def library(self) -> str:
    """What is preloaded, compiled."""
    library = self.folder / "hardships.so"
    source = pathlib.Path(__file__).with_suffix(".c")
    subprocess.run(
      ["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True
    )
    return str(library)


# What was done, what came of it, and what was wrong.
Outcome = tuple[str, str, list[str]]


def clock(drill: Drill) -> Iterator[Outcome]:
  for days, words in ((-1, "a day back"), (365, "a year ahead")):
    command = drill.command(f"clock_{days}")
    leap = drill.folder / f"leap_{days}"
    began = time.monotonic()
    processes = command.start(
      variables={
        "LD_PRELOAD": drill.library,
        "LEAPING_CLOCK": f"{days * 86_400} {leap}",
      }
    )
    _wait_for(command, processes, _EARLY)
    leap.touch()
    _wait_for(command, processes, _LATE)
    processes[0].terminate()
    problems = _problems(fault_drill.wait(processes), processes, {143})
    command.finish()
    most = time.monotonic() - began
    for record in logs.read(str(command.workdir)).records:
      for name, value in record.items():
        if name.startswith("seconds/") and not 0 <= value <= most:
          problems.append(f"{name}={value} at {record['train_step']}")
    yield words, "saved, went on", problems + drill.differences(command)


def moved(drill: Drill) -> Iterator[Outcome]:
  before, after = drill.command("before"), drill.command("after/run")
  processes = before.start()
  _wait_for(before, processes, _EARLY)
  processes[0].kill()
  fault_drill.wait(processes)
  after.workdir.parent.mkdir()
  shutil.move(before.workdir, after.workdir)
  after.finish()
  yield "killed, mv, --config.workdir", "went on", drill.differences(after)


def disk(drill: Drill) -> Iterator[Outcome]:
  for number, (name, (fault, parts, code)) in enumerate(_DISKS.items()):
    command = drill.command(f"disk_{number}")
    variables = {"LD_PRELOAD": drill.library, "FAILING_DISK": fault}
    if name == "compiled programs":
      programs = drill.folder / "full_programs"
      variables["JAX_COMPILATION_CACHE_DIR"] = str(programs)
    processes = command.start(variables=variables)
    said = fault_drill.wait(processes)
    named = (*parts, str(command.workdir)) if parts else ()
    problems = _problems(said, processes, {code}, named)
    at = command.num_logged()
    command.finish()
    ended = f"ended after {at} train steps, went on" if code else "no matter"
    yield f"full: {name}", ended, problems + drill.differences(command)
  yield from _full_outputs(drill)


def _full_outputs(drill: Drill) -> Iterator[Outcome]:
  """Evaluation and export: on a full disk, again, and where there was room."""
  whole = drill.whole()
  for name, fault, words, file in (
    (
      "records of an evaluation",
      "28 w 1 */examples.jsonl",
      (
        "agrpo_jax.evaluate",
        "--config=configs/sudoku_tiny.py",
        "--config.evaluate.num_examples=64",
        "--config.evaluate.batch_size=32",
        f"--checkpoint={whole}",
        "--output=",
      ),
      "examples.jsonl",
    ),
    (
      "an exported model",
      "28 w 0 */exported_broken/*",
      ("agrpo_jax.port", f"--checkpoint={whole}", "--to="),
      "model.safetensors",
    ),
  ):
    kind = "evaluated" if "evaluate" in words[0] else "exported"
    expected, broken = (
      drill.folder / f"{kind}_{x}" for x in ("whole", "broken")
    )
    run = functools.partial(_run, drill, words)
    problems = _problems_of(run(expected), {0})
    variables = {"LD_PRELOAD": drill.library, "FAILING_DISK": fault}
    problems += _problems_of(
      run(broken, **variables), {2}, ("ake room", "No space", str(broken))
    )
    problems += _problems_of(run(broken), {0})
    if (expected / file).read_bytes() != (broken / file).read_bytes():
      problems.append(f"{file} differs")
    yield f"full: {name}", "ended, went on", problems


def readonly(drill: Drill) -> Iterator[Outcome]:
  command = drill.command("readonly")
  fault = f"30 owmrsu 400 {command.workdir}/*"
  variables = {"LD_PRELOAD": drill.library, "FAILING_DISK": fault}
  processes = command.start(variables=variables)
  problems = _problems(
    fault_drill.wait(processes),
    processes,
    {2},
    ("Read-only file system", str(command.workdir), "writable"),
  )
  at = command.num_logged()
  command.finish()
  problems += drill.differences(command)
  yield "read-only", f"ended after {at} train steps, went on", problems


def stopped(drill: Drill) -> Iterator[Outcome]:
  yield _stopped(drill, 0)
  shorter, longer = (round(drill.stop_seconds * x) for x in (0.5, 3))
  for process in range(2):
    yield _stopped(drill, process, patience=longer)
    yield _stopped(drill, process, patience=shorter)
  for half, index in (("the guard", 0), ("the grader", 1)):
    yield _worker_stopped(drill, half, index)


def _stopped(drill: Drill, process: int, patience: int = 0) -> Outcome:
  """One that is alone, or of two that wait for each other so many seconds."""
  num_processes = 2 if patience else 1
  name = f"stopped_{num_processes}_{process}_{patience}"
  command = drill.command(name, num_processes)
  processes = command.start(variables={_HEARTBEAT: str(patience)})
  _wait_for(command, processes, _EARLY)
  processes[process].send_signal(signal.SIGSTOP)
  at = command.num_logged()
  time.sleep(drill.stop_seconds)
  processes[process].send_signal(signal.SIGCONT)
  said = fault_drill.wait(processes)
  what = f"{drill.stop_seconds:g} s"
  if patience:
    what += f", process {process}, patience {patience}"
  if not patience or patience > drill.stop_seconds:
    problems = _problems(said, processes, {0})
    return what, "went on", problems + drill.differences(command, num_processes)
  problems = _problems(said, processes, {4}, ("the same command",))
  command.finish()
  problems += drill.differences(command, num_processes)
  return what, f"ended after {at}, went on", problems


def _worker_stopped(drill: Drill, half: str, index: int) -> Outcome:
  """A worker is two processes: one grades, one waits to end it."""
  command = drill.command(f"worker_{index}")
  processes = command.start()
  _wait_for(command, processes, _EARLY)
  found = [
    pid
    for pid in soak.tree(processes[0].pid)
    if "grading.worker" in pathlib.Path(f"/proc/{pid}/cmdline").read_text()
  ]
  os.kill(found[index], signal.SIGSTOP)
  problems = _problems(fault_drill.wait(processes), processes, {0})
  ours, theirs = (
    logs.read(str(workdir)).records
    for workdir in (command.workdir, drill.whole())
  )
  if len(ours) != _NUM_STEPS:
    problems.append(f"{len(ours)} train steps are logged")
  lost = [
    int(record["train_step"])
    for record in ours
    if record["grading/num_timed_out"] or record["grading/num_failed"]
  ]
  num_lost = sum(record["grading/num_timed_out"] for record in ours)
  first = lost[0] if lost else _NUM_STEPS
  if [r["loss"] for r in ours[:first]] != [r["loss"] for r in theirs[:first]]:
    problems.append("train steps before that differ")
  if num_lost > 1 or (index and not num_lost):
    problems.append(f"{num_lost:g} completions lost their points")
  if not lost:
    problems += drill.differences(command)
  return (
    f"a grading worker, {half}",
    f"went on, {num_lost:g} out of time",
    problems,
  )


def previous(drill: Drill) -> Iterator[Outcome]:
  """An earlier version's run, full and with adapters, in this one's hands."""
  if drill.previous is None:
    return
  for rank, what in ((0, "all parameters"), (4, "adapters")):
    begun, theirs = (
      drill.command(f"{name}_{rank}", rank=rank, root=drill.previous)
      for name in ("begun", "theirs")
    )
    theirs.finish()
    processes = begun.start()
    _wait_for(begun, processes, _EARLY)
    processes[0].terminate()
    fault_drill.wait(processes)
    evaluate = (
      "agrpo_jax.evaluate",
      "--config=configs/sudoku_tiny.py",
      "--config.evaluate.num_examples=64",
      f"--checkpoint={begun.workdir}",
      "--output=",
    )
    port = ("agrpo_jax.port", f"--checkpoint={begun.workdir}", "--to=")
    page = ("agrpo_jax.report", str(begun.workdir), "--html=")
    for verb, words in (
      ("evaluated", evaluate),
      ("exported", port),
      ("read", page),
    ):
      output = drill.folder / f"{verb}_{rank}"
      yield f"{what}: {verb}", "", _problems_of(_run(drill, words, output), {0})
    ours = drill.command(f"begun_{rank}", rank=rank)
    at = begun.newest_save()
    ours.finish()
    found = _differences_of_versions(theirs.workdir, ours.workdir)
    yield f"{what}: trained on", f"after train step {at}", found


def _differences_of_versions(
  theirs: pathlib.Path, ours: pathlib.Path
) -> list[str]:
  """As `fault_drill.differences`, where only one of them has some metrics."""
  folder = ours.with_name(f"{ours.name}_shared")
  shutil.copytree(ours, folder)
  lines = [
    [json.loads(line) for line in (one / "metrics.jsonl").open()]
    for one in (theirs, ours)
  ]
  shared = [
    {name: value for name, value in b.items() if name in a}
    for a, b in zip(*lines, strict=True)
  ]
  text = "".join(f"{json.dumps(record)}\n" for record in shared)
  (folder / "metrics.jsonl").write_text(text)
  return fault_drill.differences(theirs, folder, _NUM_STEPS)


def _run(
  drill: Drill, words: Sequence[str], output: pathlib.Path, **variables: str
) -> subprocess.CompletedProcess[str]:
  """Runs another command, whose last word ends in the output."""
  return subprocess.run(
    [sys.executable, "-m", *words[:-1], f"{words[-1]}{output}"],
    cwd=fault_drill.ROOT,
    env={**drill.command("any").environment, **variables},
    capture_output=True,
    text=True,
    check=False,
  )


def _problems(
  said: Sequence[tuple[str, str]],
  processes: Sequence[subprocess.Popen[str]],
  codes: set[int],
  parts: Sequence[str] = (),
) -> list[str]:
  """Returns what is wrong with how processes ended."""
  return [
    problem
    for process, (out, err) in zip(processes, said, strict=True)
    for problem in _problems_of(
      subprocess.CompletedProcess((), process.returncode, out, err),
      codes,
      parts,
    )
  ]


def _problems_of(
  done: subprocess.CompletedProcess[str],
  codes: set[int],
  parts: Sequence[str] = (),
) -> list[str]:
  found = []
  if done.returncode not in codes:
    found.append(f"exit code {done.returncode}")
  if "Traceback" in done.stderr:
    found.append("a traceback")
  found += [
    f"no {part!r} in what it says" for part in parts if part not in done.stderr
  ]
  if found:
    found.append(f"it said:\n{done.stderr[-3000:]}")
  return found


def _wait_for(
  command: fault_drill.Command,
  processes: Sequence[subprocess.Popen[str]],
  num_steps: int,
) -> None:
  """Returns when so many train steps are logged."""
  while command.num_logged() < num_steps:
    if any(process.poll() is not None for process in processes):
      said = fault_drill.wait(processes)
      raise RuntimeError(f"It ended before train step {num_steps}: {said}")
    time.sleep(0.01)


HARDSHIPS: dict[str, Callable[[Drill], Iterator[Outcome]]] = {
  one.__name__: one for one in (clock, moved, disk, readonly, stopped, previous)
}


def main(argv: Sequence[str]) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  logging.set_verbosity(logging.ERROR)
  parser.add_argument("--only", default=",".join(HARDSHIPS))
  parser.add_argument("--folder", help="of all runs; default: a temporary one")
  parser.add_argument("--stop_seconds", type=float, default=120.0)
  parser.add_argument(
    "--previous", type=pathlib.Path, help="checkout of an earlier commit"
  )
  args = parser.parse_args(argv)
  names = args.only.split(",")
  if unknown := {*names} - {*HARDSHIPS}:
    parser.error(
      f"--only={args.only}: of {', '.join(HARDSHIPS)}, not {unknown}"
    )
  is_wrong = False
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(args.folder or temporary).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    previous = args.previous and args.previous.resolve()
    drill = Drill(folder, args.stop_seconds, previous)
    for name in names:
      for what, came, problems in HARDSHIPS[name](drill):
        verdict = "; ".join(problems) or "as it should"
        print(_ROW.format(name, what, came, verdict), flush=True)
        is_wrong |= bool(problems)
  return int(is_wrong)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
