"""Python files of the user's own, named by their paths: a task, an objective.

Only the file at this explicit path is ever imported. It is as trusted as the
command that names it.
"""

import importlib.util
import pathlib
import types

from agrpo_jax import errors


def load(path: str, what: str) -> types.ModuleType:
  """Returns the module in the Python file at `path`.

  Args:
    path: of the file.
    what: it is, for messages: "task".

  Raises:
    UserError: a missing file, one that is no Python, or one that fails.
  """
  file = pathlib.Path(path).expanduser()
  if not file.is_file():
    raise errors.UserError(f"{what} file {path!r} does not exist.")
  spec = importlib.util.spec_from_file_location(file.stem, file)
  if spec is None or spec.loader is None:
    raise errors.UserError(
      f"{what} file {path!r} is no Python file: its name must end in .py."
    )
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except (Exception, SystemExit) as error:
    raise errors.UserError(
      f"{what} file {path!r} failed to load: {type(error).__name__}: {error}"
    ) from error
  return module
