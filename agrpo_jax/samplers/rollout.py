"""Draws completions by iterative unmasking, block by block, on device.

One denoising step of one row:

1. The active block is the first one that still has masked positions.
2. Under the `random` rule the positions are chosen now, so that logits are
   needed at U positions only; otherwise at the T positions of the block.
3. One forward pass of the whole row, logits at those positions.
4. A token is drawn at each; the unmask rule says which of them stay.
5. When the block is full and all EOS, the completion ends: what follows is EOS
   and carries no step.

Rows do not wait for each other: each has its own block and step counter, and
the loop ends when every row has.
"""

import chex
import flax.struct
import jax
import jax.numpy as jnp

from agrpo_jax import types
from agrpo_jax.parallel import mesh as mesh_lib
from agrpo_jax.samplers import noise as noise_lib
from agrpo_jax.samplers import sampling as sampling_lib
from agrpo_jax.samplers import unmask


class _Row(flax.struct.PyTreeNode):
  """The loop's state, one row of it; the first fields as in `Rollout`."""

  completion: jax.Array
  unmask_step: jax.Array
  logprob: jax.Array
  entropy: jax.Array
  support: jax.Array | None
  order_logprob: jax.Array
  num_steps: jax.Array
  block: jax.Array  # int32, the active block
  denoise_step: jax.Array  # int32, the next step's index
  is_done: jax.Array  # bool


def place(
  prompt_P: jax.Array,
  prompt_length: jax.Array,
  completion_C: jax.Array,
  is_masked_C: jax.Array,
  mask_id: int,
) -> jax.Array:
  """One row of the network's input: [prompt | partial completion | padding].

  Never padding between prompt and completion: it would stretch the rotary
  distances between them.

  Returns:
    int32 [P + C]; the last P - prompt_length positions are padding.
  """
  partial_C = jnp.where(is_masked_C, mask_id, completion_C)
  row_L = jnp.pad(prompt_P, (0, completion_C.shape[0]), constant_values=mask_id)
  return jax.lax.dynamic_update_slice_in_dim(row_L, partial_C, prompt_length, 0)


def sample_rollout(
  logits_fn: types.LogitsFn,
  prompts: types.Prompts,
  sampling: sampling_lib.Sampling,
  *,
  noise: noise_lib.Noise = noise_lib.NOISE,
  top_k: types.TopK = jax.lax.top_k,
) -> types.Rollout:
  """Draws one completion per row.

  Args:
    logits_fn: the behaviour policy's network.
    prompts: B rows.
    sampling: static settings.
    noise: source of randomness, read through each row's own key.
    top_k: how the largest logits are found, see `ops.split_top_k`.

  Returns:
    The rollout: all that learning needs to know of it.

  Raises:
    ValueError: settings that contradict each other.
  """
  found = sampling_lib.problems(sampling)
  if found:
    raise ValueError("; ".join(found))
  chex.assert_rank([prompts.tokens, prompts.length, prompts.key], [2, 1, 1])
  length_B = prompts.length + sampling.completion_length

  def logits_at(row_B: _Row, offset_BxS: jax.Array) -> jax.Array:
    tokens_BxL = jax.vmap(place, (0, 0, 0, 0, None))(
      prompts.tokens,
      prompts.length,
      row_B.completion,
      row_B.unmask_step == sampling.max_steps,
      sampling.mask_id,
    )
    start_B = prompts.length + jax.vmap(_block_start, (0, None))(
      row_B, sampling
    )
    position_BxS = start_B[:, None] + offset_BxS
    logits_BxSxV = logits_fn(tokens_BxL, length_B, position_BxS)
    if sampling.guidance == 0:
      return logits_BxSxV
    # Classifier-free guidance (arXiv:2502.09992, generate.py): the network
    # without the prompt is the network whose prompt is masked.
    is_prompt_BxL = (
      jnp.arange(tokens_BxL.shape[1])[None, :] < prompts.length[:, None]
    )
    free_BxSxV = logits_fn(
      jnp.where(is_prompt_BxL, sampling.mask_id, tokens_BxL),
      length_B,
      position_BxS,
    )
    return free_BxSxV + (sampling.guidance + 1) * (logits_BxSxV - free_BxSxV)

  def denoise(row_B: _Row) -> _Row:
    offset_BxS, is_chosen_BxS = jax.vmap(
      lambda row, key: _choose_before(row, key, sampling, noise)
    )(row_B, prompts.key)
    logits_BxSxV = logits_at(row_B, offset_BxS)
    return jax.vmap(
      lambda *row: _unmask_row(
        *row, sampling=sampling, noise=noise, top_k=top_k
      ),
      spmd_axis_name=mesh_lib.ROW_AXES,
    )(row_B, prompts.key, offset_BxS, is_chosen_BxS, logits_BxSxV)

  start_B = jax.vmap(lambda _: _start(sampling, support_CxS=None))(length_B)
  if sampling.is_truncated:
    vocab_size = jax.eval_shape(
      logits_at, start_B, jnp.zeros((length_B.shape[0], 1), jnp.int32)
    ).shape[-1]
    support_CxS = _empty_support(sampling, vocab_size)
    start_B = jax.vmap(lambda _: _start(sampling, support_CxS))(length_B)
  row_B = jax.lax.while_loop(
    lambda row_B: ~row_B.is_done.all(), denoise, start_B
  )
  return types.Rollout(
    prompt=prompts.tokens,
    prompt_length=prompts.length,
    completion=row_B.completion,
    unmask_step=row_B.unmask_step,
    logprob=row_B.logprob,
    entropy=row_B.entropy,
    support=row_B.support,
    order_logprob=row_B.order_logprob,
    num_steps=row_B.num_steps,
  )


def _start(
  sampling: sampling_lib.Sampling, support_CxS: jax.Array | None
) -> _Row:
  num_tokens, num_steps = sampling.completion_length, sampling.max_steps
  return _Row(
    completion=jnp.full((num_tokens,), sampling.eos_id, jnp.int32),
    unmask_step=jnp.full((num_tokens,), num_steps, jnp.int32),
    logprob=jnp.zeros((num_tokens,)),
    entropy=jnp.zeros((num_tokens,)),
    support=support_CxS,
    order_logprob=jnp.zeros((num_steps,)),
    num_steps=jnp.int32(0),
    block=jnp.int32(0),
    denoise_step=jnp.int32(0),
    is_done=jnp.bool_(False),
  )


def _empty_support(
  sampling: sampling_lib.Sampling, vocab_size: int
) -> jax.Array:
  num_tokens = sampling.completion_length
  if sampling.top_k > 0:
    size = unmask.support_size(sampling, vocab_size)
    return jnp.full((num_tokens, size), -1, jnp.int32)
  return jnp.zeros((num_tokens, -(-vocab_size // 8)), jnp.uint8)


def _block_start(row: _Row, sampling: sampling_lib.Sampling) -> jax.Array:
  last = sampling.num_blocks - 1
  return jnp.minimum(row.block, last) * sampling.block_length


def _masked(row: _Row, sampling: sampling_lib.Sampling) -> jax.Array:
  """bool [T]: which positions of the active block are still masked."""
  step_T = jax.lax.dynamic_slice_in_dim(
    row.unmask_step, _block_start(row, sampling), sampling.block_length
  )
  return (step_T == sampling.max_steps) & ~row.is_done


def _count(row: _Row, sampling: sampling_lib.Sampling) -> jax.Array:
  """How many positions this step unmasks."""
  counts = jnp.asarray(sampling_lib.step_counts(sampling))
  return counts[row.denoise_step % sampling.steps_per_block]


def _choose_before(
  row: _Row,
  key: jax.Array,
  sampling: sampling_lib.Sampling,
  noise: noise_lib.Noise,
) -> tuple[jax.Array, jax.Array]:
  """Offsets in the block that need logits, and which are chosen already.

  Returns:
    offset int32 [S], ascending; is_chosen bool [S], all false under the rules
    that need to see the draws or the distributions first.
  """
  size = sampling.block_length
  if sampling.unmask_rule != "random":
    return jnp.arange(size, dtype=jnp.int32), jnp.zeros((size,), bool)
  is_masked_T = _masked(row, sampling)
  place_T = unmask.first(noise.order(key, row.denoise_step, size), is_masked_T)
  offset_U = jnp.nonzero(
    place_T < sampling.tokens_per_step, size=sampling.tokens_per_step
  )[0].astype(jnp.int32)
  is_chosen_T = is_masked_T & (place_T < _count(row, sampling))
  return offset_U, is_chosen_T[offset_U]


def _choose_after(
  row: _Row, drawn: unmask.Draw, sampling: sampling_lib.Sampling
) -> jax.Array:
  """bool [T]: what the `confidence` and `entropy` rules unmask."""
  is_masked_T = _masked(row, sampling)
  by_confidence = sampling.unmask_rule == "confidence"
  place_T = unmask.first(
    drawn.confidence if by_confidence else -drawn.entropy, is_masked_T
  )
  if sampling.threshold is None:
    return is_masked_T & (place_T < _count(row, sampling))
  is_sure_T = drawn.confidence >= jnp.log(sampling.threshold)
  return is_masked_T & (is_sure_T | (place_T == 0))


def _unmask_row(
  row: _Row,
  key: jax.Array,
  offset_S: jax.Array,
  is_chosen_S: jax.Array,
  logits_SxV: jax.Array,
  *,
  sampling: sampling_lib.Sampling,
  noise: noise_lib.Noise,
  top_k: types.TopK,
) -> _Row:
  """Draws, unmasks, and moves the row on."""
  filter_all = jax.vmap(unmask.filter_logits, (0, None, None))
  filtered = filter_all(logits_SxV, sampling, top_k)
  gumbel_SxK = noise.gumbel(key, row.denoise_step, offset_S, filtered.ids)
  drawn = jax.vmap(unmask.draw, (0, 0, 0, None))(
    logits_SxV, filtered, gumbel_SxK, sampling
  )
  order_logprob_K = row.order_logprob
  if sampling.unmask_rule != "random":
    is_chosen_S = _choose_after(row, drawn, sampling)
  if sampling.unmask_rule == "confidence":
    confidence_SxK = jax.vmap(unmask.confidence, (0, 0, None))(
      logits_SxV, filtered, sampling
    )
    factor = unmask.order_logprob(
      filtered.logprob,
      confidence_SxK,
      drawn.confidence,
      is_chosen_S,
      _masked(row, sampling),
    )
    order_logprob_K = order_logprob_K.at[row.denoise_step].add(factor)

  position_S = _block_start(row, sampling) + offset_S

  def write(array: jax.Array, value_S: jax.Array) -> jax.Array:
    old_S = array[position_S]
    is_new_S = is_chosen_S.reshape((-1,) + (1,) * (old_S.ndim - 1))
    return array.at[position_S].set(jnp.where(is_new_S, value_S, old_S))

  row = row.replace(
    completion=write(row.completion, drawn.token),
    unmask_step=write(row.unmask_step, row.denoise_step),
    logprob=write(row.logprob, drawn.logprob),
    entropy=write(row.entropy, drawn.entropy),
    support=jax.tree.map(write, row.support, drawn.support),  # or None
    order_logprob=order_logprob_K,
    num_steps=jnp.where(row.is_done, row.num_steps, row.denoise_step + 1),
  )
  return _move_on(row, sampling)


def _move_on(row: _Row, sampling: sampling_lib.Sampling) -> _Row:
  """To the next step or block; ends the row after its last block."""
  is_full = ~_masked(row, sampling).any()
  completion_T = jax.lax.dynamic_slice_in_dim(
    row.completion, _block_start(row, sampling), sampling.block_length
  )
  is_last = row.block == sampling.num_blocks - 1
  if sampling.stop_at_eos:
    is_last |= (completion_T == sampling.eos_id).all()
  next_step = row.denoise_step + 1
  if sampling.threshold is None:
    # Where the schedule has more steps than tokens, those that would unmask
    # nothing are skipped but keep their index.
    next_block_step = (row.block + 1) * sampling.steps_per_block
    next_step = jnp.where(is_full, next_block_step, next_step)
  is_done = row.is_done | (is_full & is_last)
  return row.replace(
    block=jnp.where(is_full & ~is_done, row.block + 1, row.block),
    denoise_step=jnp.where(is_done, row.denoise_step, next_step),
    is_done=is_done,
  )
