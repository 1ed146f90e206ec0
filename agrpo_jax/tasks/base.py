"""What every task shares: the `Example` record and checked options."""

import dataclasses
import hashlib
import inspect
import json
import math
import types
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from agrpo_jax import errors

# The functions of a task: what each is called with, by position and by name.
_CALLS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
  "examples": (("split",), ("path", "options")),
  "reward_weights": (("options",), ()),
  "reward": (("completion", "fields", "options"), ()),
  "grade": (("completion", "fields", "options"), ()),
  "answer": (("completion", "fields", "options"), ()),
  "demonstration": (("example", "rng", "options"), ()),
}
REQUIRED = ("examples", "reward_weights", "reward", "grade")
SPLITS = ("train", "test")


@dataclasses.dataclass(frozen=True)
class Example:
  """One problem.

  Attributes:
    id: unique within its split; random keys are folded from it.
    messages: chat turns, each {"role": ..., "content": ...}.
    fields: JSON values that `reward` and `grade` read (the gold answer, ...).
    prefill: text that the completion is made to start with; it is part of the
      prompt and not of the completion.
  """

  id: int
  messages: tuple[dict[str, str], ...]
  fields: dict[str, Any]
  prefill: str = ""


class OutOfTime(BaseException):
  """The time of a grader is up: see `grading.worker`.

  No Exception, because libraries swallow those.
  """


def settings(
  options: Mapping[str, Any] | None, defaults: Mapping[str, Any], task: str
) -> dict[str, Any]:
  """Returns `defaults` overridden by `options`.

  Raises:
    UserError: naming every unknown key and every value of another type than
      its default.
  """
  options = dict(options or {})
  problems = [
    f"option {name!r} is unknown" for name in options if name not in defaults
  ]
  for name, default in defaults.items():
    value = options.get(name, default)
    if isinstance(default, float) and type(value) is int:
      options[name] = float(value)
    elif type(value) is not type(default):
      problems.append(
        f"option {name}={value!r} must be of type {type(default).__name__}"
      )
  if problems:
    raise errors.UserError(
      f"task {task!r}: {'; '.join(problems)}. "
      f"Its options are {', '.join(sorted(defaults))}."
    )
  return {**defaults, **options}


def check_range(
  task: str,
  options: Mapping[str, Any],
  name: str,
  low: float,
  high: float = math.inf,
) -> None:
  """Checks that an option lies between two bounds, both included.

  Raises:
    UserError: naming the option, its value and the bounds.
  """
  if not low <= options[name] <= high:
    legal = f"at least {low}" if high == math.inf else f"{low} to {high}"
    raise errors.UserError(
      f"task {task!r}: option {name}={options[name]} must be {legal}."
    )


def check_choice(task: str, what: str, value: str, known: Iterable[str]) -> str:
  """Returns `value` if it is a known one.

  Raises:
    UserError: naming the known ones.
  """
  known = tuple(known)
  if value not in known:
    raise errors.UserError(
      f"task {task!r}: {what} {value!r} is unknown; choose one of "
      f"{', '.join(known)}."
    )
  return value


def check_split(task: str, split: str) -> str:
  """Returns `split` if there is one of that name; else raises UserError."""
  return check_choice(task, "split", split, SPLITS)


def is_text(value: object) -> bool:
  """Returns whether `value` is a string without lone surrogates.

  Those come from escapes in JSON, and no tokenizer can encode them.
  """
  if not isinstance(value, str):
    return False
  try:
    value.encode()
  except UnicodeEncodeError:
    return False
  return True


def user_turn(text: str, system: str = "") -> tuple[dict[str, str], ...]:
  """Returns chat messages: an optional system turn, then one user turn."""
  user = {"role": "user", "content": text}
  return ({"role": "system", "content": system}, user) if system else (user,)


def fingerprint(examples: Sequence[Example]) -> str:
  """Returns a name for the problems of a split, whatever file they came in.

  A SHA-256 over the fields of every example in order, cut to 16 hexadecimal
  digits. Prompts are left out, so it does not depend on the protocol.
  """
  digest = hashlib.sha256()
  for example in examples:
    digest.update(json.dumps(example.fields, sort_keys=True).encode())
    digest.update(b"\n")
  return digest.hexdigest()[:16]


def check_functions(task: types.ModuleType) -> None:
  """Checks that a task has the functions of one, and that they can be called.

  Raises:
    UserError: naming those that are missing or take other arguments.
  """
  problems = [
    f"{name} is missing" for name in REQUIRED if not hasattr(task, name)
  ]
  for name, (by_place, by_name) in _CALLS.items():
    if not hasattr(task, name):
      continue
    function = getattr(task, name)
    try:
      inspect.signature(function).bind(*by_place, **dict.fromkeys(by_name))
    except (TypeError, ValueError) as error:  # what no function is, too
      call = ", ".join([*by_place, *(f"{one}=..." for one in by_name)])
      problems.append(f"{name} cannot be called as {name}({call}): {error}")
  if problems:
    raise mistake(
      task, "; ".join(problems), f"A task has {', '.join(REQUIRED)}."
    )


def mistake(task: types.ModuleType, what: str, remedy: str) -> errors.UserError:
  """Returns the error of a task file that its author has to mend."""
  title = getattr(task, "NAME", None) or task.__file__
  return errors.UserError(f"task {title!r}: {what}. {remedy}")
