"""Two processes of the real command on loopback: deaths, signals, refusals."""

import pathlib
import signal

import numpy as np

from agrpo_jax.evaluation import accuracy
from agrpo_jax.parallel import processes
from agrpo_jax.runs import metrics
from agrpo_jax.runs import workdir
from fixtures import commands


def lines(folder: pathlib.Path, name: str = "metrics.jsonl") -> list[dict]:
  path = folder / name
  return list(metrics.read(path)) if path.exists() else []


def num_lines(folder: pathlib.Path) -> int:
  path = folder / "metrics.jsonl"
  return path.read_bytes().count(b"\n") if path.exists() else 0


def has_checkpoint(folder: pathlib.Path) -> bool:
  saved = folder / "checkpoints"
  return saved.exists() and any(p.name.isdigit() for p in saved.iterdir())


def assert_same_training(folder: pathlib.Path, other: pathlib.Path) -> None:
  """Equal completions and, up to float noise, metrics; no line twice."""
  ours, theirs = lines(folder), lines(other)
  assert [line["train_step"] for line in ours] == list(range(len(theirs)))
  for our, their in zip(ours, theirs, strict=True):
    assert {*our} == {*their}
    for name in our:
      if "second" not in name:
        np.testing.assert_allclose(our[name], their[name], 1e-4, 1e-6)
  assert lines(folder, "samples.jsonl") == lines(other, "samples.jsonl")


LOST = "Another process of the run ended or does not answer"


def test_a_run_goes_on_after_the_death_of_either_process(tmp_path):
  """In the end it is what one process with as many devices makes of it."""
  run, other = tmp_path / "run", tmp_path / "other"
  words = (
    *commands.TINY,
    "--config.train.num_steps=12",
    "--config.train.checkpoint_every=2",
  )

  def assert_end(pair: commands.Pair, victim: int) -> None:
    pair.processes[victim].kill()
    codes = pair.codes(seconds=60)
    said = pair.said(1 - victim)
    assert (codes[victim], codes[1 - victim]) == (-signal.SIGKILL, 4), said
    assert LOST in said
    assert "the same command, on all processes, goes on" in said

  with commands.Pair(tmp_path, *words, f"--config.workdir={run}") as pair:
    # One save complete: the next start has something to go on from.
    pair.wait_until(lambda: num_lines(run) >= 4 and has_checkpoint(run))
    assert_end(pair, victim=1)  # which process 0 exchanges results with
  with commands.Pair(tmp_path, *words, f"--config.workdir={run}") as pair:
    pair.wait_until(lambda: "train step compiles" in pair.said(0))
    assert_end(pair, victim=0)  # which process 1 does not wait for right now
  with commands.Pair(tmp_path, *words, f"--config.workdir={run}") as pair:
    assert pair.codes() == [0, 0], pair.said(0) + pair.said(1)
    assert f"Continuing {run} after train step" in pair.said(0)
    assert "step 12/12" in pair.said(0)
    # Gloo's own lines aside, process 1 has nothing to tell.
    spoken = pair.said(1).splitlines()
    assert not [line for line in spoken if line and "[Gloo]" not in line]
  commands.alone(*words, f"--config.workdir={other}")
  assert_same_training(run, other)
  # Such groups are left out of the update, so all have to agree on them.
  assert any(line["frac_reward_zero_std"] > 0 for line in lines(run))


def test_a_signal_to_one_process_stops_both_after_the_same_step(tmp_path):
  """Of SFT from random parameters, which one process writes for both."""
  run = tmp_path / "run"
  words = (
    *("-m", "agrpo_jax.sft", "--config=configs/sft_sudoku.py"),
    f"--config.workdir={run}",
    f"--config.sft.output={tmp_path / 'out'}",
    "--config.task.options.num_examples=200",
    "--config.model.network.num_layers=1",
    "--config.sft.batch_size=16",
    "--config.sft.microbatch=16",
    "--config.optimizer.schedule=constant",
  )
  with commands.Pair(tmp_path, *words, "--config.train.num_steps=4000") as pair:
    pair.wait_until(lambda: num_lines(run) >= 2)
    pair.processes[1].send_signal(signal.SIGTERM)
    assert pair.codes() == [128 + signal.SIGTERM] * 2, pair.said(0)
    done = num_lines(run)
    for i in range(2):
      assert f"Stopped after train step {done}, which is saved" in pair.said(i)
  changed = (
    f"--config.train.num_steps={done + 2}",
    "--config.accept_changed_config=true",
  )
  with commands.Pair(tmp_path, *words, *changed) as pair:
    assert pair.codes() == [0, 0], pair.said(0) + pair.said(1)
    assert f"after train step {done} of {done + 2}" in pair.said(0)
  assert [line["train_step"] for line in lines(run)] == [*range(done + 2)]
  assert (tmp_path / "out" / "model.safetensors").exists()


def test_an_evaluation_of_two_processes_is_that_of_one(tmp_path):
  words = (
    *("-m", "agrpo_jax.evaluate", "--config=configs/sudoku_tiny.py"),
    "--config.task.options.num_examples=200",
    "--config.evaluate.num_examples=12",
    "--config.evaluate.batch_size=8",
    "--config.grading.num_workers=1",
  )
  output = [tmp_path / "two.jsonl", tmp_path / "one.jsonl"]
  with commands.Pair(tmp_path, *words, f"--output={output[0]}") as pair:
    assert pair.codes() == [0, 0], pair.said(0) + pair.said(1)
    assert "12 problems" in pair.said(0)
    assert "12 problems" not in pair.said(1)
  commands.alone(*words, f"--output={output[1]}")
  records = [file.read_bytes() for file in output]
  assert records[0] == records[1]
  assert records[0].count(b"\n") == 12


def test_process_0_knows_which_evaluation_is_complete(monkeypatch):
  found = {"records": [], "seconds": 7.0}
  monkeypatch.setattr(processes, "is_main", lambda: False)
  monkeypatch.setattr(processes, "exchange", lambda own: [found, own])
  result = accuracy.finished("not/on/this/machine.jsonl", {}, 1)
  assert result.seconds == 7


# A command that does nothing but this, in all processes that found each other.
COMMAND = """
import jax, time
from agrpo_jax import command
from agrpo_jax.parallel import processes

def main(argv):
  print("joined")
  {}

command.main(main)
"""


def test_a_process_that_freezes_counts_as_lost(tmp_path):
  """Nothing waits for it here, so JAX aborts those that are left."""
  with commands.Pair(
    tmp_path,
    *("-c", COMMAND.format("time.sleep(600)")),
    AGRPO_HEARTBEAT_SECONDS="8",
  ) as pair:
    pair.wait_until(lambda: "joined" in pair.said(0))
    pair.processes[1].send_signal(signal.SIGSTOP)
    assert pair.processes[0].wait(timeout=60) == 4, pair.said(0)
    assert LOST in pair.said(0)
    pair.processes[1].send_signal(signal.SIGCONT)
    assert pair.processes[1].wait(timeout=60) == 4, pair.said(1)
    assert LOST in pair.said(1)


def test_why_a_save_timed_out_is_looked_for(monkeypatch):
  """Orbax raises TimeoutError from what JAX says of the other process."""
  error = TimeoutError("Timed out while waiting.")
  error.__cause__ = RuntimeError("INTERNAL: Barrier failed because: ...")
  assert not processes.is_lost(error)  # a single process has lost nobody
  monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
  assert processes.is_lost(error)
  assert not processes.is_lost(TimeoutError("Timed out while waiting."))


def test_our_own_mistake_in_one_process_ends_the_other(tmp_path):
  script = "processes.exchange(1 // (1 - jax.process_index()))"
  with commands.Pair(tmp_path, "-c", COMMAND.format(script)) as pair:
    assert pair.codes(seconds=60) == [4, 1], pair.said(0) + pair.said(1)
    assert "ZeroDivisionError" in pair.said(1)
    assert LOST in pair.said(0)


def test_processes_with_other_settings_are_refused(tmp_path):
  """And flags say who is who, where the environment says something else."""
  with commands.Pair(
    tmp_path,
    *commands.TINY,
    own=(("--process_id=0",), ("--process_id=1", "--config.seed=1")),
    AGRPO_PROCESS_ID="7",
  ) as pair:
    assert pair.codes(seconds=60) == [2, 2], pair.said(0) + pair.said(1)
    for i in range(2):
      assert "config.seed: 0 (process 0), 1 (process 1)" in pair.said(i)
      assert "the same command" in pair.said(i)
      assert "workdir" not in pair.said(i)


def test_what_process_0_refuses_ends_the_other(tmp_path):
  folder = tmp_path / "run"
  with (
    workdir.claim(folder),
    commands.Pair(
      tmp_path, *commands.TINY, f"--config.workdir={folder}"
    ) as pair,
  ):
    assert pair.codes(seconds=60) == [2, 4], pair.said(0) + pair.said(1)
    assert "in use by process" in pair.said(0)
    assert LOST in pair.said(1)


def test_a_process_that_never_comes(tmp_path):
  seconds = {"AGRPO_JOIN_SECONDS": "2"}
  no_1 = commands.Pair(
    tmp_path / "a", *commands.TINY, own=((), None), **seconds
  )
  no_0 = commands.Pair(
    tmp_path / "b", *commands.TINY, own=(None, ()), **seconds
  )
  with no_1, no_0:
    for i, pair in enumerate((no_1, no_0)):
      assert pair.codes(seconds=60) == [4]
      said = pair.said(i).splitlines()[-1]
      assert "did not find each other in 2 s (AGRPO_JOIN_SECONDS)" in said
