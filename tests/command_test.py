"""How commands start and end: help, signals, and what they say then."""

import ast
import asyncio
import errno
import gc
import logging
import pathlib
import re
import signal
import subprocess
import sys

import pytest

import agrpo_jax
from agrpo_jax import __main__ as agrpo
from agrpo_jax import command
from agrpo_jax import config as config_lib
from agrpo_jax import errors
from fixtures import commands

ROOT = pathlib.Path(__file__).parents[1]


def shown(*words: str) -> str:
  done = subprocess.run(
    [sys.executable, "-m", *words, "--help"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert (done.returncode, done.stderr) == (0, "")
  return done.stdout


def docstring(module: str) -> str:
  source = (ROOT / "agrpo_jax" / module).with_suffix(".py")
  if not source.exists():
    source = ROOT / "agrpo_jax" / module / "__main__.py"
  return ast.get_docstring(ast.parse(source.read_text()))


@pytest.mark.parametrize(
  "module,parts",
  [
    ("main", ["--config=gsm8k", "--config:", "agrpo_jax/config.py"]),
    ("evaluate", ["--checkpoint:", "--config:", "--num_samples:"]),
    ("sweep", ["--output:", "--config:", "sft_sudoku,"]),
    ("show", ["--html:", "--config:"]),
    ("port", ["--from:", "--to:", "--process_id:"]),
    ("tasks", ["agrpo tasks --show=gsm8k", "--split=train \\\n"]),
  ],
)
def test_help_teaches(module, parts):
  """The first lines say what the command does, then come its flags."""
  text = shown(f"agrpo_jax.{module}")
  for part in parts:
    assert part in text
  assert text.startswith(docstring(module))


@pytest.mark.parametrize("word,module", [("train", "main"), ("show", "show")])
def test_a_word_is_its_module(word, module):
  assert shown("agrpo_jax", word) == shown(f"agrpo_jax.{module}")


def test_every_command_has_a_word():
  package = ROOT / "agrpo_jax"
  modules = {
    path.stem
    for path in package.glob("*.py")
    if "__name__ ==" in path.read_text() and path.stem != "__main__"
  }
  modules |= {path.parent.name for path in package.glob("*/__main__.py")}
  assert sorted(agrpo.WORDS) == sorted(modules - {"main"} | {"train"})


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_the_words_are_listed_at_once(words):
  """Without importing what they run."""
  script = f"""
import sys
from agrpo_jax import __main__ as agrpo
sys.argv[1:] = {words!r}
agrpo.main()
assert "absl" not in sys.modules and "jax" not in sys.modules
"""
  text = subprocess.check_output(
    [sys.executable, "-c", script], cwd=ROOT, text=True
  )
  for word in agrpo.WORDS:
    taught = docstring("main" if word == "train" else word)
    assert f"  {word:10}  {taught.splitlines()[0]}\n" in text


def test_the_version(monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["agrpo", "--version"])
  agrpo.main()
  assert capsys.readouterr().out == f"agrpo_jax {agrpo_jax.__version__}\n"


@pytest.mark.parametrize(
  "word,part", [("trian", "Did you mean train?"), ("--config=x", "--help")]
)
def test_an_unknown_word(word, part, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["agrpo", word])
  with pytest.raises(SystemExit) as end:
    agrpo.main()
  assert end.value.code == 2
  message = capsys.readouterr().err
  assert word in message and part in message


def test_a_file_wins_over_the_config_of_its_name(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  shipped = str(ROOT / "configs" / "gsm8k.py")
  assert command.find_config("gsm8k") == shipped
  (tmp_path / "gsm8k").mkdir()  # where runs of it may lie
  assert command.find_config("gsm8k") == shipped
  (tmp_path / "gsm8k.py").touch()
  assert command.find_config("gsm8k.py") == "gsm8k.py"
  (tmp_path / "gsm8k").rmdir()
  (tmp_path / "gsm8k").touch()
  assert command.find_config("gsm8k") == "gsm8k"


def test_a_config_in_the_home_folder(tmp_path, monkeypatch):
  (tmp_path / "mine.py").touch()
  monkeypatch.setenv("HOME", str(tmp_path))
  assert command.find_config("~/mine.py") == str(tmp_path / "mine.py")


@pytest.mark.parametrize(
  "key,said",
  [
    ("rollout.top_k", r"$"),
    ("task.options.shots", r"$"),  # named by the task
    (
      "rollout.temprature",
      r"config\.rollout has no key 'temprature'; did you mean temperature\? "
      r"It has batch_size, .*, unmask_rule\. /.*/config\.py says ",
    ),
    ("rollut.top_k", r"config has no key 'rollut'; did you mean rollout\? "),
    ("rollout.xyz", r"config\.rollout has no key 'xyz'\. It has batch_size, "),
    ("seed.x", r"config\.seed has no key 'x'\. It has none\."),
  ],
)
def test_a_key_that_a_config_lacks(key, said):
  assert re.match(said, command._unknown_key(config_lib.rl(), key))


def test_a_config_by_name_for_programs():
  assert command.load_config("sudoku_tiny").rollout.cache == "none"
  c = command.load_config(str(ROOT / "configs" / "sudoku_tiny.py") + ":dual")
  assert c.rollout.cache == "dual"
  with pytest.raises(errors.UserError, match="Did you mean sudoku_tiny"):
    command.load_config("sudoku_tinny")


@pytest.mark.parametrize(
  "flags,baseline",
  [
    (["--config.objective.name=agrpo"], "group_mean"),
    (["--config.objective.name=vine_ppo"], "none"),
    (["--config.objective.path=agrpo.py"], "none"),
  ],
)
def test_the_configs_own_objective_keeps_its_settings(flags, baseline):
  script = """
from agrpo_jax import command
command.main(
  lambda argv: print(command.CONFIG.value.objective.get("baseline", "none"))
)
"""
  said = commands.run("-c", script, "--config=published:agrpo", *flags).stdout
  assert said == f"{baseline}\n"


def test_installed_configs_lie_in_the_package(tmp_path, monkeypatch):
  """Others' may lie beside it: site-packages belongs to everybody."""
  for folder in ("configs", "agrpo_jax/configs"):
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "gsm8k.py").touch()
  (tmp_path / "configs" / "foreign.py").touch()
  package = tmp_path / "agrpo_jax"
  monkeypatch.setattr(command, "__file__", str(package / "command.py"))
  found = command.find_config("gsm8k")
  assert found == str(package / "configs" / "gsm8k.py")
  with pytest.raises(errors.UserError, match=r"Those are gsm8k\.$"):
    command.find_config("foreign")


def test_a_disk_that_takes_no_more_is_no_mistake_of_ours():
  script = """
import os
import sys
from agrpo_jax import command
def write(argv):
  raise OSError(int(argv[1]), os.strerror(int(argv[1])), "runs/sweep.csv")
command.main(write, num_words=1)
"""
  full = commands.run("-c", script, errno.ENOSPC)
  assert full.returncode == 2
  assert full.stderr.startswith(
    "Cannot write 'runs/sweep.csv': No space left on device. Make room"
  )
  other = commands.run("-c", script, errno.EBADF)
  assert other.returncode == 1
  assert "Traceback" in other.stderr


@pytest.mark.parametrize(
  "words,is_kept",
  [(["agrpo_jax.evaluate"], False), (["agrpo_jax", "evaluate"], True)],
)
def test_an_interrupted_evaluation_promises_what_it_keeps(
  tmp_path, words, is_kept
):
  """Its output is no terminal, and yet it says how far it is."""
  evaluation = subprocess.Popen(
    [
      *(sys.executable, "-m", *words),
      "--config=configs/sudoku_tiny.py",
      "--config.evaluate.batch_size=8",
      "--config.evaluate.num_examples=400",
      "--config.task.options.num_examples=400",
      "--config.grading.num_workers=1",
      *([f"--output={tmp_path}"] if is_kept else []),
    ],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  line = next(
    one for one in evaluation.stderr if one.startswith("evaluating: ")
  )
  assert line.startswith("evaluating: 8 of 400 after ")
  evaluation.send_signal(signal.SIGINT)
  _, message = evaluation.communicate(timeout=60)
  assert evaluation.returncode == 130
  assert "Traceback" not in message
  if not is_kept:
    assert message.splitlines()[-1] == "Stopped."
    return
  lines = (tmp_path / "examples.jsonl").read_text().splitlines()
  assert message.splitlines()[-1] == (
    f"Stopped. {len(lines)} completions are kept in {tmp_path}; the same "
    "command goes on from there."
  )


@pytest.mark.parametrize(
  "path,is_shown", [("orbax/serialization.py", False), ("grader.py", True)]
)
def test_a_save_that_fails_leaves_no_task_to_report(path, is_shown, caplog):
  """Of several arrays the loop may end before the second error is seen."""
  source = "async def write():\n  raise ValueError('File too large')\n"
  namespace: dict = {}
  exec(compile(source, path, "exec"), namespace)

  async def save():
    lost = [asyncio.create_task(namespace["write"]())]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    lost.clear()

  logger = logging.getLogger("asyncio")
  logger.addFilter(command._is_of_no_save)
  try:
    asyncio.run(save())
    gc.collect()
  finally:
    logger.removeFilter(command._is_of_no_save)
  assert ("never retrieved" in caplog.text) == is_shown
