"""The settings of a run as a page: what agrpo_jax/config.py says of each."""

import ast
import io
import pathlib
import re
import tokenize

_HEAD = """# Settings

Every key of a config, with its default and what `agrpo_jax/config.py` says of
it: unit, legal values, meaning. Files in `configs/` start from these defaults
and change what differs; a command line changes both:
`--config.rollout.temperature=0.6`."""

# Function of config.py -> heading.
_FUNCTIONS = {
  "_common": "Of runs of both kinds",
  "rl": "Of reinforcement learning: `agrpo train`",
  "_sampling": "How completions are drawn: `rollout.*` and `evaluate.*`",
  "sft": "Of supervised fine-tuning: `agrpo sft`",
}


def markdown(file: pathlib.Path) -> str:
  """Returns the page.

  Args:
    file: `config.py`.

  Raises:
    ValueError: a key of which the file says nothing.
  """
  source = file.read_text("utf-8")
  comments = _Comments(source)
  functions = {
    node.name: node
    for node in ast.parse(source).body
    if isinstance(node, ast.FunctionDef)
  }
  parts = [_HEAD]
  for name, heading in _FUNCTIONS.items():
    parts += [f"## {heading}", _table(functions[name], comments)]
  parts += ["## Samplers by name: `--sampler=`", _samplers(source)]
  return "\n\n".join(parts) + "\n"


class _Comments:
  """The comments of a source, by line."""

  def __init__(self, source: str):
    self._behind: dict[int, str] = {}
    self._alone: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
      if token.type == tokenize.COMMENT:
        line, column = token.start
        is_alone = not token.line[:column].strip()
        where = self._alone if is_alone else self._behind
        where[line] = token.string.removeprefix("#").strip()

  def of(self, node: ast.stmt) -> str:
    """Returns what stands above a statement and behind its end."""
    first = node.lineno
    while first - 1 in self._alone:
      first -= 1
    found = [self._alone[line] for line in range(first, node.lineno)]
    found.append(self._behind.get(node.end_lineno or node.lineno, ""))
    return " ".join(found).strip()


def _table(function: ast.FunctionDef, comments: _Comments) -> str:
  """Returns the keys that a function of config.py sets, a row each."""
  groups = {"c": "", "sub": ""}  # what a name in the function stands for
  rows = ["| key | default | |", "| --- | --- | --- |"]
  for node in function.body:
    if not isinstance(node, ast.Assign):
      continue
    target = ast.unparse(node.targets[0])
    owner, dot, rest = target.partition(".")
    if not dot or owner not in groups:
      continue
    key = f"{groups[owner]}.{rest}".lstrip(".")
    groups |= {ast.unparse(other): key for other in node.targets[1:]}
    meaning = comments.of(node).replace("|", "\\|")
    is_group = ast.unparse(node.value) == "ConfigDict()"
    if is_group and not meaning:
      continue
    if not meaning:
      raise ValueError(f"{target}, line {node.lineno}, has no comment.")
    shown = f"`{key}.*`" if is_group else f"`{key}`"
    rows.append(f"| {shown} | {_default(node.value)} | {meaning} |")
  return "\n".join(rows)


def _default(value: ast.expr) -> str:
  """Returns a default as it stands there; "" for what is computed."""
  try:
    return f"`{ast.literal_eval(value)!r}`"
  except ValueError:
    return ""


def _samplers(source: str) -> str:
  """Returns the comment that explains `SAMPLERS`, as text and a list."""
  found = re.search(r"((?:^#.*\n)+)_GREEDY", source, re.MULTILINE)
  if found is None:
    raise ValueError("config.py does not explain its samplers.")
  text = re.sub(r"^# ?", "", found[1], flags=re.MULTILINE)
  return re.sub(r"^(\w[\w, ]*): ", r"* **\1**: ", text, flags=re.MULTILINE)
