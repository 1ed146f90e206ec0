"""Draws completions by iterative unmasking, block by block, on device.

One denoising step of one row:

1. The active block is the first one that still has masked positions. Where it
   begins, the policy is opened on the row's state.
2. Under a rule that looks at nothing the positions are chosen now, so that
   logits are needed at U positions only; else at the T positions of the block.
3. The policy gives the logits at those positions.
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
from agrpo_jax.policies import base as policies
from agrpo_jax.policies import plain
from agrpo_jax.samplers import draw
from agrpo_jax.samplers import noise as noise_lib
from agrpo_jax.samplers import rules
from agrpo_jax.samplers import sampling as sampling_lib


class _Row(flax.struct.PyTreeNode):
  """The loop's state, one row of it; the first fields as in `Rollout`."""

  completion: jax.Array
  unmask_step: jax.Array
  logprob: jax.Array
  entropy: jax.Array
  support: jax.Array | None
  order_logprob: jax.Array
  num_executed_steps: jax.Array
  block: jax.Array  # int32, the active block
  block_step: jax.Array  # int32, denoising steps since it began
  denoise_step: jax.Array  # int32, the next step's index
  is_done: jax.Array  # bool


def sample_rollout(
  network: types.Network,
  prompts: types.Prompts,
  sampling: sampling_lib.Sampling,
  *,
  policy: policies.Policy = plain.PLAIN,
  noise: noise_lib.Noise = noise_lib.NOISE,
) -> types.Rollout:
  """Draws one completion per row.

  Args:
    network: the behaviour policy's, bound to its parameters.
    prompts: B rows.
    sampling: static settings.
    policy: how the logits of a step are computed from the network.
    noise: source of randomness, read through each row's own key.

  Returns:
    The rollout: all that learning needs to know of it.

  Raises:
    ValueError: settings that contradict each other.
  """
  found = sampling_lib.problems(sampling)
  if found:
    raise ValueError("; ".join(found))
  chex.assert_rank([prompts.tokens, prompts.length, prompts.key], [2, 1, 1])

  def block_start(row_B: _Row) -> jax.Array:
    return jax.vmap(_block_start, (0, None))(row_B, sampling)

  def partial(row_B: _Row) -> jax.Array:
    is_masked_BxC = row_B.unmask_step == sampling.max_steps
    return jnp.where(is_masked_BxC, sampling.mask_id, row_B.completion)

  def open_policy(row_B: _Row) -> types.Tree:
    return policy.open(
      network,
      prompts.tokens,
      prompts.length,
      partial(row_B),
      block_start(row_B),
    )

  def reopen(row_B: _Row, memory: types.Tree) -> types.Tree:
    """The memory of each row's block: a new one where a block begins."""
    if not jax.tree.leaves(memory):
      return memory
    is_new_B = (row_B.block_step == 0) & ~row_B.is_done

    # Rows begin blocks at different steps: all are opened together as soon as
    # one has to be, and the others keep what they have.
    def renewed() -> types.Tree:
      return jax.tree.map(
        lambda new, old: jnp.where(
          is_new_B.reshape((-1,) + (1,) * (new.ndim - 1)), new, old
        ),
        open_policy(row_B),
        memory,
      )

    return jax.lax.cond(is_new_B.any(), renewed, lambda: memory)

  def logits_at(
    row_B: _Row, memory: types.Tree, offset_BxW: jax.Array
  ) -> jax.Array:
    start_B = jax.vmap(_window_start, (0, None))(row_B, sampling)
    position_BxW = start_B[:, None] + offset_BxW
    # One state of each row at a time: [B, 1, ...].
    return policy.logits(
      network,
      memory,
      prompts.tokens,
      prompts.length,
      partial(row_B)[:, None],
      position_BxW[:, None],
    )[:, 0]

  def denoise(carry: tuple[_Row, types.Tree]) -> tuple[_Row, types.Tree]:
    row_B, memory = carry
    memory = reopen(row_B, memory)
    offset_BxW, is_chosen_BxW = jax.vmap(
      lambda row, key: _choose_before(row, key, sampling, noise)
    )(row_B, prompts.key)
    logits_BxWxV = logits_at(row_B, memory, offset_BxW)
    row_B = mesh_lib.vmap_rows(
      lambda *row: _unmask_row(
        *row, sampling=sampling, noise=noise, top_k=network.top_k
      )
    )(row_B, prompts.key, offset_BxW, is_chosen_BxW, logits_BxWxV)
    return row_B, memory

  num_rows = prompts.length.shape[0]

  def start(support_CxS: jax.Array | None) -> _Row:
    return jax.vmap(lambda _: _start(sampling, support_CxS))(prompts.length)

  # What `open` returns is known by shape only; every row's first step is the
  # start of a block, which fills it.
  memory = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype),
    jax.eval_shape(open_policy, start(None)),
  )
  row_B = start(None)
  if sampling.is_truncated:
    vocab_size = jax.eval_shape(
      logits_at, row_B, memory, jnp.zeros((num_rows, 1), jnp.int32)
    ).shape[-1]
    row_B = start(_empty_support(sampling, vocab_size))
  row_B, _ = jax.lax.while_loop(
    lambda carry: ~carry[0].is_done.all(), denoise, (row_B, memory)
  )
  return types.Rollout(
    prompt=prompts.tokens,
    prompt_length=prompts.length,
    completion=partial(row_B) if sampling.redraw_mask else row_B.completion,
    unmask_step=row_B.unmask_step,
    logprob=row_B.logprob,
    entropy=row_B.entropy,
    support=row_B.support,
    order_logprob=row_B.order_logprob,
    num_executed_steps=row_B.num_executed_steps,
  )


def _start(
  sampling: sampling_lib.Sampling, support_CxS: jax.Array | None
) -> _Row:
  num_tokens, max_steps = sampling.completion_length, sampling.max_steps
  return _Row(
    completion=jnp.full((num_tokens,), sampling.eos_id, jnp.int32),
    unmask_step=jnp.full((num_tokens,), max_steps, jnp.int32),
    logprob=jnp.zeros((num_tokens,)),
    entropy=jnp.zeros((num_tokens,)),
    support=support_CxS,
    order_logprob=jnp.zeros((max_steps,)),
    num_executed_steps=jnp.int32(0),
    block=jnp.int32(0),
    block_step=jnp.int32(0),
    denoise_step=jnp.int32(0),
    is_done=jnp.bool_(False),
  )


def _empty_support(
  sampling: sampling_lib.Sampling, vocab_size: int
) -> jax.Array:
  num_tokens = sampling.completion_length
  if sampling.top_k > 0:
    size = draw.support_size(sampling, vocab_size)
    return jnp.full((num_tokens, size), -1, jnp.int32)
  return jnp.zeros((num_tokens, -(-vocab_size // 8)), jnp.uint8)


def _block_start(row: _Row, sampling: sampling_lib.Sampling) -> jax.Array:
  last = sampling.num_blocks - 1
  return jnp.minimum(row.block, last) * sampling.block_length


def _window_start(row: _Row, sampling: sampling_lib.Sampling) -> jax.Array:
  """Returns the first completion position that a step looks at."""
  return jnp.int32(0) if sampling.redraw_mask else _block_start(row, sampling)


def _masked(row: _Row, sampling: sampling_lib.Sampling) -> jax.Array:
  """bool [T] (or [C], see `Sampling.window_length`): what can be unmasked.

  Those are the masked positions of the active block and of earlier ones.
  """
  start = _window_start(row, sampling)
  step_T = jax.lax.dynamic_slice_in_dim(
    row.unmask_step, start, sampling.window_length
  )
  is_masked_T = (step_T == sampling.max_steps) & ~row.is_done
  if sampling.redraw_mask:
    block_end = _block_start(row, sampling) + sampling.block_length
    is_masked_T &= jnp.arange(sampling.window_length) < block_end
  return is_masked_T


def _count(row: _Row, sampling: sampling_lib.Sampling) -> jax.Array:
  """Returns how many positions the schedule unmasks in this step."""
  counts = jnp.asarray(sampling_lib.step_counts(sampling))
  return counts[row.block_step]


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
  size = sampling.window_length
  # Which positions stay is known after the draw; all of the block is needed.
  if sampling.rule.looks_at != "nothing":
    return jnp.arange(size, dtype=jnp.int32), jnp.zeros((size,), bool)
  is_masked_T = _masked(row, sampling)
  # Logits at U positions cost U / T of the unembedding. A step may unmask fewer
  # than U (the schedule's remainder), but compiled code has one size.
  rank_T = rules.ranks(noise.order(key, row.denoise_step, size), is_masked_T)
  offset_U = jnp.nonzero(
    rank_T < sampling.tokens_per_step, size=sampling.tokens_per_step
  )[0].astype(jnp.int32)
  is_chosen_T = is_masked_T & (rank_T < _count(row, sampling))
  return offset_U, is_chosen_T[offset_U]


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
  filter_all = jax.vmap(draw.filter_logits, (0, None, None))
  filtered = filter_all(logits_SxV, sampling, top_k)
  gumbel_SxK = noise.gumbel(key, row.denoise_step, offset_S, filtered.ids)
  drawn = jax.vmap(draw.draw_token, (0, 0, 0, None))(
    logits_SxV, filtered, gumbel_SxK, sampling
  )
  order_logprob_K = row.order_logprob
  rule = sampling.rule
  if rule.looks_at != "nothing":
    seen = draw.seen(
      logits_SxV, filtered, drawn.confidence, _masked(row, sampling), sampling
    )
    at = key, row.denoise_step, sampling.window_length
    is_chosen_S = rule.choose(
      seen,
      _count(row, sampling),
      lambda: rules.Chance(noise.passes(*at), noise.fallback(*at)),
    )
  if sampling.redraw_mask:
    is_chosen_S &= drawn.token != sampling.mask_id
  if rule.looks_at == "draws":
    # A row that is done passes here too; nothing of it is masked, and log 1 = 0
    # is added to its last step.
    order_logprob_K = order_logprob_K.at[row.denoise_step].add(
      rule.order_logprob(seen, is_chosen_S)
    )

  position_S = _window_start(row, sampling) + offset_S

  def write(array: jax.Array, value_S: jax.Array) -> jax.Array:
    # What is not chosen keeps its old value: scatters cannot leave out entries.
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
    num_executed_steps=row.num_executed_steps + ~row.is_done,
  )
  return _move_on(row, sampling)


def _move_on(row: _Row, sampling: sampling_lib.Sampling) -> _Row:
  """To the next step or block; ends the row after its last block."""
  start = _block_start(row, sampling)
  step_T = jax.lax.dynamic_slice_in_dim(
    row.unmask_step, start, sampling.block_length
  )
  is_over = (step_T < sampling.max_steps).all() | row.is_done
  if sampling.redraw_mask:
    # A block whose steps are used up is left as it is: the released loop of
    # the threshold would go on for ever where nothing changes any more.
    is_over |= row.block_step + 1 == sampling.steps_per_block
  completion_T = jax.lax.dynamic_slice_in_dim(
    row.completion, start, sampling.block_length
  )
  is_last = row.block == sampling.num_blocks - 1
  if sampling.stop_at_eos:
    is_last |= (completion_T == sampling.eos_id).all()
  # A block that needed fewer steps than it may have leaves indices out, so that
  # a step's index says its block.
  next_block_step = (row.block + 1) * sampling.steps_per_block
  next_step = jnp.where(is_over, next_block_step, row.denoise_step + 1)
  is_done = row.is_done | (is_over & is_last)
  return row.replace(
    block=jnp.where(is_over & ~is_done, row.block + 1, row.block),
    block_step=jnp.where(is_over, 0, row.block_step + 1),
    denoise_step=jnp.where(is_done, row.denoise_step, next_step),
    is_done=is_done,
  )
