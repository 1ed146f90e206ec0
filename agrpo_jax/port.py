r"""Checkpoints in Hugging Face's layout <-> our parameters.

    python -m agrpo_jax.port --from=<folder or hub id> --to=<folder> \
      [--dtype=bfloat16] [--merge_adapter=<PEFT folder>]

copies a checkpoint through our parameters: tensors, shards, `config.json`,
tokenizer and code files come out as the original code reads them. Code is
copied, never run.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from agrpo_jax import command
from agrpo_jax import errors
from agrpo_jax import hub
from agrpo_jax import llada
from agrpo_jax import lora as lora_lib
from agrpo_jax import peft
from agrpo_jax import port_arrays
from agrpo_jax import port_files
from agrpo_jax import port_names
from agrpo_jax import port_write
from agrpo_jax import types

MAX_SHARD_BYTES = 5 * 10**9  # what transformers writes

Shardings = Any  # a tree like the parameters', of jax.sharding.Sharding


def load_config(
  path: str, *, revision: str | None = None, **switches: str
) -> llada.Config:
  """Reads only the `config.json` of a checkpoint; see `load`."""
  folder = hub.folder(str(path), (port_files.CONFIG,), revision)
  return _read_config(folder, switches)


def load(
  path: str | pathlib.Path,
  *,
  dtype: Any = None,
  shardings: Shardings | Callable[[llada.Config], Shardings] | None = None,
  revision: str | None = None,
  **switches: str,
) -> tuple[llada.Config, types.Tree]:
  """Loads a LLaDA checkpoint.

  Tensors are read as they are placed: the host holds one stacked array at a
  time, and every process reads only what its own devices hold.

  Args:
    path: a local folder or a hub id.
    dtype: of the parameters; as stored if None.
    shardings: where they go: a tree like the parameters', or a function that
      makes it from the config; JAX's default device if None.
    revision: branch, tag or commit on the hub.
    **switches: how to compute: `compute_dtype`, `remat`, `attention` (`dtype`,
      `remat`, `attention` of `llada.Config`).

  Raises:
    UserError: naming everything that is wrong with the checkpoint.
  """
  folder = hub.folder(str(path), hub.CHECKPOINT, revision)
  config = _read_config(folder, switches)
  tensors = port_files.Tensors(folder)
  table = port_names.table(config)
  problems = port_arrays.misfits(tensors, table, dtype)
  if problems:
    for name in sorted(tensors.names()):
      port_arrays.check_finite(tensors, name, tensors.read(name), problems)
    _raise(folder, problems)
  if callable(shardings):
    shardings = shardings(config)
  if shardings is None:
    shardings = jax.tree.map(lambda _: None, table)
  params = jax.tree.map(
    lambda entry, sharding: port_arrays.place(
      tensors, entry, sharding, dtype, problems
    ),
    table,
    shardings,
  )
  _raise(folder, problems)
  return config, params


def _read_config(
  folder: pathlib.Path, switches: dict[str, str]
) -> llada.Config:
  if "compute_dtype" in switches:
    switches = {**switches, "dtype": switches["compute_dtype"]}
    del switches["compute_dtype"]
  raw = port_files.read_json(folder / port_files.CONFIG)
  return llada.Config.from_json(raw, **switches)


def _raise(folder: pathlib.Path, problems: list[str]) -> None:
  if problems:
    raise errors.UserError(
      f"{folder} does not hold the network that its config.json describes:\n  "
      + "\n  ".join(problems)
      + "\nDownload or export the checkpoint again, or correct config.json."
    )


def save(
  path: str | pathlib.Path,
  config: llada.Config,
  params: types.Tree,
  *,
  source: str | pathlib.Path | None = None,
  max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
  """Writes a checkpoint that the original PyTorch code loads.

  Tensors keep the dtype of `params`. Weights that the folder already holds are
  replaced once all new ones are written.

  Args:
    path: the folder, made if need be.
    config: of the network.
    params: its parameters.
    source: the checkpoint it came from, a folder or hub id: its `config.json`,
      tokenizer and code files are copied. None: `config.json` is written anew.
    max_shard_bytes: a file of tensors is at most this long, unless a single
      tensor is longer.

  Raises:
    UserError: if the folder cannot be written, or `source` is another network.
  """
  origin = None
  if source is not None:
    origin = hub.folder(str(source), hub.ALL_BUT_WEIGHTS)
  where: dict[str, tuple[jax.Array, port_names.Entry, int]] = {}

  def locate(entry: port_names.Entry, array: jax.Array) -> None:
    if array.shape != entry.spec.shape:
      raise ValueError(
        f"{entry.names[0]}: {array.shape=}, expected {entry.spec.shape}"
      )
    for layer, name in enumerate(entry.names):
      where[name] = (array, entry, layer)

  jax.tree.map(locate, port_names.table(config), params)
  sizes = {
    name: math.prod(entry.stored_shape) * array.dtype.itemsize
    for name, (array, entry, _) in where.items()
  }
  dtypes = [str(array.dtype) for array, _, _ in where.values()]
  port_write.write(
    pathlib.Path(path),
    sizes={name: sizes[name] for name in sorted(sizes, key=port_names.order)},
    read=lambda name: port_arrays.stored(*where[name]),
    config=port_write.config_text(
      config, origin, max(sorted(set(dtypes)), key=dtypes.count)
    ),
    source=origin,
    max_shard_bytes=max_shard_bytes,
  )


def save_peft(
  path: str | pathlib.Path,
  config: llada.Config,
  lora: types.Tree,
  settings: lora_lib.Lora,
  base: str = "",
) -> None:
  """Writes an adapter as PEFT reads it; `base` names its base model."""
  peft.save(pathlib.Path(path), config, lora, settings, base)


def _define_flags() -> None:
  # Not when this module is imported: other commands have flags of their own.
  flags.DEFINE_string("from", None, "Checkpoint: a folder or a hub id.")
  flags.DEFINE_string("to", None, "Folder to write; must hold no weights yet.")
  flags.DEFINE_string(
    "merge_adapter", None, "PEFT adapter folder to add to the weights."
  )
  flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16", "float16"],
    "Of the tensors written; as they are if not given.",
  )
  flags.DEFINE_integer(
    "max_shard_bytes",
    MAX_SHARD_BYTES,
    "A file of tensors is at most this long, unless one tensor is longer.",
    lower_bound=1,
  )


def main(argv: Sequence[str]) -> None:
  del argv
  asked = flags.FLAGS.flag_values_dict()
  if not asked["from"] or not asked["to"]:
    raise errors.UserError(
      "Give --from=<folder or hub id> and --to=<folder to write>."
    )
  port_write.refuse_weights(pathlib.Path(asked["to"]))
  jax.config.update("jax_platforms", "cpu")  # host memory is where this fits
  config, params = load(asked["from"], dtype=asked["dtype"])
  if asked["merge_adapter"]:
    adapter, settings = peft.load(pathlib.Path(asked["merge_adapter"]), config)
    params = lora_lib.merge(params, adapter, settings.scale)
  save(
    asked["to"],
    config,
    params,
    source=asked["from"],
    max_shard_bytes=asked["max_shard_bytes"],
  )
  print(f"Wrote {asked['to']}: {lora_lib.count(params):,} parameters.")


if __name__ == "__main__":
  _define_flags()
  command.main(main)
