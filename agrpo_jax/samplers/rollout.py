"""Draws completions by iterative unmasking, block by block, on device.

One denoising step of one row:

1. The active block is the first one that still has masked positions.
2. Under a rule that looks at nothing the positions are chosen now, so that
   logits are needed at U positions only; else at the T positions of the block,
   or the last T, where the last block is shorter.
3. The policy gives the logits at those positions.
4. A token is drawn at each; the unmask rule says which of them stay.
5. When the block is full and all of it is EOS, or any (`eos_per_block`), the
   completion ends: what follows is EOS and carries no step.

Each row has its own block and step counter. What the steps of a block share is
opened for all rows at once, in *rounds*: a row that has ended its block before
the others waits for the next round, in which its next block begins. That costs
steps in which it does nothing, and those are cheap beside one that opens; a
policy that shares nothing has rounds of one step, and nobody waits. A row that
has ended its completion makes room, at the next round, for one that has not
begun.

A row may be taken up at the start of a block (`types.Start`): what follows has
the law of any completion that came to that state, since a block's steps look at
the tokens that stand there and not at how they came.
"""

from collections.abc import Callable
from typing import Any

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
  num_whole_passes: jax.Array
  num_slot_steps: jax.Array
  block: jax.Array  # int32, the active block
  block_step: jax.Array  # int32, denoising steps since it began
  denoise_step: jax.Array  # int32, the next step's index
  is_waiting: jax.Array  # bool, has ended its block; the next has not begun
  is_done: jax.Array  # bool

  @property
  def stays(self) -> jax.Array:
    """Whether the next step does nothing to the row."""
    return self.is_done | self.is_waiting


class _Slots(flax.struct.PyTreeNode):
  """The loop's state.

  Attributes:
    row_B: all rows.
    slot_S: int32, the row in each slot.
    memory: of the rows in the slots, where it is that of the next block too;
      else None.
  """

  row_B: _Row
  slot_S: jax.Array
  memory: types.Tree | None


def sample_rollout(
  network: types.Network,
  prompts: types.Prompts,
  sampling: sampling_lib.Sampling,
  *,
  policy: policies.Policy = plain.PLAIN,
  noise: noise_lib.Noise = noise_lib.NOISE,
  num_slots: int = 0,
  shard_rows: Callable[[Any], Any] = lambda tree: tree,
) -> types.Rollout:
  """Draws one completion per row.

  Args:
    network: the behaviour policy's, bound to its parameters.
    prompts: B rows.
    sampling: static settings.
    policy: how the logits of a step are computed from the network.
    noise: source of randomness, read through each row's own key.
    num_slots: rows that the network runs at a time; 0: all B. No completion
      depends on it.
    shard_rows: puts the rows in the slots on the mesh.

  Returns:
    The rollout: all that learning needs to know of it.

  Raises:
    ValueError: settings that contradict each other.
  """
  found = sampling_lib.problems(sampling)
  if found:
    raise ValueError("; ".join(found))
  chex.assert_rank([prompts.tokens, prompts.length, prompts.key], [2, 1, 1])
  num_rows = prompts.length.shape[0]

  def partial(row_B: _Row) -> jax.Array:
    is_masked_BxC = row_B.unmask_step == sampling.max_steps
    return jnp.where(is_masked_BxC, sampling.mask_id, row_B.completion)

  def logits_at(
    row_B: _Row,
    of: types.Prompts,
    memory: types.Tree,
    offset_BxW: jax.Array,
    is_start: jax.Array | bool,
  ) -> jax.Array:
    start_B = sampling.window_start(_block(row_B, sampling))
    position_BxW = start_B[:, None] + offset_BxW
    # One state of each row at a time: [B, 1, ...].
    return policy.logits(
      network,
      memory,
      of.tokens,
      of.length,
      partial(row_B)[:, None],
      _block_start(row_B, sampling)[:, None],
      position_BxW[:, None],
      is_start,
    )[:, 0]

  def denoise(
    row_B: _Row,
    of: types.Prompts,
    memory: types.Tree,
    is_start: jax.Array | bool,
  ) -> _Row:
    offset_BxW, is_chosen_BxW = jax.vmap(
      lambda row, key: _choose_before(row, key, sampling, noise)
    )(row_B, of.key)
    logits_BxWxV = logits_at(row_B, of, memory, offset_BxW, is_start)
    return mesh_lib.vmap_rows(
      lambda *row: _unmask_row(
        *row, sampling=sampling, noise=noise, top_k=network.top_k
      )
    )(row_B, of.key, offset_BxW, is_chosen_BxW, logits_BxWxV)

  def open_memory(
    row_B: _Row, of: types.Prompts, before: types.Tree | None = None
  ) -> types.Tree:
    return policy.open(
      network,
      before,
      of.tokens,
      of.length,
      partial(row_B),
      _block_start(row_B, sampling),
      keeps=policy.refresh != 1,
    )

  def finish_round(
    row_B: _Row, of: types.Prompts, before: types.Tree | None
  ) -> tuple[_Row, types.Tree]:
    """The steps of all rows until the memory has to be opened anew."""
    memory = open_memory(row_B, of, before)
    # A memory that spans the blocks is of one pass over the row.
    is_whole_B = ~row_B.is_done
    if policy.spans:
      is_whole_B &= row_B.num_whole_passes == 0
    row_B = row_B.replace(
      is_waiting=jnp.zeros_like(row_B.is_waiting),
      num_whole_passes=row_B.num_whole_passes + policy.passes * is_whole_B,
    )
    if policy.refresh == 1:
      return denoise(row_B, of, memory, is_start=True), memory

    def goes_on(carry: tuple[jax.Array, _Row]) -> jax.Array:
      count, row_B = carry
      is_fresh = count < policy.refresh if policy.refresh else True
      return (~row_B.stays).any() & is_fresh

    def go_on(carry: tuple[jax.Array, _Row]) -> tuple[jax.Array, _Row]:
      count, row_B = carry
      # The memory was opened of the states as they are before the first step.
      return count + 1, denoise(row_B, of, memory, is_start=count == 0)

    _, row_B = jax.lax.while_loop(goes_on, go_on, (jnp.int32(0), row_B))
    return row_B, memory

  def in_slots(slot_S: jax.Array, tree: Any) -> Any:
    return shard_rows(jax.tree.map(lambda x: x[slot_S], tree))

  def finish_next_round(carry: _Slots) -> _Slots:
    if not has_slots:
      row_B, memory = finish_round(carry.row_B, prompts, carry.memory)
      return carry.replace(row_B=row_B, memory=memory if policy.spans else None)
    slot_S = _refilled(carry.slot_S, carry.row_B.is_done)
    row_S, of = in_slots(slot_S, (carry.row_B, prompts))
    memory = carry.memory
    if policy.spans:
      # Of a row that has just come there is nothing to go on with.
      is_new_S = slot_S != carry.slot_S
      memory = jax.lax.cond(
        is_new_S.any(),
        lambda: _of_rows(is_new_S, open_memory(row_S, of), memory),
        lambda: memory,
      )
    row_S, memory = finish_round(row_S, of, memory)
    row_B = jax.tree.map(
      lambda x, new: x.at[slot_S].set(new), carry.row_B, row_S
    )
    return _Slots(row_B, slot_S, memory if policy.spans else None)

  def start(support_CxS: jax.Array | None) -> _Row:
    return jax.vmap(lambda _, start: _start(sampling, support_CxS, start))(
      prompts.length, prompts.start
    )

  row_B = start(None)
  if sampling.is_truncated:
    vocab_size = jax.eval_shape(
      lambda row_B: logits_at(
        row_B,
        prompts,
        open_memory(row_B, prompts),
        jnp.zeros((num_rows, 1), jnp.int32),
        is_start=False,
      ),
      row_B,
    ).shape[-1]
    row_B = start(_empty_support(sampling, vocab_size))
  has_slots = 0 < num_slots < num_rows
  slot_S = jnp.arange(num_slots if has_slots else num_rows)
  memory = None
  if policy.spans:
    first = (
      in_slots(slot_S, (row_B, prompts)) if has_slots else (row_B, prompts)
    )
    memory = open_memory(*first)
  row_B = jax.lax.while_loop(
    lambda carry: ~carry.row_B.is_done.all(),
    finish_next_round,
    _Slots(row_B, slot_S, memory),
  ).row_B
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
    num_whole_passes=row_B.num_whole_passes,
    num_slot_steps=row_B.num_slot_steps,
  )


def _refilled(slot_S: jax.Array, is_done_B: jax.Array) -> jax.Array:
  """The rows in the slots: for those that are done the next, while there are.

  Rows take slots in their order, and keep them.
  """
  is_free_S = is_done_B[slot_S]
  # All rows before the last one that has a slot have had one.
  next_S = slot_S.max() + jnp.cumsum(is_free_S)
  return jnp.where(is_free_S & (next_S < is_done_B.size), next_S, slot_S)


def _of_rows(
  is_new_S: jax.Array, new: types.Tree, old: types.Tree
) -> types.Tree:
  """`new` for some rows, `old` for the others; see `types.KeysValuesFn`."""
  is_new_Sx1x1x1 = is_new_S[:, None, None, None]
  return jax.tree.map(
    lambda new, old: jnp.where(
      is_new_Sx1x1x1.reshape((1,) * (new.ndim - 4) + is_new_Sx1x1x1.shape),
      new,
      old,
    ),
    new,
    old,
  )


def _start(
  sampling: sampling_lib.Sampling,
  support_CxS: jax.Array | None,
  start: types.Start | None,
) -> _Row:
  num_tokens, max_steps = sampling.completion_length, sampling.max_steps
  row = _Row(
    completion=jnp.full((num_tokens,), sampling.eos_id, jnp.int32),
    unmask_step=jnp.full((num_tokens,), max_steps, jnp.int32),
    logprob=jnp.zeros((num_tokens,)),
    entropy=jnp.zeros((num_tokens,)),
    support=support_CxS,
    order_logprob=jnp.zeros((max_steps,)),
    num_executed_steps=jnp.int32(0),
    num_whole_passes=jnp.int32(0),
    num_slot_steps=jnp.int32(0),
    block=jnp.int32(0),
    block_step=jnp.int32(0),
    denoise_step=jnp.int32(0),
    is_waiting=jnp.bool_(False),
    is_done=jnp.bool_(False),
  )
  if start is None:
    return row
  is_prompt_C = start.unmask_step < 0
  # In blocks that are all the prompt's there is nothing to draw.
  block = is_prompt_C.sum(dtype=jnp.int32) // sampling.block_length
  block = jnp.maximum(start.block, block)
  is_given_C = jnp.arange(num_tokens) < block * sampling.block_length
  is_given_C |= is_prompt_C
  return row.replace(
    completion=jnp.where(is_given_C, start.completion, row.completion),
    unmask_step=jnp.where(is_given_C, start.unmask_step, row.unmask_step),
    block=block,
    denoise_step=block * sampling.steps_per_block,
  )


def _empty_support(
  sampling: sampling_lib.Sampling, vocab_size: int
) -> jax.Array:
  num_tokens = sampling.completion_length
  if sampling.top_k > 0:
    size = draw.support_size(sampling, vocab_size)
    return jnp.full((num_tokens, size), -1, jnp.int32)
  return jnp.zeros((num_tokens, -(-vocab_size // 8)), jnp.uint8)


def _block(row: _Row, sampling: sampling_lib.Sampling) -> jax.Array:
  # A row that is done is in nobody's way at the end: a window that reaches from
  # the earliest block on is shortest there.
  return jnp.where(row.is_done, sampling.num_blocks - 1, row.block)


def _block_start(row: _Row, sampling: sampling_lib.Sampling) -> jax.Array:
  return _block(row, sampling) * sampling.block_length


def _window(
  row: _Row, sampling: sampling_lib.Sampling
) -> tuple[jax.Array, jax.Array]:
  """The completion positions that a step looks at.

  Returns:
    int32 [T] (or [C], see `Sampling.window_length`), and which of them are the
    active block's, bool: all, but for the last one's if it is shorter.
  """
  first = sampling.window_start(_block(row, sampling))
  position_T = first + jnp.arange(sampling.window_length)
  block_T = position_T // sampling.block_length
  return position_T, block_T == _block(row, sampling)


def _masked(row: _Row, sampling: sampling_lib.Sampling) -> jax.Array:
  """bool [T] (or [C], see `Sampling.window_length`): what can be unmasked.

  Those are the masked positions of the active block and of earlier ones, or
  one of them that leads.
  """
  position_T, _ = _window(row, sampling)
  step_T = row.unmask_step[position_T]
  is_masked_T = (step_T == sampling.max_steps) & ~row.stays
  if sampling.redraw_mask:
    block_end = _block_start(row, sampling) + sampling.block_length
    is_masked_T &= position_T < block_end
  return rules.candidates(is_masked_T, position_T, sampling.lead_every)


def _amount(row: _Row, sampling: sampling_lib.Sampling) -> jax.Array:
  """Returns how many positions the schedule unmasks now, or their share."""
  amounts = jnp.asarray(sampling_lib.step_amounts(sampling))
  return amounts[row.block, row.block_step]


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
  is_chosen_T = sampling.rule.choose_before(
    noise.order(key, row.denoise_step, size),
    _masked(row, sampling),
    _amount(row, sampling),
  )
  # Logits at U positions cost U / T of the unembedding. A step may unmask fewer
  # than U (the schedule's remainder), but compiled code has one size.
  chosen_first_T = jnp.argsort(~is_chosen_T, stable=True).astype(jnp.int32)
  offset_U = jnp.sort(chosen_first_T[: sampling.tokens_per_step])
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
      _amount(row, sampling),
      lambda: rules.Chance(noise.passes(*at), noise.fallback(*at)),
    )
  if sampling.redraw_mask:
    is_chosen_S &= drawn.token != sampling.mask_id
  if rule.looks_at == "draws":
    # A row that stays passes here too; nothing of it is masked, and log 1 = 0
    # is added to its next step.
    order_logprob_K = order_logprob_K.at[row.denoise_step].add(
      rule.order_logprob(seen, is_chosen_S)
    )

  position_S = _window(row, sampling)[0][offset_S]

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
    num_executed_steps=row.num_executed_steps + ~row.stays,
    num_slot_steps=row.num_slot_steps + 1,
  )
  return _move_on(row, sampling)


def _move_on(row: _Row, sampling: sampling_lib.Sampling) -> _Row:
  """To the next step or block; ends the row after its last block."""
  position_T, is_own_T = _window(row, sampling)
  step_T = row.unmask_step[position_T]
  is_over = ((step_T < sampling.max_steps) | ~is_own_T).all()
  if sampling.redraw_mask:
    # A block whose steps are used up is left as it is: the released loop of
    # the threshold would go on for ever where nothing changes any more.
    is_over |= row.block_step + 1 == sampling.steps_per_block
  is_over |= row.stays
  is_last = row.block == sampling.num_blocks - 1
  if sampling.stop_at_eos:
    token_T = row.completion[position_T]
    is_eos_T = jnp.isin(token_T, jnp.array(sampling.eos_ids))
    # The prompt's tokens neither end a completion nor carry it on.
    is_drawn_T = is_own_T & (step_T >= 0)
    is_last |= (
      (is_eos_T & is_drawn_T).any()
      if sampling.eos_per_block == "any"
      else (is_eos_T | ~is_drawn_T).all()
    )
  # A block that needed fewer steps than it may have leaves indices out, so that
  # a step's index says its block.
  next_block_step = (row.block + 1) * sampling.steps_per_block
  next_step = jnp.where(is_over, next_block_step, row.denoise_step + 1)
  ends = is_over & ~row.stays
  is_done = row.is_done | (ends & is_last)
  return row.replace(
    block=jnp.where(ends & ~is_done, row.block + 1, row.block),
    block_step=jnp.where(is_over, 0, row.block_step + 1),
    denoise_step=jnp.where(is_done | row.stays, row.denoise_step, next_step),
    is_waiting=is_over,
    is_done=is_done,
  )
