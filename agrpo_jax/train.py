"""The recipe: sample, grade, learn, repeat."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agrpo_jax import build
from agrpo_jax import config as config_lib
from agrpo_jax import data
from agrpo_jax import optimizer
from agrpo_jax import types
from agrpo_jax.evaluation import accuracy
from agrpo_jax.grading import pool
from agrpo_jax.grading import shares
from agrpo_jax.models import lora as lora_lib
from agrpo_jax.runs import metrics
from agrpo_jax.runs import progress
from agrpo_jax.runs import run as run_lib


def train(c: config_lib.ConfigDict) -> None:
  """Trains until `config.train.num_steps`, from where the work directory is.

  Raises:
    UserError: anything that the user has to change.
    FloatingPointError: a loss or gradient that is not finite.
  """
  with run_lib.start(c) as run, build.grader(c) as grader:
    policy = build.policy(c)
    dataset = build.dataset(c, policy.tokenizer, "train")
    held_out = build.held_out(c, policy.tokenizer) if c.evaluate.every else []
    learner = build.make_learner(c, policy)
    sampler = build.make_sampler(c, c.rollout, policy)
    evaluation_sampler = build.make_sampler(c, c.evaluate, policy)
    reference = build.reference(c, policy)
    state = build.init_state(policy, learner.optimizer)
    state = run.restore(state, policy.base_model)
    learn = jax.jit(learner.train_step, donate_argnames="state")
    report = progress.Progress(c.train.num_steps, run.first_step)
    print(
      f"{len(dataset)} problems ({dataset.num_skipped} skipped: too long), "
      f"{lora_lib.count(state.trainable):,} trained parameters. "
      + (
        "The first train step compiles."
        if run.first_step < c.train.num_steps
        else "All train steps are done."
      ),
      flush=True,
    )

    for train_step in range(run.first_step, c.train.num_steps):
      clock = progress.Clock()
      step_key = jax.random.fold_in(jax.random.key(c.seed), train_step)
      rollout_key, draw_key = jax.random.split(step_key)
      batch = data.batch_examples(
        dataset, train_step, c.rollout.num_prompts, c.seed
      )
      rows = Rows(batch, c.rollout.group_size)

      pending: list[shares.Pending] = []
      chunks: list[types.Rollout] = []
      for chunk in sampler.sample(
        state.params, state.lora, rows.prompts, rollout_key, rows.id_Bx2
      ):
        fields = rows.fields[len(chunks) * sampler.batch_size :]
        fields = fields[: sampler.batch_size]
        pending.append(shares.submit(chunk, fields, policy.tokenizer, grader))
        chunks.append(chunk)
      rollout = jax.tree.map(lambda *x: jnp.concatenate(x), *chunks)
      clock.lap("rollout")
      graded = shares.collect(pending)
      clock.lap("grade")

      state, learned = learn(
        state,
        rollout,
        graded.reward_B.astype(np.float32),
        draw_key,
        rows.id_Bx2,
        reference,
      )
      learned["learning_rate"] = optimizer.last_learning_rate(
        config_lib.optimizer_settings(c), state.opt_state
      )
      scalars = metrics.to_floats(learned)
      clock.lap("update")

      scalars |= reward_scalars(graded, c.rollout.group_size)
      completion_BxC = np.concatenate([x.completion_BxC for x in pending])
      scalars |= length_scalars(completion_BxC, policy.tokenizer.eos_id)
      if c.evaluate.every and (train_step + 1) % c.evaluate.every == 0:
        result = accuracy.evaluate(
          evaluation_sampler,
          state.params,
          state.lora,
          held_out,
          policy.tokenizer,
          grader,
          seed=c.seed,
        )
        scalars |= result.scalars("eval/")
        clock.lap("evaluate")
      scalars |= {f"seconds/{k}": v for k, v in clock.seconds.items()}
      completions = [text for one in pending for text in one.texts]
      run.finish_step(
        state,
        train_step,
        scalars,
        samples(rows, completions, graded, c.train.log_samples),
      )
      report.step(train_step, scalars, clock.seconds, rollout.completion.size)


class Rows:
  """The B = N * G rows of a batch: each prompt, G times, side by side."""

  def __init__(
    self, batch: Sequence[tuple[Any, Sequence[int]]], group_size: int
  ):
    self.examples = [e for e, _ in batch for _ in range(group_size)]
    self.prompts = [ids for _, ids in batch for _ in range(group_size)]
    self.fields = [example.fields for example in self.examples]
    # What the random key of a row is made of: prompt, place in the group.
    self.id_Bx2 = np.array(
      [[example.id, i] for example, _ in batch for i in range(group_size)],
      np.uint32,
    )


def reward_scalars(graded: pool.Graded, group_size: int) -> dict[str, float]:
  """Rewards and grades of a batch, under the names TRL gives them."""
  reward_NxG = graded.reward_B.reshape(-1, group_size)
  scalars = {
    "reward": reward_NxG.mean(),
    "reward_std": reward_NxG.std(axis=1, ddof=1).mean(),
    "grading/num_failed": graded.num_failed,
    "grading/num_timed_out": graded.num_timed_out,
  }
  for name, part_B in graded.parts.items():
    scalars[f"rewards/{name}/mean"] = part_B.mean()
  for name, grade_B in graded.grades.items():
    scalars[name] = grade_B.mean()
  return {name: float(value) for name, value in scalars.items()}


def length_scalars(completion_BxC: np.ndarray, eos_id: int) -> dict[str, float]:
  """How long completions are: tokens up to the last that is not EOS."""
  is_content_BxC = completion_BxC != eos_id
  place_C = np.arange(1, is_content_BxC.shape[1] + 1)
  length_B = (is_content_BxC * place_C).max(axis=1)
  return {
    "completions/mean_length": float(length_B.mean()),
    "completions/max_length": float(length_B.max()),
    "completions/clipped_ratio": float(is_content_BxC.all(axis=1).mean()),
  }


def samples(
  rows: Rows, completions: Sequence[str], graded: pool.Graded, count: int
) -> list[dict[str, Any]]:
  """The first completions of a batch, for a person to read."""
  return [
    {
      "prompt": rows.examples[row].messages[-1]["content"],
      "completion": completions[row],
      "reward": float(graded.reward_B[row]),
      "accuracy": float(graded.grade_B[row]),
    }
    for row in range(min(count, len(completions)))
  ]
