"""The rules of the house that a machine can check."""

import ast
import functools
import importlib
import pathlib
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "agrpo_jax"

# The folders from the ground up: a folder imports only folders before it.
LAYERS = """
  parallel models policies samplers objectives tasks grading runs port
  evaluation lm_eval show plan report lab
""".split()

# What knows the sampler and the estimator knows no network: it gets a function.
WITHOUT_NETWORK = {"types", "policies", "samplers", "objectives"}
NETWORKS = {"models", "port"}

# Grading runs in processes that must start fast and never touch a device.
WITHOUT_JAX = ("errors", "tasks", "grading.worker")
JAX_FAMILY = {"jax", "jaxlib", "flax", "optax", "orbax", "chex", "grain"}

# Extras that a user may not have installed are imported where they are used.
OPTIONAL = {"wandb", "matplotlib", "datasets", "pyarrow", "lm_eval"}

# What takes as long to import as JAX, for what few commands come to; those that
# are started often import neither.
SLOW = {"scipy", "grain"}
STARTED_OFTEN = ("main", "evaluate", "sweep", "show.__main__", "port.__main__")

MODULES = sorted(PACKAGE.rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
SOURCES = [
  path
  for folder in (
    *("agrpo_jax", "configs", "benchmarks", "examples", "launch", "tests"),
    "tools",
  )
  for path in sorted((ROOT / folder).rglob("*.py"))
]


def _name(path: pathlib.Path) -> str:
  """agrpo_jax/tasks/sudoku.py -> agrpo_jax.tasks.sudoku."""
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {_name(path): ast.parse(path.read_text("utf-8")) for path in MODULES}


def _imported(node: ast.AST) -> list[str]:
  """Dotted names that an import statement brings in, without relative ones."""
  if isinstance(node, ast.Import):
    return [alias.name for alias in node.names]
  if isinstance(node, ast.ImportFrom) and node.module:
    return [f"{node.module}.{alias.name}" for alias in node.names]
  return []


def _imports(tree: ast.AST) -> Iterator[str]:
  for node in ast.walk(tree):
    yield from _imported(node)


def _own_imports(name: str) -> set[str]:
  """Modules of the package that a module of it imports."""
  found = set()
  for imported in _imports(TREES[name]):
    while imported.startswith("agrpo_jax.") and imported not in TREES:
      imported = imported.rpartition(".")[0]  # a name inside a module
    if imported in TREES and imported not in (name, "agrpo_jax"):
      found.add(imported)
  return found


def _unit(name: str) -> str:
  """agrpo_jax.tasks.sudoku -> tasks."""
  return [*name.split("."), ""][1]


def test_a_folder_imports_only_folders_before_it():
  upward = [
    f"{name} imports {imported}"
    for name in TREES
    for imported in sorted(_own_imports(name))
    if {_unit(name), _unit(imported)} <= {*LAYERS}
    and LAYERS.index(_unit(imported)) > LAYERS.index(_unit(name))
  ]
  assert not upward


def test_every_folder_is_a_layer():
  folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
  assert folders == {*LAYERS}


def test_no_import_cycles():
  """Removes what imports nothing that is left, until nothing is left."""
  left = {name: _own_imports(name) for name in TREES}
  while left:
    free = [name for name, needs in left.items() if not needs & {*left}]
    assert free, f"these import in a circle: {sorted(left)}"
    for name in free:
      del left[name]


MAX_CHAIN = 8  # modules from the ground to a command


def test_no_chain_of_imports_is_long():
  @functools.cache
  def chain(name: str) -> tuple[str, ...]:
    below = [chain(imported) for imported in sorted(_own_imports(name))]
    return (*max(below, key=len, default=()), name)

  longest = max((chain(name) for name in TREES), key=len)
  assert len(longest) <= MAX_CHAIN, " <- ".join(reversed(longest))


def test_the_estimator_knows_no_network():
  for name in TREES:
    if name != "agrpo_jax" and _unit(name) in WITHOUT_NETWORK:
      known = {_unit(imported) for imported in _own_imports(name)}
      assert not known & NETWORKS, name


def test_nothing_imports_nnx():
  """Flax's other API does not import on every JAX that we support."""
  for name, tree in TREES.items():
    assert not any("nnx" in imported for imported in _imports(tree)), name


def test_imports_stand_at_the_top():
  inside = []
  for name, tree in TREES.items():
    for function in ast.walk(tree):
      if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
        for imported in _imports(function):
          if imported.split(".")[0] not in OPTIONAL | SLOW:
            inside.append(f"{name}.{function.name}: {imported}")
  assert not inside


def test_optional_packages_are_not_imported_at_the_top():
  for name, tree in TREES.items():
    for node in tree.body:
      top = {imported.split(".")[0] for imported in _imported(node)}
      assert not top & OPTIONAL, name


def test_relative_imports_are_not_used():
  for name, tree in TREES.items():
    for node in ast.walk(tree):
      assert not (isinstance(node, ast.ImportFrom) and node.level), name


def test_no_model_text_is_ever_executed():
  """Nor anything else: the package calls no eval, exec or compile."""
  for name, tree in TREES.items():
    for node in ast.walk(tree):
      if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        assert node.func.id not in ("eval", "exec", "compile"), name


def test_asserts_guard_no_input():
  """They vanish under `python -O`; errors are raised."""
  for name, tree in TREES.items():
    assert not any(isinstance(n, ast.Assert) for n in ast.walk(tree)), name


def _public_functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
  for node in tree.body:
    inside = node.body if isinstance(node, ast.ClassDef) else [node]
    if not getattr(node, "name", "_").startswith("_"):
      for each in inside:
        if isinstance(each, ast.FunctionDef) and not each.name.startswith("_"):
          yield each


def test_public_functions_are_annotated():
  bare = []
  for name, tree in TREES.items():
    for function in _public_functions(tree):
      arguments = function.args
      every = [
        *arguments.posonlyargs,
        *arguments.args,
        *arguments.kwonlyargs,
        *filter(None, [arguments.vararg, arguments.kwarg]),
      ]
      if function.returns is None or any(
        each.annotation is None and each.arg not in ("self", "cls")
        for each in every
      ):
        bare.append(f"{name}.{function.name}")
  assert not bare


def test_every_file_says_what_it_is():
  silent = [
    str(path.relative_to(ROOT))
    for path in SOURCES
    if not ast.get_docstring(ast.parse(path.read_text("utf-8")))
  ]
  assert not silent


def test_public_classes_have_docstrings():
  bare = [
    f"{name}.{node.name}"
    for name, tree in TREES.items()
    for node in tree.body
    if isinstance(node, ast.ClassDef)
    and not node.name.startswith("_")
    and not ast.get_docstring(node)
  ]
  assert not bare


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_can_be_imported(path):
  module = importlib.import_module(f"configs.{path.stem}")
  assert callable(getattr(module, "get_config", None)) or path.stem.startswith(
    "_"
  )


def fresh(script: str) -> None:
  """Runs a script in a Python that has imported nothing yet."""
  subprocess.run(
    [sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, check=True
  )


def test_grading_starts_without_jax():
  names = [
    name
    for name in TREES
    if name.removeprefix("agrpo_jax.").startswith(WITHOUT_JAX)
    and not name.endswith(".__main__")  # a person's command
  ]
  for name in names:
    family = {i.split(".")[0] for i in _imports(TREES[name])} & JAX_FAMILY
    assert not family, name
  fresh(f"""
    import importlib, sys
    for name in {names!r}:
      importlib.import_module(name)
    assert "jax" not in sys.modules
  """)


def test_commands_start_fast():
  fresh(f"""
    import importlib, sys
    for name in {STARTED_OFTEN!r}:
      importlib.import_module("agrpo_jax." + name)
    assert not {{"scipy.stats", "grain"}} & sys.modules.keys()
  """)


def test_importing_the_package_starts_no_device():
  """`main` must be able to call jax.distributed.initialize first."""
  fresh(f"""
    import importlib
    from absl import flags
    for name in {sorted(TREES)!r}:
      importlib.import_module(name)
      for flag in list(flags.FLAGS):  # two commands may share a flag's name
        delattr(flags.FLAGS, flag)
    from jax._src import xla_bridge
    assert not xla_bridge.backends_are_initialized()
  """)


UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|raise NotImplemented")
# Folders of one machine.
ELSEWHERE = re.compile(r"(?<![\w.~-])/(work|home|root|Users)/")
SKIPPED = re.compile(r"mark\.(skip|xfail)|pytest\.skip|skipTest|unittest\.skip")
TEXT = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".sh", ".cfg", ""}


def _project_texts() -> Iterator[tuple[str, str]]:
  """(path, text) of what people read and write, not of data."""
  folders = ("agrpo_jax", "configs", "benchmarks", "launch", "tests", "docs")
  paths = [
    path
    for path in ROOT.iterdir()
    if path.is_file() and path.name != ".git"  # of a linked worktree
  ]
  for folder in (*folders, "examples", "tools", ".ci", ".github"):
    paths += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
  for path in sorted(paths):
    is_data = {"testdata", "assets", "__pycache__"} & {*path.parts}
    if path.suffix in TEXT and not is_data:
      yield str(path.relative_to(ROOT)), path.read_text("utf-8")


@pytest.mark.parametrize("pattern", [UNFINISHED, ELSEWHERE, SKIPPED])
def test_words_that_have_no_place_here(pattern):
  here = str(pathlib.Path(__file__).relative_to(ROOT))
  found = [
    f"{path}:{number}: {line.strip()}"
    for path, text in _project_texts()
    if path != here
    for number, line in enumerate(text.splitlines(), 1)
    if pattern.search(line)
  ]
  assert not found


# A file of the project that a text names, such as docs/survival.md.
CITED = re.compile(
  r"(?<![\w/.-])(?:docs|benchmarks|tests)/[\w/-]+\.(?:md|py|json)\b"
)


def test_files_that_are_cited_exist():
  here = str(pathlib.Path(__file__).relative_to(ROOT))
  missing = [
    f"{path}: {cited}"
    for path, text in _project_texts()
    if path != here
    for cited in CITED.findall(text)
    if not (ROOT / cited).exists()
  ]
  assert not missing
