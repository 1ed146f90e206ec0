"""What a run would need: compiled for the hardware, without the hardware.

    agrpo plan --config=gsm8k --topology=v5e:4x8

compiles the two programs that `agrpo_jax.main` runs with this config, of the
real network but without its parameters, and prints what they take: memory per
device, FLOPs, bytes, communication, and the least time that allows. TPU slices
need `pip install 'agrpo_jax[tpu]'`; h100:8 and the like are partitioned for N
devices and compiled for CPUs, which keeps bfloat16 products in float32: read
their memory as an upper bound.

Times are floors: all K denoising steps run, no pair of the update is left out,
and compute, memory and network overlap perfectly at their datasheet rates.
--search compiles many: it tries meshes, caches, batches, microbatches and
recomputation in place of the config's, and prints the fastest that fit. Another
cache is another policy (docs/estimator.md): --caches=none leaves it alone.
"""

import dataclasses
import itertools
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence

import jax
from absl import flags

from agrpo_jax import command
from agrpo_jax import config as config_lib
from agrpo_jax import errors
from agrpo_jax import settings as settings_lib
from agrpo_jax.models import base
from agrpo_jax.parallel import mesh as mesh_lib
from agrpo_jax.plan import chips
from agrpo_jax.plan import programs as programs_lib
from agrpo_jax.samplers import sampling as sampling_lib

_TOPOLOGY = flags.DEFINE_string(
  "topology", None, "Such as v5e:4x8, v5p:2x2x1, h100:8 or cpu:8."
)
_PROMPT_LENGTH = flags.DEFINE_integer(
  "prompt_length",
  0,
  "Tokens; 0: config.data.max_prompt_length.",
  lower_bound=0,
)
_SEARCH = flags.DEFINE_bool(
  "search", False, "Search the fastest mesh, cache, batches and recomputation."
)
_CACHES = flags.DEFINE_list(
  "caches", list(sampling_lib.CACHES), "Caches that --search tries."
)

# Weights are split over as few devices as they fit on, or up to this many times
# as many: more leaves more memory to activations, and costs communication.
_MOST_SPLIT = 4

_NUM_CHOICES = 10
_NUM_COLLECTIVES = 8
_NUM_BUFFERS = 5


def main(argv: Sequence[str]) -> None:
  del argv
  c = command.CONFIG.value
  if _SEARCH.value:  # what is searched need not be right before
    c.rollout.batch_size = c.rollout.num_prompts * c.rollout.group_size
  s = settings_lib.rl(c)
  topology = chips.parse(_TOPOLOGY.value or "")
  chip, devices = topology.chip, chips.devices(topology)

  def make_planner(s: settings_lib.Rl) -> programs_lib.Planner:
    length = _PROMPT_LENGTH.value or s.data.max_prompt_length
    return programs_lib.Planner(s, s.mesh.make(devices), length)

  found: Iterable[programs_lib.Program] = ()
  if _SEARCH.value:
    if chip is None:
      raise errors.UserError(
        f"--search on --topology={topology.name}: CPUs have neither a memory "
        "to fit nor a time to tell. Name an accelerator, such as h100:8."
      )
    choices = fastest(_with_caches(c), make_planner, len(devices), chip)
    print("\nThe fastest that fit, seconds a train step at the roofline:")
    for choice in choices[:_NUM_CHOICES]:
      print(f"  {choice}")
    s, found = choices[0].s, (choices[0].rollout, choices[0].update)
  planner = make_planner(s)
  trained = "LoRA" if s.lora else "full fine-tuning"
  if s.model.quantize != "none":
    trained += f" on {s.model.quantize}"
  shape = ", ".join(f"{axis} {n}" for axis, n in planner.mesh.shape.items())
  print(
    f"{s.model.path} on {topology.name}: {len(devices)} devices as {shape}; "
    f"{trained}, remat {s.model.remat}, "
    f"prompts of {planner.prompt_length} tokens.",
    flush=True,
  )
  programs = []
  for program in found or (f(s) for f in (planner.rollout, planner.update)):
    print(describe(program, chip), flush=True)
    programs.append(program)
  print(summary(s, programs, chip, len(devices)))


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
      f"{self.seconds:.4g} s: {_mesh(s)} {_cache(s)} {_batch_size(s)} "
      f"{_microbatch(s)} {_remat(s)}"
    )


def fastest(
  candidates: Sequence[settings_lib.Rl],
  make_planner: Callable[[settings_lib.Rl], programs_lib.Planner],
  num_devices: int,
  chip: chips.Chip,
) -> list[Choice]:
  """Returns the settings that were tried and fit, the fastest first.

  On a mesh the two programs of a train step do not depend on each other:
  rollouts are tried by their batch, updates by microbatch and recomputation,
  and any of the ones goes with any of the others.

  Batches are powers of two times the row shards. Their sizes ascend until one
  does not fit, or is slower than the one before.

  Args:
    candidates: settings that differ in what changes both programs, such as
      the cache; of each, what is searched is replaced.
    make_planner: settings -> what compiles their programs.
    num_devices: how many there are to split over.
    chip: what has to hold the programs, and tells their seconds.

  Raises:
    UserError: nothing fits, or no mesh can hold the network at all.
  """
  choices: list[Choice] = []
  reasons: list[str] = []
  fewest = 0
  for mesh, s in itertools.product(meshes(num_devices), candidates):
    parts = mesh.fsdp * mesh.tensor
    # Meshes ascend in parts: the rest would be split even more.
    if fewest and parts > _MOST_SPLIT * fewest:
      break
    on_mesh = dataclasses.replace(
      s,
      mesh=mesh,
      # The least that divides over the mesh, until sizes are tried below.
      microbatch=mesh.data * mesh.fsdp,
      rollout=dataclasses.replace(s.rollout, batch_size=s.rollout.num_rows),
    )
    try:
      planner = make_planner(on_mesh)
      if planner.held_bytes(on_mesh) > chip.hbm_bytes:
        continue
      fewest = fewest or parts
      print(_mesh(on_mesh), _cache(on_mesh), flush=True)
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
    except errors.UserError as error:
      reasons.append(str(error))
      continue
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
  raise errors.UserError(
    "\n".join(
      [
        f"No mesh of these {num_devices} devices holds the network and one row "
        "of activations a device. Take more devices or larger ones, or train "
        "adapters (config.lora.rank).",
        # What kept meshes from being tried, each once.
        *dict.fromkeys(reasons),
      ]
    )
  )


def _with_caches(c: config_lib.ConfigDict) -> list[settings_lib.Rl]:
  """Returns the settings of a config under each of --caches."""
  found, problems = [], []
  for cache in _CACHES.value or [c.rollout.cache]:
    one = c.copy_and_resolve_references()
    if cache != c.rollout.cache:
      config_lib.use_cache(one, cache)
      # What is planned is training; an evaluation keeps what it had.
      one.evaluate.cache = c.evaluate.cache
      one.rollout.cache_refresh = 0
    try:
      found.append(settings_lib.rl(one))
    except errors.UserError as error:
      problems.append(f"Under cache={cache}: {error}")
  if not found:
    raise errors.UserError("\n".join(problems))
  for problem in problems:
    print(problem, flush=True)
  return found


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
    # What is next keeps more, and so fits no better.
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


def _cache(s: settings_lib.Rl) -> str:
  flag = f"--config.rollout.cache={s.rollout.sampling.cache}"
  rule = getattr(s.objective, "step_rule", "")
  return f"{flag} --config.objective.step_rule={rule}" if rule else flag


def _batch_size(s: settings_lib.Rl) -> str:
  return f"--config.rollout.batch_size={s.rollout.batch_size}"


def _microbatch(s: settings_lib.Rl) -> str:
  return f"--config.objective.microbatch={s.microbatch}"


def _remat(s: settings_lib.Rl) -> str:
  return f"--config.model.remat={s.model.remat}"


def describe(program: programs_lib.Program, chip: chips.Chip | None) -> str:
  """Returns in words what one program takes of a device."""
  kept = ""
  if program.cache:
    kept = f"keys and values that steps share {_gib(program.cache)}"
  if program.refusal:
    reason = f" ({kept})" if kept else ""
    return f"\n{program.name}: DOES NOT FIT. {program.refusal}{reason}"
  cost = program.cost
  trips = " x ".join(f"{count:g}" for count in program.trips)
  lines = [
    f"\n{program.name}: {program.runs} a train step, outer loop {trips} times, "
    f"compiled in {program.compile_seconds:.0f} s",
    f"  memory      {_gib(program.total)}: arguments "
    f"{_gib(program.arguments)}, outputs {_gib(program.outputs)}, temporaries "
    f"{_gib(program.temporaries)}"
    + (f" (of them {kept})" if kept else "")
    + f", lying by {_gib(program.resident)}"
    + (f"; of {_gib(chip.hbm_bytes)}" if chip else ""),
    f"  FLOPs       {cost.flops:.3e} a run",
    f"  HBM bytes   {cost.bytes:.3e} a run",
    f"  network     {cost.wire_bytes:.3e} bytes received a run, most of it:",
  ]
  by_size = sorted(
    cost.collectives.items(), key=lambda item: -item[1] * item[0].wire_bytes
  )
  for one, times in by_size[:_NUM_COLLECTIVES]:
    lines.append(
      f"    {times:10.0f} x {one.kind} {one.shape} among {one.group} "
      f"({times * one.wire_bytes / 1e9:.1f} GB) {one.source}"
    )
  lines.append("  largest arrays: ")
  shapes: dict[str, str] = {}
  for _, shape, source in sorted(cost.buffers, reverse=True):
    shapes.setdefault(shape, source)
  for shape, source in list(shapes.items())[:_NUM_BUFFERS]:
    lines.append(f"    {shape} {source}")
  if chip:
    seconds = program.seconds(chip)
    listed = ", ".join(f"{name} {t:.1f}" for name, t in seconds.items())
    lines.append(f"  seconds     {max(seconds.values()):.1f} a run ({listed})")
  return "\n".join(lines)


def summary(
  s: settings_lib.Rl,
  programs: Sequence[programs_lib.Program],
  chip: chips.Chip | None,
  num_devices: int,
) -> str:
  """The run as a whole."""
  if chip is None:
    return "\nCPUs have neither a memory to fit nor a time to tell."
  does_fit = all(program.fits(chip) for program in programs)
  verdict = "It fits." if does_fit else "IT DOES NOT FIT."
  if any(program.refusal for program in programs):
    return f"\n{verdict}"
  step = sum(program.step_seconds(chip) for program in programs)
  hours = step * s.train.num_steps / 3600
  num_chips = num_devices // chip.per_chip
  return (
    f"\n{verdict} At the roofline {step:.1f} s a train step; "
    f"{s.train.num_steps} train steps in {hours:.1f} hours, "
    f"{hours * num_chips:.0f} chip-hours. At half of it, which is what good "
    f"programs reach, {2 * hours:.1f} hours, {2 * hours * num_chips:.0f} "
    "chip-hours. Calculated from the compiled programs, not run."
  )


def _gib(num_bytes: float) -> str:
  return f"{num_bytes / 2**30:.2f} GiB"


if __name__ == "__main__":
  # A plan must not take hold of the accelerator that this machine may have.
  jax.config.update("jax_platforms", "cpu")
  command.main(main, required=["config", "topology"])
