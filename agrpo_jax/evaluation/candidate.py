"""The model that is evaluated, and what the numbers it gets depend on."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from agrpo_jax import build
from agrpo_jax import config as config_lib
from agrpo_jax import errors
from agrpo_jax import tasks
from agrpo_jax.runs import checkpoint_meta
from agrpo_jax.runs import checkpoint_read

CHECKPOINT_HELP = (
  "Work directory of a run, for its newest checkpoint; WORKDIR:best for the "
  "most accurate one, WORKDIR:TRAIN_STEP for that of a train step."
)


def check_checkpoint(checkpoint: str) -> None:
  """Raises UserError for what names no checkpoint of a run; "" is fine."""
  if checkpoint:
    _find(checkpoint)


def _find(checkpoint: str) -> tuple[checkpoint_read.Reader, int | None]:
  """WORKDIR, WORKDIR:best or WORKDIR:TRAIN_STEP; None stands for the newest."""
  folder, _, which = checkpoint.rpartition(":")
  if which != "best" and not (folder and which.isdecimal()):
    folder, which = checkpoint, ""
  if not (pathlib.Path(folder).expanduser() / "checkpoints").is_dir():
    raise errors.UserError(
      f"--checkpoint={checkpoint!r} is not a work directory with checkpoints/; "
      "give a run's config.workdir, with :best or :TRAIN_STEP behind it if you "
      "want another than the newest."
    )
  reader = checkpoint_read.Reader(folder)
  steps = reader.steps()
  if not steps:
    raise errors.UserError(
      f"--checkpoint={checkpoint!r} holds no checkpoint yet: the run saves one "
      "every config.train.checkpoint_every train steps, and at its end."
    )
  if not which:
    return reader, None
  train_step = reader.best_step if which == "best" else int(which)
  if train_step is None:
    raise errors.UserError(
      f"--checkpoint={checkpoint!r}: the run evaluated none of its checkpoints "
      f"{steps}. Give one of those numbers instead of 'best'; a run "
      "with config.evaluate.every and config.train.keep_best keeps its best."
    )
  if train_step not in steps:
    raise errors.UserError(
      f"--checkpoint={checkpoint!r}: there are checkpoints of the train steps "
      f"{steps}, not of {train_step}."
    )
  return reader, train_step


def train_step(checkpoint: str) -> int | None:
  """Of the checkpoint that is meant now: a run beside us may save others."""
  if not checkpoint:
    return None
  reader, found = _find(checkpoint)
  return reader.latest_step if found is None else found


def policy(c: config_lib.ConfigDict, checkpoint: str = "") -> build.Policy:
  """The model of a config; its trained part from a run's checkpoint.

  Args:
    c: as the run's.
    checkpoint: WORKDIR (its newest), WORKDIR:best, WORKDIR:TRAIN_STEP, or "".

  Raises:
    UserError: there is no such checkpoint, or it cannot be read.
  """
  if not checkpoint:
    return build.policy(c, is_trained=False)
  reader, train_step = _find(checkpoint)
  loaded = build.policy(c)
  trainable = loaded.params if loaded.lora is None else loaded.lora
  found = reader.read({"trainable": trainable}, loaded.base_model, train_step)
  if found is None:
    raise errors.UserError(
      f"--checkpoint={checkpoint!r} holds no checkpoint yet."
    )
  part = "params" if loaded.lora is None else "lora"
  return dataclasses.replace(loaded, **{part: found[0]["trainable"]})


def model_settings(c: config_lib.ConfigDict) -> dict[str, str]:
  """The keys of `c.model` that numbers depend on."""
  names = ("path", "revision", "tokenizer", "dtype")
  return {name: c.model[name] for name in names}


def fingerprint(loaded: build.Policy) -> str:
  """Of all parameters, adapters included."""
  sums = checkpoint_meta.checksums((loaded.params, loaded.lora))
  return hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16]


def settings(
  c: config_lib.ConfigDict,
  examples: Sequence[tasks.Example],
  checkpoint: str,
  num_samples: int,
) -> dict[str, Any]:
  """Everything that the records depend on and that is known without a model.

  Not in it, because without effect: batch size, mesh, grading workers.
  """
  sampling = c.evaluate.to_dict()
  for free in ("batch_size", "every"):
    del sampling[free]
  return {
    "config": {
      "seed": c.seed,
      "model": model_settings(c),
      "lora": c.lora.to_dict() if checkpoint else None,
      "task": c.task.to_dict(),
      "data": {"max_prompt_length": c.data.max_prompt_length},
      "evaluate": sampling,
    },
    "checkpoint": checkpoint,
    "train_step": train_step(checkpoint),
    "num_samples": num_samples,
    "problems": tasks.provenance(build.task(c), examples),
  }
