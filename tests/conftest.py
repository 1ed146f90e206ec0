"""What all tests share: quiet CPU JAX, and processes with several devices."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from collections.abc import Iterator

import pytest

# Before JAX is imported anywhere: it reads these once.
_ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "JAX_NUMPY_RANK_PROMOTION": "raise",
  "TF_CPP_MIN_LOG_LEVEL": "2",
  "TOKENIZERS_PARALLELISM": "false",
  "HF_HUB_OFFLINE": "1",
}
os.environ.update(_ENVIRONMENT)

import jax  # noqa: E402

_ROOT = pathlib.Path(__file__).parent.parent

# A shell without job control starts what stands before "&" with SIGINT ignored,
# and children inherit that: the commands that tests interrupt would go on.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)

RunInSubprocess = Callable[..., str]


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs() -> Iterator[None]:
  """The programs of a whole suite would fill gigabytes."""
  yield
  jax.clear_caches()


@pytest.fixture
def run_in_subprocess() -> RunInSubprocess:
  """Runs a Python script in a process of its own, with virtual CPU devices.

  The number of devices is fixed when a process first uses JAX, so tests of
  meshes cannot share the test process. The script signals failure by raising;
  what it prints is returned.
  """

  def run(
    script: str, devices: int = 8, timeout: float = 300.0, **environment: str
  ) -> str:
    flags = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
      [sys.executable, "-c", textwrap.dedent(script)],
      env=dict(os.environ, XLA_FLAGS=flags, **environment),
      cwd=_ROOT,
      capture_output=True,
      text=True,
      timeout=timeout,
      check=False,
    )
    assert done.returncode == 0, (
      f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    )
    return done.stdout

  return run
