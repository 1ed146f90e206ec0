"""Host memory that loading a checkpoint takes, measured.

    python benchmarks/load_memory.py --gigabytes=4 --folder=/tmp/big [--int8]

Writes a random LLaDA-shaped bfloat16 checkpoint in shards of about 1 GB (used
again if it is there) and loads it onto virtual CPU devices, in processes of
their own. Device memory is host memory there, so what loading itself takes is
the process's peak minus what it had before and minus the arrays of its devices.
Pages of the mapped files are not counted: the system takes them back when it
needs memory. With --int8 kernels are quantized as they are read. Prints a
table, in GB (10^9 bytes) per process. Linux only.
"""

import argparse
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import jax
import ml_dtypes
import numpy as np
from safetensors import numpy as safetensors_numpy

from agrpo_jax import models
from agrpo_jax.models import base
from agrpo_jax.models import quantized
from agrpo_jax.models import transformer
from agrpo_jax.parallel import mesh as mesh_lib
from agrpo_jax.parallel import processes as processes_lib
from agrpo_jax.port import arrays
from agrpo_jax.port import files as files_lib
from agrpo_jax.port import model_folder

ROOT = pathlib.Path(__file__).resolve().parents[1]
GB = 1e9
_SHARD_BYTES = 10**9
_WIDTH = 2048
# layer bytes: 4 square projections and 3 of the MLP, 2 bytes each
_LAYER_BYTES = 2 * (4 * _WIDTH**2 + 3 * _WIDTH * 3 * _WIDTH)
_CASES = (
  # devices per process, processes, mesh
  (1, 1, dict(data=1, fsdp=1, tensor=1)),
  (8, 1, dict(data=1, fsdp=8, tensor=1)),
  (8, 1, dict(data=1, fsdp=4, tensor=2)),
  (4, 2, dict(data=1, fsdp=8, tensor=1)),
)


def generate(folder: pathlib.Path, gigabytes: float) -> None:
  """A checkpoint of about this size, tensor by tensor."""
  folder.mkdir(parents=True, exist_ok=True)
  num_layers = max(1, round(gigabytes * GB / _LAYER_BYTES))
  raw = json.loads(
    (ROOT / "agrpo_jax/assets/tiny-sudoku/config.json").read_text()
  )
  raw |= dict(
    d_model=_WIDTH,
    n_layers=num_layers,
    n_heads=16,
    n_kv_heads=16,
    mlp_hidden_size=3 * _WIDTH,
    weight_tying=False,
  )
  (folder / "config.json").write_text(json.dumps(raw))
  rng = np.random.default_rng(0)
  config = model_folder.load_shape(str(folder))
  shard: dict[str, np.ndarray] = {}
  weight_map: dict[str, str] = {}
  files: list[str] = []

  def flush() -> None:
    name = f"model-{len(files):05d}.safetensors"
    safetensors_numpy.save_file(shard, str(folder / name))
    weight_map.update(dict.fromkeys(shard, name))
    files.append(name)
    shard.clear()

  table = arrays.table(config, models.family_of(config))
  entries = jax.tree.leaves(table)
  sizes = {n: e.stored_shape for e in entries for n in e.names}
  for name in arrays.ordered(table):
    bits = rng.integers(0x3C00, 0x3D00, sizes[name], np.uint16)
    shard[name] = bits.view(ml_dtypes.bfloat16)
    if sum(x.nbytes for x in shard.values()) >= _SHARD_BYTES:
      flush()
  if shard:
    flush()
  (folder / files_lib.INDEX).write_text(
    json.dumps({"metadata": {}, "weight_map": weight_map})
  )


class Peak(threading.Thread):
  """The most memory this process has had of its own, sampled."""

  def __init__(self) -> None:
    super().__init__(daemon=True)
    self.bytes = own_memory()
    self.start()

  def run(self) -> None:
    while True:
      self.bytes = max(self.bytes, own_memory())
      time.sleep(0.002)


def own_memory() -> int:
  """Bytes of resident memory that is not a file's."""
  text = pathlib.Path("/proc/self/status").read_text()
  return 1024 * int(text.split("RssAnon:")[1].split()[0])


def load(folder: str, axes: dict[str, int], int8: bool) -> None:
  """Loads, and prints what it took as JSON."""
  processes_lib.initialize()
  mesh = mesh_lib.make(axes["data"], axes["fsdp"], axes["tensor"])
  jax.block_until_ready(jax.device_put(np.zeros(8)))
  before, peak, began = own_memory(), Peak(), time.monotonic()

  def shardings(config: base.Shape) -> model_folder.Shardings:
    described = transformer.abstract_params(config)
    logical_axes = transformer.logical_axes(config)
    if int8:
      described = quantized.abstract_params(described)
      logical_axes = quantized.logical_axes(logical_axes)
    return mesh_lib.shardings(mesh, logical_axes, described)

  if int8:
    params, _ = model_folder.load_quantized(
      folder, dtype="bfloat16", shardings=shardings
    )
  else:
    _, params = model_folder.load(folder, shardings=shardings)
  jax.block_until_ready(params)
  seconds = time.monotonic() - began
  leaves = jax.tree.leaves(params)
  held = sum(x.data.nbytes for leaf in leaves for x in leaf.addressable_shards)
  result = dict(
    held=held,
    extra=peak.bytes - before - held,
    largest=max(leaf.nbytes for leaf in leaves),
    seconds=seconds,
  )
  print(json.dumps(result), flush=True)


def measure(
  folder: str,
  devices: int,
  num_processes: int,
  axes: dict[str, int],
  int8: bool,
) -> list[dict[str, float]]:
  """Returns what `load` prints in each process."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port_number = free.getsockname()[1]
  processes = []
  for process in range(num_processes):
    environment = {
      **os.environ,
      "PYTHONPATH": str(ROOT),
      "JAX_PLATFORMS": "cpu",
      "JAX_NUM_CPU_DEVICES": str(devices),
    }
    if num_processes > 1:
      environment |= {
        "AGRPO_COORDINATOR": f"localhost:{port_number}",
        "AGRPO_NUM_PROCESSES": str(num_processes),
        "AGRPO_PROCESS_ID": str(process),
      }
    words = [sys.executable, __file__, "--load", json.dumps(axes)]
    words += ["--int8"] if int8 else []
    processes.append(
      subprocess.Popen(
        [*words, f"--folder={folder}"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
      )
    )
  outputs = [process.communicate()[0] for process in processes]
  return [json.loads(out.strip().splitlines()[-1]) for out in outputs]


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--gigabytes", type=float, default=4)
  parser.add_argument("--folder", required=True)
  parser.add_argument("--int8", action="store_true")
  parser.add_argument("--load", help="(of the processes it starts)")
  args = parser.parse_args(argv)
  if args.load:
    load(args.folder, json.loads(args.load), args.int8)
    return
  folder = pathlib.Path(args.folder).resolve()
  if not (folder / files_lib.INDEX).exists():
    generate(folder, args.gigabytes)
  files = list(folder.glob("*.safetensors"))
  size = sum(file.stat().st_size for file in files)
  print(f"{size / GB:.2f} GB in {len(files)} shards; JAX {jax.__version__}\n")
  print("| processes x devices | mesh | held | extra | largest array | s |")
  print("| --- | --- | --- | --- | --- | --- |")
  for devices, num_processes, axes in _CASES:
    results = measure(str(folder), devices, num_processes, axes, args.int8)
    worst = max(results, key=lambda result: result["extra"])
    print(
      f"| {num_processes} x {devices} "
      f"| {','.join(f'{k}={v}' for k, v in axes.items())} "
      f"| {worst['held'] / GB:.2f} | {worst['extra'] / GB:.2f} "
      f"| {worst['largest'] / GB:.2f} | {worst['seconds']:.0f} |",
      flush=True,
    )


if __name__ == "__main__":
  main(sys.argv[1:])
