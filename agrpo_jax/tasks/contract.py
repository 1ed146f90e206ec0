"""What the functions of a task return, checked.

A task of one's own that breaks the contract would train on nothing or on the
wrong thing without a word. Its mistakes are the user's to mend, so they end the
run, with a message that says what was returned and what should be.
"""

import contextlib
import json
import math
import numbers
import os
import random
import traceback
import types
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from agrpo_jax import errors
from agrpo_jax.tasks import base

MAX_ID = 2**32 - 1  # random keys are folded from unsigned 32-bit integers
_MAX_SHOWN = 5  # problems of the examples, in one message


def examples(
  task: types.ModuleType,
  split: str,
  *,
  path: str | None = None,
  options: Mapping[str, Any] | None = None,
) -> list[base.Example]:
  """Returns the problems of a split, when they are what a task has to give.

  Raises:
    UserError: what the task itself refuses or fails with, or something else
      than a list of `Example` with ids that are unique and fit into 32 bits,
      chat messages, and fields of JSON values.
  """
  with _naming_failures(task, f"examples({split!r})"):
    found = task.examples(
      split, path=path and os.path.expanduser(path), options=options
    )
  if not isinstance(found, Sequence):
    raise base.mistake(
      task,
      f"examples({split!r}) gave a {type(found).__name__}",
      "It must return a list of tasks.Example.",
    )
  problems = list(_example_problems(found))
  if problems:
    shown = problems[:_MAX_SHOWN]
    if len(problems) > len(shown):
      shown.append(f"and {len(problems) - len(shown)} more problems")
    raise base.mistake(
      task,
      f"examples({split!r}): {'; '.join(shown)}",
      f"Each id is a whole number from 0 to {MAX_ID}, unique in its split; "
      'messages are [{"role": text, "content": text}, ...]; fields is a dict '
      "of JSON values; prefill is text.",
    )
  return list(found)


def _example_problems(found: Sequence[Any]) -> Iterator[str]:
  first_of: dict[int, int] = {}
  for index, example in enumerate(found):
    where = f"example {index}"
    if not isinstance(example, base.Example):
      yield f"{where} is a {type(example).__name__}"
      continue
    # A bool counts as a whole number in Python.
    is_whole = isinstance(example.id, numbers.Integral)
    if not is_whole or isinstance(example.id, bool):
      yield f"{where} has id={example.id!r}"
    elif not 0 <= example.id <= MAX_ID:
      yield f"{where} has id={example.id}"
    elif (first := first_of.setdefault(example.id, index)) != index:
      yield f"{where} has the id={example.id} of example {first}"
    if not is_chat(example.messages):
      yield f"{where} has messages={example.messages!r:.80}"
    if not base.is_text(example.prefill):
      yield f"{where} has prefill={example.prefill!r:.80}"
    if not _is_json_object(example.fields):
      yield f"{where} has fields={example.fields!r:.80}"


def is_chat(messages: object) -> bool:
  """Returns whether `messages` are chat turns of text, at least one."""
  return (
    isinstance(messages, (list, tuple))
    and bool(messages)
    and all(
      isinstance(turn, Mapping)
      and base.is_text(turn.get("role"))
      and base.is_text(turn.get("content"))
      for turn in messages
    )
  )


def _is_json_object(fields: object) -> bool:
  if not isinstance(fields, Mapping) or not all(
    isinstance(name, str) for name in fields
  ):
    return False
  try:
    json.dumps(dict(fields))
  except (TypeError, ValueError, RecursionError):
    return False
  return True


def reward_weights(
  task: types.ModuleType,
  options: Mapping[str, Any],
  changed: Mapping[str, float] | None = None,
) -> dict[str, float]:
  """Returns the weight of every part of a task's reward.

  Args:
    task: of this package or of one's own.
    options: of the task.
    changed: weights that replace the task's own.

  Raises:
    UserError: what the task itself refuses or fails with, weights of unknown
      parts, or weights that are no finite numbers.
  """
  with _naming_failures(task, "reward_weights"):
    own = task.reward_weights(options)
  weights = _numbers(task, "reward_weights", own)
  unknown = sorted(set(changed or {}) - set(weights))
  if unknown:
    raise errors.UserError(
      f"reward weights of unknown parts: {', '.join(unknown)}. The parts are "
      f"{', '.join(weights)}."
    )
  weights |= _numbers(task, "config.task.reward_weights", changed or {})
  for name, weight in weights.items():
    if not math.isfinite(weight):
      raise errors.UserError(
        f"the weight {name}={weight} of a reward's part must be finite."
      )
  return weights


def parts(
  task: types.ModuleType, given: object, names: Iterable[str]
) -> dict[str, float]:
  """Returns what `reward` gave as floats.

  Raises:
    UserError: it is no dict from exactly the parts of `reward_weights`, which
      are `names`, to numbers.
  """
  floats = _numbers(task, "reward", given)
  names = list(names)
  if set(floats) != set(names):
    raise base.mistake(
      task,
      f"reward gave the parts {_listed(floats)}, and reward_weights names "
      f"{_listed(names)}",
      "Both must have the same, for every completion: an unnamed part has no "
      "weight. A part of weight 0 is only logged.",
    )
  return floats


def grades(task: types.ModuleType, given: object) -> dict[str, float]:
  """Returns what `grade` gave as floats.

  Raises:
    UserError: it is no dict to numbers, or its "accuracy" is missing or outside
      [0, 1].
  """
  floats = _numbers(task, "grade", given)
  if "accuracy" not in floats:
    raise base.mistake(
      task,
      f"grade gave {_listed(floats)}",
      'One of its verdicts must be "accuracy", in [0, 1].',
    )
  accuracy = floats["accuracy"]
  # A mean of ones may be off by a rounding; not finite is a failed grading.
  if math.isfinite(accuracy) and not -1e-9 <= accuracy <= 1 + 1e-9:
    raise base.mistake(
      task,
      f"grade gave accuracy={accuracy}",
      "It must be in [0, 1]. Other scales can have other names beside it.",
    )
  return floats


def demonstration(
  task: types.ModuleType,
  example: base.Example,
  rng: random.Random,
  options: Mapping[str, Any],
) -> str:
  """Returns a completion to imitate.

  Raises:
    UserError: what the task itself refuses or fails with, or something else
      than text.
  """
  with _naming_failures(task, f"demonstration of the id={example.id}"):
    text = task.demonstration(example, rng, options)
  if not base.is_text(text):
    raise base.mistake(
      task,
      f"demonstration gave {text!r:.80} for the example with id={example.id}",
      "It must return text.",
    )
  return text


@contextlib.contextmanager
def _naming_failures(task: types.ModuleType, call: str) -> Iterator[None]:
  """Makes what a task's function raises a mistake, with the line it is in."""
  try:
    yield
  except errors.UserError:
    raise
  except Exception as error:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == task.__file__]
    place = (own or frames)[-1]
    raise base.mistake(
      task,
      f"{call} failed with {type(error).__name__}: {error}",
      f"See {place.filename}, line {place.lineno}.",
    ) from error


def _numbers(
  task: types.ModuleType, function: str, values: object
) -> dict[str, float]:
  """Returns a dict from names to numbers with floats for values."""
  remedy = "It must be a dict from names to numbers."
  if not isinstance(values, Mapping):
    raise base.mistake(task, f"{function} gave {values!r:.80}", remedy)
  floats: dict[str, float] = {}
  for name, value in values.items():
    try:
      if not isinstance(name, str) or isinstance(value, (str, bytes)):
        raise TypeError  # float() would read text as well
      floats[name] = float(value)
    except (TypeError, ValueError) as error:
      raise base.mistake(
        task, f"{function} gave {name!r}: {value!r:.80}", remedy
      ) from error
  return floats


def _listed(names: Iterable[str]) -> str:
  return ", ".join(map(repr, names)) or "none"
