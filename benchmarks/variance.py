"""How noisy the gradient estimate is, per pass of the network and per second.

    python benchmarks/variance.py --config=configs/sudoku_tiny.py:blocks \
      --output=benchmarks/results/variance_tiny
    python benchmarks/variance.py --preset=mid --output=...

On one fixed batch of rollouts, drawn under each of `--caches`, the exact
gradient visits every executed step. Every way of drawing steps or blocks then
estimates it again and again with fresh draws:

    relative variance = E |g - exact|^2 / |exact|^2

and the cosine of one estimate with the exact gradient. The noise of the
rollouts themselves comes on top, the same for all. A config's model is rewarded
by its task; a preset of `benchmarks/step.py` has random weights and rewards.

Seconds are medians of the compiled gradient after the call that compiles.
Passes are counted in whole rows: windows by their share of the FLOPs.
"""

import csv
import dataclasses
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import step as step_lib
from absl import app
from absl import flags

from agrpo_jax import command
from agrpo_jax import data
from agrpo_jax import learner as learner_lib
from agrpo_jax import settings as settings_lib
from agrpo_jax import train
from agrpo_jax import types
from agrpo_jax.grading import shares
from agrpo_jax.models import transformer
from agrpo_jax.objectives import agrpo
from agrpo_jax.objectives import mc_steps
from agrpo_jax.port import model as model_lib
from agrpo_jax.samplers import host
from agrpo_jax.samplers import sampling as sampling_lib

# Units of several steps are larger than single ones.
_STATES_PER_MICROBATCH = {"config": 256, "preset": 16}


@dataclasses.dataclass(frozen=True)
class Batch:
  """A graded batch of rollouts, and the model that drew it."""

  model: model_lib.Model
  sampling: sampling_lib.Sampling
  rollout: types.Rollout
  reward_B: jax.Array
  group_size: int
  num_states: int  # per microbatch


def of_config(s: settings_lib.Rl, cache: str, block_length: int) -> Batch:
  """Draws and grades the first batch of a run."""
  model = model_lib.load_model(s.model, s.lora, s.mesh.make(), seed=s.seed)
  dataset = data.load_dataset(s.task, s.data, model.tokenizer, "train")
  sampling = dataclasses.replace(s.rollout.sampling, cache=cache)
  if block_length:
    sampling = dataclasses.replace(sampling, block_length=block_length)
  draw = dataclasses.replace(s.rollout, sampling=sampling)
  sampler = host.Sampler(
    model.bind, draw, model.tokenizer, model.mesh, s.data.bucket
  )
  prompts = dataset.batch(0, s.rollout.num_prompts, s.seed)
  batch = data.Batch.of(prompts, s.rollout.group_size)
  state = types.TrainState(jnp.int32(0), model.params, model.lora, ())
  with s.start_grader() as grader:
    rollout, pending = train.sample(
      sampler, state, batch, jax.random.key(s.seed), model.tokenizer, grader
    )
    reward_B = jnp.asarray(shares.collect(pending).reward_B, jnp.float32)
  return Batch(
    model,
    draw.sampling_for(model.tokenizer),
    rollout,
    reward_B,
    s.rollout.group_size,
    _STATES_PER_MICROBATCH["config"],
  )


def of_preset(preset: step_lib.Preset, cache: str) -> Batch:
  """Draws a batch from random weights, with random rewards."""
  model = step_lib.make_model(preset, "none")
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
  return Batch(
    model,
    subject.sampling,
    rollout,
    jnp.asarray(reward_B, jnp.float32),
    preset.group_size,
    _STATES_PER_MICROBATCH["preset"],
  )


def kinds(sampling: sampling_lib.Sampling) -> list[tuple[str, int]]:
  """Returns step rules and numbers of draws, the exact gradient first."""
  found = [("all", 1)]
  num_draws = [n for n in (2, 4, 8, 24) if n <= sampling.max_steps]
  found += [(rule, n) for rule in mc_steps.DRAWN_STEPS for n in num_draws]
  num_blocks = [n for n in (1, 2, 4) if n < sampling.num_blocks]
  return found + [
    (rule, n) for rule in mc_steps.DRAWN_BLOCKS for n in num_blocks
  ]


def estimator(batch: Batch, step_rule: str, num_draws: int) -> Any:
  """Returns a compiled function: key -> gradient, units run."""
  objective = agrpo.Agrpo(
    step_rule=step_rule, num_mc_steps=num_draws, num_mc_blocks=num_draws
  )
  sampling = batch.sampling
  shared = sampling.steps_per_memory
  if step_rule in mc_steps.DRAWN_STEPS:
    shared = 1
  draw = host.Draw(sampling, 0.0, batch_size=1, num_slots=0)
  learner = learner_lib.Learner(
    bind=batch.model.bind,
    optimizer=optax.sgd(1.0),
    sampling=sampling,
    objective=objective,
    group_size=batch.group_size,
    microbatch=max(1, batch.num_states // shared),
    policy=draw.policy_for(batch.model.shape),
  )
  state = types.TrainState(
    jnp.int32(0), batch.model.params, batch.model.lora, ()
  )
  advantage_B = objective.advantage(
    batch.reward_B.reshape(-1, batch.group_size)
  ).reshape(-1)

  @jax.jit
  def gradient(
    state: types.TrainState, rollout: types.Rollout, key: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    key_B = jax.random.split(key, len(advantage_B))
    visits, _ = objective.visits(rollout, advantage_B, key, key_B, sampling)
    visits = jax.tree.map(lambda x: x[0], visits)
    tree, _, num_units = learner.gradient(state, rollout, advantage_B, visits)
    leaves = [x.reshape(-1) for x in jax.tree.leaves(tree)]
    return jnp.concatenate(leaves), num_units

  return lambda key: gradient(state, batch.rollout, key)


def passes_per_unit(batch: Batch, step_rule: str) -> float:
  """Returns the FLOPs of a unit's states, in those of a whole row."""
  s, shape = batch.sampling, batch.model.shape
  if s.cache == "none":
    return 1.0
  length = batch.rollout.prompt.shape[1] + s.completion_length
  window = s.block_length if s.cache == "dual" else s.completion_length
  states = 1 if step_rule in mc_steps.DRAWN_STEPS else s.steps_per_memory
  wanted = s.tokens_per_step
  flops = transformer.forward_flops(shape, length, 0)
  flops += states * transformer.forward_flops(shape, length, wanted, window)
  return flops / transformer.forward_flops(shape, length, wanted)


def asked_kinds(words: Sequence[str]) -> list[tuple[str, int]]:
  """Returns what words such as `blocks=2` ask for, the exact gradient first."""
  found = [("all", 1)]
  for word in words:
    step_rule, _, num_draws = word.partition("=")
    if step_rule not in mc_steps.STEP_RULES or not num_draws.isdigit():
      raise app.UsageError(f"--kinds: {word!r} is no step rule and number")
    found.append((step_rule, int(num_draws)))
  return found


def measure(
  batch: Batch, num_estimates: int, words: Sequence[str]
) -> list[dict[str, Any]]:
  """Returns a row of figures per kind of estimate."""
  exact, rows = None, []
  for step_rule, num_draws in (
    asked_kinds(words) if words else kinds(batch.sampling)
  ):
    run = estimator(batch, step_rule, num_draws)
    # What is compiled with the first call is not counted.
    estimates, seconds = [], []
    num = 1 if step_rule == "all" else num_estimates
    for draw in range(num + 1):
      begin = time.perf_counter()
      gradient, num_units = run(jax.random.key(draw))
      found = np.asarray(gradient, np.float64)
      seconds.append(time.perf_counter() - begin)
      estimates.append((found, int(num_units)))
    if exact is None:
      exact = estimates[0][0]
    errors = [((g - exact) ** 2).sum() for g, _ in estimates[1:]]
    cosines = [
      g @ exact / np.linalg.norm(g) / np.linalg.norm(exact)
      for g, _ in estimates[1:]
    ]
    units = statistics.mean(n for _, n in estimates[1:])
    rows.append(
      {
        "cache": batch.sampling.cache,
        "step_rule": step_rule,
        "num_draws": num_draws,
        "passes_per_completion": units
        * passes_per_unit(batch, step_rule)
        / len(batch.reward_B),
        "seconds": statistics.median(seconds[1:]),
        "relative_variance": statistics.mean(errors) / (exact @ exact),
        "cosine": statistics.mean(cosines),
      }
    )
    print(
      "{cache:>6} {step_rule:>15} {num_draws:>3}  "
      "{passes_per_completion:8.2f} passes  {seconds:8.3f} s  variance "
      "{relative_variance:8.4f}  cosine {cosine:.3f}".format(**rows[-1]),
      flush=True,
    )
  return rows


def plot(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
  """Draws relative variance against seconds."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(7, 5))
  for cache in dict.fromkeys(row["cache"] for row in rows):
    for rule in dict.fromkeys(row["step_rule"] for row in rows):
      of = [
        row
        for row in rows
        if (row["cache"], row["step_rule"]) == (cache, rule) and rule != "all"
      ]
      if of:
        axes.plot(
          [row["seconds"] for row in of],
          [row["relative_variance"] for row in of],
          "o-" if cache == "none" else "s--",
          label=f"{cache}, {rule}",
        )
  axes.set(
    xscale="log",
    yscale="log",
    xlabel="seconds per gradient",
    ylabel="relative variance",
  )
  axes.legend()
  figure.tight_layout()
  figure.savefig(path, dpi=120)


def main(argv: Sequence[str]) -> None:
  del argv
  asked = flags.FLAGS
  if asked.preset:
    preset = step_lib.PRESETS[asked.preset]
    batches = [of_preset(preset, cache) for cache in asked.caches]
  else:
    s = settings_lib.rl(command.CONFIG.value)
    batches = [
      of_config(s, cache, asked.block_length) for cache in asked.caches
    ]
  rows = [
    row for batch in batches for row in measure(batch, asked.draws, asked.kinds)
  ]
  if asked.output:
    path = pathlib.Path(asked.output)
    with path.with_suffix(".csv").open("w", newline="") as file:
      writer = csv.DictWriter(file, rows[0])
      writer.writeheader()
      writer.writerows(rows)
    plot(rows, path.with_suffix(".png"))


if __name__ == "__main__":
  flags.DEFINE_enum("preset", None, sorted(step_lib.PRESETS), "Random weights.")
  flags.DEFINE_list("caches", ["none", "dual"], "Policies.")
  flags.DEFINE_integer("block_length", 0, "T; 0: as the config has it.")
  flags.DEFINE_integer("draws", 16, "Estimates of each kind.")
  flags.DEFINE_list("kinds", [], "STEP_RULE=DRAWS, ...; none: all of them.")
  flags.DEFINE_string("output", "", "CSV and PNG, without the suffix.")
  command.main(main)
