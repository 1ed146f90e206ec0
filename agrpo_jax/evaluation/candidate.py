"""The model that is evaluated, and what the numbers it gets depend on."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from agrpo_jax import build
from agrpo_jax import config as config_lib
from agrpo_jax import errors
from agrpo_jax import tasks
from agrpo_jax.runs import checkpoint_meta
from agrpo_jax.runs import checkpoint_named


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
  reader, train_step = checkpoint_named.find(checkpoint)
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
    "train_step": checkpoint_named.find_train_step(checkpoint),
    "num_samples": num_samples,
    "problems": tasks.provenance(build.task(c), examples),
  }
