r"""Supervised fine-tuning of a masked diffusion language model.

    agrpo sft --config=sft_sudoku \
      --config.workdir=runs/sft_sudoku

Demonstrations come from the task's own generator, or from a JSONL file with
`prompt` and `completion` (`config.data.path`). A completion shorter than
`completion_length` is filled up with EOS, and those EOS are targets like the
rest: this is how the model learns to stop (arXiv:2502.09992, section 2.3).
"""

import dataclasses
import pathlib
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from agrpo_jax import command
from agrpo_jax import data
from agrpo_jax import errors
from agrpo_jax import optimizer
from agrpo_jax import settings as settings_lib
from agrpo_jax import types
from agrpo_jax.models import base
from agrpo_jax.models import lora as lora_lib
from agrpo_jax.models import tokens
from agrpo_jax.models import transformer
from agrpo_jax.parallel import mesh as mesh_lib
from agrpo_jax.parallel import processes
from agrpo_jax.policies import block_causal
from agrpo_jax.policies import row
from agrpo_jax.port import model as model_lib
from agrpo_jax.port import model_folder
from agrpo_jax.report import page
from agrpo_jax.runs import metrics
from agrpo_jax.runs import progress
from agrpo_jax.runs import run as run_lib

# Bounds what a masked position weighs in the loss, 1 / ratio.
_MIN_MASK_RATIO = 1e-3


class Batch(flax.struct.PyTreeNode):
  """B demonstrations and the noise that hides parts of them.

  Attributes:
    tokens: int32 [B, P], the prompts, padded on the right.
    length: int32 [B], their lengths.
    completion: int32 [B, C], filled up with EOS.
    is_masked: bool [B, C], hidden from the network; never the first tokens that
      are the prompt's (`row.cut`).
    mask_ratio: float32 [B], the mask ratio t of each row.
  """

  tokens: jax.Array
  length: jax.Array
  completion: jax.Array
  is_masked: jax.Array
  mask_ratio: jax.Array


def noise(
  key: jax.Array, num_rows: int, num_tokens: int
) -> tuple[jax.Array, jax.Array]:
  """Mask ratios t in (0.001, 1) and masks, each position masked with chance t.

  The ratios are one to each of B equal slices, in random order: uniform for
  every row, and of less variance in the mean than independent ones.

  Returns:
    is_masked bool [B, C], ratio float32 [B].
  """
  order_key, ratio_key, mask_key = jax.random.split(key, 3)
  stratum_B = jax.random.permutation(order_key, num_rows)
  uniform_B = (
    stratum_B + jax.random.uniform(ratio_key, (num_rows,))
  ) / num_rows
  mask_ratio_B = _MIN_MASK_RATIO + (1 - _MIN_MASK_RATIO) * uniform_B
  uniform_BxC = jax.random.uniform(mask_key, (num_rows, num_tokens))
  return uniform_BxC < mask_ratio_B[:, None], mask_ratio_B


def loss(
  network: types.Network, batch: Batch, mask_id: int, attention_block: int = 0
) -> jax.Array:
  """LLaDA's SFT loss (arXiv:2502.09992, equation 5), mean over rows.

    1 / (t C) sum over masked positions of -log p(token | prompt, partial)

  where C counts the EOS that fill a completion up. Its expectation over the
  noise bounds the negative log-likelihood per token, in nats. Where attention
  is block-causal, a block sees the whole of those before it, and the bound is
  that of block diffusion (arXiv:2503.09573, equation 8).

  Args:
    network: bound to its parameters.
    batch: B demonstrations.
    mask_id: id of [MASK].
    attention_block: the network's, see `base.Shape`.

  Returns:
    float32 scalar.
  """
  num_tokens = batch.completion.shape[1]
  partial_BxC = jnp.where(batch.is_masked, mask_id, batch.completion)
  if attention_block:
    logits_BxCxV = block_causal.partial_logits(
      network,
      batch.tokens,
      batch.length,
      batch.completion,
      partial_BxC,
    )
  else:
    logits_BxCxV = row.logits_at(
      network,
      batch.tokens,
      batch.length,
      partial_BxC,
      jnp.broadcast_to(jnp.arange(num_tokens), partial_BxC.shape),
    )
  cross_entropy_BxC = optax.softmax_cross_entropy_with_integer_labels(
    logits_BxCxV, batch.completion
  )
  return (
    cross_entropy_BxC * batch.is_masked / batch.mask_ratio[:, None]
  ).mean()


def make_train_step(
  model: model_lib.Model,
  transformation: optax.GradientTransformation,
  microbatch: int,
) -> Callable[..., tuple[types.TrainState, dict[str, jax.Array]]]:
  """(state, batch) -> (state, metrics): one optimizer update."""
  shard = mesh_lib.shard_rows(model.mesh)
  mask_id = model.tokenizer.mask_id

  def train_step(
    state: types.TrainState, batch: Batch
  ) -> tuple[types.TrainState, dict[str, jax.Array]]:
    def microbatch_loss(trainable: types.Tree, part: Batch) -> jax.Array:
      now = state.with_trainable(trainable)
      network = model.bind(now.params, now.lora)
      # Its rows stood side by side in the batch, on few of the devices.
      return loss(network, shard(part), mask_id, model.shape.attention_block)

    def accumulate(carry: Any, part: Batch) -> Any:
      value, gradient = jax.value_and_grad(microbatch_loss)(
        state.trainable, part
      )
      return jax.tree.map(jnp.add, carry, (value, gradient)), None

    parts = jax.tree.map(
      lambda x: x.reshape(-1, microbatch, *x.shape[1:]), batch
    )
    zeros = jax.tree.map(jnp.zeros_like, state.trainable)
    total, _ = jax.lax.scan(accumulate, (jnp.zeros(()), zeros), parts)
    # Microbatches are of one size: the mean of their means is the batch's.
    num_parts = batch.mask_ratio.shape[0] // microbatch
    value, gradient = jax.tree.map(lambda x: x / num_parts, total)
    updates, opt_state = transformation.update(
      gradient, state.opt_state, state.trainable
    )
    state = state.with_trainable(
      optax.apply_updates(state.trainable, updates)
    ).replace(opt_state=opt_state, train_step=state.train_step + 1)
    return state, {"loss": value, "grad_norm": optax.tree.norm(gradient)}

  return train_step


def fine_tune(s: settings_lib.Sft) -> None:
  """Runs until `train.num_steps`, from where the work directory is.

  Args:
    s: the settings of the run.

  Raises:
    UserError: anything that the user has to change.
    FloatingPointError: a loss or gradient that is not finite.
  """
  with run_lib.claim(s) as claimed, page.at_end(s, claimed):
    source = s.model
    if s.network:
      initial, shape = claimed.folder / "initial", initial_shape(s.network)
      # What a start that was refused later has left is made anew.
      if processes.is_main() and not claimed.has_begun:
        make_initial(shape, s.seed, initial)
      processes.exchange(None)  # the others read it when it is all there
      source = dataclasses.replace(source, path=str(initial))
    mesh = s.mesh.make()
    mesh_lib.check_rows(mesh, "config.sft.microbatch", s.microbatch)
    print(f"Loading {source.path}.", flush=True)
    model = model_lib.load_model(source, s.lora, mesh, seed=s.seed)
    demonstrations = load_demonstrations(s, model.tokenizer, model.shape)
    transformation = optimizer.make(s.optimizer)
    run, state = claimed.begin(
      model.initial_state(transformation),
      model.base_model,
      dataclasses.asdict(model.shape),
    )
    learn = jax.jit(
      make_train_step(model, transformation, s.microbatch),
      donate_argnames="state",
    )
    report = progress.Progress(s.train.num_steps, run.first_step)
    for train_step in range(run.first_step, s.train.num_steps):
      clock = progress.Clock()
      tokens_BxP, length_B, completion_BxC, num_given_B = demonstrations.batch(
        train_step
      )
      # From the seed and the step alone: a run that continues draws the same.
      key = jax.random.fold_in(jax.random.key(s.seed), train_step)
      is_masked_BxC, mask_ratio_B = noise(key, *completion_BxC.shape)
      place_C = np.arange(completion_BxC.shape[1])
      is_masked_BxC &= place_C[None] >= num_given_B[:, None]
      batch = Batch(
        tokens=jnp.asarray(tokens_BxP),
        length=jnp.asarray(length_B),
        completion=jnp.asarray(completion_BxC),
        is_masked=is_masked_BxC,
        mask_ratio=mask_ratio_B,
      )
      state, learned = learn(
        state, jax.device_put(batch, mesh_lib.rows(model.mesh))
      )
      learned["learning_rate"] = optimizer.last_learning_rate(
        s.optimizer, state.opt_state
      )
      # Waits for the device, without which the lap would time the dispatch.
      scalars = metrics.to_floats(learned)
      clock.lap("update")
      scalars |= {f"seconds/{k}": v for k, v in clock.seconds.items()}
      run.finish_step(state, train_step, scalars)
      report.step(train_step, scalars, clock.seconds, completion_BxC.size)
    if s.output:
      export(s, source, model, state)


def load_demonstrations(
  s: settings_lib.Sft, tokenizer: tokens.Tokenizer, shape: base.Shape
) -> data.Demonstrations:
  """Reads, or makes, what is to be learned.

  Raises:
    UserError: a task that makes no demonstrations, or too few of them; a length
      that is not one of whole blocks.
  """
  if s.completion_length % max(1, shape.attention_block):
    raise errors.UserError(
      f"config.sft.completion_length={s.completion_length} is not a multiple "
      f"of {shape.attention_block}, the blocks of the model's attention."
    )
  if s.task:
    completion_fn = s.task.load_maker_of_demonstrations()
    dataset = data.load_dataset(s.task, s.data, tokenizer, "train")
  else:
    completion_fn = data.recorded
    dataset = data.Dataset(
      data.from_jsonl(s.data.path), tokenizer, s.data.max_prompt_length
    )
  return data.Demonstrations(
    dataset,
    completion_fn,
    tokenizer,
    completion_length=s.completion_length,
    batch_size=s.batch_size,
    bucket=s.data.bucket,
    seed=s.seed,
    prompt_multiple=shape.prompt_multiple,
  )


def initial_shape(network: Mapping[str, Any]) -> base.Shape:
  """Returns the shape of a network to start from random parameters.

  Args:
    network: `config.model.network`; what it leaves out is small LLaDA's.

  Raises:
    UserError: fields that a shape lacks, or values that cannot be.
  """
  vocab = tokens.byte_network_settings()
  defaults: dict[str, Any] = dict(
    model_type="llada",
    embedding_size=vocab["vocab_size"],
    num_kv_heads=network.get("num_heads"),
    rope_theta=500_000.0,
    norm_eps=1e-5,
    qkv_bias=False,
    tied_head=False,
    max_length=4096,
  )
  try:
    return base.Shape(**(vocab | defaults | dict(network)))
  except TypeError as error:
    raise errors.UserError(f"config.model.network: {error}") from error


def make_initial(shape: base.Shape, seed: int, folder: pathlib.Path) -> None:
  """Writes a model of random parameters and the byte tokenizer."""
  tokens.write_byte_tokenizer(folder)
  params = transformer.init(shape, jax.random.key(seed))
  model_folder.save(folder, shape, params)


def export(
  s: settings_lib.Sft,
  source: base.Source,
  model: model_lib.Model,
  state: types.TrainState,
) -> None:
  """Writes what was trained as a checkpoint in Hugging Face's layout."""
  params = state.params
  if model.lora_settings is not None:
    params = lora_lib.merge(params, state.lora, model.lora_settings.scale)
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  folder = pathlib.Path(s.output).expanduser()
  model_folder.save(folder, model.shape, params, source=source.path)
  print(f"Wrote {folder}")


def main(argv: Sequence[str]) -> None:
  del argv
  fine_tune(settings_lib.sft(command.CONFIG.value))


if __name__ == "__main__":
  command.main(main, required=["config"])
