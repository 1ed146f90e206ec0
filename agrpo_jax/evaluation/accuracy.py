"""One evaluation: draws completions of held-out prompts, grades, keeps records.

Every completion is drawn from a key of its own, folded from the seed, the
prompt's id and the completion's index. So it does not depend on the batch size,
on the number of devices, on how many completions its prompt gets, or on an
interruption.
"""

import time
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from agrpo_jax import data
from agrpo_jax import errors
from agrpo_jax import types
from agrpo_jax.evaluation import records
from agrpo_jax.evaluation import statistics
from agrpo_jax.grading import pool
from agrpo_jax.grading import shares
from agrpo_jax.models import tokens
from agrpo_jax.parallel import processes
from agrpo_jax.runs import progress
from agrpo_jax.samplers import host

# Of a record, by key; `evaluate` says what they are.
KINDS: Mapping[str, type] = {
  "id": int,
  "index": int,
  "answer": str,
  "grades": dict,
  "num_tokens": int,
  "num_executed_steps": int,
  "num_whole_passes": int,
}


def evaluate(
  sampler: host.Sampler,
  params: types.Tree,
  lora: types.Tree | None,
  prompts: Sequence[data.Prompt],
  tokenizer: tokens.Tokenizer,
  grader: pool.Grader,
  *,
  seed: int,
  num_samples: int = 1,
  kept: records.Records | None = None,
  look: Callable[[types.Rollout], None] = lambda rollout: None,
) -> statistics.Result:
  """Draws and grades completions, and goes on from those that are `kept`.

  A record is {"id", "index", "prompt", "completion", "answer", "reward",
  "grades", "num_tokens", "num_executed_steps", "num_whole_passes",
  "fields"}: id of the prompt, index of the completion among its prompt's, the
  extracted answer ("" for none), every verdict by name, tokens up to the last
  that is not EOS, denoising steps, passes of the network over the whole row.

  Args:
    sampler: with the evaluation's settings.
    params: of the network.
    lora: adapters, or None.
    prompts: the problems.
    tokenizer: for the text of completions.
    grader: of the task.
    seed: of the draws.
    num_samples: completions per prompt.
    kept: what is done already, and where new records go.
    look: is shown the rollout of each batch, in order.
  """
  kept = kept or records.Records()
  work = data.Batch.of(prompts, num_samples)
  done = [[record["id"], record.get("index")] for record in kept.done]
  if done != work.id_Bx2.tolist()[: len(done)]:
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
    params, lora, work.tokens, jax.random.key(seed), work.id_Bx2, first
  ):
    # The last batch repeats its last row; those are not counted.
    batch = work[first : first + sampler.batch_size]
    first += len(batch)
    pending = shares.submit(sampler.drawn(rollout), batch, tokenizer, grader)
    look(rollout)
    if ahead is not None:
      keep(*ahead)
    counts = {
      name: processes.to_host(getattr(rollout, name))
      for name in ("num_executed_steps", "num_whole_passes")
    }
    eos_ids = tokenizer.eos_id, *tokenizer.stop_ids
    ahead = _records(batch, pending, counts, eos_ids), pending
  if ahead is not None:
    keep(*ahead)
  bar.close()
  return statistics.Result(kept.done, num_samples, kept.seconds)


def _records(
  batch: data.Batch,
  pending: shares.Pending,
  counts: dict[str, np.ndarray],
  eos_ids: tuple[int, ...],
) -> list[dict[str, Any]]:
  """Returns the records of a batch, without its grades."""
  place_C = np.arange(1, pending.completion_BxC.shape[1] + 1)
  is_content_BxC = ~np.isin(pending.completion_BxC, eos_ids)
  length_B = (is_content_BxC * place_C).max(axis=1)
  return [
    {
      "id": example.id,
      "index": index,
      "prompt": example.messages[-1]["content"],
      "completion": text,
      "num_tokens": int(length_B[row]),
      **{name: int(count_B[row]) for name, count_B in counts.items()},
      "fields": example.fields,
    }
    for row, (example, index, text) in enumerate(
      zip(batch.examples, batch.index, pending.texts, strict=True)
    )
  ]


def finished(
  output: str,
  asked: dict[str, Any],
  num_samples: int,
  kinds: Mapping[str, type] = KINDS,
) -> statistics.Result | None:
  """The result of a complete evaluation in `output`, else None.

  Complete is what has the figures and as many records as they say: those that
  are damaged may have been removed. Of several processes the first looks, and
  tells the others.

  Raises:
    UserError: what is there, complete or not, was made with other settings, or
      is damaged.
  """
  found = None
  if processes.is_main():
    records.check(output, asked)
    figures = records.result(output) if output else None
    if figures is not None:
      kept = records.Records(output, kinds)
      # Those of a likelihood count completions.
      number = figures.get(
        "num_completions", figures.get("num_problems", -1) * num_samples
      )
      if len(kept.done) == number:
        found = {"records": kept.done, "seconds": kept.seconds}
  found = processes.exchange(found)[0]
  if found is None:
    return None
  return statistics.Result(found["records"], num_samples, found["seconds"])
