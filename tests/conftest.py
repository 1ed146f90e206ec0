"""What all tests share: quiet CPU JAX, and processes with several devices."""

import atexit
import os
import pathlib
import resource
import shutil
import signal
import tempfile
import textwrap
from collections.abc import Callable
from collections.abc import Iterator

import pytest

# Before JAX is imported anywhere: it reads these once.
_ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  # Most of the time goes to compiling, programs that run once or twice: these
  # halve it twice. The emitters of old are slower in what they make only; and
  # programs of this size gain nothing from being cut up, or from knowing which
  # lines they stand for.
  "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
  "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
  "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false "
  "--xla_cpu_parallel_codegen_split_count=1",
  "JAX_NUMPY_RANK_PROMOTION": "raise",
  "TF_CPP_MIN_LOG_LEVEL": "2",
  "TOKENIZERS_PARALLELISM": "false",
  "HF_HUB_OFFLINE": "1",
}
os.environ.update(_ENVIRONMENT)

# Compiling is most of a suite's work, and many tests start commands that
# compile the same programs: what was compiled once serves all processes.
if "PYTEST_XDIST_WORKER" not in os.environ:
  _programs = tempfile.mkdtemp(prefix="agrpo_jax-programs-")
  atexit.register(shutil.rmtree, _programs, ignore_errors=True)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax  # noqa: E402

from agrpo_jax import learner  # noqa: E402
from fixtures import browser  # noqa: E402
from fixtures import commands  # noqa: E402

_MANY_BYTES = 2 * 2**30

# A learner's program holds a loop for each number of states that its units may
# have. Two are enough to tell them apart; five take twice as long to compile.
learner._MAX_SIZES = 2

# Not everybody has a browser, and nobody needs one for the rest; CI has it.
_IN_BROWSER = "report/browser_test.py"
_NO_BROWSER = browser.missing()
collect_ignore = [_IN_BROWSER] if _NO_BROWSER else []


# The longest files: if one began last, its process would be the only one left.
_LONG = (
  "parallel/processes_test.py",
  "policies/block_causal_test.py",
  "objectives/estimator_test.py",
  "parallel/processes_agree_test.py",
  "objectives/objectives_test.py",
  "objectives/recorded_objectives_test.py",
  "lab/train_test.py",
  "runs/fault_drill_test.py",
  "runs/restore_test.py",
  "models/qwen_test.py",
  "port/export_test.py",
  "grading/grading_test.py",
)
_TESTS = pathlib.Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Puts the longest files first, in an order that does not change."""

  def place(item: pytest.Item) -> int:
    name = item.path.relative_to(_TESTS).as_posix()
    return _LONG.index(name) if name in _LONG else len(_LONG)

  items.sort(key=place)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
  """Says what was left out, and why."""
  if _NO_BROWSER:
    terminalreporter.write_line(
      f"Not run: tests/{_IN_BROWSER}, for lack of {_NO_BROWSER}."
    )


# A shell without job control starts what stands before "&" with SIGINT ignored,
# and children inherit that: the commands that tests interrupt would go on.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)

RunInSubprocess = Callable[..., str]


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs() -> Iterator[None]:
  """The programs of a whole suite would fill gigabytes; many serve again."""
  yield
  if _resident_bytes() > _MANY_BYTES:
    jax.clear_caches()


def _resident_bytes() -> int:
  """Returns the memory of this process: now on Linux, else at most so far."""
  pages = pathlib.Path("/proc/self/statm")
  if pages.exists():
    return int(pages.read_text().split()[1]) * resource.getpagesize()
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.fixture
def run_in_subprocess() -> RunInSubprocess:
  """Runs a Python script in a process of its own, with virtual CPU devices.

  The number of devices is fixed when a process first uses JAX, so tests of
  meshes cannot share the test process. The script signals failure by raising;
  what it prints is returned.
  """

  def run(script: str, devices: int = 8, **environment: str) -> str:
    done = commands.run(
      "-c", textwrap.dedent(script), devices=devices, **environment
    )
    assert done.returncode == 0, (
      f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    )
    return done.stdout

  return run
