"""One command for all: `agrpo WORD ...` is `python -m agrpo_jax.WORD ...`.

    agrpo train --config=sudoku_tiny

`train` is `agrpo_jax.main`. Only the module asked for is imported.
"""

import ast
import difflib
import pathlib
import runpy
import sys

import agrpo_jax

WORDS = (
  *("train", "evaluate", "sweep", "likelihood", "report", "show", "sft"),
  *("port", "plan", "tasks", "lm_eval", "lab", "demo"),
)

_PACKAGE = pathlib.Path(__file__).parent


def main() -> None:
  """Runs the command that the first word names."""
  word = sys.argv[1] if len(sys.argv) > 1 else "--help"
  if word in ("--help", "-h", "help"):
    print(_listing())
    return
  if word == "--version":
    print(f"agrpo_jax {agrpo_jax.__version__}")
    return
  if word not in WORDS:
    print(_unknown(word), file=sys.stderr)
    sys.exit(2)
  del sys.argv[1]
  # As `python -m` does: the module finds itself in sys.modules["__main__"] and
  # its file in sys.argv[0], from which --help knows what to show.
  runpy.run_module(_module(word), run_name="__main__", alter_sys=True)


def _module(word: str) -> str:
  return f"agrpo_jax.{'main' if word == 'train' else word}"


def _listing() -> str:
  """Returns the commands, each with the first line of its module."""
  width = max(map(len, WORDS))
  first = {word: docstring(word).partition("\n")[0] for word in WORDS}
  lines = [f"  {word:{width}}  {text}" for word, text in first.items()]
  return "\n".join(
    [
      "agrpo COMMAND [--flag=value ...], where COMMAND is one of",
      "",
      *lines,
      "",
      "agrpo COMMAND --help says more, for example: agrpo train --help",
      "agrpo --version says which agrpo_jax this is",
    ]
  )


def docstring(word: str) -> str:
  """Returns what the module of a command says of itself."""
  path = _PACKAGE.joinpath(*_module(word).split(".")[1:])
  file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
  return ast.get_docstring(ast.parse(file.read_text("utf-8"))) or ""


def _unknown(word: str) -> str:
  close = difflib.get_close_matches(word, WORDS, n=1)
  guess = f" Did you mean {close[0]}?" if close else ""
  return (
    f"agrpo {word}: there is no such command.{guess} agrpo --help lists them."
  )


if __name__ == "__main__":
  main()
