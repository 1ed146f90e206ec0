"""Two processes of the real command on loopback: deaths, signals, refusals."""

import pathlib
import signal

import numpy as np

import processes
from agrpo_jax import metrics


def lines(workdir: pathlib.Path, name: str = "metrics.jsonl") -> list[dict]:
  path = workdir / name
  return list(metrics.read(path)) if path.exists() else []


def num_lines(workdir: pathlib.Path) -> int:
  path = workdir / "metrics.jsonl"
  return path.read_bytes().count(b"\n") if path.exists() else 0


def assert_same_training(workdir: pathlib.Path, other: pathlib.Path) -> None:
  """Equal completions and, up to float noise, equal metrics; no line double."""
  ours, theirs = lines(workdir), lines(other)
  assert [line["train_step"] for line in ours] == list(range(len(theirs)))
  for our, their in zip(ours, theirs, strict=True):
    assert {*our} == {*their}
    for name in our:
      if "second" not in name:
        np.testing.assert_allclose(our[name], their[name], 1e-4, 1e-6)
  assert lines(workdir, "samples.jsonl") == lines(other, "samples.jsonl")


def test_a_run_goes_on_after_the_death_of_either_process(tmp_path):
  """In the end it is what one process with as many devices makes of it."""
  num_steps = 12
  run, other = tmp_path / "run", tmp_path / "other"
  flags = (
    *processes.TINY,
    f"--config.train.num_steps={num_steps}",
    "--config.train.checkpoint_every=2",
  )
  for victim, until in ((1, 3), (0, 6)):
    with processes.Pair(tmp_path, *flags, f"--config.workdir={run}") as pair:
      pair.wait_until(lambda until=until: num_lines(run) >= until)
      pair.processes[victim].kill()
      codes = pair.codes(seconds=60)
      said = pair.said(1 - victim)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 4, said
    message = said.splitlines()[-1]
    assert message.startswith("Another process of the run ended or does not")
    assert "the same command, on all processes, goes on" in message
    assert "Traceback" not in said

  with processes.Pair(tmp_path, *flags, f"--config.workdir={run}") as pair:
    assert pair.codes() == [0, 0], pair.said(0) + pair.said(1)
    assert f"Continuing {run} after train step" in pair.said(0)
    assert f"step {num_steps}/{num_steps}" in pair.said(0)
    # Gloo's own lines aside, process 1 has nothing to tell.
    spoken = pair.said(1).splitlines()
    assert not [line for line in spoken if line and "[Gloo]" not in line]
  processes.alone(tmp_path, *flags, f"--config.workdir={other}")
  assert_same_training(run, other)
  # What all have to agree on did occur: groups without spread, evaluations.
  names = ("frac_reward_zero_std", "eval/accuracy")
  assert all(any(line.get(name) for line in lines(run)) for name in names)
