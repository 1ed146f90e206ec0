"""Tests of agrpo_jax.workdir: one run at a time, whatever it dies of."""

import errno
import fcntl
import json
import os
import subprocess
import sys

import pytest

from agrpo_jax import errors
from agrpo_jax.runs import workdir

_HOLD = """
import sys, time
from agrpo_jax.runs import workdir
with workdir.claim(sys.argv[1]):
  print("claimed", flush=True)
  time.sleep(60)
"""


def test_the_directory_is_made_and_can_be_claimed_again(tmp_path):
  for _ in range(2):
    with workdir.claim(tmp_path / "a" / "b") as directory:
      assert directory == tmp_path / "a" / "b"
      assert directory.is_dir()
  with pytest.raises(KeyError):
    with workdir.claim(tmp_path):
      raise KeyError("a run that fails")
  with workdir.claim(tmp_path):
    pass


def test_home_is_understood(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  with workdir.claim("~/runs") as directory:
    assert directory == tmp_path / "runs"


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path):
  command = [sys.executable, "-c", _HOLD, str(tmp_path)]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
    try:
      assert first.stdout.readline() == "claimed\n"
      with pytest.raises(errors.UserError) as caught:
        with workdir.claim(tmp_path):
          pass
      message = str(caught.value)
      assert f"in use by process {first.pid} on " in message
      assert "--config.workdir" in message
    finally:
      first.kill()  # SIGKILL: the process cleans nothing up
  with workdir.claim(tmp_path):
    owner = json.loads((tmp_path / "lock.json").read_text())
    assert owner["pid"] == os.getpid()


def test_only_process_0_holds_the_claim(tmp_path, monkeypatch):
  with workdir.claim(tmp_path):
    monkeypatch.setattr(workdir.jax, "process_index", lambda: 1)
    with workdir.claim(tmp_path):
      pass


@pytest.mark.parametrize("name", ["file", "file/below", "/proc/nowhere/runs"])
def test_an_unwritable_directory_is_a_users_mistake(tmp_path, name):
  (tmp_path / "file").write_text("not a folder")
  with pytest.raises(errors.UserError, match=r"Cannot write.*config\.workdir"):
    with workdir.claim(tmp_path / name):
      pass


def test_a_disk_that_is_full_already_is_a_users_mistake(tmp_path):
  """Of a process that may write no byte, as on a full disk."""
  script = """
import resource, sys
from agrpo_jax import errors
from agrpo_jax.runs import workdir
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
try:
  with workdir.claim(sys.argv[1]):
    pass
except errors.UserError as error:
  print(error)
"""
  done = subprocess.run(
    [sys.executable, "-c", script, str(tmp_path)],
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert "There is no room to write to the work directory" in done.stdout


def test_a_disk_that_becomes_read_only_is_a_users_mistake(tmp_path):
  said = f"Failed to fsync file: {os.strerror(errno.EROFS)}"
  with pytest.raises(errors.UserError, match=r"Read-only.*config\.workdir="):
    with workdir.claim(tmp_path):
      raise ValueError(said)  # as tensorstore does


def test_a_bucket_is_refused():
  with pytest.raises(errors.UserError, match=r"'gs://bucket/run' is not a loc"):
    with workdir.claim("gs://bucket/run"):
      pass


def test_a_file_system_without_locks_is_used_with_a_warning(
  tmp_path, monkeypatch, caplog
):
  def flock(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

  monkeypatch.setattr(fcntl, "flock", flock)
  with workdir.claim(tmp_path):
    pass
  assert "has no file locks (No locks available)" in caplog.text
