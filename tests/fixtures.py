"""Recorded numbers of the released PyTorch code, and how to read them."""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from agrpo_jax import llada
from agrpo_jax import port
from agrpo_jax import port_names
from agrpo_jax import sampling as sampling_lib
from agrpo_jax import types

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
GOLDEN = pathlib.Path(__file__).parent / "testdata" / "golden"


def golden(name: str) -> tuple[dict[str, np.ndarray], dict]:
  """The arrays and the settings of one recording."""
  with np.load(GOLDEN / f"{name}.npz") as file:
    arrays = {key: file[key] for key in file.files}
  return arrays, json.loads(str(arrays.pop("meta")))


def config(name: str, *args: str):
  """What a file of configs/ returns."""
  spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(*args)


def network(name: str):
  """(config, params, logits_fn) of a recorded checkpoint, in float32."""
  return network_at(GOLDEN / "ckpt" / name)


def network_at(folder):
  """(config, params, logits_fn) of the checkpoint in a folder, in float32."""
  config, params = port.load(str(folder), dtype="float32", attention="xla")
  return config, params, llada.logits_fn(config, params)


def random_network(**changes):
  """(config, params): grouped heads, biases, more embeddings than tokens."""
  config = llada.Config(
    **{
      "vocab_size": 37,
      "embedding_size": 40,
      "num_layers": 3,
      "width": 32,
      "num_heads": 4,
      "num_kv_heads": 2,
      "mlp_width": 48,
      "rope_theta": 500.0,
      "norm_eps": 1e-5,
      "qkv_bias": True,
      "tied_head": False,
      "max_length": 64,
      "mask_id": 36,
      "eos_id": 35,
      "pad_id": 35,
      **changes,
    }
  )
  rng = np.random.default_rng(0)
  # Biases and scales too, so that they can be wrong.
  params = jax.tree.map(
    lambda one: jnp.asarray(rng.normal(0.2, 0.3, one.shape), one.dtype),
    llada.abstract_params(config),
  )
  return config, params


def prompts(ids_BxP: np.ndarray, valid_BxP: np.ndarray | None) -> types.Prompts:
  """Left-padded prompts as recorded -> ours; keys are the row numbers."""
  num_rows, width = ids_BxP.shape
  if valid_BxP is None:
    valid_BxP = np.ones_like(ids_BxP)
  tokens = np.zeros((num_rows, width), np.int32)
  for row in range(num_rows):
    real = ids_BxP[row][valid_BxP[row].astype(bool)]
    tokens[row, : real.size] = real
  return types.Prompts(
    tokens=jnp.asarray(tokens),
    length=jnp.asarray(valid_BxP.sum(axis=1), jnp.int32),
    key=jnp.arange(num_rows),
  )


RULES = {
  "low_confidence": "confidence",
  "random": "random",
  "entropy": "entropy",
}


def sampling(
  config: llada.Config, meta: dict, **changes
) -> sampling_lib.Sampling:
  """The settings of a recorded rollout of the released AGRPO code."""
  settings = dict(
    mask_id=config.mask_id,
    eos_id=config.eos_id,
    completion_length=meta["max_completion_length"],
    block_length=meta["block_length"],
    num_denoise_steps=meta["sampling_steps"],
    unmask_rule=RULES[meta["unmasking"]],
    temperature=meta["temperature"],
    top_k=meta["top_k"] or 0,
    top_p=meta["top_p"],
    top_p_rule="drop",
  )
  return sampling_lib.Sampling(**(settings | changes))


def keep_mask(support, vocab_size: int) -> np.ndarray:
  """bool [B, C, V]: which tokens a recorded support kept."""
  support = np.asarray(support)
  if support.dtype == np.uint8:
    return np.unpackbits(support, axis=-1)[..., :vocab_size].astype(bool)
  kept = np.zeros(support.shape[:2] + (vocab_size + 1,), bool)
  rows, columns, _ = np.indices(support.shape)
  kept[rows, columns, support] = True  # -1 lands in the extra last column
  return kept[..., :vocab_size]


def tree_of(config: llada.Config, file: str):
  """A recorded tree of weights or gradients, in our layout."""
  tensors = safetensors.numpy.load_file(GOLDEN / file)

  def array(entry: port_names.Entry) -> jax.Array:
    parts = [tensors[name] for name in entry.names]
    parts = [part.T if entry.transposed else part for part in parts]
    return jnp.asarray(np.stack(parts) if entry.stacked else parts[0])

  return jax.tree.map(array, port_names.table(config))
