r"""Shows what a task asks and what it rewards, or writes demonstrations.

    agrpo tasks --show=gsm8k --protocol=agrpo --path=test.jsonl
    agrpo tasks --show=countdown --protocol=bare --split=train \
      --demonstrations=countdown.jsonl

The second writes what `agrpo_jax.sft` learns from by `config.data.path`; files
of several tasks, one behind the other, are a mixture.
"""

import json
import pathlib
import random
import textwrap
from collections.abc import Sequence

from absl import flags

from agrpo_jax import command
from agrpo_jax import errors
from agrpo_jax import tasks
from agrpo_jax.tasks import base
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
_DEMONSTRATIONS = flags.DEFINE_string(
  "demonstrations", "", "Write all of the split's to this JSONL file instead."
)


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


def write_demonstrations(
  task_name: str, task_path: str | None, file: pathlib.Path
) -> int:
  """Writes a demonstration per problem, as `data.from_jsonl` reads them.

  What a prompt prefills stands at the start of the completion. A task that
  draws its demonstrations draws the same ones every time.

  Returns:
    How many there are.

  Raises:
    UserError: a task that makes none, a file that cannot be written, or that is
      there already with other contents.
  """
  task = tasks.get(task_name, task_path)
  if not hasattr(task, "demonstration"):
    what = "makes no demonstrations"
    raise base.mistake(task, what, "Only tasks that do can be written.")
  options = _options()
  examples = contract.examples(
    task, _SPLIT.value, path=_PATH.value or None, options=options
  )
  lines = []
  for example in examples:
    rng = random.Random(example.id)
    text = contract.demonstration(task, example, rng, options)
    row = {"prompt": example.messages, "completion": example.prefill + text}
    lines.append(json.dumps(row, ensure_ascii=False) + "\n")
  content = "".join(lines).encode()
  try:
    # The same again is no loss: a recipe can be followed twice.
    if file.is_file() and file.read_bytes() != content:
      raise errors.UserError(
        f"--demonstrations={file} is there already, with other contents. Give "
        "another file, or move that one away."
      )
    file.write_bytes(content)
  except OSError as error:
    raise errors.UserError(
      f"--demonstrations={file} cannot be written: {error.strerror}."
    ) from error
  return len(examples)


def main(argv: Sequence[str]) -> None:
  del argv
  if not _SHOW.value and not _TASK_PATH.value:
    raise errors.UserError(
      f"Say which task: --show={'|'.join(tasks.NAMES)} or --task_path=FILE."
    )
  if _DEMONSTRATIONS.value:
    file = pathlib.Path(_DEMONSTRATIONS.value).expanduser()
    count = write_demonstrations(_SHOW.value, _TASK_PATH.value or None, file)
    print(f"Wrote {count} demonstrations to {file}")
  else:
    print(errors.readable(render(_SHOW.value, _TASK_PATH.value or None)))


if __name__ == "__main__":
  command.main(main)
