"""What a run would need: compiled for the hardware, without the hardware.

    python -m agrpo_jax.plan --config=configs/gsm8k.py --topology=v5e:4x8

compiles the two programs that `agrpo_jax.main` runs with this config, of the
real network but without its parameters, and prints what they take: memory per
device, FLOPs, bytes, communication, and the least time that allows. TPU slices
need `pip install 'agrpo_jax[tpu]'`; h100:8 and the like are partitioned for N
devices and compiled for CPUs, which keeps bfloat16 products in float32: read
their memory as an upper bound.

Times are floors: all K denoising steps run, no pair of the update is left out,
and compute, memory and network overlap perfectly at their datasheet rates.
--fit searches the largest `rollout.batch_size` and `objective.microbatch`.
"""

import dataclasses
from collections.abc import Callable
from collections.abc import Sequence

import jax
from absl import flags

from agrpo_jax import command
from agrpo_jax import errors
from agrpo_jax import settings as settings_lib
from agrpo_jax.parallel import mesh as mesh_lib
from agrpo_jax.plan import chips
from agrpo_jax.plan import programs as programs_lib

_TOPOLOGY = flags.DEFINE_string(
  "topology", None, "Such as v5e:4x8, v5p:2x2x1, h100:8 or cpu:8."
)
_PROMPT_LENGTH = flags.DEFINE_integer(
  "prompt_length", 0, "Tokens; 0: config.data.max_prompt_length."
)
_FIT = flags.DEFINE_bool("fit", False, "Search the largest batches that fit.")

_NUM_COLLECTIVES = 8
_NUM_BUFFERS = 5


def main(argv: Sequence[str]) -> None:
  del argv
  s = settings_lib.rl(command.CONFIG.value)
  topology = chips.parse(_TOPOLOGY.value or "")
  devices = chips.devices(topology)
  mesh = s.mesh.make(devices)
  length = _PROMPT_LENGTH.value or s.data.max_prompt_length
  planner = programs_lib.Planner(s, mesh, length)
  shape = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
  print(
    f"{s.model.path} on {topology.name}: {len(devices)} devices as {shape}; "
    f"{'LoRA' if s.lora else 'full fine-tuning'}, remat {s.model.remat}, "
    f"prompts of {planner.prompt_length} tokens."
  )
  if _FIT.value:
    s = fit(s, planner, topology.chip)
  programs = []
  for build_program in (planner.rollout, planner.update):
    programs.append(build_program(s))
    print(describe(programs[-1], topology.chip), flush=True)
  print(summary(s, programs, topology.chip, len(devices)))


def fit(
  s: settings_lib.Rl,
  planner: programs_lib.Planner,
  chip: chips.Chip | None,
) -> settings_lib.Rl:
  """Returns settings with the largest batches that fit.

  They are powers of two times the row shards.

  Raises:
    UserError: not even the smallest fits.
  """
  shards = mesh_lib.num_row_shards(planner.mesh)
  rows = s.rollout.num_rows

  def with_batch_size(s: settings_lib.Rl, size: int) -> settings_lib.Rl:
    rollout = dataclasses.replace(s.rollout, batch_size=size)
    return dataclasses.replace(s, rollout=rollout)

  def with_microbatch(s: settings_lib.Rl, size: int) -> settings_lib.Rl:
    return dataclasses.replace(s, microbatch=size)

  for key, build_program, change, most in (
    ("rollout.batch_size", planner.rollout, with_batch_size, rows),
    (
      "objective.microbatch",
      planner.update,
      with_microbatch,
      planner.units_per_update(s),
    ),
  ):
    sizes = [shards << i for i in range(most.bit_length())]
    sizes = [n for n in sizes if n <= most and (key[0] == "o" or rows % n == 0)]

    def fits(
      size: int,
      key: str = key,
      make: Callable = build_program,
      change: Callable = change,
      s: settings_lib.Rl = s,
    ) -> bool:
      program = make(change(s, size))
      verdict = "fits" if program.fits(chip) else "does not fit"
      print(f"  --config.{key}={size} {verdict}", flush=True)
      return program.fits(chip)

    size = largest(sizes, fits)
    if size is None:
      raise errors.UserError(
        f"Not even config.{key}={sizes[0] if sizes else shards} fits. Split "
        "the model over more devices (config.mesh), or recompute more "
        "(config.model.remat=full)."
      )
    s = change(s, size)
  return s


def largest(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
  """The largest of ascending sizes that fits, by bisection; None if none."""
  low, high = -1, len(sizes)
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if fits(sizes[middle]) else (low, middle)
  return sizes[low] if low >= 0 else None


def describe(program: programs_lib.Program, chip: chips.Chip | None) -> str:
  """Returns in words what one program takes of a device."""
  if program.refusal:
    return f"\n{program.name}: DOES NOT FIT. {program.refusal}"
  cost = program.cost
  lines = [
    f"\n{program.name}: {program.runs} a train step, outer loop "
    f"{program.trips} times, compiled in {program.compile_seconds:.0f} s",
    f"  memory      {_gib(program.total)}: arguments "
    f"{_gib(program.arguments)}, outputs {_gib(program.outputs)}, temporaries "
    f"{_gib(program.temporaries)}, lying by {_gib(program.resident)}"
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
  step = sum(
    program.runs * max(program.seconds(chip).values()) for program in programs
  )
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
