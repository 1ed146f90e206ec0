"""Writes what a run trained as a folder that PyTorch's libraries load."""

import dataclasses
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
from agrpo_jax.models import lora as lora_lib
from agrpo_jax.models import transformer
from agrpo_jax.port import hub
from agrpo_jax.port import model_folder
from agrpo_jax.port import peft
from agrpo_jax.runs import checkpoint_meta
from agrpo_jax.runs import checkpoint_named


@dataclasses.dataclass(frozen=True)
class Trained:
  """The model of a run, as the run's config.json names it.

  Attributes:
    path: the base model's folder or hub id.
    revision: of the base model on the hub, or None.
    dtype: that the run computes in.
    tokenizer: folder or hub id, or "bytes".
    lora: settings of the adapter, or None where all parameters are trained.
  """

  path: str
  revision: str | None
  dtype: str
  tokenizer: str
  lora: lora_lib.Lora | None

  @classmethod
  def of(cls, checkpoint: str) -> "Trained":
    """Reads it from the work directory that a checkpoint's name names.

    Raises:
      UserError: there is no such checkpoint, or the run's config.json is
        missing, damaged, or of no run.
    """
    checkpoint_named.find(checkpoint)  # refuses what is no checkpoint
    raw = checkpoint_named.read_config(checkpoint)
    try:
      model, lora = raw["model"], raw["lora"]
      path = model["path"]
      if model.get("network"):  # SFT from random parameters, kept by the run
        workdir, _ = checkpoint_named.split(checkpoint)
        path = str(pathlib.Path(workdir).expanduser() / "initial")
      return cls(
        path=path,
        revision=model["revision"] or None,
        dtype=model["dtype"],
        tokenizer=model["tokenizer"] or path,
        lora=lora_lib.Lora(lora["rank"], lora["alpha"], tuple(lora["targets"]))
        if lora["rank"]
        else None,
      )
    except (KeyError, TypeError, AttributeError) as error:
      raise errors.UserError(
        f"The config.json of {checkpoint!r} is not that of a run of this "
        f"package: {type(error).__name__}: {error}"
      ) from error


def merged(
  checkpoint: str,
  to: pathlib.Path,
  dtype: str | None = None,
  max_shard_bytes: int = model_folder.MAX_SHARD_BYTES,
) -> int:
  """Writes the trained weights, adapters merged, with tokenizer and config.

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
      or another one, the folder cannot be written, or float16 cannot hold the
      weights.
  """
  trained = Trained.of(checkpoint)
  folder = _base_folder(checkpoint, trained, hub.CHECKPOINT)
  dtype = dtype or model_folder.stored_dtype(folder)
  if trained.lora is None:
    shape = model_folder.load_shape(str(folder))
    params = _read(checkpoint, transformer.abstract_params(shape))
    params = jax.tree.map(lambda x: x.astype(dtype), params)
  else:
    # In the run's dtype: the adapter was trained on these very values.
    shape, params = model_folder.load(folder, dtype=trained.dtype)
    base_model = checkpoint_meta.describe_base(
      trained.path, trained.revision or "", params
    )
    adapter = _read(checkpoint, _abstract(trained.lora, shape), base_model)
    params = lora_lib.merge(params, adapter, trained.lora.scale, dtype)
  if not all(jnp.isfinite(x).all() for x in jax.tree.leaves(params)):
    raise errors.UserError(
      f"The trained weights do not fit into {dtype}; give another --dtype."
    )
  model_folder.save(
    to, shape, params, source=folder, max_shard_bytes=max_shard_bytes
  )
  if trained.tokenizer != trained.path:
    _copy_tokenizer(trained, to)
  return lora_lib.count(params)


def adapter(checkpoint: str, to: pathlib.Path) -> int:
  """Writes the trained adapter in PEFT's layout, with the tokenizer.

  Args:
    checkpoint: WORKDIR, WORKDIR:best or WORKDIR:TRAIN_STEP.
    to: the folder, made if need be.

  Returns:
    How many parameters were written.

  Raises:
    UserError: there is no such checkpoint, the run trained no adapter, or the
      folder cannot be written.
  """
  trained = Trained.of(checkpoint)
  if trained.lora is None:
    raise errors.UserError(
      f"The run of --checkpoint={checkpoint!r} trained all parameters, so it "
      "has no adapter; leave out --adapter to write its weights."
    )
  shape = model_folder.load_shape(
    str(_base_folder(checkpoint, trained, hub.ALL_BUT_WEIGHTS))
  )
  tree = _read(checkpoint, _abstract(trained.lora, shape))
  peft.save(to, shape, tree, trained.lora, base_model=trained.path)
  _copy_tokenizer(trained, to)
  return lora_lib.count(tree)


def _base_folder(
  checkpoint: str, trained: Trained, patterns: Sequence[str]
) -> pathlib.Path:
  try:
    return hub.folder(trained.path, patterns, trained.revision)
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
) -> types.Tree:
  """The trained arrays; `trainable` has their shapes and dtypes."""
  reader, train_step = checkpoint_named.find(checkpoint)
  found = reader.read({"trainable": trainable}, base_model, train_step)
  if found is None:
    raise errors.UserError(
      f"--checkpoint={checkpoint!r} holds no checkpoint any more."
    )
  items, _ = found
  return items["trainable"]


def _abstract(settings: lora_lib.Lora, shape: base.Shape) -> types.Tree:
  """The adapter's tree with shapes and dtypes, without memory."""
  init = functools.partial(
    lora_lib.init, settings, transformer.abstract_params(shape)
  )
  tree: Any = jax.eval_shape(init, jax.random.key(0))
  return tree


def _copy_tokenizer(trained: Trained, to: pathlib.Path) -> None:
  """Copies the files of the run's tokenizer, unless that has none."""
  if trained.tokenizer == "bytes":
    return
  revision = trained.revision if trained.tokenizer == trained.path else None
  folder = hub.folder(trained.tokenizer, hub.TOKENIZER, revision)
  for pattern in hub.TOKENIZER:
    for file in sorted(folder.glob(pattern)):
      if file.is_file():
        shutil.copyfile(file, to / file.name)
