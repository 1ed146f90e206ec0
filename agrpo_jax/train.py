"""The recipe: sample, grade, learn, repeat."""

from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agrpo_jax import data
from agrpo_jax import learner as learner_lib
from agrpo_jax import optimizer
from agrpo_jax import settings as settings_lib
from agrpo_jax import types
from agrpo_jax.evaluation import accuracy
from agrpo_jax.grading import pool
from agrpo_jax.grading import shares
from agrpo_jax.models import lora as lora_lib
from agrpo_jax.models import tokens
from agrpo_jax.objectives import base
from agrpo_jax.parallel import processes
from agrpo_jax.port import model as model_lib
from agrpo_jax.runs import metrics
from agrpo_jax.runs import progress
from agrpo_jax.runs import run as run_lib
from agrpo_jax.samplers import host
from agrpo_jax.samplers import sampling as sampling_lib


def train(s: settings_lib.Rl) -> None:
  """Trains until `train.num_steps`, from where the work directory is.

  Args:
    s: the settings of the run.

  Raises:
    UserError: anything that the user has to change.
    FloatingPointError: a loss or gradient that is not finite.
  """
  rollout, group_size = s.rollout, s.rollout.group_size
  with run_lib.claim(s) as claimed, s.start_grader() as grader:
    # What is cheap comes first: a mistake in it should not cost a download.
    examples = data.load_examples(s.task, s.data, "train")
    data.check_size(len(examples), rollout.num_prompts)
    model = model_lib.load_model(s.model, s.lora, s.mesh.make(), seed=s.seed)
    tokenizer = model.tokenizer
    dataset = data.Dataset(examples, tokenizer, s.data.max_prompt_length)
    data.check_size(len(dataset), rollout.num_prompts, dataset.num_skipped)
    sampler = host.Sampler(
      model.bind, rollout, tokenizer, model.mesh, s.data.bucket
    )
    for draw in (rollout, s.evaluate):
      model.check_draw(s.data.max_prompt_length, draw)
    held_out: Sequence[data.Prompt] = []
    if s.evaluate.every:
      evaluated = data.load_dataset(s.task, s.data, tokenizer, s.evaluate.split)
      held_out = evaluated.prompts[: s.evaluate.num_examples or None]
    evaluation_sampler = host.Sampler(
      model.bind, s.evaluate, tokenizer, model.mesh, s.data.bucket
    )
    learner = s.make_learner(model.bind, tokenizer, model.mesh)
    reference = None
    if s.objective.has_reference and model.lora is None:
      # Training would change the only copy; beside adapters the base stays.
      reference = jax.tree.map(jnp.copy, model.params)
    run, state = claimed.begin(
      model.initial_state(learner.optimizer), model.base_model
    )
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

    for train_step in range(run.first_step, s.train.num_steps):
      clock = progress.Clock()
      # From the seed and the step alone: a run that continues draws the same.
      step_key = jax.random.fold_in(jax.random.key(s.seed), train_step)
      rollout_key, draw_key, value_key = jax.random.split(step_key, 3)
      prompts = dataset.batch(train_step, rollout.num_prompts, s.seed)
      batch = data.Batch.of(prompts, group_size)

      # Grading of a chunk runs on the host while the device draws the next one.
      sampled, pending = sample(
        sampler, state, batch, rollout_key, tokenizer, grader
      )
      clock.lap("rollout")
      graded = shares.collect(pending)
      clock.lap("grade")

      value_BxV, scalars = None, dict[str, float]()
      if learner.restarts is not None:
        value_BxV, scalars = values(
          learner.restarts,
          learner,
          sampler,
          state,
          batch,
          sampled,
          graded.reward_B,
          value_key,
          tokenizer,
          grader,
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
      scalars |= length_scalars(completion_BxC, tokenizer.eos_id)
      if s.evaluate.every and (train_step + 1) % s.evaluate.every == 0:
        result = accuracy.evaluate(
          evaluation_sampler,
          state.params,
          state.lora,
          held_out,
          tokenizer,
          grader,
          seed=s.seed,
        )
        scalars |= result.scalars("eval/")
        clock.lap("evaluate")
      scalars |= {f"seconds/{k}": v for k, v in clock.seconds.items()}
      logged = samples(batch, texts, graded, s.train.log_samples)
      run.finish_step(state, train_step, scalars, logged)
      report.step(train_step, scalars, clock.seconds, completion_BxC.size)


def sample(
  sampler: host.Sampler,
  state: types.TrainState,
  batch: data.Batch,
  key: jax.Array,
  tokenizer: tokens.Tokenizer,
  grader: pool.Grader,
) -> tuple[types.Rollout, list[shares.Pending]]:
  """Draws a completion per row, and starts grading each chunk as it comes.

  Returns:
    The rollout of all rows, and what is being graded of it, in order.
  """
  chunks, pending = zip(
    *_sample(sampler, state, batch, key, tokenizer, grader), strict=True
  )
  return jax.tree.map(lambda *x: jnp.concatenate(x), *chunks), [*pending]


def _sample(
  sampler: host.Sampler,
  state: types.TrainState,
  batch: data.Batch,
  key: jax.Array,
  tokenizer: tokens.Tokenizer,
  grader: pool.Grader,
  start: types.Start | None = None,
) -> Iterator[tuple[types.Rollout, shares.Pending]]:
  chunks = sampler.sample(
    state.params, state.lora, batch.tokens, key, batch.id_Bx2, start=start
  )
  for index, chunk in enumerate(chunks):
    first = index * sampler.batch_size
    rows = batch[first : first + sampler.batch_size]
    yield chunk, shares.submit(chunk, rows, tokenizer, grader)


def values(
  restarts: base.Restarts,
  learner: learner_lib.Learner,
  sampler: host.Sampler,
  state: types.TrainState,
  batch: data.Batch,
  sampled: types.Rollout,
  reward_B: np.ndarray,
  key: jax.Array,
  tokenizer: tokens.Tokenizer,
  grader: pool.Grader,
) -> tuple[np.ndarray, dict[str, float]]:
  """Estimates the values of states within the completions of a batch.

  Each state is drawn on from, with keys that are nobody else's, by the sampler
  that came to it; what comes out is graded like any other completion.

  Args:
    restarts: which states, and how often.
    learner: knows what steps cost.
    sampler: drew the completions.
    state: whose policy did.
    batch: B prompts.
    sampled: their completions.
    reward_B: of these.
    key: random, of this alone.
    tokenizer: ids -> text.
    grader: of the task.

  Returns:
    float32 [B, V], mean rewards, the price of the steps taken off; of a state
    behind the completion's end its own. And scalars to log.
  """
  num_rows, sampling = len(batch), learner.sampling
  block_V = np.array(restarts.blocks, np.int32)
  completion_BxC, unmask_step_BxC = map(
    processes.to_host, (sampled.completion, sampled.unmask_step)
  )
  num_done_NxB = _steps_done(unmask_step_BxC, sampling)
  num_given_VxB, num_steps_B = num_done_NxB[block_V - 1], num_done_NxB[-1]
  is_state_VxB = num_given_VxB < num_steps_B  # else behind the end
  paid_B = reward_B - learner.price(num_steps_B)
  value_VxB = np.tile(paid_B, (len(block_V), 1))
  # The same state of all completions stands together: those end together too.
  state_R, row_R, again_R = np.nonzero(
    np.repeat(is_state_VxB[..., None], restarts.num, axis=-1)
  )
  num_own, num_passes, change = 0, 0, 0.0
  if len(row_R):
    # Numbered like the completions of a prompt: each has a key of its own.
    index_B = np.array(batch.index)
    index_R = (index_B[row_R] * len(block_V) + state_R) * restarts.num + again_R
    anew = data.Batch(
      prompts=tuple(batch.prompts[row] for row in row_R),
      index=tuple(index_R.tolist()),
    )
    start = types.Start(
      completion=completion_BxC[row_R],
      unmask_step=unmask_step_BxC[row_R],
      block=block_V[state_R],
    )
    pending, counts = [], []
    for chunk, graded in _sample(
      sampler, state, anew, key, tokenizer, grader, start
    ):
      pending.append(graded)
      each = chunk.num_executed_steps, chunk.num_whole_passes
      counts.append([processes.to_host(x) for x in each])
    # What filled the last batch up stands at the end.
    own_R, passes_R = np.concatenate(counts, axis=1)[:, : len(row_R)]
    price_R = learner.price(num_given_VxB[state_R, row_R] + own_R)
    paid_R = shares.collect(pending).reward_B - price_R
    value_VxB[is_state_VxB] = paid_R.reshape(-1, restarts.num).mean(axis=1)
    num_own, num_passes = own_R.sum(), passes_R.sum()
    next_VxB = np.concatenate([value_VxB[1:], paid_B[None]])
    change = np.abs(next_VxB - value_VxB)[is_state_VxB].mean()
  scalars = {
    "values/restarts": len(row_R),
    # Per completion that is learned from, as `completions/...`.
    "values/mean_denoise_steps": num_own / num_rows,
    "values/mean_whole_passes": num_passes / num_rows,
    "values/mean_change": change,
  }
  return (
    value_VxB.T.astype(np.float32),
    {name: float(value) for name, value in scalars.items()},
  )


def _steps_done(
  unmask_step_BxC: np.ndarray, sampling: sampling_lib.Sampling
) -> np.ndarray:
  """int [num_blocks, B], denoising steps executed by the end of each block."""
  num_rows = len(unmask_step_BxC)
  # K, of positions that no step unmasked, falls on a column that is cut off.
  is_executed_BxK = np.zeros((num_rows, sampling.max_steps + 1), bool)
  np.put_along_axis(is_executed_BxK, unmask_step_BxC, True, axis=1)
  by_block = is_executed_BxK[:, :-1].reshape(num_rows, sampling.num_blocks, -1)
  return by_block.sum(axis=2).cumsum(axis=1).T


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
  """Returns lengths of completions: tokens up to the last that is not EOS."""
  is_content_BxC = completion_BxC != eos_id
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
