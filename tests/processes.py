"""Several processes of one command on this machine, for tests."""

import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).parents[1]

# Short train steps, each with a line in metrics.jsonl.
TINY = (
  "-m",
  "agrpo_jax.main",
  "--config=configs/sudoku_tiny.py",
  "--config.evaluate.every=0",
  "--config.rollout.num_prompts=2",
  "--config.rollout.group_size=4",
  "--config.rollout.batch_size=8",
  "--config.objective.microbatch=16",
  "--config.optimizer.schedule=constant",
  "--config.task.options.num_examples=200",
  "--config.grading.num_workers=1",
  "--config.train.log_samples=8",
)


def environment(programs: pathlib.Path, devices: int) -> dict[str, str]:
  """Of a process with virtual devices; `programs` keeps what is compiled."""
  return {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "PYTHONUNBUFFERED": "1",
    "JAX_NUM_CPU_DEVICES": str(devices),
    # Compiling is most of the work.
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "JAX_COMPILATION_CACHE_DIR": str(programs),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }


def alone(folder: pathlib.Path, *words: str, devices: int = 2) -> str:
  """Runs Python on `words` in one process to its end; what it printed."""
  done = subprocess.run(
    [sys.executable, *words],
    cwd=ROOT,
    env=environment(folder / "programs", devices),
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


class Pair:
  """Two processes that find each other, with what they say in files.

  Use as a context manager: none is left over.

  Args:
    folder: for what they say, and for programs compiled before.
    words: after `python`, for both processes.
    own: more words, of process 0 and of process 1; None: it is not started.
    devices: virtual ones per process.
    variables: more of the environment.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    *words: str,
    own: Sequence[Sequence[str] | None] = ((), ()),
    devices: int = 1,
    **variables: str,
  ):
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      port = free.getsockname()[1]
    self._said = [folder / f"said_{i}.txt" for i in range(2)]
    self.processes = [
      subprocess.Popen(
        [sys.executable, *words, *more],
        cwd=ROOT,
        env={
          **environment(folder / "programs", devices),
          "AGRPO_COORDINATOR": f"127.0.0.1:{port}",
          "AGRPO_NUM_PROCESSES": "2",
          "AGRPO_PROCESS_ID": str(i),
          **variables,
        },
        stdout=self._said[i].open("w"),
        stderr=subprocess.STDOUT,
      )
      for i, more in enumerate(own)
      if more is not None
    ]

  def __enter__(self) -> "Pair":
    return self

  def __exit__(self, *exception: object) -> None:
    for process in self.processes:
      process.kill()
      process.wait()

  def said(self, i: int) -> str:
    """What process i wrote so far, on both streams."""
    return self._said[i].read_text(errors="replace")

  def wait_until(self, is_so: Callable[[], bool], seconds: float = 180) -> None:
    """Returns when it is so; fails when a process ends before."""
    deadline = time.monotonic() + seconds
    while not is_so():
      codes = [process.poll() for process in self.processes]
      assert codes == [None] * len(codes), (codes, self.said(0), self.said(1))
      assert time.monotonic() < deadline, (self.said(0), self.said(1))
      time.sleep(0.01)

  def codes(self, seconds: float = 180) -> list[int]:
    """Exit codes, when all have ended."""
    return [process.wait(timeout=seconds) for process in self.processes]
