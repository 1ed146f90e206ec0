"""How noisy AGRPO's gradient estimates are, plain and with a cache.

    python benchmarks/variance.py --config=sudoku_tiny:blocks \
      --output=benchmarks/results/variance_tiny
    python benchmarks/variance.py --preset=mid --caches=none,dual \
      --kinds=uniform=8,blocks=1,blocks=2 --draws=8 --output=...

`agrpo_jax/lab/gradients.py` measures, and says what it measures: on one fixed
batch of rollouts, drawn under each of `--caches`, every way of drawing steps or
blocks against the exact gradient. A config's model is rewarded by its task; a
preset of `benchmarks/step.py` has random weights and rewards.
"""

import csv
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import step as step_lib
from absl import app
from absl import flags

from agrpo_jax import command
from agrpo_jax import settings as settings_lib
from agrpo_jax.lab import gradients
from agrpo_jax.objectives import agrpo
from agrpo_jax.objectives import mc_steps
from agrpo_jax.samplers import host
from agrpo_jax.samplers import sampling as sampling_lib


def of_config(
  s: settings_lib.Rl, cache: str, block_length: int
) -> gradients.Batch:
  """Draws and grades the first batch of a run."""
  changes: dict[str, Any] = {"cache": cache}
  if block_length:
    changes["block_length"] = block_length
  sampling = dataclasses.replace(s.rollout.sampling, **changes)
  rollout = dataclasses.replace(s.rollout, sampling=sampling)
  return gradients.draw(dataclasses.replace(s, rollout=rollout))


def of_preset(preset: step_lib.Preset, cache: str) -> gradients.Batch:
  """Draws a batch from random weights, with random rewards."""
  model = step_lib.make_model(preset)
  variant = step_lib.Variant(cache, "all", 1, preset.microbatch)
  subject = step_lib.Subject(model, preset, variant)
  num_rows = preset.num_prompts * preset.group_size
  prompts = (
    np.random.default_rng(0)
    .integers(0, 200, (preset.num_prompts, preset.prompt_length))
    .repeat(preset.group_size, axis=0)
  )
  row_id = np.stack([np.arange(num_rows)] * 2, axis=1).astype(np.uint32)
  (rollout,) = subject.sampler.sample(
    model.params, model.lora, prompts.tolist(), jax.random.key(0), row_id
  )
  reward_B = np.random.default_rng(0).normal(size=num_rows)
  draw = host.Draw(subject.sampling, 0.0, batch_size=num_rows, num_slots=0)
  return gradients.Batch(
    model=model,
    sampling=subject.sampling,
    policy=draw.policy_for(model.shape),
    rollout=rollout,
    reward_NxG=jnp.asarray(reward_B, jnp.float32).reshape(
      -1, preset.group_size
    ),
    num_states=16,
  )


def kinds(sampling: sampling_lib.Sampling) -> list[str]:
  """Returns step rules with numbers of draws, as `--kinds` takes them."""
  num_steps = [n for n in (2, 4, 8, 24) if n <= sampling.max_steps]
  num_blocks = [n for n in (1, 2, 4) if n < sampling.num_blocks]
  return (
    ["all=1"]
    + [f"{rule}={n}" for rule in mc_steps.DRAWN_STEPS for n in num_steps]
    + [f"{rule}={n}" for rule in mc_steps.DRAWN_BLOCKS for n in num_blocks]
  )


def objective_of(kind: str) -> agrpo.Agrpo:
  """Returns AGRPO with the step rule and the draws of `blocks=2`."""
  step_rule, _, num = kind.partition("=")
  if step_rule not in mc_steps.STEP_RULES or not num.isdigit():
    raise app.UsageError(f"--kinds: {kind!r} is no step rule and number")
  return agrpo.Agrpo(
    step_rule=step_rule, num_mc_steps=int(num), num_mc_blocks=int(num)
  )


def plot(rows: Sequence[tuple[str, gradients.Row]], path: pathlib.Path) -> None:
  """Draws relative variance against passes."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  lines: dict[tuple[str, str], list[gradients.Row]] = {}
  for cache, row in rows:
    rule = row.estimate.partition("=")[0]
    if rule != "all":
      lines.setdefault((cache, rule), []).append(row)
  figure, axes = pyplot.subplots(figsize=(7, 5))
  for (cache, rule), line in lines.items():
    axes.plot(
      [row.passes for row in line],
      [row.relative_variance for row in line],
      "o-" if cache == "none" else "s--",
      label=f"{cache}, {rule}",
    )
  axes.set(
    xscale="log",
    yscale="log",
    xlabel="passes per completion",
    ylabel="relative variance",
  )
  axes.legend()
  figure.tight_layout()
  figure.savefig(path, dpi=120)


def main(argv: Sequence[str]) -> None:
  del argv
  asked = flags.FLAGS
  rows: list[tuple[str, gradients.Row]] = []
  for cache in asked.caches:
    if asked.preset:
      batch = of_preset(step_lib.PRESETS[asked.preset], cache)
    else:
      s = settings_lib.rl(command.CONFIG.value)
      batch = of_config(s, cache, asked.block_length)
    words = asked.kinds or kinds(batch.sampling)
    print(f"cache: {cache}")
    found = gradients.measure(
      batch, {word: objective_of(word) for word in words}, asked.draws
    )
    rows += [(cache, row) for row in found]
  if asked.output:
    path = pathlib.Path(asked.output)
    with path.with_suffix(".csv").open("w", newline="") as file:
      records = [{"cache": cache} | dataclasses.asdict(r) for cache, r in rows]
      writer = csv.DictWriter(file, records[0])
      writer.writeheader()
      writer.writerows(records)
    plot(rows, path.with_suffix(".png"))


if __name__ == "__main__":
  flags.DEFINE_enum("preset", None, sorted(step_lib.PRESETS), "Random weights.")
  flags.DEFINE_list("caches", ["none", "dual"], "Policies.")
  flags.DEFINE_list("kinds", [], "STEP_RULE=DRAWS, ...; none: all of them.")
  flags.DEFINE_integer("block_length", 0, "T; 0: as the config has it.")
  flags.DEFINE_integer("draws", 16, "Estimates of each kind.")
  flags.DEFINE_string("output", "", "CSV and PNG, without the suffix.")
  command.main(main)
