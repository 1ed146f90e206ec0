"""Writes what a run trained as a folder that PyTorch's libraries load."""

import functools
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from agrpo_jax import errors
from agrpo_jax import types
from agrpo_jax.models import base
from agrpo_jax.models import folder as folder_lib
from agrpo_jax.models import lora as lora_lib
from agrpo_jax.models import transformer
from agrpo_jax.port import card
from agrpo_jax.port import hub
from agrpo_jax.port import model as model_lib
from agrpo_jax.port import model_folder
from agrpo_jax.port import peft
from agrpo_jax.runs import checkpoint_meta
from agrpo_jax.runs import checkpoint_named


def merged(
  checkpoint: str,
  to: pathlib.Path,
  dtype: str | None = None,
  max_shard_bytes: int = model_folder.MAX_SHARD_BYTES,
) -> int:
  """Writes the trained weights, adapters merged, tokenizer, config and card.

  Args:
    checkpoint: WORKDIR, WORKDIR:best or WORKDIR:TRAIN_STEP.
    to: the folder, made if need be.
    dtype: of the tensors; that of the base model's if None.
    max_shard_bytes: a file of tensors is at most this long, unless a single
      tensor is longer.

  Returns:
    How many parameters were written.

  Raises:
    UserError: there is no such checkpoint, its base model is not to be found
      or another one, the run's records are damaged, the folder cannot be
      written, or float16 cannot hold the weights.
  """
  source, lora = model_lib.trained_by(checkpoint)
  folder = _base_folder(checkpoint, source, hub.CHECKPOINT)
  dtype = dtype or model_folder.stored_dtype(folder)
  block = source.attention_block
  if lora is None:
    shape = model_folder.load_shape(str(folder), attention_block=block)
    params, meta = _read(checkpoint, transformer.abstract_params(shape))
    params = jax.tree.map(lambda x: x.astype(dtype), params)
  else:
    # In the run's dtype: the adapter was trained on these very values, or, if
    # the run had them quantized, near them. Never into int8: its error would
    # stay in what is written.
    shape, params = model_folder.load(
      folder, dtype=source.dtype, attention_block=block
    )
    base_model = checkpoint_meta.describe_base(
      source.path, source.revision, params
    )
    adapter, meta = _read(checkpoint, _abstract(lora, shape), base_model)
    params = lora_lib.merge(params, adapter, lora.scale, dtype)
  if not all(jnp.isfinite(x).all() for x in jax.tree.leaves(params)):
    raise errors.UserError(
      f"The trained weights do not fit into {dtype}; give another --dtype."
    )
  made = card.make(to, checkpoint, meta, source, lora, is_adapter=False)
  model_folder.save(
    to, shape, params, source=folder, max_shard_bytes=max_shard_bytes
  )
  if source.tokenizer:
    _copy_tokenizer(source, to)
  card.write(to, made)
  return lora_lib.count(params)


def adapter(checkpoint: str, to: pathlib.Path) -> int:
  """Writes the trained adapter in PEFT's layout, with tokenizer and card.

  Args:
    checkpoint: WORKDIR, WORKDIR:best or WORKDIR:TRAIN_STEP.
    to: the folder, made if need be.

  Returns:
    How many parameters were written.

  Raises:
    UserError: there is no such checkpoint, the run trained no adapter, its
      records are damaged, or the folder cannot be written.
  """
  source, lora = model_lib.trained_by(checkpoint)
  if lora is None:
    raise errors.UserError(
      f"The run of --checkpoint={checkpoint!r} trained all parameters, so it "
      "has no adapter; leave out --adapter to write its weights."
    )
  folder = str(_base_folder(checkpoint, source, hub.ALL_BUT_WEIGHTS))
  shape = model_folder.load_shape(folder)
  tree, meta = _read(checkpoint, _abstract(lora, shape))
  made = card.make(to, checkpoint, meta, source, lora, is_adapter=True)
  # Other programs do not know the bundled models by their names.
  base_model = source.path if hub.is_id(source.path) else folder
  peft.save(to, shape, tree, lora, base_model=base_model)
  _copy_tokenizer(source, to)
  card.write(to, made)
  return lora_lib.count(tree)


def _base_folder(
  checkpoint: str, source: base.Source, patterns: Sequence[str]
) -> pathlib.Path:
  try:
    return hub.folder(source.path, patterns, source.revision or None)
  except errors.UserError as error:
    raise errors.UserError(
      f"The base model of --checkpoint={checkpoint!r} is not to be found: "
      f"{error} If it has moved, say where as model.path in the run's "
      "config.json: its contents are compared."
    ) from error


def _read(
  checkpoint: str,
  trainable: types.Tree,
  base_model: checkpoint_meta.BaseModel | None = None,
) -> tuple[types.Tree, dict[str, Any]]:
  """The trained arrays, whose shapes and dtypes `trainable` has; the meta."""
  reader, train_step = checkpoint_named.find(checkpoint)
  found = reader.read({"trainable": trainable}, base_model, train_step)
  if found is None:
    raise errors.UserError(
      f"--checkpoint={checkpoint!r} holds no checkpoint any more."
    )
  items, meta = found
  return items["trainable"], meta


def _abstract(settings: lora_lib.Lora, shape: base.Shape) -> types.Tree:
  """The adapter's tree with shapes and dtypes, without memory."""
  init = functools.partial(
    lora_lib.init, settings, transformer.abstract_params(shape)
  )
  tree: Any = jax.eval_shape(init, jax.random.key(0))
  return tree


def _copy_tokenizer(source: base.Source, to: pathlib.Path) -> None:
  """Copies the files of the run's tokenizer, unless that has none."""
  if source.tokenizer == "bytes":
    return
  revision = None if source.tokenizer else source.revision or None
  folder = hub.folder(source.tokenizer or source.path, hub.TOKENIZER, revision)
  for pattern in hub.TOKENIZER:
    for file in sorted(folder.glob(pattern)):
      if file.is_file():
        folder_lib.check(file, max_bytes=None)
        shutil.copyfile(file, to / file.name)
