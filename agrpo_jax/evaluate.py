"""Held-out accuracy under given sampling settings.

    python -m agrpo_jax.evaluate --config=configs/gsm8k.py --checkpoint=WORKDIR

Without --checkpoint it is the model of `config.model.path`. A completion is
drawn from a key of its own, so the result depends neither on the batch size nor
on the number of devices.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from agrpo_jax import build
from agrpo_jax import checkpoint
from agrpo_jax import command
from agrpo_jax import config as config_lib
from agrpo_jax import errors
from agrpo_jax import grading
from agrpo_jax import progress
from agrpo_jax import sampler as sampler_lib
from agrpo_jax import tokens
from agrpo_jax import types


@dataclasses.dataclass(frozen=True)
class Result:
  """What an evaluation measured.

  Attributes:
    grades: name -> float64 [n], per example; "accuracy" is always there.
    num_tokens: tokens per completion up to the last that is not EOS, mean.
    num_steps: denoising steps per completion, mean.
    seconds: wall clock, grading and compilation included.
    records: per example: prompt, completion and verdicts.
  """

  grades: dict[str, np.ndarray]
  num_tokens: float
  num_steps: float
  seconds: float
  records: list[dict[str, Any]]

  @property
  def accuracy(self) -> float:
    return float(self.grades["accuracy"].mean())

  @property
  def standard_error(self) -> float:
    """Of the accuracy, over the choice of examples."""
    accuracy_n = self.grades["accuracy"]
    if accuracy_n.size < 2:
      return float("nan")
    return float(accuracy_n.std(ddof=1) / np.sqrt(accuracy_n.size))

  def scalars(self, prefix: str = "") -> dict[str, float]:
    means = {name: float(x.mean()) for name, x in self.grades.items()}
    return {
      prefix + name: value
      for name, value in {
        **means,
        "accuracy_standard_error": self.standard_error,
        "mean_length": self.num_tokens,
        "mean_denoise_steps": self.num_steps,
        "seconds": self.seconds,
      }.items()
    }


def evaluate(
  sampler: sampler_lib.Sampler,
  params: types.Tree,
  lora: types.Tree | None,
  rows: Sequence[tuple[Any, Sequence[int]]],
  tokenizer: tokens.Tokenizer,
  grader: grading.Grader,
  *,
  seed: int,
) -> Result:
  """Draws and grades one completion per example.

  Args:
    sampler: with the evaluation's settings.
    params: of the network.
    lora: adapters, or None.
    rows: (example, prompt's ids) pairs.
    tokenizer: for the text of completions.
    grader: of the task.
    seed: of the draws; each example has its own key, from its id.
  """
  begin = time.monotonic()
  examples = [example for example, _ in rows]
  key_B = sampler_lib.row_keys(
    jax.random.key(seed),
    np.array([example.id for example in examples]),
    np.zeros(len(rows), int),
  )
  texts: list[str] = []
  pending, lengths, num_steps = [], [], []
  bar = progress.bar(len(rows), "evaluating")
  for rollout in sampler.sample(params, lora, [ids for _, ids in rows], key_B):
    # The last batch repeats its last row; those are not counted.
    size = min(sampler.batch_size, len(rows) - len(texts))
    completion_BxC = np.asarray(rollout.completion)[:size]
    batch = tokenizer.decode_batch(completion_BxC)
    fields = [example.fields for example in examples[len(texts) :][:size]]
    pending.append(grader.submit(batch, fields))
    texts += batch
    lengths.append((completion_BxC != tokenizer.eos_id).sum(axis=1))
    num_steps.append(np.asarray(rollout.num_steps)[:size])
    bar.update(size)
  graded = grading.concatenate([future.result() for future in pending])
  bar.close()
  return Result(
    grades=graded.grades,
    num_tokens=float(np.concatenate(lengths).mean()),
    num_steps=float(np.concatenate(num_steps).mean()),
    seconds=time.monotonic() - begin,
    records=[
      {
        "id": example.id,
        "prompt": example.messages[-1]["content"],
        "completion": text,
        "reward": float(graded.reward_B[row]),
        **{name: float(x[row]) for name, x in graded.grades.items()},
        "fields": example.fields,
      }
      for row, (example, text) in enumerate(zip(examples, texts, strict=True))
    ],
  )


_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", "", "Work directory of a run; its newest checkpoint is used."
)
_OUTPUT = flags.DEFINE_string(
  "output", "", "JSONL file to write, a line per example."
)


def run(c: config_lib.ConfigDict, folder: str, output: str) -> Result:
  """Evaluates the model of a config, or a checkpoint of a run of it."""
  config_lib.check(c)
  with build.grader(c) as grader:
    policy = build.policy(c)
    rows = build.held_out(c, policy.tokenizer)
    sampler = build.make_sampler(c, c.evaluate, policy)
    params, lora = policy.params, policy.lora
    if folder:
      params, lora = _restore(policy, folder)
    result = evaluate(
      sampler, params, lora, rows, policy.tokenizer, grader, seed=c.seed
    )
  if output:
    with open(output, "w", encoding="utf-8") as file:
      file.writelines(json.dumps(record) + "\n" for record in result.records)
  return result


def _restore(
  policy: build.Policy, folder: str
) -> tuple[types.Tree, types.Tree | None]:
  """(params, lora) of the newest checkpoint of a run."""
  if not (pathlib.Path(folder) / "checkpoints").is_dir():
    raise errors.UserError(
      f"--checkpoint={folder!r} is not a work directory with checkpoints/."
    )
  trainable = policy.params if policy.lora is None else policy.lora
  with checkpoint.Checkpoints(folder, read_only=True) as checkpoints:
    found = checkpoints.restore_trainable(
      trainable, base_model=policy.base_model
    )
  if found is None:
    raise errors.UserError(f"--checkpoint={folder!r} holds no checkpoint yet.")
  if policy.lora is None:
    return found[0], None
  return policy.params, found[0]


def main(argv: Sequence[str]) -> None:
  del argv
  result = run(command.CONFIG.value, _CHECKPOINT.value, _OUTPUT.value)
  print(
    f"accuracy {100 * result.accuracy:.1f} % "
    f"± {100 * result.standard_error:.1f} (standard error, "
    f"{len(result.records)} examples), "
    f"mean length {result.num_tokens:.1f} tokens, "
    f"{result.num_steps:.1f} denoising steps, {result.seconds:.1f} s"
  )
  for name, value in result.scalars().items():
    print(f"  {name} = {value:.4f}")


if __name__ == "__main__":
  command.main(main, required=["config"])
