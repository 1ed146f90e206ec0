"""How completions are drawn: the settings and the schedule.

A completion of C tokens is drawn block by block; the K denoising steps are
divided equally over the blocks, and a block's positions over its steps as the
schedule says. Where the blocks do not divide the completion the last one has
fewer positions, and as many steps.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from agrpo_jax.samplers import rules

SCHEDULES = ("equal", "dream", "mdlm")
TRUNCATIONS = ("top_k", "top_p")
TOP_P_RULES = ("keep", "drop")
CONFIDENCES = ("policy", "model")
EOS_PER_BLOCK = ("all", "any")
_LEAST_TEMPERATURE = 1e-3  # far below, logits divided by it overflow
CACHES = ("none", "prefix", "dual", "block")


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Settings of a sampler. Hashable: a static argument of compiled code.

  Attributes:
    mask_id: vocabulary id of [MASK].
    eos_id: vocabulary id that ends a completion, and fills up what was not
      drawn.
    stop_ids: further ids that end one.
    completion_length: C.
    block_length: T, at most C; a block is finished before the next begins. The
      last one has what the others leave of C.
    lead_every: a multiple of T: of every so many positions the first is
      unmasked before the others of its block, alone (Fast-dLLM v2, where its
      logits come from the block before); 0: none is.
    num_denoise_steps: K, divided equally over the blocks.
    schedule: how many positions of a block each of its steps unmasks, see
      `step_counts`: `equal` shares (LLaDA); what a time that goes down evenly
      says, rounded as by `dream` or by `mdlm` (dllm).
    last_time: under `dream`, the time at which the last step ends; the first
      begins at 1.
    unmask_rule: a name in RULES.
    temperature: divides the logits; 0 takes the most probable token (the
      recorded log-probabilities are then those at temperature 1).
    top_k: keep the k most probable tokens and those tied with the k-th; 0: all.
    top_p: keep the most probable tokens until their mass reaches this; 1: all.
    truncate_first: where both are set, `top_k` or `top_p` (Dream) cuts first,
      and the other what is left, renormalised.
    top_p_rule: `keep` the token that crosses top_p, or `drop` it (released
      AGRPO; the first token always stays).
    confidence: what the `confidence` rule ranks by: the probability of the
      drawn token under the `policy` (temperature and support applied; released
      AGRPO) or under the `model` (neither; the original LLaDA sampler).
    threshold, factor, gamma, soft_width: of the unmask rules that have a field
      of this name (`rules`); None under the others.
    cache: which keys and values the steps of a block share: `none`: every step
      runs the whole row; as Fast-dLLM (arXiv:2505.22618) has it, `prefix`:
      those before the block, `dual`: all but the block's own; `block`: those
      before the block, which block-causal models have once for all.
    cache_refresh: denoising steps of a block until they are computed anew; 0:
      only where a block begins.
    stop_at_eos: a block that comes out EOS, of whichever id, ends the
      completion.
    eos_per_block: how much of the block must be: `all` of it, or `any` token
      (SDAR), behind which nothing counts as text.
    redraw_mask: evaluation only, as LLaDA's and Fast-dLLM's samplers were
      released: a position whose drawn token is [MASK] itself stays masked. It
      is drawn again in later steps, those of later blocks included, which then
      need logits at the whole completion; what is never unmasked is [MASK] in
      the completion. Else [MASK] is a token like any other: its position is
      unmasked, for good.
  """

  mask_id: int
  eos_id: int
  completion_length: int
  block_length: int
  num_denoise_steps: int
  lead_every: int = 0
  schedule: str = "equal"
  last_time: float = 1e-3
  unmask_rule: str = "random"
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  truncate_first: str = "top_k"
  top_p_rule: str = "keep"
  confidence: str = "policy"
  threshold: float | None = None
  factor: float | None = None
  gamma: float | None = None
  soft_width: float | None = None
  cache: str = "none"
  cache_refresh: int = 0
  stop_at_eos: bool = True
  eos_per_block: str = "all"
  redraw_mask: bool = False
  stop_ids: tuple[int, ...] = ()

  @property
  def eos_ids(self) -> tuple[int, ...]:
    return (self.eos_id, *self.stop_ids)

  @property
  def rule(self) -> rules.UnmaskRule:
    names = parameters(self.unmask_rule)
    return RULES[self.unmask_rule](**{n: getattr(self, n) for n in names})

  @property
  def num_blocks(self) -> int:
    return -(-self.completion_length // self.block_length)

  @property
  def last_length(self) -> int:
    """The number of positions of the last block."""
    return self.completion_length - (self.num_blocks - 1) * self.block_length

  @property
  def steps_per_block(self) -> int:
    if self.rule.schedule == "none":
      return self.block_length  # every step unmasks one at least
    return self.num_denoise_steps // self.num_blocks

  @property
  def steps_per_memory(self) -> int:
    """Denoising steps that share what a policy computes once."""
    if self.cache == "none":
      return 1
    steps = self.steps_per_block
    return min(self.cache_refresh or steps, steps)

  @property
  def window_length(self) -> int:
    """The number of positions that a step looks at: the block's T, or all C."""
    return self.completion_length if self.redraw_mask else self.block_length

  def window_start(self, block: jax.Array) -> jax.Array:
    """Returns the first position that the steps of a block look at.

    A block's own, but for a shorter last one, before which they look back at
    finished positions: all windows are as long.
    """
    if self.redraw_mask:
      return jnp.zeros_like(block)
    last = self.completion_length - self.block_length
    return jnp.minimum(block * self.block_length, last)

  @property
  def max_steps(self) -> int:
    """K: no completion executes more denoising steps, none has this index.

    Step s belongs to block s // steps_per_block: a block that needs fewer steps
    leaves its last indices out.
    """
    return self.num_blocks * self.steps_per_block

  @property
  def tokens_per_step(self) -> int:
    """U: the most positions that a step unmasks."""
    if self.rule.schedule != "exact":
      return self.block_length
    return int(step_amounts(self).max())

  @property
  def is_truncated(self) -> bool:
    # At temperature 0 the most probable token is taken, which is never cut.
    return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)


RULES: dict[str, type[rules.UnmaskRule]] = {
  "random": rules.Random,
  "sequential": rules.Sequential,
  "origin": rules.Origin,
  "confidence": rules.Confidence,
  "entropy": rules.Entropy,
  "margin": rules.Margin,
  "threshold": rules.Threshold,
  "dynamic": rules.Dynamic,
  "factor": rules.Factor,
  "entropy_bounded": rules.EntropyBounded,
  "soft_threshold": rules.SoftThreshold,
}
"""Name -> the unmask rule."""


def parameters(unmask_rule: str) -> list[str]:
  """Returns the names of the settings that a rule has of its own."""
  return [field.name for field in dataclasses.fields(RULES[unmask_rule])]


def problems(sampling: Sampling) -> list[str]:
  """Returns what is wrong with the settings, a sentence each."""
  s = sampling
  found = []

  def check(holds: bool, problem: str) -> None:
    if not holds:
      found.append(problem)

  for name in ("completion_length", "block_length", "num_denoise_steps"):
    check(
      getattr(s, name) >= 1, f"{name}={getattr(s, name)} must be at least 1"
    )
  # What follows divides by these.
  if found:
    return found
  check(
    s.block_length <= s.completion_length,
    f"block_length={s.block_length} is more than completion_length="
    f"{s.completion_length}; use at most that",
  )
  rule = RULES.get(s.unmask_rule, rules.Random)
  check(
    # Else the draws alone say how many steps there are.
    rule.schedule == "none" or s.num_denoise_steps % s.num_blocks == 0,
    f"num_denoise_steps={s.num_denoise_steps} does not divide equally over "
    f"{s.num_blocks} blocks (completion_length={s.completion_length}, "
    f"block_length={s.block_length}); use a multiple of {s.num_blocks}",
  )
  check(
    s.lead_every >= 0 and s.lead_every % s.block_length == 0,
    f"lead_every={s.lead_every} is not a multiple of block_length="
    f"{s.block_length}; 0: no position leads",
  )
  for name, value, known in (
    ("unmask_rule", s.unmask_rule, tuple(RULES)),
    ("schedule", s.schedule, SCHEDULES),
    ("truncate_first", s.truncate_first, TRUNCATIONS),
    ("top_p_rule", s.top_p_rule, TOP_P_RULES),
    ("eos_per_block", s.eos_per_block, EOS_PER_BLOCK),
    ("confidence", s.confidence, CONFIDENCES),
  ):
    check(value in known, f"{name}={value!r} is not one of {', '.join(known)}")
  check(
    s.cache in CACHES, f"cache={s.cache!r} is not one of {', '.join(CACHES)}"
  )
  check(
    s.cache_refresh >= 0,
    f"cache_refresh={s.cache_refresh} is negative; 0 computes keys and values "
    "only where a block begins",
  )
  check(
    s.cache != "none" or not s.cache_refresh,
    f"cache_refresh={s.cache_refresh} needs a cache, not cache='none'",
  )
  check(
    s.cache != "block" or not s.cache_refresh,
    f"cache_refresh={s.cache_refresh} has nothing to compute anew under "
    "cache='block', which is exact",
  )
  check(
    s.cache == "none" or not s.redraw_mask,
    f"cache={s.cache!r} runs the block alone, where redraw_mask="
    f"{s.redraw_mask} draws in earlier blocks too; use cache='none'",
  )
  check(0 <= s.last_time < 1, f"last_time={s.last_time} is outside [0, 1)")
  check(
    s.temperature == 0 or s.temperature >= _LEAST_TEMPERATURE,
    f"temperature={s.temperature} is below {_LEAST_TEMPERATURE}; 0 takes the "
    "most probable tokens",
  )
  check(s.top_k >= 0, f"top_k={s.top_k} is negative; 0 keeps all tokens")
  check(0 < s.top_p <= 1, f"top_p={s.top_p} is outside (0, 1]")
  if s.redraw_mask and s.unmask_rule in RULES:
    check(
      s.rule.looks_at == "draws",
      f"redraw_mask={s.redraw_mask} needs a rule that looks at the drawn "
      f"tokens, not unmask_rule={s.unmask_rule!r}",
    )
  if s.unmask_rule in RULES:
    found += _parameter_problems(s)
    check(
      not s.lead_every
      or s.rule.schedule == "none"
      or (s.schedule == "equal" and s.steps_per_block == s.block_length),
      f"lead_every={s.lead_every} has steps that unmask one position; under "
      f"unmask_rule={s.unmask_rule!r} all must: num_denoise_steps="
      f"{s.num_blocks * s.block_length} and schedule='equal'",
    )
    check(
      not s.lead_every or s.rule.schedule != "share",
      f"lead_every={s.lead_every} needs a rule that is sure to unmask a "
      f"position that leads, not unmask_rule={s.unmask_rule!r}",
    )
    check(
      s.schedule == "equal" or s.rule.schedule in ("exact", "share"),
      f"schedule={s.schedule!r} needs a rule that takes as many positions as "
      f"it says, not unmask_rule={s.unmask_rule!r}",
    )
    check(
      s.schedule != "dream" or not s.redraw_mask,
      f"schedule={s.schedule!r} counts on every drawn token, where redraw_mask="
      f"{s.redraw_mask} leaves positions masked",
    )
  return found


# Setting of an unmask rule -> what is legal, and in words.
_LEGAL: dict[str, tuple[Callable[[float], bool], str]] = {
  "threshold": (lambda x: 0 < x <= 1, "in (0, 1]"),
  "factor": (lambda x: 0 < x < math.inf, "positive"),
  "gamma": (lambda x: 0 <= x < math.inf, "0 or more"),
  "soft_width": (lambda x: 0 < x < math.inf, "positive"),
}


def _parameter_problems(s: Sampling) -> list[str]:
  """Returns which settings of a rule's own it lacks, or are not its own."""
  found = []
  ours = parameters(s.unmask_rule)
  for name, (is_legal, words) in _LEGAL.items():
    value = getattr(s, name)
    if name in ours and (value is None or not is_legal(value)):
      found.append(
        f"{name}={value} must be {words} under unmask_rule={s.unmask_rule!r}"
      )
    if name not in ours and value is not None:
      having = [repr(rule) for rule in RULES if name in parameters(rule)]
      found.append(
        f"{name}={value} needs unmask_rule={' or '.join(having)}, "
        f"not {s.unmask_rule!r}"
      )
  return found


def step_amounts(sampling: Sampling) -> np.ndarray:
  """Returns what the unmask rule is told for each denoising step.

  [num_blocks, steps_per_block], a number of positions, or under a rule of
  chance the share of them.
  """
  is_share = sampling.rule.schedule == "share"
  of_block = step_shares if is_share else step_counts
  whole, last = (
    of_block(sampling, size)
    for size in (sampling.block_length, sampling.last_length)
  )
  return np.stack([whole] * (sampling.num_blocks - 1) + [last])


def step_counts(sampling: Sampling, size: int) -> np.ndarray:
  """Returns how many positions of a block of `size` each step unmasks.

  int32 [steps_per_block]. `equal`: equal shares of the block, the remainder one
  each to the first steps (LLaDA, arXiv:2502.09992, `get_num_transfer_tokens`).
  The others take `step_shares` of what is still masked. `dream` rounds down, so
  that its first steps often unmask nothing, and takes the rest in the last
  (arXiv:2508.15487, `diffusion_generate`, which counts the mean over its batch,
  while this is a row's own number). `mdlm` rounds to even and leaves out steps
  that unmask nothing (dllm's `get_num_transfer_tokens`): here they come last,
  and never run.
  """
  num_steps, left = sampling.steps_per_block, size
  if sampling.schedule == "equal":
    share, rest = divmod(left, num_steps)
    counts = np.full(num_steps, share, np.int32)
    counts[:rest] += 1
    return counts
  counts = np.zeros(num_steps, np.int32)
  for step, share in enumerate(step_shares(sampling, size)):
    # Of numbers in the precision of the share, as released.
    taken = left * share
    counts[step] = round(taken) if sampling.schedule == "mdlm" else int(taken)
    left -= int(counts[step])
  if sampling.schedule == "mdlm":
    counts = counts[np.argsort(counts == 0, stable=True)]
  return counts


def step_shares(sampling: Sampling, size: int) -> np.ndarray:
  """Returns the share of its masked positions that each step unmasks.

  float [steps_per_block], 1 in the last. Under `dream` and `mdlm` it is 1 - s/t
  for a step from time t to s. Every operation rounds as in the released code:
  on it depends by how much a product misses a whole number, or a half.
  """
  num_steps = sampling.steps_per_block
  if sampling.schedule == "equal":
    counts = step_counts(sampling, size)
    left = size - np.cumsum(counts) + counts
    # Where nothing is left, no step gets to.
    return (counts / np.maximum(left, 1)).astype(np.float32)
  one = np.float32(1)
  if sampling.schedule == "dream":
    # PyTorch's linspace, which goes from either end to the middle.
    index = np.arange(num_steps + 1, dtype=np.float32)
    last = np.float32(sampling.last_time)
    pace = (last - one) / np.float32(num_steps)
    time = np.where(
      index < (num_steps + 1) // 2,
      one + pace * index,
      last - pace * index[::-1],
    )
    share = one - time[1:] / time[:-1]
    share[-1] = one
    return share
  time = np.arange(num_steps, -1, -1) / num_steps
  noise = one - (one - time.astype(np.float32))
  return 1 - (noise[1:] / noise[:-1]).astype(np.float64)
