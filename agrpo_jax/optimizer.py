"""AdamW with clipping by the global norm, a warm-up and a decay.

One optimizer update consumes one gradient, whatever number of microbatches it
was summed over; schedules count updates, not train steps.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from agrpo_jax import errors

SCHEDULES = ("constant", "cosine")

# Weight decay pulls towards zero what multiplies activations: kernels, the
# embedding table, adapters. Biases and the scales of norms stay out of it, as
# in the trainers that published recipes were run with.
_UNDECAYED = ("bias", "scale")


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """Settings.

  Attributes:
    learning_rate: the highest learning rate of the schedule.
    warmup_steps: updates of linear warm-up; none of them has rate zero. Before
      a decay at most half of the run's.
    schedule: "constant", or "cosine" down to zero after `num_updates`.
    num_updates: optimizer updates of the whole run (only "cosine" looks at it).
    b1: decay of the mean of the gradients, in [0, 1).
    b2: decay of the mean of their squares, in [0, 1).
    eps: added to the root of the second mean.
    weight_decay: decoupled, times the learning rate (arXiv:1711.05101).
    clip_norm: the gradient is shrunk to this global norm; inf for never.
  """

  learning_rate: float
  warmup_steps: int = 0
  schedule: str = "constant"
  num_updates: int = 0
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 0.0
  clip_norm: float = 1.0


def problems(settings: Optimizer) -> list[str]:
  """Returns what is wrong with the settings, a line each; [] for nothing."""
  found = []

  def want(is_fine: bool, name: str, legal: str) -> None:
    if not is_fine:
      value = getattr(settings, name)
      found.append(f"optimizer.{name}={value!r} must be {legal}")

  # Adam moves every parameter by about the learning rate in an update, and no
  # parameter is larger than that.
  want(0 < settings.learning_rate <= 1, "learning_rate", "in (0, 1]")
  want(settings.warmup_steps >= 0, "warmup_steps", "0 or more")
  want(settings.schedule in SCHEDULES, "schedule", " or ".join(SCHEDULES))
  want(0 <= settings.b1 < 1, "b1", "in [0, 1)")
  want(0 <= settings.b2 < 1, "b2", "in [0, 1)")
  want(0 < settings.eps <= 1, "eps", "in (0, 1]")
  want(0 <= settings.weight_decay <= 100, "weight_decay", "in [0, 100]")
  want(settings.clip_norm > 0, "clip_norm", "positive (inf for no clipping)")
  return found


def schedule(settings: Optimizer) -> optax.Schedule:
  """Returns the learning rate of update u = 0, 1, ... as a function.

  With w = `warmup_steps`, n = `num_updates`: peak (u + 1) / (w + 1) while
  u < w; then the peak, or peak (1 + cos(pi (u - w) / (n - w))) / 2. So no
  gradient, which cost a rollout, is multiplied by zero.
  """
  peak, warmup = settings.learning_rate, settings.warmup_steps
  if settings.schedule == "constant":
    return optax.warmup_constant_schedule(peak / (warmup + 1), peak, warmup)
  # A run that is shortened to be tried out keeps some of its decay.
  warmup = min(warmup, settings.num_updates // 2)
  first = peak / (warmup + 1)
  return optax.warmup_cosine_decay_schedule(
    first, peak, warmup, settings.num_updates
  )


def last_learning_rate(settings: Optimizer, opt_state: Any) -> jax.Array:
  """Returns the rate of the newest update; before the first one, the first's.

  Args:
    settings: that `make` was given.
    opt_state: a state of that optimizer. It counts its updates itself: a batch
      without anything to learn from makes none.
  """
  count = optax.tree.get(
    opt_state,
    "count",
    # Adam counts too, under the same name.
    filtering=lambda path, _: path[-1].tuple_name == "ScaleByScheduleState",
  )
  return schedule(settings)(jnp.maximum(count - 1, 0))


def make(settings: Optimizer) -> optax.GradientTransformation:
  """Returns the chain: clip, Adam, weight decay, minus the learning rate.

  Its `init` raises ValueError for trained arrays that are not float32: in
  bfloat16 an update of one part in a thousand rounds to nothing.

  Raises:
    UserError: settings out of range, all of them in one message.
  """
  found = problems(settings)
  if found:
    raise errors.UserError("Wrong optimizer settings:\n  " + "\n  ".join(found))
  # Not `optax.adamw`: its state would nest one level deeper, and checkpoints
  # that are there could not be read.
  chain = optax.chain(
    optax.clip_by_global_norm(settings.clip_norm),
    optax.scale_by_adam(b1=settings.b1, b2=settings.b2, eps=settings.eps),
    optax.add_decayed_weights(settings.weight_decay, mask=is_decayed),
    optax.scale_by_learning_rate(schedule(settings)),
  )

  def init(params: Any) -> Any:
    others = {
      jax.tree_util.keystr(path, simple=True, separator="/"): str(leaf.dtype)
      for path, leaf in jax.tree_util.tree_leaves_with_path(params)
      if leaf.dtype != jnp.float32
    }
    if others:
      raise ValueError(f"Trained parameters must be float32, but: {others}")
    return chain.init(params)

  return optax.GradientTransformation(init, chain.update)


def is_decayed(params: Any) -> Any:
  """Returns the same tree of bools: whether weight decay acts on an array."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[-1].key not in _UNDECAYED, params
  )


def state_shardings(
  transformation: optax.GradientTransformation,
  params: Any,
  params_shardings: Any,
  other: jax.sharding.Sharding,
) -> Any:
  """Returns where the optimizer's state goes: moments with their parameters.

  Args:
    transformation: from `make`.
    params: the trained tree; abstract arrays do.
    params_shardings: the same tree of shardings.
    other: for what belongs to no parameter (the counts).

  Returns:
    A tree of shardings like `transformation.init(params)`.
  """
  state = jax.eval_shape(transformation.init, params)
  return optax.tree.map_params(
    transformation,
    lambda _, sharding: sharding,
    state,
    params_shardings,
    transform_non_params=lambda _: other,
  )
