"""Families made of Qwen: the released code, files both ways, training."""

import dataclasses
import json
import pathlib
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from tokenizers import models as tokenizer_models

from agrpo_jax import config as config_lib
from agrpo_jax import errors
from agrpo_jax import models
from agrpo_jax import types
from agrpo_jax.lm_eval import adapter as lm_eval_adapter
from agrpo_jax.models import base
from agrpo_jax.models import lora as lora_lib
from agrpo_jax.models import transformer
from agrpo_jax.port import export
from agrpo_jax.port import model as model_lib
from agrpo_jax.port import model_folder
from agrpo_jax.port import peft
from agrpo_jax.runs import metrics
from agrpo_jax.samplers import host
from agrpo_jax.samplers import noise as noise_lib
from agrpo_jax.samplers import rollout as rollout_lib
from agrpo_jax.samplers import sampling as sampling_lib
from fixtures import recordings
from fixtures import runs

GOLDEN2 = pathlib.Path(__file__).parents[1] / "testdata" / "golden2"
WHOLE = ("tiny_a2d_qwen2", "tiny_a2d_qwen3", "tiny_dream")
# Whose forward passes are compared in policies/block_causal_test and
# policies/fast_dllm_v2_test.
BLOCK_CAUSAL = ("tiny_sdar", "tiny_fast_dllm_v2")
NAMES = (*WHOLE, *BLOCK_CAUSAL)
MASK = {
  "tiny_a2d_qwen2": 188,
  "tiny_a2d_qwen3": 197,
  "tiny_dream": 190,
  "tiny_sdar": 175,
  "tiny_fast_dllm_v2": 91,
}


def config_json(name):
  return json.loads((GOLDEN2 / "ckpt" / name / "config.json").read_text())


@pytest.fixture
def folder(request, tmp_path):
  """A recorded checkpoint, with a tokenizer of single letters.

  The real Tiny-A2D have no mask id in config.json; the tokenizer has it.
  """
  name = request.param
  path = tmp_path / name
  shutil.copytree(GOLDEN2 / "ckpt" / name, path)
  raw = config_json(name)
  letters = {chr(0x100 + at): at for at in range(raw["vocab_size"] - 15)}
  tokenizer = tokenizers.Tokenizer(
    tokenizer_models.WordLevel(letters, unk_token=chr(0x100))
  )
  special = {raw["eos_token_id"]: "<|im_end|>", MASK[name]: "<|mask|>"}
  tokenizer.add_special_tokens(
    [special.get(at, f"<|{at}|>") for at in range(len(letters), 200)]
  )
  tokenizer.save(str(path / "tokenizer.json"))
  (path / "tokenizer_config.json").write_text(
    json.dumps(
      {
        "mask_token": "<|mask|>",
        "eos_token": "<|im_end|>",
        "chat_template": "{% for m in messages %}{{ m['content'] }}"
        "{% endfor %}{% if enable_thinking is false %}<|im_end|>{% endif %}",
      }
    )
  )
  return path


def every(function):
  return pytest.mark.parametrize("folder", NAMES, indirect=True)(function)


@pytest.mark.parametrize("folder", WHOLE, indirect=True)
def test_logits_of_the_released_code(folder):
  with np.load(GOLDEN2 / "forward" / f"{folder.name}.npz") as file:
    recorded = dict(file)
  shape, _, network = recordings.network_at(folder)
  assert shape.mask_id == MASK[folder.name]
  logits = jax.jit(network.logits)
  aligned = "aligned" if shape.shift else "logits"
  for ids, valid, kind in (
    ("ids", None, "full"),
    ("ids_rightpad", "mask_rightpad", "rightpad"),
  ):
    tokens = recorded[ids]
    is_real = np.ones(tokens.shape, bool)
    if valid:
      is_real = recorded[valid].astype(bool)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    found = logits(tokens, is_real.sum(axis=1), positions)
    np.testing.assert_allclose(
      np.asarray(found)[is_real],
      recorded[f"{aligned}_{kind}"][is_real],
      atol=3e-4,
    )


@every
def test_files_both_ways(folder, tmp_path):
  shape, params = model_folder.load(folder)
  model_folder.save(tmp_path / "again", shape, params, source=folder)
  for name in ("config.json", "model.safetensors"):
    ours = (tmp_path / "again" / name).read_bytes()
    assert ours == (folder / name).read_bytes()
  # Without a source the family writes the config.json, mask id included.
  model_folder.save(tmp_path / "new", shape, params)
  new_shape, new_params = model_folder.load(tmp_path / "new")
  assert new_shape == shape
  chex.assert_trees_all_equal(new_params, params)


@pytest.mark.parametrize("folder", WHOLE[:2], indirect=True)
def test_a_tied_head_may_be_stored_again(folder, tmp_path):
  """As the released Tiny-A2D have it; then it is written again too."""
  file = folder / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  table = tensors["model.embed_tokens.weight"]
  safetensors.numpy.save_file({**tensors, "lm_head.weight": table}, file)
  shape, params = model_folder.load(folder)
  assert "head" not in params
  model_folder.save(tmp_path / "again", shape, params, source=folder)
  again = safetensors.numpy.load_file(tmp_path / "again" / file.name)
  np.testing.assert_array_equal(again["lm_head.weight"], table)
  assert {*again} == {*tensors, "lm_head.weight"}
  safetensors.numpy.save_file({**tensors, "lm_head.weight": table + 1}, file)
  with pytest.raises(errors.UserError, match="differs from model"):
    model_folder.load(folder)
  head = {"lm_head.weight": table[:-1]}
  safetensors.numpy.save_file({**tensors, **head}, file)
  with pytest.raises(errors.UserError, match=r"lm_head\.weight has shape"):
    model_folder.load(folder)


@pytest.mark.parametrize(
  "folder, name, key, block",
  [
    ("tiny_a2d_qwen3", "Qwen3-0.6B-diffusion-bd3lm-v0.1", "block_size", 32),
    ("tiny_sdar", "SDAR-8B-Chat-b8", "block_size", 8),
  ],
  indirect=["folder"],
)
def test_blocks_that_only_a_name_tells(folder, tmp_path, name, key, block):
  """Must be set, and are kept where the model is written."""
  path = folder.rename(tmp_path / name)
  raw = json.loads((path / "config.json").read_text())
  raw.pop(key, None)
  (path / "config.json").write_text(json.dumps(raw))
  source = base.Source(str(path))
  with pytest.raises(errors.UserError, match=f"in blocks of {block}, and the"):
    model_lib.load_shape(source)
  source = dataclasses.replace(source, attention_block=block)
  shape = model_lib.load_shape(source)
  _, params = model_folder.load(path)
  model_folder.save(tmp_path / "trained", shape, params, source=path)
  written = model_folder.load_shape(str(tmp_path / "trained"))
  assert written.attention_block == shape.attention_block == block
  judged = lm_eval_adapter.Adapter(
    str(path), attention_block=block, sampler="bd3lm", block_length=block
  )
  assert judged._model.shape.attention_block == block


@pytest.mark.parametrize("folder", WHOLE[1:2], indirect=True)
def test_a_mask_that_was_added_as_an_ordinary_token(folder):
  file = folder / "tokenizer.json"
  tokenizer = json.loads(file.read_text())
  for token in tokenizer["added_tokens"]:
    token["special"] &= token["content"] != "<|mask|>"
  file.write_text(json.dumps(tokenizer))
  shape = model_folder.load_shape(str(folder))
  found = model_folder.load_tokenizer(str(folder), shape)
  assert found.decode([shape.mask_id]) == ""
  assert shape.mask_id not in found.encode("<|mask|>")


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_rope_that_is_scaled_by_nothing(key):
  raw = config_json("tiny_dream")
  scaled = raw | {"rope_scaling": {key: "default"}}
  assert models.read_shape(scaled) == models.read_shape(raw)


@pytest.mark.parametrize("folder", NAMES[:1], indirect=True)
def test_prompts_ask_for_no_thoughts(folder):
  """Templates of Qwen3 then write an empty thought."""
  shape = model_folder.load_shape(str(folder))
  tokenizer = model_folder.load_tokenizer(str(folder), shape)
  ids = tokenizer.encode_chat([{"role": "user", "content": "?"}])
  assert ids[-1] == shape.eos_id


@pytest.mark.parametrize("name", [*WHOLE, "tiny_sdar"])
def test_a_mask_id_that_nobody_tells(name):
  raw = {k: v for k, v in config_json(name).items() if k != "mask_token_id"}
  with pytest.raises(errors.UserError, match="mask_token_id is missing"):
    models.read_shape(raw)


def test_what_only_the_code_of_fast_dllm_v2_tells():
  """Its files name neither the mask nor, in the tokenizer, its token."""
  raw = config_json("tiny_fast_dllm_v2") | {"vocab_size": 152064}
  del raw["mask_token_id"], raw["bd_size"]
  shape = models.read_shape(raw)
  assert (shape.mask_id, shape.attention_block, shape.shift) == (151665, 32, 1)
  assert models.read_shape(raw | {"bd_size": 16}).attention_block == 16
  assert models.read_shape(raw, attention_block=8).attention_block == 8
  with pytest.raises(errors.UserError, match="bd_size=0 is not a number of"):
    models.read_shape(raw | {"bd_size": 0})
  with pytest.raises(errors.UserError, match="blocks_from='end'"):
    models.write_shape(dataclasses.replace(shape, blocks_from="end"))
  assert models.write_shape(shape)["bd_size"] == 32


@pytest.mark.parametrize(
  "change, words",
  [
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"attention_bias": True}, "attention_bias=True"),
    ({"rope_scaling": {"factor": 2}}, "rope_scaling="),
    ({"use_sliding_window": True}, "use_sliding_window=True"),
    ({"layer_types": ["sliding_attention"] * 2}, "'sliding_attention'"),
    ({"layer_types": 2}, "layer_types=2"),
    ({"rope_parameters": [1e6]}, "rope_parameters=.* is not an object"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "factor=0.5"),
    ({"eos_token_id": []}, "eos_token_id="),
    ({"eos_token_id": [195, "194"]}, "eos_token_id has '194'"),
    ({"eos_token_id": [195, 200]}, "eos_token_id has 200, which is not below"),
    ({"eos_token_id": [195, 197]}, "eos_token_id has 197, .* mask_token_id"),
    ({"right_shift_logits": 1}, "right_shift_logits=1 is not true or false"),
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
    (
      {"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn"}},
      "rope_type='yarn'",
    ),
  ],
)
def test_what_is_not_computed_is_refused(change, words):
  raw = config_json("tiny_a2d_qwen3") | {"mask_token_id": 197}
  with pytest.raises(errors.UserError, match=words):
    models.read_shape(raw | change)


@pytest.mark.parametrize("folder", NAMES[1:2], indirect=True)
def test_several_ids_end_a_completion(folder, tmp_path):
  """Those of config.json first, then those of generation_config.json."""
  path = folder / "generation_config.json"
  path.write_text(json.dumps({"eos_token_id": [194, 195, 199]}))
  shape, params = model_folder.load(folder)
  assert (shape.eos_id, shape.stop_ids) == (195, (194, 199))
  tokenizer = model_folder.load_tokenizer(str(folder), shape)
  assert (tokenizer.eos_id, tokenizer.stop_ids) == (195, (194, 199))
  # Kept with a source, and written into config.json without one.
  model_folder.save(tmp_path / "again", shape, params, source=folder)
  assert model_folder.load_shape(str(tmp_path / "again")) == shape
  model_folder.save(tmp_path / "new", shape, params)
  assert model_folder.load_shape(str(tmp_path / "new")) == shape
  path.write_text(json.dumps({"eos_token_id": 7}))
  shape = model_folder.load_shape(str(folder))
  with pytest.raises(errors.UserError, match="eos_token_id is 7, the ordinary"):
    model_folder.load_tokenizer(str(folder), shape)


def test_the_shift_is_a_key_of_the_config():
  raw = config_json("tiny_dream")
  assert models.read_shape(raw).shift == 1
  assert models.read_shape(raw | {"right_shift_logits": False}).shift == 0
  qwen = config_json("tiny_a2d_qwen3") | {"mask_token_id": 197}
  assert models.read_shape(qwen).shift == 0
  assert models.read_shape(qwen | {"right_shift_logits": True}).shift == 1


def test_rotary_base_where_newer_files_have_it():
  raw = config_json("tiny_a2d_qwen3") | {"mask_token_id": 197}
  theta = raw.pop("rope_theta")
  newer = raw | {"rope_parameters": {"rope_theta": theta}}
  assert models.read_shape(newer).rope_theta == 1e6
  with pytest.raises(errors.UserError, match="rope_theta is missing"):
    models.read_shape(raw)


def test_heads_are_normalised_one_by_one():
  shape, params = recordings.random_network(
    model_type="a2d-qwen3", qk_norm=True, qkv_bias=False, embedding_size=37
  )
  assert params["layers"]["q_norm"]["scale"].shape == (2, 8)
  network = transformer.bind(shape, params)
  logits = jax.jit(network.logits)
  tokens, length = np.arange(12)[None] % 37, np.array([12])
  positions = np.arange(12)[None]
  expected = logits(tokens, length, positions)
  # A head's size is without effect on what is normalised; its scale is not.
  larger = jax.tree.map(lambda x: x, params)
  larger["layers"]["q"]["kernel"] = 7.0 * params["layers"]["q"]["kernel"]
  found = jax.jit(transformer.bind(shape, larger).logits)
  np.testing.assert_allclose(
    found(tokens, length, positions), expected, rtol=1e-3, atol=1e-3
  )
  larger = jax.tree.map(lambda x: x, params)
  scale = params["layers"]["q_norm"]["scale"]
  larger["layers"]["q_norm"]["scale"] = 100.0 * scale
  found = jax.jit(transformer.bind(shape, larger).logits)
  assert np.abs(found(tokens, length, positions) - expected).max() > 1e-2
  with pytest.raises(errors.UserError, match="qk_norm=True"):
    models.FAMILIES["llada"].write(shape)


# Of blocks of the network.
IN_PARTS = dict(
  completion_length=32, block_length=8, lead_every=32, num_denoise_steps=32
)


@pytest.mark.parametrize(
  "folder, rank, rollout",
  [
    ("tiny_a2d_qwen3", 0, dict(schedule="mdlm")),
    # bd3lm, whose last block is shorter.
    ("tiny_a2d_qwen3", 4, dict(cache="block", completion_length=6)),
    ("tiny_dream", 4, {}),
    ("tiny_dream", 4, dict(schedule="dream", unmask_rule="entropy")),
    ("tiny_dream", 4, dict(schedule="dream", unmask_rule="origin")),
    ("tiny_dream", 4, dict(cache="dual")),
    (
      "tiny_dream",
      0,
      dict(cache="prefix", unmask_rule="threshold", threshold=0.1),
    ),
    ("tiny_sdar", 4, dict(cache="block", num_slots=1)),
    ("tiny_sdar", 0, dict(cache="block", unmask_rule="dynamic", threshold=0.1)),
    ("tiny_sdar", 0, dict(unmask_rule="confidence")),
    ("tiny_fast_dllm_v2", 4, IN_PARTS | dict(cache="block")),
    ("tiny_fast_dllm_v2", 0, IN_PARTS | dict(unmask_rule="random")),
  ],
  indirect=["folder"],
)
def test_agrpo_trains_it_on_policy(folder, tmp_path, rank, rollout):
  c = runs.varied(tmp_path)
  c.model.path = str(folder)
  c.model.tokenizer = ""
  c.lora.rank = rank
  c.lora.targets = targets_of(model_folder.load_shape(str(folder)))
  with c.unlocked():
    c.rollout.update(rollout)
    if folder.name == "tiny_fast_dllm_v2":
      c.evaluate.update(IN_PARTS)
  if folder.name == "tiny_a2d_qwen3" and rollout.get("cache"):
    c.model.attention_block = 4
  if rollout.get("cache"):
    c.objective.step_rule = "blocks"
  c.train.num_steps = 2
  runs.train(c)
  log = [*metrics.read(pathlib.Path(c.workdir) / "metrics.jsonl")]
  assert any(record["grad_norm"] > 0 for record in log)
  for record in log:
    if record["grad_norm"]:
      assert record["policy_ratio/max_deviation"] < 1e-4
  # What it trained has the names and shapes of the family's own modules.
  if rank:
    export.adapter(c.workdir, tmp_path / "trained")
    tensors = safetensors.numpy.load_file(tmp_path / "trained" / peft.WEIGHTS)
    assert {k: x.shape for k, x in tensors.items()} == peft_shapes(folder, rank)
    assert any(x.any() for k, x in tensors.items() if "lora_B" in k)
  else:
    export.merged(c.workdir, tmp_path / "trained")
    tensors, before = (
      safetensors.numpy.load_file(path / "model.safetensors")
      for path in (tmp_path / "trained", folder)
    )
    assert {k: x.shape for k, x in tensors.items()} == {
      k: x.shape for k, x in before.items()
    }
    assert all((x != before[k]).any() for k, x in tensors.items())


def targets_of(shape):
  return lora_lib.LAYER_TARGETS if shape.tied_head else lora_lib.TARGETS


def peft_shapes(folder, rank):
  """Of an adapter of all projections, from the names in a released layout."""
  weights = safetensors.numpy.load_file(folder / "model.safetensors")
  found = {}
  for name, weight in weights.items():
    module = name.removesuffix(".weight")
    if module.endswith(("_proj", "lm_head")):
      fan_out, fan_in = weight.shape
      root = f"base_model.model.{module}"
      found[f"{root}.lora_A.weight"] = rank, fan_in
      found[f"{root}.lora_B.weight"] = fan_out, rank
  assert len(found) in (28, 30)  # two layers of seven, and a head or none
  return found


@every
def test_adapters_have_the_names_of_the_family_s_modules(folder, tmp_path):
  shape, params = model_folder.load(folder)
  settings = lora_lib.Lora(4, 10.0, targets_of(shape))
  rng = np.random.default_rng(0)
  adapter = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32),
    lora_lib.init(settings, params, jax.random.key(0)),
  )
  peft.save(tmp_path / "adapter", shape, adapter, settings)
  tensors = safetensors.numpy.load_file(tmp_path / "adapter" / peft.WEIGHTS)
  assert {k: x.shape for k, x in tensors.items()} == peft_shapes(folder, 4)
  np.testing.assert_array_equal(
    tensors["base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"].T,
    adapter["layers"]["attn_out"]["a"][0],
  )
  described = json.loads((tmp_path / "adapter" / peft.CONFIG).read_text())
  modules = {name.split(".")[-3] for name in tensors}
  assert {*described["target_modules"]} == modules
  again, _ = peft.load(tmp_path / "adapter", shape)
  chex.assert_trees_all_equal(again, adapter)


@pytest.mark.parametrize("folder", ["tiny_sdar"], indirect=True)
def test_an_objective_that_masks_by_itself_wants_the_cache(folder, tmp_path):
  c = runs.varied(tmp_path)
  c.model.path = str(folder)
  c.model.tokenizer = ""
  config_lib.use_objective(c, "espo")
  c.objective.microbatch = 4
  with pytest.raises(errors.UserError, match="'espo' masks completions by"):
    runs.train(c)


def mdlm_noise(meta, arrays, sampling):
  """The recording's uniforms, found by forward and column of the canvas.

  A row's key is its number.
  """
  if meta["noise_seed"] is None:
    return noise_lib.NOISE
  num_rows, width = arrays["final_ids"].shape
  shape = meta["forwards"], num_rows, width

  def uniform(seed, shape):
    return np.random.Generator(np.random.PCG64(seed)).random(shape)

  of_tokens = uniform(meta["noise_seed"], (*shape, meta["special"]["V"]))
  gumbel = jnp.asarray(-np.log(-np.log(of_tokens)), jnp.float32)
  order = jnp.asarray(uniform(meta["noise_seed"] + 1, shape), jnp.float32)

  def place(row, step):
    forward, block = forward_of(step, sampling)
    start = jnp.asarray(arrays["prompt_len"])[row]
    return forward, start + block * sampling.block_length

  def order_at(row, step, size):
    forward, start = place(row, step)
    return jax.lax.dynamic_slice_in_dim(order[forward, row], start, size)

  def gumbel_at(row, step, offset_S, ids_SxK):
    forward, start = place(row, step)
    return gumbel[forward, row, start + offset_S[:, None], ids_SxK]

  return noise_lib.NOISE._replace(order=order_at, gumbel=gumbel_at)


def forward_of(step, sampling):
  """(forward of the released code, block) of a denoising step.

  It leaves out steps that unmask nothing, which here are a block's last.
  """
  block, own = step // sampling.steps_per_block, step % sampling.steps_per_block
  return block * int(
    (sampling_lib.step_amounts(sampling)[0] > 0).sum()
  ) + own, block


MDLM = (
  "qwen2_greedy_lens_b6",
  "qwen2_noise_t1_b8",
  "qwen3_greedy_b8",
  "qwen3_greedy_cfg1",
  "qwen3_greedy_lastblock_partial",
  "qwen3_greedy_lens_b6",
  "qwen3_greedy_shift",
  "qwen3_greedy_suppress",
  "qwen3_noise_t06_random",
  "qwen3_noise_t1_b8",
)


@pytest.mark.parametrize("case", MDLM)
def test_the_released_sampler_token_for_token(tmp_path, case):
  """dllm's, of Tiny-A2D."""
  with np.load(GOLDEN2 / f"mdlm_tiny_a2d_{case}.npz") as file:
    arrays = {key: file[key] for key in file.files}
  meta = json.loads(str(arrays["meta"]))
  s, special = meta["settings"], meta["special"]
  path = tmp_path / "model"
  shutil.copytree(GOLDEN2 / "ckpt" / meta["checkpoint"], path)
  raw = config_json(meta["checkpoint"]) | {"mask_token_id": special["mask"]}
  raw["right_shift_logits"] = s.get("right_shift_logits", False)
  (path / "config.json").write_text(json.dumps(raw))
  _, _, network = recordings.network_at(path)
  # No setting of ours: as if the network never said these.
  never = jnp.isin(
    jnp.arange(special["V"]), jnp.array(s.get("suppress_tokens", [-1]))
  )
  said = types.Network(
    lambda *args: jnp.where(never, -jnp.inf, network.logits(*args))
  )
  num_blocks = -(-meta["max_new_tokens"] // s["block_size"])
  draw = host.Draw(
    sampling_lib.Sampling(
      mask_id=special["mask"],
      eos_id=special["eos"],
      completion_length=meta["max_new_tokens"],
      block_length=s["block_size"],
      num_denoise_steps=-(-s["steps"] // num_blocks) * num_blocks,
      schedule="mdlm",
      unmask_rule=s.get("remasking", "confidence"),
      temperature=s.get("temperature", 0.0),
      confidence="model",
      stop_at_eos=False,
    ),
    guidance=s.get("cfg_scale", 0.0),
    batch_size=len(arrays["prompt_len"]),
    num_slots=0,
  )
  noise = mdlm_noise(meta, arrays, draw.sampling)
  length = arrays["prompt_len"]
  key = jax.random.split(jax.random.key(0), len(length))
  if noise is not noise_lib.NOISE:
    key = jnp.arange(len(length))
  prompts = types.Prompts(
    tokens=jnp.asarray(arrays["prompt_ids"]),
    length=jnp.asarray(length),
    key=key,
  )
  rollout = jax.jit(
    lambda prompts: rollout_lib.sample_rollout(
      said,
      prompts,
      draw.sampling,
      policy=draw.policy_for(draw.sampling),
      noise=noise,
    )
  )(prompts)
  for row, start in enumerate(length):
    own = slice(start, start + meta["max_new_tokens"])
    np.testing.assert_array_equal(
      rollout.completion[row], arrays["final_ids"][row, own]
    )
    np.testing.assert_array_equal(
      forward_of(np.asarray(rollout.unmask_step[row]), draw.sampling)[0],
      arrays["fill_step"][row, own],
    )
