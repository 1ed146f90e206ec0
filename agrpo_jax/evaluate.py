r"""Held-out accuracy of a model under given sampling settings.

    agrpo evaluate --config=gsm8k \
      [--model=FOLDER_OR_HUB_ID] [--checkpoint=WORKDIR[:best|:TRAIN_STEP]] \
      [--sampler=NAME] [--num_samples=8 --k=1,4,8] \
      [--output=FOLDER or FILE.jsonl]

Without --model it is the model of `config.model.path`; --checkpoint takes the
model that a run trained, and its adapter's settings, from the run: its newest
checkpoint, its most accurate one, or that of a train step. `config.py` lists
the samplers, `records.py` what --output holds. The same command goes on where
it was stopped. For more than one setting or model: `agrpo_jax.sweep`.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Collection
from collections.abc import Sequence
from typing import Any

from absl import flags

from agrpo_jax import command
from agrpo_jax import config as config_lib
from agrpo_jax import data
from agrpo_jax import errors
from agrpo_jax import settings as settings_lib
from agrpo_jax import tasks
from agrpo_jax.evaluation import accuracy
from agrpo_jax.evaluation import records
from agrpo_jax.evaluation import statistics
from agrpo_jax.grading import pool
from agrpo_jax.models import base as models
from agrpo_jax.parallel import processes
from agrpo_jax.port import model as model_lib
from agrpo_jax.runs import checkpoint_meta
from agrpo_jax.runs import checkpoint_named
from agrpo_jax.samplers import sampling as sampling_lib

# Of a model, what its folder holds decides, whatever its path; how it is
# computed is the command's business.
_FREE_MODEL_KEYS = ("path", "revision", "quantize", *models.SWITCHES)


def run(
  s: settings_lib.Rl,
  checkpoint: str = "",
  output: str = "",
  *,
  num_samples: int = 1,
  examples: Sequence[tasks.Example] | None = None,
) -> statistics.Result:
  """Evaluates a model, or what a run trained.

  What is complete in `output` is read from there and loads no model.

  Args:
    s: the settings; see `use_run` for those of a checkpoint.
    checkpoint: WORKDIR, WORKDIR:best or WORKDIR:TRAIN_STEP, or "".
    output: see `records`, or "".
    num_samples: completions per prompt.
    examples: the problems; None for those of the split.

  Raises:
    UserError: anything that the user has to change, as early as it shows.
  """
  check(s, num_samples)
  if examples is None:
    examples = data.load_examples(s.task, s.data, s.evaluate.split)
  asked = record_settings(s, examples, checkpoint, num_samples)
  result = accuracy.finished(output, asked, num_samples)
  if result is not None:
    print(f"Read from {output}, where it is complete.", flush=True)
  else:
    with s.start_grader() as grader:
      model = model_lib.load_trained(s.model, s.lora, s.mesh.make(), checkpoint)
      result = measure(s, model, examples, grader, asked, output)
  return dataclasses.replace(result, problems=asked["problems"])


def check(s: settings_lib.Rl, num_samples: int = 1) -> None:
  """Raises UserError for what shows before any model is loaded."""
  if num_samples < 1:
    raise errors.UserError(f"--num_samples={num_samples} must be at least 1.")
  if num_samples > 1 and not s.evaluate.has_chance:
    raise errors.UserError(
      f"--num_samples={num_samples} would draw the same completion again and "
      "again: config.evaluate.temperature=0 and unmask_rule="
      f"{s.evaluate.sampling.unmask_rule!r} leave nothing to chance. Set a "
      "temperature above 0."
    )


def measure(
  s: settings_lib.Rl,
  model: model_lib.Model,
  examples: Sequence[tasks.Example],
  grader: pool.Grader,
  asked: dict[str, Any],
  output: str,
) -> statistics.Result:
  """Evaluates a loaded model.

  Args:
    s: the settings.
    model: with its parameters.
    examples: the problems of the split.
    grader: of the task.
    asked: from `record_settings`.
    output: see `records`, or "".
  """
  dataset = data.Dataset(examples, model.tokenizer, s.data.max_prompt_length)
  prompts = dataset.prompts[: s.evaluate.num_examples or None]
  model.check_draw(s.data.max_prompt_length, s.evaluate)
  sampler = model.sampler(s.evaluate, s.data.bucket)
  asked = {**asked, "weights": fingerprint(model)}
  with records.start(
    output if processes.is_main() else "", asked, accuracy.KINDS
  ) as kept:
    kept.done = processes.exchange(kept.done)[0]
    result = accuracy.evaluate(
      sampler,
      model.params,
      model.lora,
      prompts,
      model.tokenizer,
      grader,
      seed=s.seed,
      num_samples=asked["num_samples"],
      kept=kept,
    )
    kept.finish(
      {
        **result.scalars(),
        "problems": asked["problems"],
        "num_problems": len(prompts),
        "num_skipped": dataset.num_skipped,
      }
    )
  return result


def fingerprint(model: model_lib.Model) -> str:
  """Names the values of all parameters, adapters included."""
  sums = checkpoint_meta.checksums((model.params, model.lora))
  return hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16]


def record_settings(
  s: settings_lib.Rl,
  examples: Sequence[tasks.Example],
  checkpoint: str,
  num_samples: int,
) -> dict[str, Any]:
  """Everything that the records depend on and that is known without a model.

  Not in it, because without effect: batch size, slots, mesh, grading workers.
  """
  sampling = dataclasses.asdict(s.evaluate)
  sampling |= sampling.pop("sampling")
  free = ("batch_size", "num_slots", "every", "mask_id", "eos_id", "stop_ids")
  for name in free:
    del sampling[name]
  return {
    "config": {
      **model_settings(s, checkpoint),
      "task": {**dataclasses.asdict(s.task), **_code_of(s.task)},
      "evaluate": sampling,
    },
    "checkpoint": checkpoint,
    "train_step": checkpoint_named.find_train_step(checkpoint),
    "num_samples": num_samples,
    "problems": tasks.provenance(s.task.load(), examples),
  }


def _code_of(task: data.Task) -> dict[str, str]:
  """Returns what names the contents of a user's own task file, if it is one."""
  if not task.path:
    return {}
  content = pathlib.Path(task.path).expanduser().read_bytes()
  return {"code": hashlib.sha256(content).hexdigest()[:16]}


def model_settings(s: settings_lib.Rl, checkpoint: str) -> dict[str, Any]:
  """Returns what a model's figures depend on, whatever it is asked."""
  names = (
    "path",
    "revision",
    "tokenizer",
    "dtype",
    "quantize",
    "attention_block",
  )
  lora = dataclasses.asdict(s.lora) if checkpoint and s.lora else None
  return {
    "seed": s.seed,
    "model": {name: getattr(s.model, name) for name in names},
    "lora": lora,
    "data": {"max_prompt_length": s.data.max_prompt_length},
  }


def use_run(
  c: config_lib.ConfigDict, checkpoint: str, given: Collection[str] = ()
) -> None:
  """Gives a config the model and the adapter settings of a run.

  Args:
    c: changed in place.
    checkpoint: the run's, or "" to change nothing.
    given: keys that stand on the command line. Path, revision, dtype and
      quantize may say where the run's base model is now and how to compute it:
      that it is the same model is checked by its contents.

  Raises:
    UserError: there is no such checkpoint, or a given key contradicts it.
  """
  if not checkpoint:
    return
  source, lora = model_lib.trained_by(checkpoint)
  if "model.path" in given:  # a revision is one of its own hub id
    given = {*given, "model.revision"}
  theirs = {f"model.{k}": v for k, v in dataclasses.asdict(source).items()}
  theirs["lora.rank"] = lora.rank if lora else 0
  if lora:
    theirs |= {"lora.alpha": lora.alpha, "lora.targets": tuple(lora.targets)}
  problems = []
  for key, value in theirs.items():
    section, name = key.split(".")
    if key not in given:
      c[section][name] = value
    elif name not in _FREE_MODEL_KEYS and c[section][name] != value:
      problems.append(
        f"config.{key}={c[section][name]!r}, but the run has {value!r}"
      )
  if problems:
    raise errors.UserError(
      f"--checkpoint={checkpoint!r} was trained under other settings:\n  "
      + "\n  ".join(problems)
      + "\nLeave these flags out: model and adapter are the run's."
    )


def describe(s: settings_lib.Rl | settings_lib.Drawing) -> str:
  """How completions are drawn, on a line."""
  sampling = s.evaluate.sampling
  steps = f"at most {sampling.max_steps} denoising steps"
  if sampling.rule.schedule == "exact":
    steps = f"{sampling.num_denoise_steps} denoising steps"
  own = "".join(
    f" ({name} {getattr(sampling, name):g})"
    for name in sampling_lib.parameters(sampling.unmask_rule)
  )
  return (
    f"{sampling.completion_length} tokens in blocks of "
    f"{sampling.block_length}, {steps}, unmask rule {sampling.unmask_rule}"
    f"{own}, cache {sampling.cache}, temperature {sampling.temperature:g}, "
    f"seed {s.seed}"
  )


def report(result: statistics.Result, ks: Sequence[int] = ()) -> str:
  """The figures as lines for a person."""
  found = result.scalars()
  lines = [f"problems: {result.problems}"]
  for name, score_N in result.grades.items():
    if name.startswith("accuracy"):
      text = f"{name} {100 * score_N.mean():.1f} %"
      if score_N.size > 1:
        error = 100 * statistics.standard_error(score_N)
        low, high = statistics.bootstrap_interval(score_N)
        text += (
          f" ± {error:.1f} (standard error), {100 * low:.1f} to "
          f"{100 * high:.1f} (95 % by bootstrap)"
        )
      lines.append(text)
    else:
      lines.append(f"{name} {score_N.mean():.4f}")
  if "cells_micro" in found:
    lines.append(f"cells_micro {found['cells_micro']:.4f}")
  if "accuracy_tolerant" in result.grades:
    lines.append(
      f"strict and tolerant verdicts disagree on {result.num_disagree} of "
      f"{len(result.records)} completions"
    )
  at_k = result.at_k(ks)
  lines += [f"{name} {100 * value:.1f} %" for name, value in at_k.items()]
  lines.append(
    f"{result.grades['accuracy'].size} problems x {result.num_samples}, mean "
    f"length {found['mean_length']:.1f} tokens, "
    f"{found['mean_denoise_steps']:.1f} denoising steps, "
    f"{found['mean_whole_passes']:.1f} passes over the whole row, "
    f"{result.seconds:.1f} s, {found['tokens_per_second']:.0f} tokens/s"
  )
  return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
  del argv
  asked = flags.FLAGS
  ks = command.numbers("k", asked.k, int)
  statistics.check_k(ks, asked.num_samples)
  c, given = command.evaluation_config(asked.sampler, asked.model)
  use_run(c, asked.checkpoint, given)
  s = settings_lib.rl(c)
  name = asked.checkpoint and checkpoint_named.pinned(asked.checkpoint)
  # Before the work: what was not meant shows while it costs nothing.
  print(f"{name or s.model.path}: {describe(s)}", flush=True)
  result = run(
    s,
    asked.checkpoint,
    asked.output,
    num_samples=asked.num_samples,
  )
  print(report(result, ks))


if __name__ == "__main__":
  command.define_flags("model", "checkpoint", "sampler", "output")
  flags.DEFINE_integer("num_samples", 1, "Completions per prompt.")
  flags.DEFINE_list(
    "k", [], "Also pass@k and the majority vote among k, for each k listed."
  )
  command.main(main, required=["config"])
