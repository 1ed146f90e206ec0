"""Rollouts from the host's side: prompts in, batches of completions out."""

import dataclasses
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Protocol

import jax
import numpy as np

from agrpo_jax import types
from agrpo_jax.parallel import mesh as mesh_lib
from agrpo_jax.parallel import processes
from agrpo_jax.policies import base as policies
from agrpo_jax.policies import block_causal
from agrpo_jax.policies import cached
from agrpo_jax.policies import guided
from agrpo_jax.policies import plain
from agrpo_jax.policies import row as row_lib
from agrpo_jax.samplers import noise as noise_lib
from agrpo_jax.samplers import rollout as rollout_lib
from agrpo_jax.samplers import sampling as sampling_lib


class Vocabulary(Protocol):
  """The ids that a sampler asks a tokenizer, or a network, for."""

  @property
  def mask_id(self) -> int: ...
  @property
  def eos_id(self) -> int: ...
  @property
  def stop_ids(self) -> tuple[int, ...]: ...


@dataclasses.dataclass(frozen=True)
class Draw:
  """Settings of a sampler, before a model says which ids are special.

  Attributes:
    sampling: the schedule and the rule; its ids mean nothing.
    guidance: scale of classifier-free guidance; 0: off.
    batch_size: completions drawn by one call of the compiled program.
    num_slots: rows that it runs at a time; a completion that ends early makes
      room for the next of the batch. 0: all of them at once.
  """

  sampling: sampling_lib.Sampling
  guidance: float
  batch_size: int
  num_slots: int

  def sampling_for(self, vocabulary: Vocabulary) -> sampling_lib.Sampling:
    """Returns the sampling settings with the ids of a vocabulary."""
    return dataclasses.replace(
      self.sampling,
      mask_id=vocabulary.mask_id,
      eos_id=vocabulary.eos_id,
      stop_ids=vocabulary.stop_ids,
    )

  def policy_for(self, vocabulary: Vocabulary) -> policies.Policy:
    """Returns how the logits of a step are computed."""
    # Guidance runs whole rows; the settings refuse a cache beside it.
    if self.guidance:
      return guided.Guided(self.guidance, vocabulary.mask_id)
    s = self.sampling
    if s.cache == "block":
      return block_causal.BlockCausal(s.block_length)
    if s.cache != "none":
      return cached.Cached(s.block_length, s.cache == "prefix", s.cache_refresh)
    return plain.PLAIN

  @property
  def has_chance(self) -> bool:
    """True if two completions of one prompt can differ."""
    return self.sampling.temperature > 0 or self.sampling.rule.has_chance


class Sampler:
  """Draws completions in batches of one size, compiled per prompt width."""

  def __init__(
    self,
    bind: types.BindFn,
    draw: Draw,
    vocabulary: Vocabulary,
    mesh: mesh_lib.Mesh,
    bucket: int,
    prompt_multiple: int = 1,
  ):
    """Fixes the settings; nothing is compiled yet.

    Args:
      bind: binds the network to parameters and adapter.
      draw: how completions are drawn.
      vocabulary: the ids of [MASK] and EOS.
      mesh: rows are split over it.
      bucket: prompts are padded to a multiple of this many tokens.
      prompt_multiple: tokens of a block that is counted from the beginning of
        the prompt: of what exceeds a multiple of it the completion is made to
        begin (`types.Rollout`), so that its blocks are the network's.

    Raises:
      UserError: a batch that does not divide over the mesh.
    """
    mesh_lib.check_rows(mesh, "batch_size", draw.batch_size)
    if draw.num_slots:
      mesh_lib.check_rows(mesh, "num_slots", draw.num_slots)
    sampling = draw.sampling_for(vocabulary)
    policy = draw.policy_for(vocabulary)

    def sample(
      params: types.Tree,
      lora: types.Tree | None,
      tokens_BxP: jax.Array,
      length_B: jax.Array,
      key: jax.Array,
      row_id_Bx2: jax.Array,
      start: types.Start | None = None,
    ) -> types.Rollout:
      prompts = types.Prompts(
        tokens=tokens_BxP,
        length=length_B,
        key=noise_lib.row_keys(key, row_id_Bx2),
        start=start,
      )
      return rollout_lib.sample_rollout(
        bind(params, lora),
        prompts,
        sampling,
        policy=policy,
        num_slots=draw.num_slots,
        shard_rows=mesh_lib.shard_rows(mesh),
      )

    self.batch_size = draw.batch_size
    self._bucket = bucket
    self._prompt_multiple = prompt_multiple
    self._sampling = sampling
    self._rows = mesh_lib.rows(mesh)
    self.program = jax.jit(sample, out_shardings=self._rows)

  def sample(
    self,
    params: types.Tree,
    lora: types.Tree | None,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    row_id_Bx2: np.ndarray,
    first: int = 0,
    start: types.Start | None = None,
  ) -> Iterator[types.Rollout]:
    """Yields rollouts of `batch_size` rows, in the order of the prompts.

    Row b draws from `noise.row_keys(key, row_id_Bx2)[b]`.
    Rows before `first` are passed over; the others are drawn exactly as with
    them, in arrays of the same width. With `start`, numpy arrays of all rows,
    completions are taken up there, which is another program to compile.

    The next batch is dispatched before one is yielded, so that the device
    works while the host decodes and grades. The last batch is filled up with
    repetitions of the last prompt: the caller takes what it asked for.
    """
    if self._prompt_multiple > 1:
      prompts, ends = row_lib.cut(prompts, self._prompt_multiple)
      if start is None:
        start = _begun(ends, self._sampling)
    # All at once: batches of one width need one compilation.
    tokens_BxP, length_B = row_lib.pack(prompts, self._bucket)
    ahead = None
    for begin in range(first, len(prompts), self.batch_size):
      row = np.arange(begin, begin + self.batch_size)
      row = np.minimum(row, len(prompts) - 1)
      tokens, length, row_id, taken_up = jax.device_put(
        jax.tree.map(
          lambda x, row=row: x[row], (tokens_BxP, length_B, row_id_Bx2, start)
        ),
        self._rows,
      )
      rollout = self.program(
        params, lora, tokens, length, key, row_id, taken_up
      )
      if ahead is not None:
        yield ahead
      ahead = rollout
    if ahead is not None:
      yield ahead

  def drawn(self, rollout: types.Rollout) -> np.ndarray:
    """Returns completions without what is not theirs, on the host.

    Args:
      rollout: B completions that this sampler drew.

    Returns:
      int32 [B, C]: without those tokens of the prompt that share a block with
      the completion, and without what stands behind the first EOS of a block
      that it ended; filled up with EOS.
    """
    completion_BxC = processes.to_host(rollout.completion)
    s, num_tokens = self._sampling, completion_BxC.shape[1]
    if self._prompt_multiple > 1:
      given_B = (processes.to_host(rollout.unmask_step) < 0).sum(axis=1)
      place_BxC = np.arange(num_tokens) + given_B[:, None]
      padded = np.pad(
        completion_BxC,
        ((0, 0), (0, self._prompt_multiple)),
        constant_values=s.eos_id,
      )
      completion_BxC = np.take_along_axis(padded, place_BxC, axis=1)
    if s.stop_at_eos and s.eos_per_block == "any":
      is_over_BxC = np.isin(completion_BxC, s.eos_ids).cumsum(axis=1) > 0
      completion_BxC = np.where(is_over_BxC, s.eos_id, completion_BxC)
    return completion_BxC


def _begun(
  ends: Sequence[Sequence[int]], sampling: sampling_lib.Sampling
) -> types.Start:
  """Completions that begin with the ends of their prompts."""
  shape = len(ends), sampling.completion_length
  completion_BxC = np.full(shape, sampling.eos_id, np.int32)
  unmask_step_BxC = np.full(shape, sampling.max_steps, np.int32)
  for row, end in enumerate(ends):
    completion_BxC[row, : len(end)] = end
    unmask_step_BxC[row, : len(end)] = -1
  block_B = np.zeros(len(ends), np.int32)
  return types.Start(completion_BxC, unmask_step_BxC, block_B)
