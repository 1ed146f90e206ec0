"""One evaluation: draws completions of held-out prompts, grades, keeps records.

Every completion is drawn from a key of its own, folded from the seed, the
prompt's id and the completion's index. So it does not depend on the batch size,
on the number of devices, on how many completions its prompt gets, or on an
interruption.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from agrpo_jax import build
from agrpo_jax import config as config_lib
from agrpo_jax import config_check
from agrpo_jax import data
from agrpo_jax import errors
from agrpo_jax import tasks
from agrpo_jax import types
from agrpo_jax.evaluation import candidate
from agrpo_jax.evaluation import records
from agrpo_jax.evaluation import statistics
from agrpo_jax.grading import pool
from agrpo_jax.grading import shares
from agrpo_jax.models import tokens
from agrpo_jax.parallel import processes
from agrpo_jax.runs import checkpoint_named
from agrpo_jax.runs import progress
from agrpo_jax.samplers import host as sampler_lib


def evaluate(
  sampler: sampler_lib.Sampler,
  params: types.Tree,
  lora: types.Tree | None,
  rows: Sequence[tuple[tasks.Example, Sequence[int]]],
  tokenizer: tokens.Tokenizer,
  grader: pool.Grader,
  *,
  seed: int,
  num_samples: int = 1,
  kept: records.Records | None = None,
) -> statistics.Result:
  """Draws and grades completions, and goes on from those that are `kept`.

  A record is {"id", "index", "prompt", "completion", "answer", "reward",
  "grades", "num_tokens", "num_steps", "fields"}: id of the prompt, index of
  the completion among its prompt's, the extracted answer ("" for none), every
  verdict by name, tokens up to the last that is not EOS, denoising steps.

  Args:
    sampler: with the evaluation's settings.
    params: of the network.
    lora: adapters, or None.
    rows: (example, prompt's ids) pairs.
    tokenizer: for the text of completions.
    grader: of the task.
    seed: of the draws.
    num_samples: completions per prompt.
    kept: what is done already, and where new records go.
  """
  kept = kept or records.Records()
  work = [
    (example, ids, index)
    for example, ids in rows
    for index in range(num_samples)
  ]
  done = [(record["id"], record["index"]) for record in kept.done]
  if done != [(e.id, index) for e, _, index in work][: len(done)]:
    raise errors.UserError(
      "The records are not the first ones of this evaluation, in its order. "
      "Give another --output."
    )
  bar = progress.bar(len(work), "evaluating")
  bar.update(len(done))
  last = time.monotonic()

  def keep(batch: list[dict[str, Any]], pending: shares.Pending) -> None:
    nonlocal last
    graded = shares.collect([pending])
    for row, record in enumerate(batch):
      record["reward"] = float(graded.reward_B[row])
      record["answer"] = graded.answers[row]
      record["grades"] = {k: float(x[row]) for k, x in graded.grades.items()}
    now = time.monotonic()
    kept.append(batch, now - last)
    last = now
    bar.update(len(batch))

  # A batch is graded while the next one is drawn.
  ahead = None
  first = len(done)
  for rollout in sampler.sample(
    params,
    lora,
    [ids for _, ids, _ in work],
    jax.random.key(seed),
    np.array([(example.id, index) for example, _, index in work], np.uint32),
    first,
  ):
    # The last batch repeats its last row; those are not counted.
    batch = work[first:][: sampler.batch_size]
    first += len(batch)
    fields = [example.fields for example, _, _ in batch]
    pending = shares.submit(rollout, fields, tokenizer, grader)
    if ahead is not None:
      keep(*ahead)
    num_steps_B = processes.to_host(rollout.num_steps)
    ahead = _records(batch, pending, num_steps_B, tokenizer.eos_id), pending
  if ahead is not None:
    keep(*ahead)
  bar.close()
  return statistics.Result(kept.done, num_samples, kept.seconds)


def _records(
  work: Sequence[tuple[tasks.Example, Sequence[int], int]],
  pending: shares.Pending,
  num_steps_B: np.ndarray,
  eos_id: int,
) -> list[dict[str, Any]]:
  """What is known of a batch before it is graded."""
  place_C = np.arange(1, pending.completion_BxC.shape[1] + 1)
  length_B = ((pending.completion_BxC != eos_id) * place_C).max(axis=1)
  return [
    {
      "id": example.id,
      "index": index,
      "prompt": example.messages[-1]["content"],
      "completion": text,
      "num_tokens": int(length_B[row]),
      "num_steps": int(num_steps_B[row]),
      "fields": example.fields,
    }
    for row, ((example, _, index), text) in enumerate(
      zip(work, pending.texts, strict=True)
    )
  ]


def run(
  c: config_lib.ConfigDict,
  checkpoint: str = "",
  output: str = "",
  *,
  num_samples: int = 1,
) -> statistics.Result:
  """Evaluates the model of a config, or a checkpoint of a run of it.

  What is complete in `output` is read from there and loads no model.

  Raises:
    UserError: anything that the user has to change, as early as it shows.
  """
  check(c, num_samples)
  if checkpoint:
    checkpoint_named.find(checkpoint)
  examples = build.examples(c, c.evaluate.split)
  asked = candidate.settings(c, examples, checkpoint, num_samples)
  result = finished(output, asked, num_samples)
  if result is None:
    with build.grader(c) as grader:
      loaded = candidate.policy(c, checkpoint)
      result = measure(c, loaded, examples, grader, asked, output)
  return dataclasses.replace(result, problems=asked["problems"])


def check(c: config_lib.ConfigDict, num_samples: int = 1) -> None:
  """Raises UserError for what shows before any model is loaded."""
  config_check.check(c)
  if num_samples < 1:
    raise errors.UserError(f"--num_samples={num_samples} must be at least 1.")
  e = c.evaluate
  if num_samples > 1 and e.temperature == 0 and e.unmask_rule != "random":
    raise errors.UserError(
      f"--num_samples={num_samples} would draw the same completion again and "
      f"again: config.evaluate.temperature=0 and unmask_rule={e.unmask_rule!r} "
      "leave nothing to chance. Set a temperature above 0."
    )


def finished(
  output: str, asked: dict[str, Any], num_samples: int
) -> statistics.Result | None:
  """The result of a complete evaluation in `output`, else None.

  Of several processes the first looks, and tells the others.

  Raises:
    UserError: what is there, complete or not, was made with other settings.
  """
  found = None
  if processes.is_main():
    records.check(output, asked)
    if output and records.result(output) is not None:
      kept = records.Records(output)
      found = {"records": kept.done, "seconds": kept.seconds}
  found = processes.exchange(found)[0]
  if found is None:
    return None
  return statistics.Result(found["records"], num_samples, found["seconds"])


def measure(
  c: config_lib.ConfigDict,
  loaded: build.Policy,
  examples: Sequence[tasks.Example],
  grader: pool.Grader,
  asked: dict[str, Any],
  output: str,
) -> statistics.Result:
  """Evaluates a loaded model under what `candidate.settings` asked for."""
  dataset = data.Dataset(examples, loaded.tokenizer, c.data.max_prompt_length)
  prompts = dataset.prompts[: c.evaluate.num_examples or None]
  sampler = build.make_sampler(c, c.evaluate, loaded)
  asked = {**asked, "weights": candidate.fingerprint(loaded)}
  with records.start(output if processes.is_main() else "", asked) as kept:
    kept.done = processes.exchange(kept.done)[0]
    result = evaluate(
      sampler,
      loaded.params,
      loaded.lora,
      [(prompt.example, prompt.tokens) for prompt in prompts],
      loaded.tokenizer,
      grader,
      seed=c.seed,
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
