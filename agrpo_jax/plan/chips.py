"""Accelerators that a run may be planned for, none of which need be here."""

import dataclasses
import importlib.util
import os
from importlib import metadata

import jax
from jax.experimental import topologies
from jax.extend import backend
from packaging import requirements

from agrpo_jax import errors

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device as JAX counts them.

  Attributes:
    hbm_bytes: of memory that a program can have. For TPUs this is what the
      compiler itself allows; for GPUs the nominal size, which leaves some
      gigabytes to the driver.
    flops: per second, bfloat16 matrix products, datasheet.
    hbm_bandwidth: bytes per second, datasheet.
    wire_bandwidth: bytes per second that a device receives in a ring of its
      neighbours, both directions: two ICI links, or NVLink.
    per_chip: devices per chip that is paid for.
    shapes: slices on offer; empty for GPUs, which are counted.
    options: what libtpu must be told besides.
  """

  hbm_bytes: float
  flops: float
  hbm_bandwidth: float
  wire_bandwidth: float
  per_chip: int = 1
  shapes: tuple[str, ...] = ()
  options: tuple[tuple[str, str], ...] = ()

  @property
  def is_tpu(self) -> bool:
    return bool(self.shapes)


_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8")
_SQUARES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")

# Bandwidths between chips: https://jax-ml.github.io/scaling-book, the rest from
# cloud.google.com/tpu/docs and the vendors' datasheets.
CHIPS = {
  "v4": Chip(
    *(30.75 * _GIB, 275e12, 1.228e12, 0.9e11),
    shapes=_CUBES,
    options=(("chip_config_name", "megacore"),),
  ),
  "v5e": Chip(15.75 * _GIB, 197e12, 0.819e12, 0.9e11, shapes=_SQUARES),
  "v5p": Chip(95.74 * _GIB, 459e12, 2.765e12, 1.8e11, shapes=_CUBES),
  "v6e": Chip(31.25 * _GIB, 918e12, 1.64e12, 1.8e11, shapes=_SQUARES),
  "tpu7x": Chip(
    *(94.75 * _GIB, 1153e12, 3.69e12, 1.8e11), per_chip=2, shapes=_CUBES
  ),
  "a100": Chip(80e9, 312e12, 2.04e12, 3.0e11),
  "h100": Chip(80e9, 989e12, 3.35e12, 4.5e11),
  "h200": Chip(141e9, 989e12, 4.8e12, 4.5e11),
  # Consumer and cloud cards; between several of them is PCIe.
  "rtx4090": Chip(24e9, 165e12, 1.01e12, 3.2e10),
  "l4": Chip(24e9, 121e12, 0.3e12, 3.2e10),
  # It has no bfloat16: what it computes in float32.
  "t4": Chip(16e9, 8.1e12, 0.32e12, 1.6e10),
}


# What JAX calls a device, in the order in which they are looked for: the name
# of one may begin that of another.
_DEVICE_KINDS = (
  ("TPU v4", "v4"),
  ("TPU v5 lite", "v5e"),
  ("TPU v5e", "v5e"),
  ("TPU v5", "v5p"),
  ("TPU v6", "v6e"),
  ("TPU7x", "tpu7x"),
  ("A100", "a100"),
  ("H100", "h100"),
  ("H200", "h200"),
  ("RTX 4090", "rtx4090"),
  ("NVIDIA L4", "l4"),
  ("T4", "t4"),
)


def of_device(device_kind: str) -> Chip | None:
  """Returns what JAX's `Device.device_kind` names, None if it is not known.

  TPU v4 lite and NVIDIA L40 are others than those that their names begin with.
  """
  words = device_kind.replace("-", " ")
  for part, kind in _DEVICE_KINDS:
    begin = words.find(part)
    rest = words[begin + len(part) :]
    if (
      begin >= 0
      and not rest[:1].isdigit()
      and not (kind == "v4" and "lite" in rest)
    ):
      return CHIPS[kind]
  return None


@dataclasses.dataclass(frozen=True)
class Topology:
  """The devices to plan for: `name` = kind:shape, no `chip` for plain CPUs."""

  name: str
  kind: str
  shape: str
  chip: Chip | None

  @property
  def is_tpu(self) -> bool:
    return self.chip is not None and self.chip.is_tpu


def parse(name: str) -> Topology:
  """Returns what "v5e:4x8", "h100:8" or "cpu:8" names.

  Raises:
    UserError: listing what is known.
  """
  kind, _, shape = name.partition(":")
  chip = CHIPS.get(kind)
  sizes = shape.split("x")
  is_shape = all(size.isdecimal() and int(size) > 0 for size in sizes)
  if chip and chip.is_tpu:
    is_known = is_shape and len(sizes) == chip.shapes[0].count("x") + 1
  else:
    is_known = (chip is not None or kind == "cpu") and shape.isdecimal()
  if not is_known or not is_shape:
    tpus = "".join(
      f"\n  {kind}:{', '.join(chip.shapes)} ..."
      for kind, chip in CHIPS.items()
      if chip.is_tpu
    )
    others = ", ".join(
      f"{kind}:N" for kind in [*CHIPS, "cpu"] if not _is_tpu(kind)
    )
    raise errors.UserError(
      f"--topology={name} is not known. TPU slices are:{tpus}\n"
      f"and N devices of one host are {others}, such as h100:8."
    )
  return Topology(name, kind, shape, chip)


def _is_tpu(kind: str) -> bool:
  return kind in CHIPS and CHIPS[kind].is_tpu


def devices(topology: Topology) -> list[jax.Device]:
  """Returns devices to compile for.

  Those of a TPU slice are only described. GPUs and CPUs are stood in for by
  virtual CPU devices: the same partitioning, another compiler behind it.

  Raises:
    UserError: libtpu is missing, belongs to another JAX, or does not know the
      slice.
  """
  if not topology.is_tpu:
    backend.clear_backends()  # their number is read when they start
    jax.config.update("jax_num_cpu_devices", int(topology.shape))
    return jax.devices()
  version = _libtpu_version(topology)
  # Else libtpu looks for the TPU that this machine would be part of, and lets
  # only one process have it.
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
  options = dict(topology.chip.options) if topology.chip else {}
  try:
    found = topologies.get_topology_desc(
      platform="tpu", topology_name=topology.name, **options
    )
  except (RuntimeError, NotImplementedError) as error:
    raise errors.UserError(
      f"libtpu {version} does not know --topology={topology.name}: {error}"
    ) from error
  return list(found.devices)


def _libtpu_version(topology: Topology) -> str:
  """Returns the installed libtpu's version, "" if it does not say.

  Raises:
    UserError: it is missing, or belongs to another JAX than the installed one.
      That would fail later, in words that tell nobody why.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise errors.UserError(
      f"--topology={topology.name} is compiled by libtpu, which is not "
      "installed (it works without a TPU): pip install 'agrpo_jax[tpu]'"
    )
  try:
    version = metadata.version("libtpu")
  except metadata.PackageNotFoundError:
    return ""
  for line in metadata.requires("jax") or []:
    wanted = requirements.Requirement(line)
    if wanted.name == "libtpu" and not wanted.specifier.contains(
      version, prereleases=True
    ):
      raise errors.UserError(
        f"libtpu {version} is installed, but jax {jax.__version__} goes with "
        f"libtpu {str(wanted.specifier).removeprefix('==')}: pip install "
        f"'jax[tpu]=={jax.__version__}'"
      )
  return version
