"""How far a base in int8 is off: logits of masked demonstrations, compared.

    python benchmarks/quantized_base.py --config=sudoku_tiny

Held-out demonstrations of the task lose tokens at a random ratio, as in
training; the logits at the masked positions are compared between dtypes, with
kernels of the layers in int8 and without. Prints a table: `rms` is the root
mean square of the difference over the standard deviation of the logits, KL is
of the probabilities at a position, in nats, `same` the share of positions whose
most probable token is the same.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from agrpo_jax import command
from agrpo_jax import data
from agrpo_jax import settings as settings_lib
from agrpo_jax import sft
from agrpo_jax.policies import row
from agrpo_jax.port import model as model_lib

_EXACT = ("float32", "none")
_PAIRS = (
  (("bfloat16", "none"), _EXACT),
  (("float32", "int8"), _EXACT),
  (("bfloat16", "int8"), ("bfloat16", "none")),
  (("bfloat16", "int8"), _EXACT),
)


def masked_logits(
  s: settings_lib.Rl, dtype: str, quantize: str, num_batches: int
) -> np.ndarray:
  """Logits of the masked positions of all demonstrations, [positions, V]."""
  source = dataclasses.replace(s.model, dtype=dtype, quantize=quantize)
  model = model_lib.load_model(source, None, s.mesh.make(), is_trained=False)
  demonstrations = data.Demonstrations(
    data.load_dataset(s.task, s.data, model.tokenizer, s.evaluate.split),
    s.task.load_maker_of_demonstrations(),
    model.tokenizer,
    completion_length=s.evaluate.sampling.completion_length,
    batch_size=s.evaluate.batch_size,
    bucket=s.data.bucket,
    seed=s.seed,
  )
  network = model.bind(model.params, None)

  @jax.jit
  def read(
    tokens: jax.Array, length: jax.Array, partial: jax.Array
  ) -> jax.Array:
    at = jnp.broadcast_to(jnp.arange(partial.shape[1]), partial.shape)
    return row.logits_at(network, tokens, length, partial, at)

  found = []
  for batch in range(num_batches):
    tokens_BxP, length_B, completion_BxC, _ = demonstrations.batch(batch)
    key = jax.random.fold_in(jax.random.key(s.seed), batch)
    is_masked_BxC, _ = sft.noise(key, *completion_BxC.shape)
    partial = jnp.where(is_masked_BxC, model.tokenizer.mask_id, completion_BxC)
    logits = read(tokens_BxP, length_B, partial)
    found.append(np.asarray(logits)[np.asarray(is_masked_BxC)])
  return np.concatenate(found).astype(np.float64)


def log_softmax(logits: np.ndarray) -> np.ndarray:
  shifted = logits - logits.max(axis=-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def main(argv: Sequence[str]) -> None:
  del argv
  s = settings_lib.rl(command.CONFIG.value)
  kinds = {kind for pair in _PAIRS for kind in pair}
  logits = {
    kind: masked_logits(s, *kind, flags.FLAGS.batches) for kind in kinds
  }
  exact = logits[_EXACT]
  print(
    f"{len(exact)} masked positions; logits have standard deviation "
    f"{exact.std():.2f}\n"
  )
  print("| logits of | against | max | rms | mean KL | largest KL | same |")
  print("| --- | --- | --- | --- | --- | --- | --- |")
  for kind, other in _PAIRS:
    found, wanted = logits[kind], logits[other]
    q, p = log_softmax(found), log_softmax(wanted)
    kl = (np.exp(p) * (p - q)).sum(axis=-1)
    rms = np.sqrt(np.mean((found - wanted) ** 2)) / wanted.std()
    same = (found.argmax(axis=-1) == wanted.argmax(axis=-1)).mean()
    print(
      f"| {kind[0]}, {kind[1]} | {other[0]}, {other[1]} "
      f"| {np.abs(found - wanted).max():.3f} | {100 * rms:.2f} % "
      f"| {kl.mean():.1e} | {kl.max():.1e} | {100 * same:.2f} % |"
    )


if __name__ == "__main__":
  flags.DEFINE_integer("batches", 8, "Of evaluate.batch_size demonstrations.")
  command.main(main, required=["config"])
