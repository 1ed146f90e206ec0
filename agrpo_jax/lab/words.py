"""Objectives as words of a command line: OBJECTIVE/SETTING=VALUE/..."""

import ast
import dataclasses
from typing import Any

from agrpo_jax import config as config_lib
from agrpo_jax import errors
from agrpo_jax import objectives as objectives_lib


def put(c: config_lib.ConfigDict, word: str, **usual: Any) -> None:
  """Puts the objective that a word means into a config.

  One that has the name of the config's own starts from the settings there, any
  other from those of its class.

  Args:
    c: changed in place; whether values are legal is for `settings` to say.
    word: OBJECTIVE/SETTING=VALUE/...
    **usual: settings in place of these, where the word says nothing; those that
      the objective does not have are passed over.

  Raises:
    UserError: an unknown objective or setting.
  """
  name, given = _split(word)
  own = c.objective.to_dict()
  if own.pop("name") != name or own.pop("path", ""):
    own = {}
  usual = {k: v for k, v in usual.items() if k in _fields(name)}
  config_lib.use_objective(c, name, **{**own, **usual, **given})


def _split(word: str) -> tuple[str, dict[str, Any]]:
  """Returns the objective's name, and the settings that the word gives."""
  name, *changes = word.split("/")
  fields = _fields(name)
  values: dict[str, Any] = {}
  for change in changes:
    key, _, text = change.partition("=")
    if key not in fields or not text:
      raise errors.UserError(
        f"{change!r} is no SETTING=VALUE of {name}, which has "
        f"{', '.join(sorted(fields))}."
      )
    try:
      values[key] = ast.literal_eval(text)
    except (ValueError, SyntaxError):
      values[key] = text  # a word, such as a step rule
  return name, values


def _fields(name: str) -> set[str]:
  record: type = objectives_lib.get(name)
  return {field.name for field in dataclasses.fields(record)}
