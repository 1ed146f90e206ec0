r"""How likely a model finds given completions: `elbo.py` over a file.

    python -m agrpo_jax.likelihood --config=configs/gsm8k.py \
      --pairs=FILE.jsonl [--model=FOLDER_OR_HUB_ID] [--checkpoint=WORKDIR] \
      [--num_draws=128] [--output=FOLDER or FILE.jsonl]

A line of FILE is {"prompt": text or chat messages, "completion": text}. Without
--pairs the task's own demonstrations of the held-out split are scored. Only a
completion's own tokens count; no EOS is added. What --output holds, and that a
stopped command goes on, is as for `agrpo_jax.evaluate`.
"""

import hashlib
import json
import pathlib
import random
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from agrpo_jax import build
from agrpo_jax import command
from agrpo_jax import config as config_lib
from agrpo_jax import config_check
from agrpo_jax import data
from agrpo_jax import demonstrations
from agrpo_jax import errors
from agrpo_jax import presets
from agrpo_jax import tasks
from agrpo_jax.evaluation import accuracy
from agrpo_jax.evaluation import candidate
from agrpo_jax.evaluation import records
from agrpo_jax.evaluation import statistics
from agrpo_jax.objectives import elbo
from agrpo_jax.parallel import processes
from agrpo_jax.runs import checkpoint_named
from agrpo_jax.runs import progress
from agrpo_jax.tasks import contract


def run(
  c: config_lib.ConfigDict,
  pairs: str = "",
  checkpoint: str = "",
  output: str = "",
  *,
  num_draws: int = 128,
) -> list[dict[str, Any]]:
  """Scores completions; a record for each.

  A record is {"id", "prompt", "completion", "num_tokens", "log_likelihood",
  "standard_error"}: natural logarithm, the mean over draws, and the error of
  that mean as if the draws were independent (stratified ones have less), None
  for a single draw.

  Args:
    c: the config; sampling settings are without effect.
    pairs: JSONL file, or "" for the task's demonstrations.
    checkpoint: a run's work directory, or "" for the model itself.
    output: see `records`, or "".
    num_draws: masks per completion.

  Raises:
    UserError: anything that the user has to change.
  """
  config_check.check(c)
  if checkpoint:
    checkpoint_named.find(checkpoint)
  if num_draws < 1:
    raise errors.UserError(f"--num_draws={num_draws} must be at least 1.")
  examples = _examples(c, pairs)
  asked = {
    "config": {
      "seed": c.seed,
      "model": candidate.model_settings(c),
      "lora": c.lora.to_dict() if checkpoint else None,
      "data": {"max_prompt_length": c.data.max_prompt_length},
    },
    "checkpoint": checkpoint,
    "train_step": checkpoint_named.find_train_step(checkpoint),
    "num_draws": num_draws,
    "pairs": hashlib.sha256(
      json.dumps(
        [(e.messages, e.fields["completion"]) for e in examples]
      ).encode()
    ).hexdigest()[:16],
  }
  complete = accuracy.finished(output, asked, 1)
  if complete is not None:
    return [dict(record) for record in complete.records]
  policy = candidate.policy(c, checkpoint)
  prompts = data.Dataset(
    examples, policy.tokenizer, c.data.max_prompt_length
  ).prompts
  texts = [prompt.example.fields["completion"] for prompt in prompts]
  completions = [policy.tokenizer.encode(text) for text in texts]
  scorer = elbo.Scorer(
    policy,
    [prompt.tokens for prompt in prompts],
    completions,
    [prompt.example.id for prompt in prompts],
    num_draws=num_draws,
    batch_size=c.evaluate.batch_size,
    bucket=c.data.bucket,
    seed=c.seed,
  )
  asked["weights"] = candidate.fingerprint(policy)
  with (
    records.start(output if processes.is_main() else "", asked) as kept,
    progress.bar(len(prompts), "scoring") as bar,
  ):
    kept.done = processes.exchange(kept.done)[0]
    first = len(kept.done)
    bar.update(first)
    last = time.monotonic()
    for place, draws_M in enumerate(scorer.estimates(first), first):
      record = {
        "id": prompts[place].example.id,
        "prompt": prompts[place].example.messages[-1]["content"],
        "completion": texts[place],
        "num_tokens": len(completions[place]),
        "log_likelihood": float(draws_M.mean()),
        "standard_error": statistics.standard_error(draws_M)
        if num_draws > 1
        else None,
      }
      now = time.monotonic()
      kept.append([record], now - last)
      last = now
      bar.update()
    kept.finish(figures(kept.done))
  return kept.done


def _examples(c: config_lib.ConfigDict, pairs: str) -> list[tasks.Example]:
  """Examples whose `fields["completion"]` is to be scored."""
  if pairs:
    if not pathlib.Path(pairs).expanduser().is_file():
      raise errors.UserError(f"--pairs={pairs!r} does not exist.")
    return demonstrations.from_jsonl(str(pathlib.Path(pairs).expanduser()))
  task = build.task(c)
  if not hasattr(task, "demonstration"):
    raise errors.UserError(
      f"The task {c.task.name or c.task.path!r} makes no demonstrations; give "
      "--pairs=FILE.jsonl."
    )
  options = config_lib.task_options(c)
  examples = build.examples(c, c.evaluate.split)
  return [
    tasks.Example(
      id=example.id,
      messages=example.messages,
      fields={
        "completion": contract.demonstration(
          task, example, random.Random(f"{c.seed}/{example.id}"), options
        )
      },
      prefill=example.prefill,
    )
    for example in examples[: c.evaluate.num_examples or None]
  ]


def figures(done: Sequence[dict[str, Any]]) -> dict[str, float]:
  """Means over completions, and per token over all of them."""
  value_N = np.array([record["log_likelihood"] for record in done])
  num_tokens = sum(record["num_tokens"] for record in done)
  found = {
    "log_likelihood": float(value_N.mean()),
    "per_token": float(value_N.sum() / num_tokens),
    "num_completions": float(value_N.size),
    "num_tokens": float(num_tokens),
  }
  if value_N.size > 1:
    found["log_likelihood_standard_error"] = statistics.standard_error(value_N)
  return found


def _define_flags() -> None:
  # Not when this module is imported: other commands have flags of their own.
  flags.DEFINE_string("pairs", "", "JSONL of prompts and completions.")
  flags.DEFINE_string(
    "model", "", "Folder or hub id, instead of config.model.path."
  )
  flags.DEFINE_string("checkpoint", "", checkpoint_named.HELP)
  flags.DEFINE_integer("num_draws", 128, "Masks per completion.")
  flags.DEFINE_string(
    "output", "", "Folder, or file ending in .jsonl, for the records."
  )


def main(argv: Sequence[str]) -> None:
  del argv
  asked = flags.FLAGS
  done = run(
    presets.config("config", asked.model),
    asked.pairs,
    asked.checkpoint,
    asked.output,
    num_draws=asked.num_draws,
  )
  found = figures(done)
  error = ""
  if len(done) > 1:
    error = f" ± {found['log_likelihood_standard_error']:.3f} (standard error)"
  print(
    f"log-likelihood (ELBO) {found['log_likelihood']:.3f}{error} nats per "
    f"completion, mean of {len(done)}; {found['per_token']:.4f} per token, "
    f"perplexity at most {np.exp(-found['per_token']):.3f}"
  )


if __name__ == "__main__":
  _define_flags()
  command.main(main, required=["config"])
