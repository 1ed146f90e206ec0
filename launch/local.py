#!/usr/bin/env python3
"""Runs a command as several processes of this machine that find each other.

    python launch/local.py --num-processes=2 --cpu-devices=4 -- \
      python -m agrpo_jax.main --config=configs/sudoku_tiny.py

Every process gets AGRPO_COORDINATOR, AGRPO_NUM_PROCESSES and AGRPO_PROCESS_ID,
which the program reads, and its lines come out with its number in front, but
for those in which Gloo tells of its connections. When one fails, the others are
asked to end, and the exit code is that of the first.
Ctrl-C and SIGTERM go to all of them; the second one kills them.
"""

import argparse
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import IO

_POLL_SECONDS = 0.05
# What Gloo, which connects CPU devices, writes for every group of devices, also
# into the middle of another line; there are dozens, and they drown the rest.
_CONNECTED = re.compile(
  r"\[Gloo\] Rank \d+ is connected to \d+ peer ranks\. "
  r"Expected number of connected peer ranks is : \d+\n?"
)


def main(argv: Sequence[str]) -> int:
  args = _parse(argv)
  port = args.port or _free_port()
  variables = [_variables(args, port, i) for i in range(args.num_processes)]
  if args.dry_run:
    for own in variables:
      settings = [f"{name}={value}" for name, value in own.items()]
      print(shlex.join(["env", *settings, *args.command]))
    return 0
  return _run(args.command, variables, args.grace)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="launch/local.py",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("--num-processes", type=int, default=2)
  parser.add_argument(
    "--cpu-devices",
    type=int,
    default=0,
    help="virtual CPU devices per process; 0: the devices that are there",
  )
  parser.add_argument(
    "--port", type=int, default=0, help="of process 0; 0: one that is free"
  )
  parser.add_argument(
    "--grace",
    type=float,
    default=30.0,
    help="seconds from asking the others to end to killing them",
  )
  parser.add_argument(
    "--dry-run", action="store_true", help="print the commands instead"
  )
  parser.add_argument("command", nargs="*", metavar="-- COMMAND")
  args = parser.parse_args(argv)
  problems = []
  if args.num_processes < 1:
    problems.append(f"--num-processes={args.num_processes} is not 1 or more")
  if args.cpu_devices < 0:
    problems.append(f"--cpu-devices={args.cpu_devices} is negative")
  if not 0 <= args.port < 2**16:
    problems.append(f"--port={args.port} is not a port")
  if args.grace < 0:
    problems.append(f"--grace={args.grace} is negative")
  if not args.command:
    problems.append("the command is missing: ... -- python -m agrpo_jax.main")
  if problems:
    parser.error("; ".join(problems))
  return args


def _variables(
  args: argparse.Namespace, port: int, process_id: int
) -> dict[str, str]:
  """Returns what this process has in its environment beside ours."""
  own = {
    "AGRPO_COORDINATOR": f"127.0.0.1:{port}",
    "AGRPO_NUM_PROCESSES": str(args.num_processes),
    "AGRPO_PROCESS_ID": str(process_id),
    "PYTHONUNBUFFERED": "1",
  }
  if args.cpu_devices:
    own["JAX_PLATFORMS"] = "cpu"
    own["JAX_NUM_CPU_DEVICES"] = str(args.cpu_devices)
  return own


def _free_port() -> int:
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    port: int = listener.getsockname()[1]
    return port


def _run(
  command: Sequence[str], variables: Sequence[dict[str, str]], grace: float
) -> int:
  """Runs the processes; returns the exit code of the first to fail, or 0."""
  processes: list[subprocess.Popen[str]] = []

  asked: list[int] = []

  def forward(number: int, frame: FrameType | None) -> None:
    del frame
    for process in processes:
      if asked and process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
      else:
        process.send_signal(number)
    asked.append(number)

  # A group of its own each: Ctrl-C reaches them through us only, once.
  for own in variables:
    try:
      processes.append(
        subprocess.Popen(
          command,
          env={**os.environ, **own},
          stdout=subprocess.PIPE,
          stderr=subprocess.STDOUT,
          text=True,
          errors="replace",
          start_new_session=True,
        )
      )
    except OSError as error:
      for process in processes:
        process.kill()
      print(f"Cannot run {command[0]!r}: {error.strerror}", file=sys.stderr)
      return 2
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, forward)
  printers = [
    threading.Thread(target=_print_lines, args=(i, process.stdout), daemon=True)
    for i, process in enumerate(processes)
  ]
  for printer in printers:
    printer.start()
  code = _wait(processes, grace)
  for printer in printers:
    printer.join(timeout=grace)
  return code


def _print_lines(process_id: int, stream: IO[str]) -> None:
  for line in stream:
    said = _CONNECTED.sub("", line)
    if said:
      # In one piece: other threads print too.
      line = said.rstrip("\n") + "\n"
      print(f"[{process_id}] {line}", end="", flush=True)


def _wait(processes: Sequence[subprocess.Popen[str]], grace: float) -> int:
  code, deadline = 0, None
  running = dict(enumerate(processes))
  while running:
    time.sleep(_POLL_SECONDS)
    for i, process in list(running.items()):
      if process.poll() is None:
        continue
      del running[i]
      if process.returncode and not code:
        ended = process.returncode
        code = ended if ended > 0 else 128 - ended
        print(f"Process {i} ended with exit code {code}.", file=sys.stderr)
        deadline = time.monotonic() + grace
        for other in running.values():
          other.terminate()
    if deadline is not None and time.monotonic() > deadline:
      for i, process in running.items():
        print(f"Process {i} did not end; killed.", file=sys.stderr)
        os.killpg(process.pid, signal.SIGKILL)
      deadline = None
  return code


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
