"""grading: what a bad completion costs, and what a bad worker costs."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from agrpo_jax import errors
from agrpo_jax.grading import pool

pytestmark = pytest.mark.filterwarnings(
  "error::pytest.PytestUnhandledThreadExceptionWarning"
)

_TASK = """
import multiprocessing, os, signal, subprocess, sys, time

_SLEEP = [sys.executable, "-c", "import time; time.sleep(1000)"]
kept = []

def fork(how):
  if how == "fork":
    if (pid := os.fork()) == 0:
      time.sleep(1000)
    return pid
  if how == "pool":
    kept.append(multiprocessing.Pool(1))
    return kept[-1].apply(os.getpid)
  if how == "session":
    return subprocess.Popen(_SLEEP, start_new_session=True).pid
  # Its parent has ended: a daemon.
  read, write = os.pipe()
  if os.fork() == 0:
    os.setsid()
    daemon = subprocess.Popen(_SLEEP)
    os.write(write, str(daemon.pid).encode())
    os._exit(0)
  os.wait()
  return int(os.read(read, 20))

def examples(split, *, path=None, options=None):
  return []

def reward_weights(options):
  return {"one": 1.0, "length": 0.0}

def reward(completion, fields, options):
  command, _, value = completion.partition(" ")
  if command == "raise":
    raise RuntimeError(value)
  if command == "exit":
    sys.exit(3)
  if command == "crash":
    os.kill(os.getpid(), signal.SIGKILL)
  if command == "spin":
    while True:
      pass
  if command == "swallow":
    while True:
      try:
        while True:
          pass
      except Exception:
        pass
  if command == "stuck":  # never comes back to Python
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 30))
    time.sleep(1000)
  if command == "sleep":
    time.sleep(float(value))
  if command == "nan":
    return {"one": float("nan"), "length": 0.0}
  if command == "print":
    print("a task may print")
  if command == "modules":
    return {"one": float("jax" in sys.modules), "length": 0.0}
  if command == "memory":
    bytearray(64 << 30)
  if command == "pid":
    return {"one": float(os.getpid()), "length": 0.0}
  if command == "fork":
    return {"one": float(fork(value)), "length": 0.0}
  return {"one": 1.0, "length": float(len(completion))}

def grade(completion, fields, options):
  while completion == "slow grade":
    pass
  return {"accuracy": float(completion == fields["gold"]), "other": 0.5}
"""


@pytest.fixture
def task_path(tmp_path):
  path = tmp_path / "task.py"
  path.write_text(_TASK)
  return str(path)


def _grade(task_path, completions, gold="a", **settings):
  settings = {"num_workers": 2, "timeout_seconds": 0.5} | settings
  with pool.Grader("", task_path=task_path, **settings) as grader:
    fields = [{"gold": gold}] * len(completions)
    return grader.submit(completions, fields).result(60)


def test_parts_grades_and_weights_in_order(task_path):
  completions = ["a", "bb", "ccc"] * 20
  graded = _grade(task_path, completions, weights={"length": 0.5})
  lengths = np.array([len(completion) for completion in completions])
  np.testing.assert_array_equal(graded.reward_B, 1.0 + 0.5 * lengths)
  np.testing.assert_array_equal(graded.parts["length"], lengths)
  np.testing.assert_array_equal(graded.grade_B, lengths == 1)
  np.testing.assert_array_equal(graded.grades["other"], 0.5)
  assert graded.reward_B.dtype == np.float64
  assert (graded.num_failed, graded.num_timed_out) == (0, 0)


@pytest.mark.parametrize(
  "bad, num_failed, num_timed_out, reason",
  [
    ("raise x", 1, 0, "raised RuntimeError: x"),
    ("exit", 1, 0, "raised SystemExit"),
    ("crash", 1, 0, "crashed its worker"),
    ("nan", 1, 0, "nan"),
    ("spin", 0, 1, "took too long"),
    ("swallow", 0, 1, "took too long"),
    ("stuck", 0, 1, "took too long"),
  ],
)
def test_a_bad_completion_costs_itself_only(
  task_path, bad, num_failed, num_timed_out, reason
):
  completions = ["a"] * 5 + [bad] + ["a"] * 5
  graded = _grade(task_path, completions, num_workers=1)
  assert graded.reward_B.tolist() == [1.0] * 5 + [0.0] + [1.0] * 5
  assert graded.grade_B.tolist() == [1.0] * 5 + [0.0] + [1.0] * 5
  assert graded.num_failed == num_failed
  assert graded.num_timed_out == num_timed_out
  assert [*graded.failures] == [5]
  assert reason in graded.failures[5]


def test_what_a_task_raises_is_no_command_to_a_terminal(task_path, monkeypatch):
  said = []
  monkeypatch.setattr(
    pool.logging,
    "log_every_n_seconds",
    lambda level, text, seconds, *words: said.append(text % words),
  )
  _grade(task_path, ["raise \x1b]0;owned\x07"])
  (line,) = said
  assert line.startswith(
    "A grader raised RuntimeError: \\x1b]0;owned\\x07, and"
  )


def test_reward_outlives_a_grade_that_took_too_long(task_path):
  graded = _grade(task_path, ["slow grade"])
  assert graded.reward_B.tolist() == [1.0]
  assert graded.grade_B.tolist() == [0.0]
  assert graded.num_timed_out == 1


def test_every_completion_bad(task_path):
  graded = _grade(task_path, ["crash", "spin", "raise"] * 2)
  assert graded.reward_B.tolist() == [0.0] * 6
  assert graded.grade_B.tolist() == [0.0] * 6
  assert (graded.num_failed, graded.num_timed_out) == (4, 2)


def test_worker_never_imports_jax(task_path):
  assert _grade(task_path, ["modules"]).reward_B.tolist() == [0.0]


def test_a_task_may_print(task_path, capfd):
  assert _grade(task_path, ["print"]).reward_B.tolist() == [1.0]
  assert "a task may print" in capfd.readouterr().err


def test_built_in_graders_have_bounded_memory(monkeypatch):
  completion = "<answer>2^{" + "9" * 9 + "}</answer>"
  with pool.Grader("math", num_workers=1) as grader:
    graded = grader.submit([completion], [{"gold": "3"}]).result(60)
  assert graded.parts["answer_tag"].tolist() == [1.0]
  assert graded.parts["correct"].tolist() == [0.0]


def test_timed_out_equality_keeps_the_parts_decided_before():
  """As released: an answer too hard to check still earns its tags."""
  hard = "+".join(f"\\sin({i}x)^{{{i}}}\\cos(x^{i})" for i in range(2, 9))
  completion = f"<think>a</think><answer>\\boxed{{{hard}}}</answer>"
  fields = {"gold": hard.replace("x", "y") + "+\\tan(y)^9"}
  with pool.Grader("math", num_workers=1, timeout_seconds=0.05) as grader:
    grader.submit(["warm"], [{"gold": "1"}]).result(60)
    graded = grader.submit([completion], [fields]).result(60)
  assert graded.num_timed_out == 1
  assert graded.reward_B.tolist() == [1.0]


def test_no_completions(task_path):
  graded = _grade(task_path, [])
  assert graded.reward_B.shape == graded.grade_B.shape == (0,)


def test_megabytes_and_odd_characters(task_path):
  completions = ["x" * 3_000_000, "\ud800\x00\u2028\n\r", "a"] * 10
  graded = _grade(task_path, completions)
  assert graded.num_failed == 0
  lengths = [pool.MAX_CHARS, 5, 1] * 10
  assert graded.parts["length"].tolist() == lengths


def test_many_submits_are_answered_apart(task_path):
  with pool.Grader("", task_path=task_path, num_workers=2) as grader:
    pending = [
      grader.submit(["x" * i], [{"gold": "x" * (i % 2)}]) for i in range(1, 30)
    ]
    lengths = [p.result(60).parts["length"].item() for p in pending]
  assert lengths == list(range(1, 30))


def test_concatenate(task_path):
  with pool.Grader("", task_path=task_path, num_workers=1) as grader:
    batches = [
      grader.submit(texts, [{"gold": "a"}] * len(texts)).result(60)
      for texts in (["a", "b"], ["raise"], [])
    ]
  graded = pool.concatenate(batches)
  assert graded.reward_B.tolist() == [1.0, 1.0, 0.0]
  assert graded.grade_B.tolist() == [1.0, 0.0, 0.0]
  assert graded.grades["other"].tolist() == [0.5, 0.5, 0.0]
  assert graded.num_failed == 1


def test_grading_runs_beside(task_path):
  """`submit` returns before anything is graded, also while workers start."""
  begin = time.monotonic()
  with pool.Grader("", task_path=task_path, num_workers=1) as grader:
    pending = grader.submit(["a"], [{"gold": "a"}])
    assert time.monotonic() - begin < 1.0
    assert not pending.done()
    pending.result(60)


def _is_running(pid):
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  return True


def _pids(grader, count):
  graded = grader.submit(["pid"] * count, [{"gold": ""}] * count).result(60)
  return {int(pid) for pid in graded.reward_B}


def test_close_leaves_no_process(task_path):
  with pool.Grader("", task_path=task_path, num_workers=3) as grader:
    pids = _pids(grader, 200)
    assert all(map(_is_running, pids))
    pending = grader.submit(["stuck"], [{"gold": ""}])
    begin = time.monotonic()
  assert time.monotonic() - begin < 3.0  # not even for one that is stuck
  assert pending.cancelled()
  # Waited for: a zombie would still have its number.
  assert not any(map(_is_running, pids))
  with pytest.raises(ValueError, match="closed"):
    grader.submit([], [])


_FORKS = ["fork", "pool", "session", "daemon"]


@pytest.mark.parametrize("how", _FORKS)
def test_close_ends_what_a_reward_has_started(task_path, how):
  with pool.Grader("", task_path=task_path, num_workers=1) as grader:
    graded = grader.submit([f"fork {how}"], [{"gold": ""}]).result(60)
    child = int(graded.reward_B[0])
    assert _is_running(child)
  assert _wait_for_end(child)


def test_a_worker_that_is_killed_takes_its_children_along(task_path):
  with pool.Grader(
    "", task_path=task_path, num_workers=1, timeout_seconds=0.2
  ) as grader:
    graded = grader.submit(["fork session"], [{"gold": ""}]).result(60)
    child = int(graded.reward_B[0])
    assert grader.submit(["stuck"], [{"gold": ""}]).result(60).num_timed_out
    assert _wait_for_end(child)


def test_close_while_workers_start(task_path):
  begin = time.monotonic()
  with pool.Grader("", task_path=task_path, num_workers=2) as grader:
    pending = grader.submit(["a"] * 50, [{"gold": "a"}] * 50)
    processes = [worker._process for worker in grader._workers]
  assert time.monotonic() - begin < 3.0
  assert pending.cancelled()
  assert all(process.returncode is not None for process in processes)


def test_killed_worker_is_replaced(task_path):
  with pool.Grader("", task_path=task_path, num_workers=1) as grader:
    (pid,) = _pids(grader, 1)
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.1)
    graded = grader.submit(["a", "a"], [{"gold": "a"}] * 2).result(60)
    assert graded.grade_B.tolist() == [1.0, 1.0]
    assert graded.num_failed == 0


def _run_script(task_path, ending, completion="pid", settings="num_workers=2"):
  script = f"""
    import os, sys, time
    from agrpo_jax.grading import pool
    grader = pool.Grader("", task_path={task_path!r}, {settings})
    graded = grader.submit([{completion!r}], [{{"gold": ""}}]).result(60)
    print(int(graded.reward_B[0]), flush=True)
  """
  return subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(script) + ending],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )


def test_a_pause_of_the_whole_machine_costs_no_completion(task_path):
  """Longer than a grader may take: three seconds by the clock."""
  process = _run_script(
    task_path,
    """
pending = grader.submit(["sleep 0.5"], [{"gold": ""}])
print("submitted", flush=True)
print(pending.result(60).num_timed_out)
grader.close()
""",
    settings="num_workers=1, timeout_seconds=1.0",
  )
  worker = int(process.stdout.readline())
  assert process.stdout.readline() == "submitted\n"
  both = process.pid, worker
  for pid in both:
    os.kill(pid, signal.SIGSTOP)
  time.sleep(3.3)
  for pid in both:
    os.kill(pid, signal.SIGCONT)
  assert process.communicate(timeout=30) == ("0\n", "")


def _wait_for_end(pid):
  for _ in range(100):
    if not _is_running(pid):
      return True
    time.sleep(0.05)
  return False


def test_ctrl_c_shows_no_traceback_of_a_worker(task_path):
  process = _run_script(task_path, "time.sleep(60)")
  worker = int(process.stdout.readline())
  assert os.getsid(worker) != process.pid  # out of reach of the terminal
  os.killpg(process.pid, signal.SIGINT)
  _, stderr = process.communicate(timeout=30)
  assert stderr.count("Traceback") == 1  # the script's own
  assert "worker" not in stderr
  assert _wait_for_end(worker)


def test_workers_end_with_a_parent_that_was_killed(task_path):
  process = _run_script(task_path, "os.kill(os.getpid(), 9)")
  worker = int(process.stdout.readline())
  process.communicate(timeout=30)
  assert _wait_for_end(worker)


@pytest.mark.parametrize("how", _FORKS)
def test_children_of_a_reward_end_with_a_parent_that_was_killed(task_path, how):
  ending = """
    grader.submit(["stuck"] * 2, [{"gold": ""}] * 2)
    time.sleep(0.2)
    os.kill(os.getpid(), 9)
  """
  process = _run_script(task_path, textwrap.dedent(ending), f"fork {how}")
  child = int(process.stdout.readline())
  process.wait(30)
  assert _wait_for_end(child)


@pytest.mark.parametrize("gib, num_failed", [(0.25, 1), (2.0, 0)])
def test_memory_is_bounded_for_any_task(tmp_path, gib, num_failed):
  path = tmp_path / "task.py"
  grade = '{"accuracy": float(len(bytearray(512 << 20)) > 0)}'
  path.write_text(_BROKEN.format(reward=_FINE, grade=grade))
  graded = _grade(str(path), ["a"], memory_gib=gib, timeout_seconds=30.0)
  assert graded.num_failed == num_failed


def test_what_a_task_maps_while_it_loads_does_not_count(tmp_path):
  path = tmp_path / "task.py"
  text = _BROKEN.format(reward=_FINE, grade='{"accuracy": 1.0}')
  path.write_text("import mmap\nkept = mmap.mmap(-1, 2 << 30)\n" + text)
  assert _grade(str(path), ["a"], memory_gib=0.5).num_failed == 0


def test_worker_that_cannot_start_is_an_error_not_a_zero(tmp_path):
  path = tmp_path / "task.py"
  path.write_text(_TASK)
  with pool.Grader("", task_path=str(path), num_workers=1) as grader:
    _pids(grader, 1)
    path.unlink()
    graded = grader.submit(["crash"], [{"gold": ""}]).result(60)
    assert graded.num_failed == 1
    pending = grader.submit(["a"], [{"gold": ""}])
    with pytest.raises(RuntimeError, match="failed to start 3 times"):
      pending.result(60)


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"num_workers": 0}, "num_workers=0"),
    ({"timeout_seconds": 0.0}, "timeout_seconds=0.0"),
    ({"memory_gib": float("nan")}, "memory_gib=nan"),
    (
      {"weights": {"two": 1.0}},
      "parts: two. The parts are one, length",
    ),
  ],
)
def test_bad_settings(task_path, settings, message):
  with pytest.raises(errors.UserError, match=message):
    pool.Grader("", task_path=task_path, **settings)


def test_lists_of_unequal_length(task_path):
  with (
    pool.Grader("", task_path=task_path, num_workers=1) as grader,
    pytest.raises(ValueError, match="differ"),
  ):
    grader.submit(["a"], [])


def test_string_tasks_take_milliseconds():
  puzzle, gold = "3014002020004130", "3214142323414132"
  fields = [{"puzzle": puzzle, "gold": gold}] * 128
  with pool.Grader("sudoku", {"protocol": "bare"}) as grader:
    grader.submit([gold] * 128, fields).result(60)
    seconds = []
    for _ in range(5):
      begin = time.monotonic()
      grader.submit([gold] * 128, fields).result(60)
      seconds.append(time.monotonic() - begin)
  assert min(seconds) < 0.1


_BROKEN = """
def examples(split, *, path=None, options=None):
  return []

def reward_weights(options):
  return {{"exact": 1.0, "length": 0.0}}

def reward(completion, fields, options):
  return {reward}

def grade(completion, fields, options):
  return {grade}
"""
_FINE = '{"exact": 1.0, "length": True}'


@pytest.mark.parametrize(
  "reward, grade, message",
  [
    ('{"exakt": 1.0, "length": 0.0}', '{"accuracy": 1.0}', "'exakt', 'length'"),
    ('{"exact": 1.0}', '{"accuracy": 1.0}', "gave the parts 'exact', and"),
    ("{}", '{"accuracy": 1.0}', "gave the parts none"),
    ("1.0", '{"accuracy": 1.0}', "reward gave 1.0"),
    ("None", '{"accuracy": 1.0}', "reward gave None"),
    ('{"exact": "1", "length": 0}', "{}", "reward gave 'exact': '1'"),
    ('{"exact": None, "length": 0}', "{}", "reward gave 'exact': None"),
    (_FINE, "0.5", "grade gave 0.5"),
    (_FINE, '{"acuracy": 1.0}', "grade gave 'acuracy'"),
    (_FINE, '{"accuracy": 1.5}', "accuracy=1.5"),
    (_FINE, '{"accuracy": -1}', "accuracy=-1.0"),
    (_FINE, '{"accuracy": 1.0, "other": "x"}', "grade gave 'other': 'x'"),
  ],
)
def test_a_task_that_breaks_the_contract_is_refused(
  tmp_path, reward, grade, message
):
  """Not graded with 0: the run would train on nothing, silently."""
  path = tmp_path / "broken.py"
  path.write_text(_BROKEN.format(reward=reward, grade=grade))
  with pytest.raises(errors.UserError, match=message) as error:
    _grade(str(path), ["a", "b", "c"])
  assert str(path) in str(error.value)


def test_a_users_mistake_in_a_reward_is_one_of_the_run(tmp_path):
  path = tmp_path / "broken.py"
  reward = "__import__('agrpo_jax.errors').errors.UserError('no such option')"
  text = _BROKEN.format(reward=reward, grade="{}").replace(
    "return __import__", "raise __import__"
  )
  path.write_text(text)
  with pytest.raises(errors.UserError, match="no such option"):
    _grade(str(path), ["a"])


def test_grades_beside_accuracy_may_be_counts(tmp_path):
  path = tmp_path / "task.py"
  grade = '{"accuracy": 1 + 1e-12, "num_right": 7}'
  path.write_text(_BROKEN.format(reward=_FINE, grade=grade))
  graded = _grade(str(path), ["a"])
  assert graded.grades["num_right"].tolist() == [7.0]


def test_options_that_are_not_json(task_path):
  with pytest.raises(errors.UserError, match=r"task\.options=\{'a': \{1\}\}"):
    pool.Grader("", {"a": {1}}, task_path=task_path)
