r"""Held-out accuracy of a model under given sampling settings.

    python -m agrpo_jax.evaluate --config=configs/gsm8k.py \
      [--model=FOLDER_OR_HUB_ID] [--checkpoint=WORKDIR[:best|:TRAIN_STEP]] \
      [--sampler=NAME] [--num_samples=8 --k=1,4,8] \
      [--output=FOLDER or FILE.jsonl]

Without --model it is the model of `config.model.path`; --checkpoint takes what
was trained on top of it from a run's newest checkpoint, its most accurate one,
or that of a train step. `presets.py` lists the samplers, `records.py` what
--output holds. The same command goes on where it was stopped. For more than one
setting or model: `agrpo_jax.sweep`.
"""

from collections.abc import Sequence

from absl import flags

from agrpo_jax import command
from agrpo_jax import presets
from agrpo_jax.evaluation import accuracy
from agrpo_jax.evaluation import statistics
from agrpo_jax.runs import checkpoint_named


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
    f"{result.seconds:.1f} s, {found['tokens_per_second']:.0f} tokens/s"
  )
  return "\n".join(lines)


def _define_flags() -> None:
  # Not when this module is imported: other commands have flags of their own.
  flags.DEFINE_string(
    "model", "", "Folder or hub id, instead of config.model.path."
  )
  flags.DEFINE_string("checkpoint", "", checkpoint_named.HELP)
  flags.DEFINE_string(
    "sampler", "config", f"One of {', '.join(presets.PRESETS)}."
  )
  flags.DEFINE_string(
    "output", "", "Folder, or file ending in .jsonl, for the records."
  )
  flags.DEFINE_integer("num_samples", 1, "Completions per prompt.")
  flags.DEFINE_list(
    "k", [], "Also pass@k and the majority vote among k, for each k listed."
  )


def main(argv: Sequence[str]) -> None:
  del argv
  asked = flags.FLAGS
  ks = command.numbers("k", asked.k, int)
  statistics.check_k(ks, asked.num_samples)
  c = presets.config(asked.sampler, asked.model)
  result = accuracy.run(
    c, asked.checkpoint, asked.output, num_samples=asked.num_samples
  )
  print(report(result, ks))


if __name__ == "__main__":
  _define_flags()
  command.main(main, required=["config"])
