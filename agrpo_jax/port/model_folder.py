"""Loads and saves model folders in the layout of Hugging Face."""

import dataclasses
import math
import pathlib
from collections.abc import Callable
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp

from agrpo_jax import errors
from agrpo_jax import models
from agrpo_jax import types
from agrpo_jax.models import base
from agrpo_jax.models import folder as folder_lib
from agrpo_jax.models import quantized
from agrpo_jax.models import tokens
from agrpo_jax.port import arrays
from agrpo_jax.port import files
from agrpo_jax.port import hub
from agrpo_jax.port import write
from agrpo_jax.runs import checkpoint_meta

# Either key may say how transformers loads the weights.
_DTYPE_KEYS = ("dtype", "torch_dtype")
_GENERATION = "generation_config.json"
MAX_SHARD_BYTES = 5 * 10**9  # what transformers writes

Shardings = Any  # a tree like the parameters', of jax.sharding.Sharding


def load_shape(
  path: str, *, revision: str | None = None, **switches: Any
) -> base.Shape:
  """Reads only what a checkpoint says of its shape; see `load`.

  `attention_block` among the switches takes the place of what it says of it.
  """
  patterns = (files.CONFIG, _GENERATION, *hub.TOKENIZER)
  folder = hub.folder(str(path), patterns, revision)
  return _read_shape(folder, switches)


def load(
  path: str | pathlib.Path,
  *,
  dtype: Any = None,
  shardings: Shardings | Callable[[base.Shape], Shardings] | None = None,
  revision: str | None = None,
  **switches: Any,
) -> tuple[base.Shape, types.Tree]:
  """Loads the checkpoint of a network.

  Tensors are read as they are placed: the host holds one stacked array at a
  time, and every process reads only what its own devices hold.

  Args:
    path: a local folder or a hub id.
    dtype: of the parameters; as stored if None.
    shardings: where they go: a tree like the parameters', or a function that
      makes it from the shape; JAX's default device if None.
    revision: branch, tag or commit on the hub.
    **switches: how to compute: `compute_dtype` (`dtype` of `base.Shape`) and
      the others of `base.SWITCHES`.

  Raises:
    UserError: naming everything that is wrong with the checkpoint.
  """
  folder, shape, tensors, table = _open(str(path), dtype, revision, switches)
  if callable(shardings):
    shardings = shardings(shape)
  if shardings is None:
    shardings = jax.tree.map(lambda _: None, table)
  problems: dict[str, None] = {}
  params = jax.tree.map(
    lambda entry, sharding: arrays.read_onto(
      tensors, entry, sharding, dtype, problems
    ),
    table,
    shardings,
  )
  _raise(folder, problems)
  return shape, params


def load_quantized(
  path: str,
  *,
  dtype: str,
  shardings: Callable[[base.Shape], Shardings],
  revision: str | None = None,
) -> tuple[types.Tree, checkpoint_meta.BaseModel]:
  """Loads the parameters of a network, kernels of its layers in int8.

  Quantized layer by layer: no kernel is ever in memory as it was.

  Args:
    path: a local folder or a hub id.
    dtype: of what is not quantized, and of what is before it is.
    shardings: where they go, from the shape: a tree like the parameters'.
    revision: branch, tag or commit on the hub.

  Returns:
    The parameters, and the record of the base model: that of the values before
    they are quantized, the same as `load` with this dtype gives.

  Raises:
    UserError: as for `load`.
  """
  folder, shape, tensors, table = _open(path, dtype, revision, {})
  problems: dict[str, None] = {}
  sums: list[list[int]] = []

  def read_kernel(entry: arrays.Entry, sharding: quantized.Kernel) -> Any:
    kernel, both = arrays.read_quantized(
      tensors, entry, sharding, dtype, problems
    )
    sums.append(both)
    return kernel

  def read(entry: arrays.Entry, sharding: jax.sharding.Sharding) -> jax.Array:
    array = arrays.read_onto(tensors, entry, sharding, dtype, problems)
    both = [checkpoint_meta.checksums(array, x)[0] for x in (None, "bfloat16")]
    sums.append(both)
    return array

  params = quantized.map_tree(read_kernel, read, table, shardings(shape))
  _raise(folder, problems)
  checksums, rounded = zip(*sums, strict=True)
  return params, checkpoint_meta.BaseModel(
    path, revision or "", dtype, checksums, rounded
  )


def _open(
  path: str, dtype: Any, revision: str | None, switches: dict[str, Any]
) -> tuple[pathlib.Path, base.Shape, files.Tensors, types.Tree]:
  """Returns a checkpoint's folder, shape, tensors, and the table of these.

  Raises:
    UserError: naming everything that is wrong, if the headers show anything.
  """
  folder = hub.folder(path, hub.CHECKPOINT, revision)
  shape = _read_shape(folder, switches)
  tensors = files.Tensors(folder)
  if shape.num_layers > len(tensors.names()):
    # Before as many names are made.
    raise errors.UserError(
      f"{folder}: config.json speaks of {shape.num_layers} layers, but the "
      f"folder holds only {len(tensors.names())} tensors. Correct config.json, "
      "or download the checkpoint again."
    )
  family = models.family_of(shape)
  table = arrays.table(shape, family)
  copy = arrays.head_copy(shape, family, tensors.names())
  _raise(folder, arrays.misfits(tensors, table, copy, dtype))
  if copy:
    _raise(folder, arrays.check_copy(tensors, table, copy))
  return folder, shape, tensors, table


def stored_dtype(folder: pathlib.Path) -> str:
  """The dtype of most tensors of a checkpoint, e.g. "bfloat16".

  Raises:
    UserError: if the files cannot be read, or hold no numbers that are known.
  """
  tensors = files.Tensors(folder)
  kinds = [tensors.dtype(name) for name in sorted(tensors.names())]
  known = [kind for kind in kinds if kind in arrays.DTYPES]
  if not known:
    raise errors.UserError(
      f"{folder} holds no tensors of {', '.join(arrays.DTYPES)}; give --dtype."
    )
  return jnp.dtype(arrays.DTYPES[max(known, key=known.count)]).name


def load_tokenizer(
  path: str,
  shape: base.Shape,
  *,
  revision: str | None = None,
) -> tokens.Tokenizer:
  """Loads the tokenizer of a checkpoint, checked against a network.

  Args:
    path: a local folder or a hub id, or "bytes" for raw bytes as tokens.
    shape: of the network that the tokenizer is for.
    revision: branch, tag or commit on the hub.

  Raises:
    UserError: if there is no tokenizer, or it does not fit the network.
  """
  folder = None
  if path != "bytes":
    folder = hub.folder(path, hub.TOKENIZER, revision)
  return tokens.load(folder, models.vocabulary(shape))


def _read_shape(folder: pathlib.Path, switches: dict[str, Any]) -> base.Shape:
  if "compute_dtype" in switches:
    switches = {**switches, "dtype": switches["compute_dtype"]}
    del switches["compute_dtype"]
  return models.read_shape(_config(folder), **switches)


def _config(folder: pathlib.Path) -> Any:
  """Returns config.json with the special ids that stand elsewhere.

  Models that were made of causal ones got their mask with the tokenizer, which
  tells its id then. The ids that end a completion are those of config.json and,
  after these, of generation_config.json.
  """
  raw = folder_lib.read_json(folder / files.CONFIG)
  if not isinstance(raw, dict):
    return raw
  if raw.get("mask_token_id") is None:
    raw["mask_token_id"] = tokens.special_ids(folder).get("mask_token_id")
  eos_ids = _eos_ids(raw)
  if (folder / _GENERATION).exists():
    more = folder_lib.read_json(folder / _GENERATION)
    if isinstance(more, dict):
      eos_ids += [one for one in _eos_ids(more) if one not in eos_ids]
  if len(eos_ids) > 1:
    raw["eos_token_id"] = eos_ids
  elif eos_ids:
    raw["eos_token_id"] = eos_ids[0]
  return raw


def _eos_ids(raw: dict[str, Any]) -> list[Any]:
  """Returns what a file says of the ids that end a completion, if anything."""
  found = raw.get("eos_token_id")
  if found is None:
    return []
  return [*found] if isinstance(found, list) else [found]


def _raise(folder: pathlib.Path, problems: Collection[str]) -> None:
  if problems:
    raise errors.UserError(
      f"{folder} does not hold the network that its config.json describes:\n  "
      + "\n  ".join(problems)
      + "\nDownload or export the checkpoint again, or correct config.json."
    )


def save(
  path: str | pathlib.Path,
  shape: base.Shape,
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
    shape: of the network.
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
  where: dict[str, tuple[jax.Array, arrays.Entry, int]] = {}

  def locate(entry: arrays.Entry, array: jax.Array) -> None:
    if array.shape != entry.spec.shape:
      raise ValueError(
        f"{entry.names[0]}: {array.shape=}, expected {entry.spec.shape}"
      )
    for layer, name in enumerate(entry.names):
      where[name] = (array, entry, layer)

  family = models.family_of(shape)
  table = arrays.table(shape, family)
  jax.tree.map(locate, table, params)
  names = arrays.ordered(table)
  copy = arrays.head_copy(shape, family, _stored_names(origin))
  if copy:
    locate(copy, params["embed"]["table"])
    names += copy.names
  sizes = {
    name: math.prod(entry.stored_shape) * array.dtype.itemsize
    for name, (array, entry, _) in where.items()
  }
  dtypes = [str(array.dtype) for array, _, _ in where.values()]
  write.write(
    pathlib.Path(path),
    sizes={name: sizes[name] for name in names},
    read=lambda name: arrays.stored(*where[name]),
    config=_config_text(
      shape, origin, max(sorted(set(dtypes)), key=dtypes.count)
    ),
    source=origin,
    max_shard_bytes=max_shard_bytes,
  )


def _stored_names(folder: pathlib.Path | None) -> Collection[str]:
  """The names of a folder's tensors; none where there are no weights."""
  if folder is None:
    return set()
  try:
    return files.Tensors(folder).names()
  except errors.UserError:
    return set()


def _config_text(
  shape: base.Shape, source: pathlib.Path | None, dtype: str
) -> str:
  """The contents of `config.json`.

  Args:
    shape: of the network.
    source: the folder whose config.json is kept as it is, but for the dtype
      and the blocks of attention; None, or a folder without one: it is written
      anew.
    dtype: of (most of) the tensors.

  Raises:
    UserError: if the source's config.json describes another network.
  """
  if source is None or not (source / files.CONFIG).exists():
    return write.json_text(models.write_shape(shape) | {"dtype": dtype})
  text = (source / files.CONFIG).read_text(encoding="utf-8")
  raw = folder_lib.read_json(source / files.CONFIG)
  theirs = dataclasses.asdict(models.read_shape(_config(source)))
  ours = dataclasses.asdict(shape)
  differ = [
    f"{name} {theirs[name]!r} there, {ours[name]!r} here"
    for name in ours
    if name not in (*base.SWITCHES, "attention_block")
    and theirs[name] != ours[name]
  ]
  if differ:
    raise errors.UserError(
      f"{source} is the checkpoint of another network: {'; '.join(differ)}. "
      "Name the checkpoint that these parameters came from."
    )
  stale = [key for key in _DTYPE_KEYS if raw.get(key) not in (None, dtype)]
  changes: dict[str, Any] = dict.fromkeys(stale, dtype)
  # Which the run may have set, because their file does not tell.
  if theirs["attention_block"] != shape.attention_block:
    changes[models.family_of(shape).block_key] = shape.attention_block
  return write.json_text(raw | changes) if changes else text
