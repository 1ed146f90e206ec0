r"""How likely a model finds given completions: the any-order bound of a file.

    agrpo likelihood --config=gsm8k \
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

from agrpo_jax import command
from agrpo_jax import data
from agrpo_jax import errors
from agrpo_jax import evaluate
from agrpo_jax import settings as settings_lib
from agrpo_jax import tasks
from agrpo_jax.evaluation import accuracy
from agrpo_jax.evaluation import likelihood as likelihood_lib
from agrpo_jax.evaluation import records
from agrpo_jax.evaluation import statistics
from agrpo_jax.parallel import processes
from agrpo_jax.port import model as model_lib
from agrpo_jax.runs import checkpoint_named
from agrpo_jax.runs import progress

# Of a record, by key; `run` says what they are.
_KINDS = {"id": int, "num_tokens": int, "log_likelihood": float}


def run(
  s: settings_lib.Rl,
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
    s: the settings; those of sampling are without effect.
    pairs: JSONL file, or "" for the task's demonstrations.
    checkpoint: a run's work directory, or "" for the model itself.
    output: see `records`, or "".
    num_draws: masks per completion.

  Raises:
    UserError: anything that the user has to change.
  """
  if num_draws < 1:
    raise errors.UserError(f"--num_draws={num_draws} must be at least 1.")
  examples = _examples(s, pairs)
  asked = {
    "config": evaluate.model_settings(s, checkpoint),
    "checkpoint": checkpoint,
    "train_step": checkpoint_named.find_train_step(checkpoint),
    "num_draws": num_draws,
    # By contents: the file of that name may be another one by now.
    "pairs": hashlib.sha256(
      json.dumps(
        [(e.messages, e.fields["completion"]) for e in examples]
      ).encode()
    ).hexdigest()[:16],
  }
  # Before the model is loaded: what is complete needs none.
  complete = accuracy.finished(output, asked, 1, _KINDS)
  if complete is not None:
    return [dict(record) for record in complete.records]
  model = model_lib.load_trained(s.model, s.lora, s.mesh.make(), checkpoint)
  prompts = data.Dataset(
    examples, model.tokenizer, s.data.max_prompt_length
  ).prompts
  texts = [prompt.example.fields["completion"] for prompt in prompts]
  completions = [model.tokenizer.encode(text) for text in texts]
  scorer = likelihood_lib.Scorer(
    model,
    [prompt.tokens for prompt in prompts],
    completions,
    [prompt.example.id for prompt in prompts],
    num_draws=num_draws,
    batch_size=s.evaluate.batch_size,
    bucket=s.data.bucket,
    seed=s.seed,
  )
  # A path may hold other weights by now; records must not mix them.
  asked["weights"] = evaluate.fingerprint(model)
  with (
    records.start(output if processes.is_main() else "", asked, _KINDS) as kept,
    progress.bar(len(prompts), "scoring") as bar,
  ):
    # Process 0 alone reads the file, and all have to go on from the same place.
    kept.done = processes.exchange(kept.done)[0]
    first = len(kept.done)
    bar.update(first)
    last = time.monotonic()
    for index, draws_M in enumerate(scorer.estimates(first), first):
      record = {
        "id": prompts[index].example.id,
        "prompt": prompts[index].example.messages[-1]["content"],
        "completion": texts[index],
        "num_tokens": len(completions[index]),
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


def _examples(s: settings_lib.Rl, pairs: str) -> list[tasks.Example]:
  """Examples whose `fields["completion"]` is to be scored."""
  if pairs:
    if not pathlib.Path(pairs).expanduser().is_file():
      raise errors.UserError(f"--pairs={pairs!r} does not exist.")
    return data.from_jsonl(str(pathlib.Path(pairs).expanduser()))
  completion_fn = s.task.load_maker_of_demonstrations()
  examples = data.load_examples(s.task, s.data, s.evaluate.split)
  return [
    tasks.Example(
      id=example.id,
      messages=example.messages,
      fields={
        "completion": completion_fn(
          example, random.Random(f"{s.seed}/{example.id}")
        )
      },
      prefill=example.prefill,
    )
    for example in examples[: s.evaluate.num_examples or None]
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


def main(argv: Sequence[str]) -> None:
  del argv
  asked = flags.FLAGS
  c, given = command.evaluation_config(model=asked.model)
  evaluate.use_run(c, asked.checkpoint, given)
  done = run(
    settings_lib.rl(c),
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
  command.define_flags("model", "checkpoint", "output")
  flags.DEFINE_string("pairs", "", "JSONL of prompts and completions.")
  flags.DEFINE_integer("num_draws", 128, "Masks per completion.")
  command.main(main, required=["config"])
