"""The fastest settings that fit a machine: mesh, batches, recomputation.

Every trial is a compilation. On a mesh the two programs of a train step do not
depend on each other: rollouts are tried by their batch, updates by microbatch
and recomputation, and any of the ones goes with any of the others.
"""

import dataclasses
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence

from agrpo_jax import errors
from agrpo_jax import settings as settings_lib
from agrpo_jax.models import base
from agrpo_jax.parallel import mesh as mesh_lib
from agrpo_jax.plan import chips
from agrpo_jax.plan import programs as programs_lib

# Weights are split over as few devices as they fit on, or up to this many times
# as many: more leaves more memory to activations, and costs communication.
_MOST_SPLIT = 4


@dataclasses.dataclass(frozen=True)
class Choice:
  """Settings whose two programs fit.

  Attributes:
    s: the settings.
    rollout: the program that draws completions.
    update: the program that learns from them.
    seconds: of a train step, at least.
  """

  s: settings_lib.Rl
  rollout: programs_lib.Program
  update: programs_lib.Program
  seconds: float

  def __str__(self) -> str:
    """The seconds, and the settings as flags."""
    s = self.s
    return (
      f"{self.seconds:.4g} s: {_mesh(s)} {_batch_size(s)} {_microbatch(s)} "
      f"{_remat(s)}"
    )


def fastest(
  s: settings_lib.Rl,
  make_planner: Callable[[settings_lib.Rl], programs_lib.Planner],
  num_devices: int,
  chip: chips.Chip,
) -> list[Choice]:
  """Returns the settings that were tried and fit, the fastest first.

  Batches are powers of two times the row shards. Their sizes ascend until one
  does not fit, or is slower than the one before.

  Args:
    s: everything that is not searched; what is, is replaced.
    make_planner: settings -> what compiles their programs.
    num_devices: how many there are to split over.
    chip: what has to hold the programs, and tells their seconds.

  Raises:
    UserError: nothing fits, or no mesh can hold the network at all.
  """
  choices: list[Choice] = []
  reasons: list[errors.UserError] = []
  fewest = 0
  # A further dimension that changes both programs is a further loop here.
  for mesh in meshes(num_devices):
    parts = mesh.fsdp * mesh.tensor
    if fewest and parts > _MOST_SPLIT * fewest:
      break
    on_mesh = dataclasses.replace(
      s,
      mesh=mesh,
      microbatch=mesh.data * mesh.fsdp,
      rollout=dataclasses.replace(s.rollout, batch_size=s.rollout.num_rows),
    )
    try:
      planner = make_planner(on_mesh)
    except errors.UserError as error:
      reasons.append(error)
      continue
    if planner.held_bytes(on_mesh) > chip.hbm_bytes:
      continue
    fewest = fewest or parts
    print(_mesh(on_mesh), flush=True)
    rollouts = _ascend(
      _with_batch_sizes(on_mesh, planner.mesh),
      planner.rollout,
      chip,
      _batch_size,
    )
    if not rollouts:
      continue
    least = min(program.step_seconds(chip) for _, program in rollouts)
    if choices and least >= min(choice.seconds for choice in choices):
      print("  its rollouts alone take longer than a train step above")
      continue
    updates = _updates(on_mesh, make_planner, chip)
    choices += [
      Choice(
        dataclasses.replace(with_update, rollout=with_rollout.rollout),
        rollout,
        update,
        rollout.step_seconds(chip) + update.step_seconds(chip),
      )
      for with_rollout, rollout in rollouts
      for with_update, update in updates
    ]
  if choices:
    return sorted(choices, key=lambda choice: choice.seconds)
  if fewest == 0 and reasons:
    raise reasons[-1]
  raise errors.UserError(
    f"No mesh of these {num_devices} devices holds the network and one row of "
    "activations a device. Take more devices or larger ones, or train adapters "
    "(config.lora.rank)."
  )


def meshes(num_devices: int) -> Iterator[settings_lib.Mesh]:
  """Yields copies of weights that are whole, or split in one way, fewest first.

  The rows of a batch are split over the copies, and over `fsdp`.
  """
  for parts in range(1, num_devices + 1):
    if num_devices % parts == 0:
      data = num_devices // parts
      yield settings_lib.Mesh(data=data, fsdp=parts, tensor=1)
      if parts > 1:
        yield settings_lib.Mesh(data=data, fsdp=1, tensor=parts)


_Trial = tuple[settings_lib.Rl, programs_lib.Program]


def _updates(
  s: settings_lib.Rl,
  make_planner: Callable[[settings_lib.Rl], programs_lib.Planner],
  chip: chips.Chip,
) -> list[_Trial]:
  """Returns the updates that fit, of all microbatches and recomputations."""
  found: list[_Trial] = []
  for remat in reversed(base.REMAT):  # those that keep least first
    s = dataclasses.replace(s, model=dataclasses.replace(s.model, remat=remat))
    planner = make_planner(s)
    more = _ascend(
      _with_microbatches(s, planner),
      planner.update,
      chip,
      lambda s: f"{_remat(s)} {_microbatch(s)}",
    )
    if not more:
      break
    found += more
  return found


def _ascend(
  tried: Sequence[settings_lib.Rl],
  build: Callable[[settings_lib.Rl], programs_lib.Program],
  chip: chips.Chip,
  words: Callable[[settings_lib.Rl], str],
) -> list[_Trial]:
  """Returns what fits of ascending sizes, up to the first that is slower."""
  found: list[_Trial] = []
  for s in tried:
    program = build(s)
    if not program.fits(chip):
      print(f"  {words(s)} does not fit", flush=True)
      break
    seconds = program.step_seconds(chip)
    print(f"  {words(s)} {seconds:.4g} s", flush=True)
    found.append((s, program))
    if len(found) > 1 and seconds > found[-2][1].step_seconds(chip):
      break
  return found


def _with_batch_sizes(
  s: settings_lib.Rl, mesh: mesh_lib.Mesh
) -> list[settings_lib.Rl]:
  return [
    dataclasses.replace(
      s, rollout=dataclasses.replace(s.rollout, batch_size=size)
    )
    for size in _sizes(mesh, s.rollout.num_rows)
    if s.rollout.num_rows % size == 0
  ]


def _with_microbatches(
  s: settings_lib.Rl, planner: programs_lib.Planner
) -> list[settings_lib.Rl]:
  return [
    dataclasses.replace(s, microbatch=size)
    for size in _sizes(planner.mesh, planner.units_per_update(s))
  ]


def _sizes(mesh: mesh_lib.Mesh, most: int) -> list[int]:
  shards = mesh_lib.num_row_shards(mesh)
  return [n for i in range(most.bit_length()) if (n := shards << i) <= most]


def _mesh(s: settings_lib.Rl) -> str:
  return " ".join(
    f"--config.mesh.{axis}={getattr(s.mesh, axis)}" for axis in mesh_lib.AXES
  )


def _batch_size(s: settings_lib.Rl) -> str:
  return f"--config.rollout.batch_size={s.rollout.batch_size}"


def _microbatch(s: settings_lib.Rl) -> str:
  return f"--config.objective.microbatch={s.microbatch}"


def _remat(s: settings_lib.Rl) -> str:
  return f"--config.model.remat={s.model.remat}"
