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
--search compiles many: it tries meshes, batches, microbatches and recomputation
in place of the config's, and prints the fastest that fit.
"""

from collections.abc import Iterable
from collections.abc import Sequence

import jax
from absl import flags

from agrpo_jax import command
from agrpo_jax import errors
from agrpo_jax import settings as settings_lib
from agrpo_jax.plan import chips
from agrpo_jax.plan import programs as programs_lib
from agrpo_jax.plan import search

_TOPOLOGY = flags.DEFINE_string(
  "topology", None, "Such as v5e:4x8, v5p:2x2x1, h100:8 or cpu:8."
)
_PROMPT_LENGTH = flags.DEFINE_integer(
  "prompt_length", 0, "Tokens; 0: config.data.max_prompt_length."
)
_SEARCH = flags.DEFINE_bool(
  "search", False, "Search the fastest mesh, batches and recomputation."
)

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
    choices = search.fastest(s, make_planner, len(devices), chip)
    print("\nThe fastest that fit, seconds a train step at the roofline:")
    for choice in choices[:_NUM_CHOICES]:
      print(f"  {choice}")
    s, found = choices[0].s, (choices[0].rollout, choices[0].update)
  planner = make_planner(s)
  shape = ", ".join(f"{axis} {n}" for axis, n in planner.mesh.shape.items())
  print(
    f"{s.model.path} on {topology.name}: {len(devices)} devices as {shape}; "
    f"{'LoRA' if s.lora else 'full fine-tuning'}, remat {s.model.remat}, "
    f"prompts of {planner.prompt_length} tokens.",
    flush=True,
  )
  programs = []
  for program in found or (f(s) for f in (planner.rollout, planner.update)):
    print(describe(program, chip), flush=True)
    programs.append(program)
  print(summary(s, programs, chip, len(devices)))


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
