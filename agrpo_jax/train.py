"""The recipe: sample, grade, learn, repeat."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agrpo_jax import actor as actor_lib
from agrpo_jax import data
from agrpo_jax import errors
from agrpo_jax import optimizer
from agrpo_jax import settings as settings_lib
from agrpo_jax import types
from agrpo_jax.evaluation import accuracy
from agrpo_jax.evaluation import statistics
from agrpo_jax.grading import pool
from agrpo_jax.grading import shares
from agrpo_jax.models import lora as lora_lib
from agrpo_jax.port import model as model_lib
from agrpo_jax.report import keep
from agrpo_jax.report import page
from agrpo_jax.runs import metrics
from agrpo_jax.runs import progress
from agrpo_jax.runs import run as run_lib


def train(s: settings_lib.Rl, checkpoint: str = "") -> None:
  """Trains until `train.num_steps`, from where the work directory is.

  Args:
    s: the settings of the run.
    checkpoint: of another run, with whose weights this one begins (WORKDIR,
      WORKDIR:best or WORKDIR:TRAIN_STEP), or "". That trained what `s` says:
      the same adapters on the same base, or all parameters.

  Raises:
    UserError: anything that the user has to change.
    FloatingPointError: a loss or gradient that is not finite.
  """
  rollout, group_size = s.rollout, s.rollout.group_size
  with (
    run_lib.claim(s) as claimed,
    page.at_end(s, claimed),
    s.start_grader() as grader,
  ):
    # What is cheap comes first: a mistake in it should not cost a download.
    examples = data.load_examples(s.task, s.data, "train")
    data.check_size(len(examples), rollout.num_prompts)
    # A run that goes on has weights of its own.
    start = "" if claimed.has_checkpoint else checkpoint
    if checkpoint and not start:
      print(
        f"--checkpoint={checkpoint} is where a run starts; this work directory "
        "goes on from its own checkpoint. Another start needs another "
        "--config.workdir.",
        flush=True,
      )
    if start and s.objective.has_reference and s.lora is None:
      # Training changes the weights it begins with, which no later start of
      # this run could have again.
      raise errors.UserError(
        f"--checkpoint={start} trains all parameters, and the objective's "
        "reference policy is the model that config.model.path names. Write the "
        f"checkpoint out (agrpo port --checkpoint={start} --to=FOLDER) and "
        "begin with --config.model.path=FOLDER; or train an adapter "
        "(config.lora.rank), whose reference is the base."
      )
    print(f"Loading {s.model.path}.", flush=True)
    model = model_lib.load_first(s.model, s.lora, s.mesh.make(), start, s.seed)
    tokenizer = model.tokenizer
    dataset = data.Dataset(examples, tokenizer, s.data.max_prompt_length)
    data.check_size(len(dataset), rollout.num_prompts, dataset.num_skipped)
    sampler = model.sampler(rollout, s.data.bucket)
    actor = actor_lib.Actor(sampler, tokenizer, grader)
    s.check_network(model.shape)
    for draw in (rollout, s.evaluate):
      model.check_draw(s.data.max_prompt_length, draw)
    held_out: Sequence[data.Prompt] = []
    if s.evaluate.every:
      evaluated = data.load_dataset(s.task, s.data, tokenizer, s.evaluate.split)
      held_out = evaluated.prompts[: s.evaluate.num_examples or None]
    evaluation_sampler = model.sampler(s.evaluate, s.data.bucket)
    learner = s.make_learner(model.bind, tokenizer, model.mesh)
    reference = None
    if s.objective.has_reference and model.lora is None:
      # Training would change the only copy; beside adapters the base stays.
      reference = jax.tree.map(jnp.copy, model.params)
    run, state = claimed.begin(
      model.initial_state(learner.optimizer),
      model.base_model,
      dataclasses.asdict(model.shape),
    )
    if start:
      print(f"Starting with the weights of {start}.", flush=True)
      run.save_start(state, start)
    # Donated: the state after takes the memory of the state before.
    learn = jax.jit(learner.train_step, donate_argnames="state")
    report = progress.Progress(s.train.num_steps, run.first_step)
    print(
      f"{len(dataset)} problems ({dataset.num_skipped} skipped: too long), "
      f"{lora_lib.count(state.trainable):,} trained parameters. "
      + (
        "The first train step compiles."
        if run.first_step < s.train.num_steps
        else "All train steps are done."
      ),
      flush=True,
    )

    def evaluate(
      state: types.TrainState,
    ) -> tuple[statistics.Result, list[dict[str, Any]]]:
      shown = keep.HeldOut(tokenizer, s.report.num_completions)
      result = accuracy.evaluate(
        evaluation_sampler,
        state.params,
        state.lora,
        held_out,
        tokenizer,
        grader,
        seed=s.seed,
        look=shown.look,
      )
      return result, shown.records(result.records)

    if held_out and s.report.before and run.first_step == 0:
      result, shown = evaluate(state)
      run.log_before(result.scalars(), shown)
      print(
        f"Held-out accuracy before: {100 * result.accuracy:.1f} %.", flush=True
      )

    for train_step in range(run.first_step, s.train.num_steps):
      clock = progress.Clock()
      # From the seed and the step alone: a run that continues draws the same.
      step_key = jax.random.fold_in(jax.random.key(s.seed), train_step)
      rollout_key, draw_key, value_key = jax.random.split(step_key, 3)
      prompts = dataset.batch(train_step, rollout.num_prompts, s.seed)
      batch = data.Batch.of(prompts, group_size)

      sampled, pending = actor.sample(state, batch, rollout_key)
      clock.lap("rollout")
      graded = shares.collect(pending)
      clock.lap("grade")

      value_BxV, scalars = None, dict[str, float]()
      if learner.restarts is not None:
        value_BxV, scalars = actor.values(
          learner.restarts,
          learner,
          state,
          batch,
          sampled,
          graded.reward_B,
          value_key,
        )
        clock.lap("values")

      state, learned = learn(
        state,
        sampled,
        graded.reward_B.astype(np.float32),
        draw_key,
        batch.id_Bx2,
        reference,
        value_BxV,
      )
      learned["learning_rate"] = optimizer.last_learning_rate(
        s.optimizer, state.opt_state
      )
      scalars |= metrics.to_floats(learned)
      clock.lap("update")

      texts = [text for one in pending for text in one.texts]
      completion_BxC = np.concatenate([x.completion_BxC for x in pending])
      scalars |= reward_scalars(graded, group_size)
      eos_ids = tokenizer.eos_id, *tokenizer.stop_ids
      scalars |= length_scalars(completion_BxC, eos_ids)
      scalars["prompts/mean_length"] = float(
        np.mean([len(prompt.tokens) for prompt in prompts])
      )
      kept: list[dict[str, Any]] = []
      is_last = train_step + 1 == s.train.num_steps
      if s.evaluate.every and (
        is_last or (train_step + 1) % s.evaluate.every == 0
      ):
        result, shown = evaluate(state)
        scalars |= result.scalars("eval/")
        kept = shown
        clock.lap("evaluate")
      kept += keep.of_train_step(
        train_step,
        s.train.num_steps,
        sampled,
        batch,
        texts,
        graded,
        tokenizer,
      )
      scalars |= {f"seconds/{k}": v for k, v in clock.seconds.items()}
      logged = samples(batch, texts, graded, s.train.log_samples)
      run.finish_step(state, train_step, scalars, logged, kept)
      report.step(train_step, scalars, clock.seconds, completion_BxC.size)


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


def length_scalars(
  completion_BxC: np.ndarray, eos_ids: tuple[int, ...]
) -> dict[str, float]:
  """Returns lengths of completions: tokens up to the last that is not EOS."""
  is_content_BxC = ~np.isin(completion_BxC, eos_ids)
  place_C = np.arange(1, is_content_BxC.shape[1] + 1)
  length_B = (is_content_BxC * place_C).max(axis=1)
  return {
    "completions/mean_length": float(length_B.mean()),
    "completions/max_length": float(length_B.max()),
    "completions/clipped_ratio": float(is_content_BxC.all(axis=1).mean()),
  }


def samples(
  batch: data.Batch,
  completions: Sequence[str],
  graded: pool.Graded,
  count: int,
) -> list[dict[str, Any]]:
  """The first completions of a batch, for a person to read."""
  return [
    {
      "prompt": batch.examples[row].messages[-1]["content"],
      "completion": completions[row],
      "reward": float(graded.reward_B[row]),
      "accuracy": float(graded.grade_B[row]),
    }
    for row in range(min(count, len(completions)))
  ]
