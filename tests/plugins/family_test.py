"""A second family plugged in from outside: other names, shifted logits."""

import json
import pathlib

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy

from agrpo_jax import errors
from agrpo_jax import models
from agrpo_jax.models import base
from agrpo_jax.models import lora as lora_lib
from agrpo_jax.models import transformer
from agrpo_jax.port import arrays
from agrpo_jax.port import model_folder
from agrpo_jax.port import peft
from agrpo_jax.runs import metrics
from fixtures import recordings
from fixtures import runs

# As the models made from Qwen name things.
_KEYS = {
  "vocab_size": "vocab_size",
  "num_layers": "num_hidden_layers",
  "width": "hidden_size",
  "num_heads": "num_attention_heads",
  "num_kv_heads": "num_key_value_heads",
  "head_dim": "head_dim",
  "mlp_width": "intermediate_size",
  "rope_theta": "rope_theta",
  "norm_eps": "rms_norm_eps",
  "qkv_bias": "attention_bias",
  "tied_head": "tie_word_embeddings",
  "max_length": "max_position_embeddings",
  "mask_id": "mask_token_id",
  "eos_id": "eos_token_id",
  "pad_id": "pad_token_id",
  "shift": "logit_shift",
}
_MODULES = {
  "attn_norm": "input_layernorm",
  "q": "self_attn.q_proj",
  "k": "self_attn.k_proj",
  "v": "self_attn.v_proj",
  "attn_out": "self_attn.o_proj",
  "mlp_norm": "post_attention_layernorm",
  "gate": "mlp.gate_proj",
  "up": "mlp.up_proj",
  "down": "mlp.down_proj",
  "embed": "model.embed_tokens",
  "final_norm": "model.norm",
  "head": "lm_head",
}


def read(raw, switches):
  found = base.unsupported(raw, {"hidden_act": (("silu",), "gelu")})
  values = {name: raw[key] for name, key in _KEYS.items() if key in raw}
  found += [f"{key} is missing" for key in _KEYS.values() if key not in raw]
  found += base.problems({**values, **switches}, _KEYS)
  base.raise_problems("config.json", found)
  return base.Shape(
    model_type="mirror",
    embedding_size=values["vocab_size"],
    **values,
    **switches,
  )


def write(shape):
  raw = {key: getattr(shape, name) for name, key in _KEYS.items()}
  return raw | {"model_type": "mirror", "hidden_act": "silu"}


def module_name(path, layer):
  if layer is None:
    return _MODULES[path[0]]
  return f"model.layers.{layer}.{_MODULES[path[1]]}"


@pytest.fixture(autouse=True)
def plugged(monkeypatch):
  family = base.Family(read, write, module_name, end_of_turn="<|im_end|>")
  monkeypatch.setitem(models.FAMILIES, "mirror", family)


@pytest.fixture
def folder(tmp_path):
  """tiny_mha under the names of the other family, its logits shifted."""
  shape, params, _ = recordings.network("tiny_mha")
  raw = {key: getattr(shape, name) for name, key in _KEYS.items()}
  raw |= {"model_type": "mirror", "hidden_act": "silu", "logit_shift": 1}
  folder = tmp_path / "mirror"
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(raw))
  tensors = {
    "model.embed_tokens.weight": params["embed"]["table"],
    "model.norm.weight": params["final_norm"]["scale"],
    "lm_head.weight": params["head"]["kernel"].T,
  }
  for layer in range(2):
    ours = params["last_layer"]
    if layer == 0:
      ours = jax.tree.map(lambda x: x[0], params["layers"])
    for module, ours_of in ours.items():
      (x,) = ours_of.values()
      tensors[f"model.layers.{layer}.{_MODULES[module]}.weight"] = x.T
  safetensors.numpy.save_file(
    {name: np.ascontiguousarray(x) for name, x in tensors.items()},
    folder / "model.safetensors",
    metadata={"format": "pt"},
  )
  return folder


def test_its_folder_is_loaded_and_saved_byte_equal(folder, tmp_path):
  shape, params = model_folder.load(folder)
  chex.assert_trees_all_equal(params, recordings.network("tiny_mha")[1])
  model_folder.save(tmp_path / "again", shape, params, source=folder)
  for file in folder.iterdir():
    assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
  # Without a source the family writes the config.json.
  model_folder.save(tmp_path / "new", shape, params)
  assert model_folder.load_shape(str(tmp_path / "new")) == shape


def test_shards_hold_the_tensors_in_the_order_of_the_network(folder):
  shape = model_folder.load_shape(str(folder))
  names = arrays.ordered(arrays.table(shape, models.family_of(shape)))
  assert names[0] == "model.embed_tokens.weight"
  assert names[-2:] == ["lm_head.weight", "model.norm.weight"]
  assert [name.split(".")[2] for name in names[1:-2]] == ["0"] * 9 + ["1"] * 9


def test_its_logits_are_those_of_the_position_before(folder):
  shape, params = model_folder.load(folder, attention="xla")
  llada, llada_params, _ = recordings.network("tiny_mha")
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 500, (3, 12))
  length = np.array([12, 5, 9])
  positions = np.array([[0, 1, 7], [4, 0, 2], [8, 8, 3]])
  before = np.array([[0, 0, 6], [3, 0, 1], [7, 7, 2]])
  np.testing.assert_array_equal(
    transformer.bind(shape, params).logits(tokens, length, positions),
    transformer.bind(llada, llada_params).logits(tokens, length, before),
  )


def test_an_unshifted_network_computes_no_shift(folder):
  """The program is that of LLaDA, operation by operation."""
  args = np.zeros((1, 8), int), np.array([8]), np.array([[3]])
  texts = []
  for shape in (
    recordings.network("tiny_mha")[0],
    models.read_shape(
      json.loads((folder / "config.json").read_text()) | {"logit_shift": 0}
    ),
  ):
    params = transformer.abstract_params(shape)
    run = jax.jit(lambda p, *a, s=shape: transformer.bind(s, p).logits(*a))
    texts.append(run.lower(params, *args).as_text())
  assert texts[0] == texts[1]


TASK = '''
"""Rewards that vary, whatever a random network writes."""

import zlib

from agrpo_jax import tasks


def examples(split, *, path=None, options=None):
  return [
    tasks.Example(
      id=index, messages=({"role": "user", "content": f"{index}?"},), fields={}
    )
    for index in range(8)
  ]


def reward_weights(options):
  return {"luck": 1.0}


def reward(completion, fields, options):
  return {"luck": zlib.crc32(completion.encode("utf-8", "replace")) % 5}


def grade(completion, fields, options):
  return {"accuracy": 0.0}
'''


@pytest.mark.parametrize("rank,cache", [(0, "none"), (4, "dual")])
def test_agrpo_trains_it_on_policy(folder, tmp_path, rank, cache):
  c = runs.small(tmp_path)
  c.rollout.cache = cache
  (tmp_path / "luck.py").write_text(TASK)
  c.task.path = str(tmp_path / "luck.py")
  c.data.path = ""
  c.data.max_prompt_length = 64
  c.data.bucket = 64
  c.model.path = str(folder)
  c.lora.rank = rank
  c.train.num_steps = 3
  runs.train(c)
  log = [*metrics.read(pathlib.Path(c.workdir) / "metrics.jsonl")]
  assert len(log) == 3
  assert any(record["grad_norm"] > 0 for record in log)
  for record in log:
    if record["grad_norm"]:
      np.testing.assert_allclose(record["policy_ratio/mean"], 1, atol=1e-5)
      assert record["policy_ratio/max_deviation"] < 1e-4


def test_adapters_go_by_its_names(folder, tmp_path):
  shape, params = model_folder.load(folder)
  settings = lora_lib.Lora(2, 4.0, ("q", "down"))
  adapter = lora_lib.init(settings, params, jax.random.key(0))
  peft.save(tmp_path / "adapter", shape, adapter, settings)
  tensors = safetensors.numpy.load_file(tmp_path / "adapter" / peft.WEIGHTS)
  assert (
    "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight" in tensors
  )
  described = json.loads((tmp_path / "adapter" / peft.CONFIG).read_text())
  assert described["target_modules"] == ["down_proj", "q_proj"]
  again, _ = peft.load(tmp_path / "adapter", shape)
  chex.assert_trees_all_equal(again, adapter)


def test_heads_may_be_wider_than_the_stream(folder):
  raw = json.loads((folder / "config.json").read_text()) | {"head_dim": 32}
  shape = models.read_shape(raw)
  params = transformer.abstract_params(shape)
  assert params["layers"]["q"]["kernel"].shape == (1, 64, 128)
  assert params["last_layer"]["attn_out"]["kernel"].shape == (128, 64)
  logits = jax.eval_shape(
    lambda p, *args: transformer.bind(shape, p).logits(*args),
    params,
    np.zeros((1, 8), int),
    np.array([8]),
    np.array([[3]]),
  )
  assert logits.shape == (1, 1, 512)


def test_what_llada_cannot_be_is_not_written_as_one(folder):
  shape = model_folder.load_shape(str(folder))
  with pytest.raises(errors.UserError, match="shift=1"):
    models.FAMILIES["llada"].write(shape)


@pytest.mark.parametrize("model_type", ["bert", None, ["llada"]])
def test_an_unknown_family_is_refused_with_the_known_ones(model_type):
  with pytest.raises(errors.UserError, match="llada, mirror") as caught:
    models.read_shape({"model_type": model_type})
  assert f"model_type is {model_type!r}" in str(caught.value)
