"""What the documents say can be done: every command, up to its work."""

import ast
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator

import pytest

import cells
import settings_page
from agrpo_jax import __main__ as agrpo
from agrpo_jax import config as config_lib

ROOT = pathlib.Path(__file__).parents[1]

PAGES = [
  *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
  *sorted((ROOT / "docs").glob("*.md")),
  *sorted((ROOT / "benchmarks/results").glob("*.md")),
  *sorted((ROOT / "agrpo_jax/assets").glob("*/README.md")),
]
MODULES = [
  path
  for folder in ("configs", "benchmarks", "examples", "tools")
  for path in sorted((ROOT / folder).rglob("*.py"))
]

# What a command begins with. Those of launch/ have their own dry runs, and a
# command of ours behind " -- ".
OURS = re.compile(r"(?:\$ )?(agrpo |python |make |pip install |launch/)")
INLINE = re.compile(
  r"agrpo [a-z_]+ |python (?:-m agrpo_jax|benchmarks/)|make \w"
)

# What stands for something of the reader's, where its kind matters.
STANDS_FOR = [
  (r"<[^>]*>", "X"),
  (r"(=\S+) or \S+", r"\1"),  # FOLDER or FILE.jsonl
  (r"[][]", ""),  # what may be left out is tried
  (r" \| ", " "),
  (r"--config=(?:FILE|X|NAME|\.\.\.)(?=\s|$)", "--config=sudoku_tiny"),
  (r"--sampler=NAME", "--sampler=d1"),
  (r"=N\b", "=1"),
  (r"=\.\.\.", "=X"),
  (r" \.\.\.", ""),
]


def in_blocks(text: str) -> Iterator[str]:
  """Yields the commands of blocks, which are indented or fenced."""
  is_fenced = False
  lines = []
  for line in text.splitlines():
    if line.lstrip().startswith("```"):
      is_fenced = not is_fenced
    elif is_fenced or line.startswith("    "):
      lines.append(line.strip())
  joined = "\n".join(lines).replace("\\\n", " ")
  yield from filter(OURS.match, joined.splitlines())


def in_prose(text: str) -> Iterator[str]:
  """Yields the commands between backticks."""
  prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
  prose = re.sub(r"^    .*$", "", prose, flags=re.MULTILINE)
  for code in re.findall(r"`([^`]+)`", prose):
    found = " ".join(code.split())
    # Without a flag it is but a name.
    if INLINE.match(found) and (" --" in found or found.startswith("make")):
      yield found


def of_cells(path: pathlib.Path) -> str:
  """Returns an example's text, and the commands that its code runs, as text."""
  parts = []
  for cell in cells.read(path):
    if cell.is_text:
      parts.append(cell.source)
      continue
    for node in ast.walk(ast.parse(cell.source)):
      if isinstance(node, ast.Constant) and "agrpo " in str(node.value):
        parts.append(f"    {' '.join(node.value.split())}")
  return "\n".join(parts)


def commands() -> Iterator[tuple[str, list[str]]]:
  """Yields (where it stands, its words) of every command, each once."""
  seen = set()
  texts = [(path, path.read_text("utf-8")) for path in PAGES]
  for word in agrpo.WORDS:
    texts.append((ROOT / f"agrpo_jax/{word}", agrpo.docstring(word)))
  for path in MODULES:
    source = path.read_text("utf-8")
    texts.append((path, ast.get_docstring(ast.parse(source)) or ""))
    if path.parent.name == "examples":
      texts.append((path, of_cells(path)))
  for path, text in texts:
    found = [*in_blocks(text), *in_prose(text)]
    for line in found:
      line = line.removeprefix("$ ")
      for pattern, word in STANDS_FOR:
        line = re.sub(pattern, word, line)
      if line not in seen:
        seen.add(line)
        yield str(path.relative_to(ROOT)), shlex.split(line, comments=True)


def written(page: str) -> str:
  """Returns the Python file that a page shows."""
  text = (ROOT / "docs" / page).read_text("utf-8")
  return re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]


def reader(folder: pathlib.Path) -> pathlib.Path:
  """Makes a folder with what a reader has who follows the documents."""
  for name in ("agrpo_jax", "benchmarks", "configs", "examples", "tools"):
    (folder / name).symlink_to(ROOT / name)
  (folder / "reverse.py").write_text(written("custom_task.md"))
  (folder / "reinforce.py").write_text(written("custom_objective.md"))
  made_before = ["FILE.jsonl", "DIR/train.jsonl", "FOLDER/train.jsonl"]
  made_before += [
    f"runs/data/{x}.jsonl" for x in ("countdown", "both", "words")
  ]
  for name in made_before:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).touch()
  return folder


def dry_runs(lines: list[list[str]], folder: pathlib.Path) -> list:
  """Returns [exit code, what it said] of each command."""
  done = subprocess.run(
    [sys.executable, ROOT / "tests/fixtures/dry_run.py"],
    input=json.dumps(lines),
    cwd=folder,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


TRAIN = ("agrpo", "train", "--config=sudoku_tiny")
# With the exit code that each has to have.
WRONG = [
  (("agrpo", "trian", "--config=sudoku_tiny"), 2),
  (("agrpo", "train", "--config=sudoku_tinny"), 2),
  ((*TRAIN, "--config.rollout.temprature=1"), 2),
  ((*TRAIN, "--config.rollout.group_size=1"), 2),
  ((*TRAIN, "--config.objective.num_masks=1"), 2),
  (
    (*TRAIN, "--config.objective.name=espo", "--config.objective.num_masks=x"),
    2,
  ),
  (("agrpo", "evaluate", "--config=sudoku_tiny", "--sampler=d2"), 2),
  (("agrpo", "sweep", "--config=sudoku_tiny"), 2),
  (("agrpo", "report", "a", "--htlm=b"), 2),
  (("agrpo", "lm_eval", "--model_args", "pth=x"), 1),
  (("python", "benchmarks/step.py", "--preset=huge"), 1),
  (("python", "benchmarks/fault_drill.py", "--klls=1"), 2),
]


@pytest.fixture(scope="module")
def tried(tmp_path_factory) -> dict:
  """(place, words) -> [exit code, what it said]; "" for the place of WRONG."""
  found = [("", words) for words, _ in WRONG]
  for place, words in commands():
    if words[0].startswith("launch/") or "launch/local.py" in words:
      words = words[words.index("--") + 1 :] if "--" in words else []
    if words[:1] in (["agrpo"], ["python"]) and "--help" not in words:
      found.append((place, (*words,)))
  lines = [[*words] for _, words in found]
  ends = dry_runs(lines, reader(tmp_path_factory.mktemp("reader")))
  return dict(zip(found, ends, strict=True))


def test_every_command_is_right_up_to_its_work(tried):
  """Words, flags, configs by name, keys and their values."""
  documented = {key: end for key, end in tried.items() if key[0]}
  assert len(documented) > 100
  wrong = [
    f"{place}: {shlex.join(words)}\n  {said.strip()[-400:]}"
    for (place, words), (code, said) in documented.items()
    if code
  ]
  assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("words,code", WRONG, ids=lambda x: str(x)[-40:])
def test_a_wrong_command_is_found(tried, words, code):
  assert tried["", words][0] == code, tried["", words]


def test_what_make_and_pip_are_asked_for_exists():
  targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  checked = 0
  for place, words in commands():
    if words[0] == "make":
      goals = [word for word in words[1:] if "=" not in word]
      assert {*goals} <= {*targets}, (place, words)
    elif words[0] == "pip":
      asked = re.findall(r"\[([\w,-]+)\]", " ".join(words))
      extras = {one for names in asked for one in names.split(",")}
      assert extras <= {*project["optional-dependencies"]}, (place, words)
    else:
      continue
    checked += 1
  assert checked > 5


def test_every_setting_is_on_its_page():
  page = settings_page.markdown(ROOT / "agrpo_jax/config.py")
  keys = set()
  for make in (config_lib.rl, config_lib.sft):
    flat = make().to_dict()
    keys |= {
      f"{group}.{key}" if isinstance(values, dict) else group
      for group, values in flat.items()
      for key in (values if isinstance(values, dict) else [""])
    }
  drawing = {*config_lib.rl().rollout} & {*config_lib.rl().evaluate}
  missing = [
    key
    for key in keys
    if f"| `{key}` |" not in page
    and not (
      key.startswith(("rollout.", "evaluate."))
      and key.partition(".")[2] in drawing
      and f"| `{key.partition('.')[2]}` |" in page
    )
  ]
  assert not missing
  for name in config_lib.SAMPLERS:
    assert re.search(rf"^\* \*\*(\w+, )?{name}(, \w+)?\*\*: ", page, re.M)


def test_a_setting_without_a_comment_is_refused(tmp_path):
  source = (ROOT / "agrpo_jax/config.py").read_text()
  silent = source.replace("c.seed = 0  #", "c.seed = 0\n  x = 0  #")
  (tmp_path / "config.py").write_text(silent)
  with pytest.raises(ValueError, match=r"c\.seed, line \d+, has no comment"):
    settings_page.markdown(tmp_path / "config.py")
