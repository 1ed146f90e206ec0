"""How long a save holds a train step, measured.

    python benchmarks/save_stall.py --megabytes=50,1000 --folder=/tmp/stall

A state of this size is saved as a run saves it and then overwritten by a train
step that is given its memory (`donate`). Medians over --repeats, in seconds:

  copy       every array to the host into new memory: the least a save can take,
  checksums  a number per array, by the device: a part of `save`,
  save       until `Checkpoints.save` returns with no other save under way,
  step after the train step after that, and
  step       one that follows no save,
  write      from then until the checkpoint is complete,
  put off    until `Checkpoints.save` returns while another is being written,
  waits      the same for one that has to be saved, at the end of a run.
"""

import argparse
import functools
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from agrpo_jax import types
from agrpo_jax.runs import checkpoint
from agrpo_jax.runs import checkpoint_meta

_NUM_ARRAYS = 12  # of trained arrays; Adam has twice as many besides
_COLUMNS = (
  *("copy", "checksums", "save", "step after", "step", "write"),
  *("put off", "waits"),
)


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--megabytes", default="50,1000", help="of each state")
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--folder", help="to write in; default: a temporary one")
  args = parser.parse_args(argv)
  if args.folder:
    pathlib.Path(args.folder).mkdir(parents=True, exist_ok=True)
  print(f"JAX {jax.__version__}, {jax.devices()[0].device_kind}\n")
  print(f"| MB | {' | '.join(_COLUMNS)} |")
  print("| --- " * (1 + len(_COLUMNS)) + "|")
  for size in args.megabytes.split(","):
    with tempfile.TemporaryDirectory(dir=args.folder) as workdir:
      rounds = measure(workdir, float(size) * 1e6, args.repeats)
    cells = [
      f"{statistics.median(one[name] for one in rounds):.3f}"
      for name in _COLUMNS
    ]
    print(f"| {size} | {' | '.join(cells)} |", flush=True)


def measure(
  workdir: str, num_bytes: float, repeats: int
) -> list[dict[str, float]]:
  """Seconds by column, of each round; one more warms up."""
  state = jax.block_until_ready(init(int(num_bytes / 4 / 3 / _NUM_ARRAYS)))
  rounds = []
  with checkpoint.Checkpoints(workdir, keep=1) as checkpoints:
    for _ in range(repeats + 1):
      found = {}
      state = jax.block_until_ready(train_step(state))
      fresh = jax.block_until_ready(jax.tree.map(jnp.copy, state))
      found["copy"] = seconds(lambda s: jax.tree.map(np.array, s), fresh)
      del fresh
      found["checksums"] = seconds(checkpoint_meta.checksums, state)
      found["save"] = seconds(checkpoints.save, state, {})
      began = time.perf_counter()
      state = jax.block_until_ready(train_step(state))
      found["step after"] = time.perf_counter() - began
      checkpoints.wait()
      found["write"] = time.perf_counter() - began
      began = time.perf_counter()
      state = jax.block_until_ready(train_step(state))
      found["step"] = time.perf_counter() - began
      checkpoints.save(state, {})
      state = jax.block_until_ready(train_step(state))
      put_off = functools.partial(checkpoints.save, is_busy=True)
      found["put off"] = seconds(put_off, state, {})
      found["waits"] = seconds(checkpoints.save, state, {})
      checkpoints.wait()
      rounds.append(found)
  return rounds[1:]


def seconds(fn: Callable[..., object], *args: object) -> float:
  began = time.perf_counter()
  fn(*args)
  return time.perf_counter() - began


@functools.partial(jax.jit, static_argnums=0)
def init(size: int) -> types.TrainState:
  """Three arrays of some `size` float32 for each of _NUM_ARRAYS names."""
  keys = jax.random.split(jax.random.key(0), 3 * _NUM_ARRAYS)
  shape = (31, size // (31 * 64), 64)  # of LLaDA-8B's adapters
  arrays = [jax.random.normal(key, shape) for key in keys]
  trained, opt_state = arrays[:_NUM_ARRAYS], arrays[_NUM_ARRAYS:]
  return types.TrainState(jnp.int32(0), {}, {"layers": trained}, opt_state)


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state: types.TrainState) -> types.TrainState:
  """Touches every number once."""
  return state.replace(
    train_step=state.train_step + 1,
    lora=jax.tree.map(lambda x: 0.999 * x, state.lora),
    opt_state=jax.tree.map(lambda x: 0.999 * x, state.opt_state),
  )


if __name__ == "__main__":
  main(sys.argv[1:])
