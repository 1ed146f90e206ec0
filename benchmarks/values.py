"""Whether values by restarts pay: variance of the gradient, and passes.

    python benchmarks/values.py --config=sudoku_tiny:blocks \
      --output=benchmarks/results/values_tiny

The prompts of a run's first batch are drawn and graded again and again. Of each
draw the gradient of all denoising steps is computed with the leave-one-out
advantages of AGRPO, and with those of VinePPO from the same completions, with
more and more restarts. All are unbiased; their variance, relative to the square
of the mean gradient, says how many batches a given precision takes. Passes are
those of `agrpo_jax/lab/prices.py`: of the rollout, the restarts and the scored
steps; completions with nothing to teach are not scored. Variance times passes
is what a precision costs: `cost_ratio`, in that of leave-one-out.
"""

import csv
import dataclasses
import pathlib
from collections.abc import Iterator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from agrpo_jax import actor as actor_lib
from agrpo_jax import command
from agrpo_jax import data
from agrpo_jax import settings as settings_lib
from agrpo_jax import types
from agrpo_jax.grading import shares
from agrpo_jax.lab import prices
from agrpo_jax.objectives import base
from agrpo_jax.objectives import vine_ppo
from agrpo_jax.port import model as model_lib

NUM_RESTARTS = (1, 2, 4, 8)
Arm = tuple[str, int]  # target, or leave_one_out, and restarts a state


def gradients(
  s: settings_lib.Rl, num_draws: int
) -> Iterator[dict[Arm, tuple[np.ndarray, float]]]:
  """Yields, draw by draw, every arm's gradient and its passes a completion."""
  model = model_lib.load_model(s.model, s.lora, s.mesh.make(), seed=s.seed)
  tokenizer = model.tokenizer
  dataset = data.load_dataset(s.task, s.data, tokenizer, "train")
  prompts = dataset.batch(0, s.rollout.num_prompts, s.seed)
  batch = data.Batch.of(prompts, s.rollout.group_size)
  sampler = model.sampler(s.rollout, s.data.bucket)
  objective = vine_ppo.VinePpo(step_rule="all")
  learner = dataclasses.replace(
    s.make_learner(model.bind, tokenizer, model.mesh), objective=objective
  )
  sampling = learner.sampling
  num_rows, size = len(batch), s.rollout.group_size
  state = types.TrainState(jnp.int32(0), model.params, model.lora, ())

  @jax.jit
  def gradient(
    rollout: types.Rollout, advantage_BxN: jax.Array
  ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    key = jax.random.key(0)  # all steps are visited: nothing is drawn
    visits, _ = objective.visits(
      rollout, advantage_BxN, key, jax.random.split(key, num_rows), sampling
    )
    first = jax.tree.map(lambda x: x[0], visits)
    tree, _, num_units = learner.gradient(state, rollout, advantage_BxN, first)
    leaves = [x.reshape(-1) for x in jax.tree.leaves(tree)]
    asked = learner.asked(visits, advantage_BxN)
    return jnp.concatenate(leaves), (num_units, *asked)

  blocks = objective.restarts(sampling).blocks
  with s.start_grader() as grader:
    actor = actor_lib.Actor(sampler, tokenizer, grader)
    for draw in range(num_draws):
      draw_key, value_key = jax.random.split(
        jax.random.fold_in(jax.random.key(s.seed), draw)
      )
      rollout, pending = actor.sample(state, batch, draw_key)
      reward_B = shares.collect(pending).reward_B
      price = prices.of_policy(
        sampling,
        model.shape,
        rollout.prompt.shape[1],
        has_adapter=model.lora is not None,
      )
      one_by_one, restarted = [], 0.0
      for restart in range(max(NUM_RESTARTS)):
        value_BxV, scalars = actor.values(
          base.Restarts(blocks, num=1),
          learner,
          state,
          batch,
          rollout,
          reward_B,
          jax.random.fold_in(value_key, restart),
        )
        one_by_one.append(value_BxV)
        restarted = prices.of_rollout(
          price,
          scalars["values/mean_denoise_steps"],
          scalars["values/mean_whole_passes"],
        )
      paid_B = reward_B - np.asarray(learner.price(rollout.num_executed_steps))
      reward_NxG = jnp.asarray(paid_B, jnp.float32).reshape(-1, size)
      loo_B = objective.advantage(reward_NxG).reshape(-1)
      advantages = {
        ("leave_one_out", 0): jnp.tile(loo_B[:, None], sampling.num_blocks)
      }
      for num in NUM_RESTARTS:
        value_NxGxV = jnp.asarray(np.mean(one_by_one[:num], axis=0)).reshape(
          *reward_NxG.shape, -1
        )
        for target in vine_ppo.TARGETS:
          arm = vine_ppo.VinePpo(target=target)
          advantages[target, num] = arm.block_advantage(
            reward_NxG, value_NxGxV, sampling
          ).reshape(num_rows, -1)
      drawn = prices.of_rollout(
        price,
        float(rollout.num_executed_steps.mean()),
        float(rollout.num_whole_passes.mean()),
      )
      found = {}
      for (name, num), advantage_BxN in advantages.items():
        flat, counts = gradient(rollout, advantage_BxN)
        updates = prices.of_updates(objective, price, *map(float, counts))
        passes = drawn + num * restarted + updates / num_rows
        found[name, num] = np.asarray(flat, np.float64), passes
      print(f"drew {draw + 1} of {num_draws}", flush=True)
      yield found


def main(argv: Sequence[str]) -> None:
  del argv
  asked = flags.FLAGS
  s = settings_lib.rl(command.CONFIG.value)
  draws = [*gradients(s, asked.draws)]
  arms = list(draws[0])
  mean = {arm: np.mean([d[arm][0] for d in draws], axis=0) for arm in arms}
  variance = {
    arm: sum(((d[arm][0] - mean[arm]) ** 2).sum() for d in draws)
    / (len(draws) - 1)
    for arm in arms
  }
  # All arms have the same mean. Its square holds a share of the variance.
  square = np.mean(
    [mean[arm] @ mean[arm] - variance[arm] / len(draws) for arm in arms]
  )
  first = arms[0]
  rows = []
  for arm in arms:
    passes = np.mean([d[arm][1] for d in draws])
    ratio = variance[arm] / variance[first]
    paid = passes / np.mean([d[first][1] for d in draws])
    rows.append(
      {
        "advantage": arm[0],
        "restarts": arm[1],
        "passes": round(float(passes), 3),
        "relative_variance": round(float(variance[arm] / square), 3),
        "variance_ratio": round(float(ratio), 4),
        "cost_ratio": round(float(ratio * paid), 4),
      }
    )
    print(rows[-1], flush=True)
  if asked.output:
    path = pathlib.Path(asked.output).with_suffix(".csv")
    with path.open("w", newline="") as file:
      writer = csv.DictWriter(file, rows[0])
      writer.writeheader()
      writer.writerows(rows)


if __name__ == "__main__":
  flags.DEFINE_integer("draws", 32, "Of the batch.")
  flags.DEFINE_string("output", "", "CSV, without the suffix.")
  command.main(main)
