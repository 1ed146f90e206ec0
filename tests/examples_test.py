"""The examples as notebooks, and the first one from beginning to end."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

import cells

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


def test_cells_of_a_script(tmp_path):
  script = tmp_path / "script.py"
  script.write_text(
    '"""Head."""\n\n# %% [markdown]\n# # Title\n#\n#     code\n\n'
    "# %%\nx = 1\n\n\nprint(x)\n\n# %%\n\n# %%\ny = 2\n"
  )
  found = cells.read(script)
  assert found == [
    cells.Cell(True, "# Title\n\n    code"),
    cells.Cell(False, "x = 1\n\n\nprint(x)"),
    cells.Cell(False, "y = 2"),
  ]
  assert cells.markdown(found) == (
    "# Title\n\n    code\n\n```python\nx = 1\n\n\nprint(x)\n```\n\n"
    "```python\ny = 2\n```"
  )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_notebook_has_what_the_format_asks_for(script, tmp_path):
  file = tmp_path / "made.ipynb"
  cells.main([str(script), str(file)])
  made = json.loads(file.read_text("utf-8"))
  assert (made["nbformat"], made["nbformat_minor"]) == (4, 5)
  ids = [cell["id"] for cell in made["cells"]]
  assert len({*ids}) == len(ids) > 5
  for cell in made["cells"]:
    keys = {"cell_type", "id", "metadata", "source"}
    if cell["cell_type"] == "code":
      keys |= {"execution_count", "outputs"}
    assert {*cell} == keys
  source = "\n".join("".join(cell["source"]) for cell in made["cells"])
  for cell in cells.read(script):
    assert cell.source in source


_RUN = """
import json, sys
namespace = {"__name__": "__main__"}
for cell in json.load(open(sys.argv[1]))["cells"]:
  if cell["cell_type"] == "code":
    exec(compile("".join(cell["source"]), cell["id"], "exec"), namespace)
"""


def test_the_first_steps_can_be_taken(tmp_path):
  """Cell by cell of the notebook, smaller: a few train steps and draws."""
  file = tmp_path / "first_steps.ipynb"
  cells.main([str(ROOT / "examples/first_steps.py"), str(file)])
  done = subprocess.run(
    [sys.executable, "-c", _RUN, file],
    cwd=tmp_path,
    env={
      **os.environ,
      "PYTHONPATH": str(ROOT),
      "FIRST_STEPS": str(tmp_path),
      "FIRST_STEPS_TRAIN": "2",
      "FIRST_STEPS_DRAWS": "2",
    },
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  made = {path.name for path in tmp_path.glob("*.png")}
  assert made == {f"{x}.png" for x in ("guesses", "unmask", "variance", "run")}
  assert "<html" in (tmp_path / "report.html").read_text()[:500]
  for run in ("run", "rules"):
    assert (tmp_path / run / "checkpoints").is_dir()
