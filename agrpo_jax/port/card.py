"""The README.md of an export: what a run made of which model, and how well."""

import json
import pathlib
import shlex
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

from agrpo_jax import errors
from agrpo_jax.models import base
from agrpo_jax.models import folder as folder_lib
from agrpo_jax.models import lora as lora_lib
from agrpo_jax.port import hub
from agrpo_jax.runs import checkpoint_named
from agrpo_jax.runs import files
from agrpo_jax.runs import metrics

_FILE = "README.md"
# What made the weights; the rest says where, and how it was logged.
_SETTINGS = (
  *("seed", "task", "lora", "sft", "rollout", "objective", "optimizer"),
  "evaluate",
)


def make(
  to: pathlib.Path,
  checkpoint: str,
  meta: Mapping[str, Any],
  source: base.Source,
  lora: lora_lib.Lora | None,
  *,
  is_adapter: bool,
) -> bytes:
  """Returns the contents of the card; none if the folder has one.

  Args:
    to: the folder of the export.
    checkpoint: WORKDIR, WORKDIR:best or WORKDIR:TRAIN_STEP, as it was given.
    meta: of the checkpoint that was read.
    source: the base model.
    lora: the adapter that was trained, or None.
    is_adapter: the folder holds the adapter alone.

  Raises:
    UserError: the run's records are not what a run writes.
  """
  if (to / _FILE).exists():
    return b""
  try:
    lines = _lines(checkpoint, meta, source, lora, is_adapter)
    # What a record says stays on its line: below, it would be text of its own.
    return "".join(f"{' '.join(x.splitlines())}\n" for x in lines).encode()
  except errors.UserError:
    raise
  # Somebody else's records may hold anything.
  except Exception as error:
    raise errors.UserError(
      f"The records of the run of --checkpoint={checkpoint!r} are not what a "
      f"run writes ({type(error).__name__}: {error}), so {_FILE} cannot be "
      f"made of them. Put a {_FILE} of your own into {str(to)!r} first."
    ) from error


def of_copy(
  to: pathlib.Path, base_model: str, adapter: str, dtype: str | None
) -> bytes:
  """Returns the contents of the card of a model that no run trained.

  Args:
    to: the folder that it was written to. If it has a card, there is none.
    base_model: folder or hub id.
    adapter: folder of the PEFT adapter that was merged, or "".
    dtype: what the tensors were made, or None.
  """
  if (to / _FILE).exists():
    return b""
  command = ["agrpo", "port", f"--from={_name(base_model)}"]
  if adapter:
    command.append(f"--merge_adapter={_name(adapter)}")
  if dtype:
    command.append(f"--dtype={dtype}")
  what = f"with the adapter `{_name(adapter)}` merged into them"
  lines = (
    *_head(to, base_model, "", "transformers"),
    f"* Weights: the base model's{f', {what}' if adapter else ''}"
    f"{f', as {dtype}' if dtype else ''}; nothing else was changed.",
    "",
    "## Held-out accuracy",
    "",
    "Not measured. `agrpo evaluate --model=FOLDER --config=...` does.",
    "",
    "## How it was made",
    "",
    f"    {shlex.join([*command, '--to=FOLDER'])}",
  )
  return "".join(f"{' '.join(x.splitlines())}\n" for x in lines).encode()


def write(to: pathlib.Path, card: bytes) -> None:
  """Writes what `make` returned.

  Raises:
    UserError: it cannot be written.
  """
  if not card:
    return
  file = to / _FILE
  try:
    file.write_bytes(card)
  except OSError as error:
    raise errors.UserError(
      f"{file} cannot be written: {error}. Give another folder, or make room."
    ) from error


def _lines(
  checkpoint: str,
  meta: Mapping[str, Any],
  source: base.Source,
  lora: lora_lib.Lora | None,
  is_adapter: bool,
) -> Iterator[str]:
  config, train_step = meta["config"], meta["train_step"]
  folder, which = checkpoint_named.split(checkpoint)
  workdir = pathlib.Path(folder).expanduser()
  library = "peft" if is_adapter else "transformers"
  is_random = config["model"].get("network")  # of SFT: not the base model's
  base_model = "" if is_random else source.path
  yield from _head(workdir, base_model, source.revision, library)
  start = workdir / "start.json"
  if start.exists():
    first = files.read_json(start, "what the run began with")
    yield (
      f"* It began with what another run trained: `{first['run']}`, train step "
      f"{first['train_step']}."
    )
  task = config["task"]
  task_name = task["name"] or pathlib.PurePath(task["path"]).stem
  yield f"* Task: {task_name or 'demonstrations of a file'}."
  if config["data"]["path"]:
    yield f"* Data: `{_name(config['data']['path'])}`."
  yield (
    f"* Trained: {train_step} of {config['train']['num_steps']} train steps of "
    f"{_method(config)} by agrpo_jax {meta['versions']['agrpo_jax']}."
  )
  if lora is None:
    yield "* All parameters were trained."
  else:
    what = "in this folder" if is_adapter else "merged into these weights"
    yield (
      f"* Adapters were trained, of rank {lora.rank} and alpha {lora.alpha:g}, "
      f"on {', '.join(lora.targets)}; they are {what}."
    )
  yield ""
  yield "## Held-out accuracy"
  yield ""
  yield from _accuracy(workdir, config, train_step, is_best=which == "best")
  yield ""
  yield "## How it was made"
  yield ""
  command = _command(workdir)
  if command:
    yield f"    {command}"
    yield ""
  yield "```json"
  kept = {key: config[key] for key in _SETTINGS if key in config}
  yield from json.dumps(kept, indent=1, ensure_ascii=False).split("\n")
  yield "```"


def _head(
  folder: pathlib.Path, base_model: str, revision: str, library: str
) -> Iterator[str]:
  """Yields the lines above a card's own: for the hub, a title, the base.

  Without a `base_model` parameters were random.
  """
  yield "---"
  if hub.is_id(base_model):
    yield f"base_model: {base_model}"
  yield f"library_name: {library}"
  yield "tags: [masked-diffusion, agrpo_jax]"
  yield "---"
  yield ""
  yield f"# {folder.resolve().name}"
  yield ""
  if not base_model:
    yield "* Base model: none; it began from random parameters."
    return
  name = f"`{_name(base_model)}`"
  if revision:
    name += f", revision `{revision}`"
  yield f"* Base model: {name}; its licence applies to this one."


def _name(path: str) -> str:
  """Returns a hub id, or of a folder's or file's path the last part."""
  # Where it lies is nobody's business who reads a card.
  return path if hub.is_id(path) else pathlib.PurePath(path).name


def _method(config: Mapping[str, Any]) -> str:
  if config["kind"] == "sft":
    return "supervised fine-tuning"
  objective = config["objective"]
  name = objective["name"]
  if objective.get("path"):
    name = pathlib.PurePath(objective["path"]).stem
  return f"reinforcement learning (objective `{name}`)"


def _accuracy(
  workdir: pathlib.Path,
  config: Mapping[str, Any],
  train_step: int,
  is_best: bool,
) -> Iterator[str]:
  found = _evaluated(workdir, train_step)
  if not found:
    yield "The run did not evaluate this checkpoint."
    return
  e = config["evaluate"]
  of = f"{e['num_examples']} problems" if e["num_examples"] else "all problems"
  yield "| | accuracy | 95 % interval |"
  yield "| --- | --- | --- |"
  before = workdir / "before.json"
  if before.exists():
    yield _row("before", files.read_json(before, "the accuracy before"))
  yield _row("this checkpoint", found)
  yield ""
  yield (
    f"Of {of} of the `{e['split']}` split, as the run evaluated itself: "
    f"{e['num_denoise_steps']} denoising steps, unmask rule "
    f"`{e['unmask_rule']}`, cache `{e['cache']}`, temperature "
    f"{e['temperature']:g}. The interval is over the choice of problems."
  )
  if is_best:
    yield (
      "It is the most accurate checkpoint of its run on these very problems, "
      "which flatters it: on others it may be less accurate."
    )


def _row(name: str, found: Mapping[str, float]) -> str:
  interval = "not known: a single problem"
  if "accuracy_low" in found:
    low, high = 100 * found["accuracy_low"], 100 * found["accuracy_high"]
    interval = f"{low:.1f} to {high:.1f} %"
  return f"| {name} | {100 * found['accuracy']:.1f} % | {interval} |"


def _evaluated(workdir: pathlib.Path, train_step: int) -> dict[str, float]:
  """Returns the figures of the evaluation after a train step, if it was one."""
  prefix = "eval/"
  file = workdir / "metrics.jsonl"
  if not file.exists():
    return {}
  folder_lib.check(file)
  try:
    for record in metrics.read(file):
      if record["train_step"] == train_step - 1 and "eval/accuracy" in record:
        return {
          name.removeprefix(prefix): value
          for name, value in record.items()
          if name.startswith(prefix)
        }
  except (OSError, ValueError, KeyError):  # a log that was damaged
    pass
  return {}


def _command(workdir: pathlib.Path) -> str:
  """Returns the command that the run was last started with, if it is known."""
  file = workdir / "environment.json"
  if not file.exists():
    return ""
  sessions = files.read_json(file, "where this run ran")["sessions"]
  return shlex.join(sessions[-1].get("command", ())) if sessions else ""
