"""Reads the small files of a model's folder."""

import json
import pathlib
from typing import Any

from agrpo_jax import errors


def read_json(path: pathlib.Path) -> Any:
  """Parses a JSON file; UserError names it if it is missing or malformed."""
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise errors.UserError(
      f"{path.parent} has no {path.name}: is it the folder of a model, and did "
      "its download finish?"
    ) from None
  except (OSError, ValueError) as error:
    raise errors.UserError(f"{path} cannot be read: {error}") from error
