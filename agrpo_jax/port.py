"""Checkpoints in Hugging Face's layout <-> our parameters."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from agrpo_jax import hub, llada, port_files, port_names

_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.py", "*.txt", "*.model")

Shardings = Any  # a tree like the parameters', or a function Config -> tree


def load_config(
  path: str, *, revision: str | None = None, **switches: str
) -> llada.Config:
  """Reads only the `config.json` of a checkpoint."""
  folder = hub.folder(path, _PATTERNS, revision)
  return _read_config(folder, switches)


def load(
  path: str,
  *,
  dtype: Any = None,
  shardings: Shardings | Callable[[llada.Config], Shardings] | None = None,
  revision: str | None = None,
  **switches: str,
) -> tuple[llada.Config, Any]:
  """Loads a LLaDA checkpoint.

  Tensors are read when they are placed: the host holds one stacked array at a
  time, and each process reads only what its devices hold.

  Args:
    path: a local folder or a hub id.
    dtype: of the parameters; what the checkpoint stores if None.
    shardings: where they go: a tree like the parameters', or a function that
      makes it from the config; the default device if None.
    revision: on the hub.
    **switches: `dtype`-free compute switches of `llada.Config`: `remat`,
      `attention`; and `compute_dtype` for its `dtype`.

  Raises:
    UserError: naming everything that is wrong with the checkpoint.
  """
  folder = hub.folder(path, _PATTERNS, revision)
  config = _read_config(folder, switches)
  tensors = port_files.Tensors(folder)
  table = port_names.table(config)
  if callable(shardings):
    shardings = shardings(config)
  if shardings is None:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: here, table)
  problems: list[str] = []
  params = jax.tree.map(
    lambda entry, sharding: _place(tensors, entry, sharding, dtype, problems),
    table,
    shardings,
  )
  return config, params


def _read_config(folder: pathlib.Path, switches: dict[str, str]) -> Any:
  switches = dict(switches)
  if "compute_dtype" in switches:
    switches["dtype"] = switches.pop("compute_dtype")
  return llada.Config.from_json(
    port_files.read_json(folder / "config.json"), **switches
  )


def _place(tensors, entry, sharding, dtype, problems):
  shape = entry.spec.shape

  def read(index):
    parts = []
    layers = range(len(entry.names))[index[0]] if entry.stacked else [0]
    rest = index[1:] if entry.stacked else index
    if entry.transposed:
      rest = rest[::-1]
    for layer in layers:
      x = tensors.read(entry.names[layer], rest)
      x = x.T if entry.transposed else x
      if dtype is not None:
        x = x.astype(dtype)
      parts.append(x)
    return np.stack(parts) if entry.stacked else np.ascontiguousarray(parts[0])

  return jax.make_array_from_callback(shape, sharding, read)
