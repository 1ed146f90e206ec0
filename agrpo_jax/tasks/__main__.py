"""Shows what a task asks and what it rewards.

python -m agrpo_jax.tasks --show=gsm8k --protocol=agrpo --path=test.jsonl
"""

import textwrap
from collections.abc import Sequence

from absl import flags

from agrpo_jax import command
from agrpo_jax import errors
from agrpo_jax import tasks
from agrpo_jax.tasks import contract

_SHOW = flags.DEFINE_string("show", "", f"Task: {', '.join(tasks.NAMES)}.")
_TASK_PATH = flags.DEFINE_string("task_path", "", "A task of your own: a file.")
_PROTOCOL = flags.DEFINE_string("protocol", "", "Prompt protocol, by name.")
_OPTION = flags.DEFINE_multi_string(
  "option", [], "Another option of the task, as name=value; repeatable."
)
_SPLIT = flags.DEFINE_enum("split", "test", ("train", "test"), "Which split.")
_PATH = flags.DEFINE_string("path", "", "Local data file or folder.")
_INDEX = flags.DEFINE_integer("index", 0, "Which problem of the split.")


def _value(text: str) -> bool | int | float | str:
  if text in ("true", "false"):
    return text == "true"
  for kind in (int, float):
    try:
      return kind(text)
    except ValueError:
      pass
  return text


def _options() -> dict[str, bool | int | float | str]:
  options = {}
  for text in _OPTION.value:
    name, equals, value = text.partition("=")
    if not equals:
      raise errors.UserError(f"--option={text!r} must be name=value.")
    options[name] = _value(value)
  if _PROTOCOL.value:
    options["protocol"] = _PROTOCOL.value
  return options


def render(task_name: str, task_path: str | None = None) -> str:
  """Returns a problem as the model meets it, and the weights of its reward."""
  task = tasks.get(task_name, task_path)
  options = _options()
  examples = contract.examples(
    task, _SPLIT.value, path=_PATH.value or None, options=options
  )
  if not 0 <= _INDEX.value < len(examples):
    raise errors.UserError(
      f"--index={_INDEX.value} must be between 0 and {len(examples) - 1}."
    )
  example = examples[_INDEX.value]
  sections = [f"split {_SPLIT.value}: {tasks.provenance(task, examples)}"]
  for message in example.messages:
    sections.append(_section(message["role"], message["content"]))
  sections.append(_section("prefilled", example.prefill or "(nothing)"))
  fields = "\n".join(f"{name}: {x}" for name, x in example.fields.items())
  sections.append(_section("known to the grader", fields))
  weights = "\n".join(
    f"{weight:8.3f}  {name}"
    for name, weight in contract.reward_weights(task, options).items()
  )
  sections.append(_section("reward weights", weights))
  return "\n".join(sections)


def _section(title: str, text: str) -> str:
  return f"--- {title}\n{textwrap.indent(text.rstrip(), '    ')}"


def main(argv: Sequence[str]) -> None:
  del argv
  if not _SHOW.value and not _TASK_PATH.value:
    raise errors.UserError(
      f"Say which task: --show={'|'.join(tasks.NAMES)} or --task_path=FILE."
    )
  print(render(_SHOW.value, _TASK_PATH.value or None))


if __name__ == "__main__":
  command.main(main)
