"""Objectives as words of a command line: OBJECTIVE/SETTING=VALUE/..."""

import ast
import dataclasses
from collections.abc import Mapping
from typing import Any

from agrpo_jax import errors
from agrpo_jax import objectives as objectives_lib
from agrpo_jax.samplers import sampling as sampling_lib


def split(word: str) -> tuple[str, dict[str, Any]]:
  """Returns the objective's name, and the settings that the word gives.

  Raises:
    UserError: an unknown objective or setting.
  """
  name, *changes = word.split("/")
  fields = _fields(objectives_lib.get(name))
  values: dict[str, Any] = {}
  for change in changes:
    key, _, text = change.partition("=")
    if key not in fields or not text:
      raise errors.UserError(
        f"{word}: {change!r} is no SETTING=VALUE of {name}, which has "
        f"{', '.join(sorted(fields))}."
      )
    try:
      values[key] = ast.literal_eval(text)
    except (ValueError, SyntaxError):
      values[key] = text  # a word, such as a step rule
  return name, values


def parse(
  word: str, sampling: sampling_lib.Sampling, usual: Mapping[str, Any]
) -> objectives_lib.Objective:
  """Returns the objective that a word means.

  Args:
    word: OBJECTIVE/SETTING=VALUE/...
    sampling: how completions are drawn.
    usual: settings that hold where the word says nothing; those that the
      objective does not have are passed over.

  Raises:
    UserError: an unknown objective or setting, or a value that is not legal.
  """
  name, given = split(word)
  record = objectives_lib.get(name)
  values = {k: v for k, v in usual.items() if k in _fields(record)} | given
  try:
    objective = record(**values)
    problems = objective.problems(sampling)
  except TypeError as error:
    problems = [str(error)]
  if problems:
    raise errors.UserError(f"{word}: " + "; ".join(problems) + ".")
  return objective


def _fields(record: type) -> set[str]:
  return {field.name for field in dataclasses.fields(record)}
