"""tasks: by name, by path, shown; options checked; docs that work."""

import json
import os
import pathlib
import random
import re
import subprocess
import sys
import types

import pytest

from agrpo_jax import data
from agrpo_jax import errors
from agrpo_jax import tasks
from agrpo_jax.grading import pool
from agrpo_jax.tasks import base

_ROOT = pathlib.Path(__file__).parents[2]
_DEFAULTS = {"count": 3, "share": 0.5, "name": "a", "flag": True}


@pytest.mark.parametrize("name", tasks.NAMES)
def test_built_in_tasks_have_every_function(name):
  task = tasks.get(name)
  base.check_functions(task)
  weights = task.reward_weights({})
  assert all(isinstance(weight, float) for weight in weights.values())


@pytest.mark.parametrize("name", ["", "gsm", "base", "os", "../gsm8k"])
def test_unknown_name_lists_the_known_ones(name):
  with pytest.raises(errors.UserError, match="countdown, gsm8k, math, sudoku"):
    tasks.get(name)


_DOCUMENT = (_ROOT / "docs/custom_task.md").read_text()
_COMMANDS = [
  f"python -m agrpo_jax {command}"
  for command in re.findall(
    r"^    agrpo ((?:.*\\\n)*.*)$", _DOCUMENT, re.MULTILINE
  )
]


@pytest.fixture
def reverse(tmp_path):
  """The file of docs/custom_task.md."""
  path = tmp_path / "reverse.py"
  path.write_text(re.search(r"```python\n(.*?)```", _DOCUMENT, re.DOTALL)[1])
  return str(path)


def test_documented_task_works(reverse):
  task = tasks.get("", reverse)
  train, test = task.examples("train"), task.examples("test")
  assert len(train) == 4 and len(test) == 2
  assert train[0].fields == {"gold": "egnaro"}
  assert task.demonstration(train[0], None, None) == "egnaro"
  with pool.Grader(
    "", {"exact_weight": 5.0}, num_workers=1, task_path=reverse
  ) as grader:
    fields = [train[0].fields] * 2
    graded = grader.submit(["egnaro\n", "egnxxx"], fields).result(60)
  assert graded.reward_B.tolist() == [6.0, 0.5]
  assert graded.grade_B.tolist() == [1.0, 0.0]


def test_documented_commands_work(tmp_path, reverse):
  """Those of docs/custom_task.md as they stand, beside its file."""
  for name in ("agrpo_jax", "configs"):
    (tmp_path / name).symlink_to(_ROOT / name)
  assert len(_COMMANDS) == 2
  said = [_shell(command, tmp_path) for command in _COMMANDS]
  assert "Write orange backwards." in said[0]
  config = json.loads((tmp_path / "runs/reverse/config.json").read_text())
  assert config["task"]["options"] == {"exact_weight": 5.0}
  lines = (tmp_path / "runs/reverse/metrics.jsonl").read_text().splitlines()
  assert "rewards/exact/mean" in json.loads(lines[0])
  misspelt = _COMMANDS[1].replace("exact_weight", "exact_wieght")
  misspelt = misspelt.replace("runs/reverse", "runs/misspelt")
  said = _shell(misspelt, tmp_path, code=2)
  assert "'exact_wieght' is unknown" in said


def test_a_run_ends_with_the_first_completion_of_a_broken_task(
  tmp_path, reverse
):
  text = pathlib.Path(reverse).read_text()
  broken = text.replace('{"letters": right', '{"leters": right')
  assert broken != text
  pathlib.Path(reverse).write_text(broken)
  for name in ("agrpo_jax", "configs"):
    (tmp_path / name).symlink_to(_ROOT / name)
  said = _shell(_COMMANDS[1], tmp_path, code=2)
  assert "reward gave the parts 'leters', 'exact'" in said
  assert "reward_weights names 'letters', 'exact'" in said
  assert "Traceback" not in said


def _shell(command, folder, code=0):
  """Returns what a command line says, on both streams."""
  done = subprocess.run(
    ["bash", "-c", command],
    cwd=folder,
    env={
      **os.environ,
      "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
      "PYTHONPATH": str(_ROOT),
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    timeout=300,
  )
  assert done.returncode == code, done.stdout
  return done.stdout


@pytest.mark.parametrize(
  "name, text, message",
  [
    ("gone.py", None, "does not exist"),
    ("task.txt", "x = 1", r"must end in \.py"),
    ("task.py", "x =", "failed to load: SyntaxError"),
    ("task.py", "import nowhere_to_be_found", "ModuleNotFoundError"),
    (
      "task.py",
      "def reward(completion, fields): pass",
      "task '.*/task.py': examples is missing; reward_weights is missing; "
      "grade is missing; reward cannot be called as "
      r"reward\(completion, fields, options\): too many",
    ),
    (
      "task.py",
      "def examples(split): pass\n"
      "def reward_weights(): pass\n"
      "def reward(*a): pass\n"
      "grade = 5\n"
      "def answer(text): pass",
      r"examples\(split, path=..., options=...\): .*"
      r"reward_weights\(options\): .*grade\(completion.*answer\(completion",
    ),
  ],
)
def test_bad_task_file(tmp_path, name, text, message):
  path = tmp_path / name
  if text is not None:
    path.write_text(text)
  with pytest.raises(errors.UserError, match=message):
    tasks.get("", str(path))


def test_settings_are_defaults_overridden():
  given = {"count": 5, "share": 1}
  assert base.settings(given, _DEFAULTS, "t") == _DEFAULTS | given
  assert isinstance(base.settings(given, _DEFAULTS, "t")["share"], float)
  assert base.settings(None, _DEFAULTS, "t") == _DEFAULTS


def test_settings_report_everything_at_once():
  given = {"cuont": 1, "share": "x", "count": True, "flag": 1, "name": None}
  with pytest.raises(errors.UserError) as caught:
    base.settings(given, _DEFAULTS, "t")
  message = str(caught.value)
  for piece in [
    "'cuont' is unknown",
    "share='x' must be of type float",
    "count=True must be of type int",
    "flag=1 must be of type bool",
    "name=None must be of type str",
    "count, flag, name, share",
  ]:
    assert piece in message


def test_provenance_names_the_problems_and_not_the_prompts():
  def examples(text, gold):
    return [tasks.Example(0, base.user_turn(text), {"gold": gold})]

  one = base.fingerprint(examples("a", 1))
  assert one == base.fingerprint(examples("b", 1))
  assert one != base.fingerprint(examples("a", 2))

  task = types.SimpleNamespace(PUBLISHED={one: "little split"})
  published = tasks.provenance(task, examples("c", 1))
  assert published.startswith("the published little split (1 problems")
  assert tasks.provenance(task, examples("c", 2)).startswith("not a published")


def _show(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "agrpo_jax.tasks", *arguments],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )


def test_show(tmp_path):
  path = tmp_path / "test.jsonl"
  row = {"question": "6 times 3?\x1b]0;owned\x07", "answer": "#### 18"}
  path.write_text(json.dumps(row) + "\n")
  done = _show("--show=gsm8k", "--protocol=agrpo", f"--path={path}")
  assert done.returncode == 0, done.stderr
  assert "\x1b" not in done.stdout
  for piece in [
    "--- system",
    "<think>",
    "6 times 3?\\x1b]0;owned\\x07",
    "gold: 18",
    "3.000  c",
  ]:
    assert piece in done.stdout


def test_show_with_options():
  done = _show("--show=sudoku", "--option=shots=0", "--option=min_blanks=7")
  assert done.returncode == 0, done.stderr
  assert done.stdout.count("Puzzle: ") == 1


def test_demonstrations_of_tasks_are_written_for_sft(tmp_path, monkeypatch):
  """Files one behind the other are a mixture that `agrpo_jax.sft` reads."""
  monkeypatch.setenv("HOME", str(tmp_path))
  names = ("countdown", "sudoku", "word_problems")
  for name in names:
    done = _show(
      f"--show={name}",
      "--split=train",
      "--option=num_examples=3",
      *(["--protocol=d1"] if name == "sudoku" else []),
      f"--demonstrations=~/{name}.jsonl",
    )
    assert "Wrote 3 demonstrations" in done.stdout, done.stderr
  mixture = tmp_path / "mixture.jsonl"
  mixture.write_text(
    "".join((tmp_path / f"{name}.jsonl").read_text() for name in names)
  )
  examples = data.from_jsonl(str(mixture))
  assert [example.id for example in examples] == [*range(9)]
  own = tasks.get("word_problems").examples("train", options={})[0]
  assert examples[6].messages == own.messages
  text = tasks.get("word_problems").demonstration(own, random.Random(0))
  assert examples[6].fields["completion"] == text
  # A prefill, which SFT has no other place for, comes first.
  assert examples[3].fields["completion"].startswith("<reasoning>")


def test_demonstrations_overwrite_nothing_else(tmp_path):
  file = tmp_path / "own.jsonl"
  words = ("--show=countdown", f"--demonstrations={file}")
  assert _show(*words, "--option=num_examples=3").returncode == 0
  written = file.read_bytes()
  assert _show(*words, "--option=num_examples=3").returncode == 0
  done = _show(*words, "--option=num_examples=2")
  assert done.returncode == 2
  assert "own.jsonl is there already, with other contents" in done.stderr
  assert file.read_bytes() == written


@pytest.mark.parametrize(
  "arguments, message",
  [
    ([], "Say which task"),
    (
      ["--show=gsm8k", "--demonstrations=x.jsonl"],
      "'gsm8k': makes no demonstrations",
    ),
    (
      ["--show=sudoku", "--demonstrations=/nowhere/x.jsonl"],
      "/nowhere/x.jsonl cannot be written: No such file",
    ),
    (["--show=gsm"], "countdown, gsm8k, math, sudoku"),
    (["--show=sudoku", "--option=shots"], "name=value"),
    (["--show=sudoku", "--option=num_examples=4", "--index=4"], "0 and 3"),
    (["--show=gsm8k", "--path=/nowhere"], "/nowhere does not exist"),
  ],
)
def test_show_mistakes_end_with_one_message(arguments, message):
  done = _show(*arguments)
  assert done.returncode == 2
  assert message in done.stderr
  assert "Traceback" not in done.stderr
