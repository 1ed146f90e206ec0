"""Adapters in PEFT's layout: names, shapes, what is refused, merging."""

import json
import os
import pathlib
import re

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy

from agrpo_jax import errors
from agrpo_jax import models
from agrpo_jax.models import lora as lora_lib
from agrpo_jax.models import transformer
from agrpo_jax.port import model_folder
from agrpo_jax.port import peft

CKPT = pathlib.Path(__file__).parents[1] / "testdata" / "golden" / "ckpt"
GQA = CKPT / "tiny_gqa_sharded"
ROOT = "base_model.model.model.transformer"


def adapter_of(params, targets, seed=0):
  """An adapter whose `b` is not zero."""
  settings = lora_lib.Lora(4, 10.0, targets)
  rng = np.random.default_rng(seed)
  adapter = jax.tree.map(
    lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32),
    jax.eval_shape(
      lambda key: lora_lib.init(settings, params, key), jax.random.key(0)
    ),
  )
  return settings, adapter


def saved(folder, targets=lora_lib.TARGETS):
  config, params = model_folder.load(GQA, dtype="float32")
  settings, adapter = adapter_of(params, targets)
  peft.save(folder, config, adapter, settings, base_model="some/base")
  return config, params, settings, adapter


def peft_adapts(target_modules, name):
  """Which modules PEFT takes: a whole-name match, or an end of the name."""
  if isinstance(target_modules, str):
    return re.fullmatch(target_modules, name) is not None
  return any(name == one or name.endswith(f".{one}") for one in target_modules)


class TestSave:
  def test_names_and_shapes(self, tmp_path):
    _, _, _, adapter = saved(tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / peft.WEIGHTS)
    fans = {
      "q_proj": (64, 64),
      "k_proj": (64, 32),
      "v_proj": (64, 32),
      "attn_out": (64, 64),
      "ff_proj": (64, 176),
      "up_proj": (64, 176),
      "ff_out": (176, 64),
    }
    expected = {}
    for layer in range(3):
      for module, (fan_in, fan_out) in fans.items():
        name = f"{ROOT}.blocks.{layer}.{module}"
        expected[f"{name}.lora_A.weight"] = (4, fan_in)
        expected[f"{name}.lora_B.weight"] = (fan_out, 4)
    expected[f"{ROOT}.ff_out.lora_A.weight"] = (4, 64)
    expected[f"{ROOT}.ff_out.lora_B.weight"] = (512, 4)
    assert {name: x.shape for name, x in tensors.items()} == expected
    np.testing.assert_array_equal(
      tensors[f"{ROOT}.blocks.1.k_proj.lora_B.weight"],
      adapter["layers"]["k"]["b"][1].T,
    )
    np.testing.assert_array_equal(
      tensors[f"{ROOT}.blocks.2.ff_out.lora_A.weight"],
      adapter["last_layer"]["down"]["a"].T,
    )

  @pytest.mark.parametrize(
    "targets",
    [
      lora_lib.TARGETS,
      lora_lib.LAYER_TARGETS,
      ("q", "v"),
      ("down",),
      ("head",),
      ("q", "head"),
      ("down", "head"),
    ],
    ids="-".join,
  )
  def test_peft_would_adapt_the_same_modules(self, targets, tmp_path):
    saved(tmp_path, targets)
    described = json.loads((tmp_path / peft.CONFIG).read_text())
    assert described["r"] == 4 and described["lora_alpha"] == 10.0
    assert described["base_model_name_or_path"] == "some/base"
    modules = ["model.transformer.wte", "model.transformer.ff_out"]
    for layer in range(3):
      modules += [
        f"model.transformer.blocks.{layer}.{name}"
        for name in (
          *("q_proj", "k_proj", "v_proj", "attn_out", "attn_norm"),
          *("ff_proj", "up_proj", "ff_out", "ff_norm"),
        )
      ]
    adapted = {
      name for name in modules if peft_adapts(described["target_modules"], name)
    }
    tensors = safetensors.numpy.load_file(tmp_path / peft.WEIGHTS)
    assert adapted == {
      name.removeprefix("base_model.model.").split(".lora_")[0]
      for name in tensors
    }

  def test_its_weights_can_be_read_by_others(self, tmp_path):
    before = os.umask(0o022)
    try:
      saved(tmp_path)
    finally:
      os.umask(before)
    assert (tmp_path / peft.WEIGHTS).stat().st_mode & 0o777 == 0o644

  def test_a_tied_network_has_one_ff_out_per_layer(self, tmp_path):
    raw = json.loads((GQA / "config.json").read_text())
    config = models.read_shape({**raw, "weight_tying": True})
    settings, adapter = adapter_of(
      transformer.abstract_params(config), ("down",)
    )
    peft.save(tmp_path, config, adapter, settings)
    described = json.loads((tmp_path / peft.CONFIG).read_text())
    assert described["target_modules"] == ["ff_out"]


class TestLoad:
  @pytest.mark.parametrize("targets", [lora_lib.TARGETS, ("head", "k")])
  def test_round_trip(self, targets, tmp_path):
    config, _, settings, adapter = saved(tmp_path, targets)
    loaded, again = peft.load(tmp_path, config)
    chex.assert_trees_all_equal(loaded, adapter)
    assert (again.rank, again.alpha) == (settings.rank, settings.alpha)
    assert set(again.targets) == set(targets)

  def test_all_problems_in_one_message(self, tmp_path):
    config, *_ = saved(tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / peft.WEIGHTS)
    q = f"{ROOT}.blocks.0.q_proj.lora_A.weight"
    k = f"{ROOT}.blocks.1.k_proj.lora_B.weight"
    v = f"{ROOT}.blocks.2.v_proj.lora_B.weight"
    del tensors[q]
    tensors[k] = tensors[k][:, :3]
    tensors[v][0, 0] = np.nan
    tensors[f"{ROOT}.blocks.0.q_proj.lora_magnitude_vector"] = np.ones(4)
    safetensors.numpy.save_file(tensors, tmp_path / peft.WEIGHTS)
    with pytest.raises(errors.UserError) as caught:
      peft.load(tmp_path, config)
    for part in (
      f"{q} is missing",
      f"{k} has shape (32, 3), expected (32, 4)",
      f"{v} has values that are NaN",
      "lora_magnitude_vector is unexpected",
    ):
      assert part in str(caught.value)

  @pytest.mark.parametrize(
    ("key", "value"),
    [
      ("use_dora", True),
      ("use_rslora", True),
      ("bias", "all"),
      ("rank_pattern", {"q_proj": 2}),
      ("modules_to_save", ["wte"]),
      ("peft_type", "LOHA"),
      ("r", 0),
      ("lora_alpha", None),
      ("lora_alpha", float("nan")),
      ("lora_alpha", 10**400),
      ("lora_alpha", 0),
    ],
  )
  def test_other_arithmetic_is_refused_by_name(self, key, value, tmp_path):
    config, *_ = saved(tmp_path, ("q",))
    file = tmp_path / peft.CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(errors.UserError, match=key):
      peft.load(tmp_path, config)

  def test_an_absurd_rank(self, tmp_path):
    """No memory is taken for what should have been there."""
    config, *_ = saved(tmp_path, ("q",))
    file = tmp_path / peft.CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), "r": 10**15}))
    with pytest.raises(errors.UserError, match="1000000000000000"):
      peft.load(tmp_path, config)

  def test_of_another_network(self, tmp_path):
    saved(tmp_path, ("q",))
    config = model_folder.load_shape(str(CKPT / "tiny_loss"))
    with pytest.raises(errors.UserError, match="expected"):
      peft.load(tmp_path, config)

  def test_no_adapter_there(self, tmp_path):
    config = model_folder.load_shape(str(GQA))
    with pytest.raises(errors.UserError, match=r"adapter_config\.json"):
      peft.load(tmp_path, config)
    (tmp_path / peft.CONFIG).write_text('{"r": 2, "lora_alpha": 4}')
    with pytest.raises(errors.UserError, match=r"adapter_model\.safetensors"):
      peft.load(tmp_path, config)


class TestMerge:
  def test_command(self, tmp_path, run_in_subprocess):
    """The merged checkpoint has the logits of base plus adapter."""
    config, params, settings, adapter = saved(tmp_path / "adapter")
    out = run_in_subprocess(f"""
      import runpy, sys
      sys.argv = [
        "port", "--from={GQA}", "--to={tmp_path / "merged"}",
        "--merge_adapter={tmp_path / "adapter"}", "--dtype=float32",
      ]
      runpy.run_module("agrpo_jax.port", run_name="__main__")
    """)
    assert "204,224 parameters" in out
    written = (tmp_path / "merged" / "README.md").read_text()
    assert "with the adapter `adapter` merged into them, as float32" in written
    _, merged = model_folder.load(tmp_path / "merged")
    tokens = np.random.default_rng(0).integers(0, 500, (2, 12))
    args = tokens, np.array([12, 7]), np.array([[0, 11, 4], [6, 1, 2]])
    expected = jax.jit(
      transformer.bind(config, params, adapter, settings.scale).logits
    )(*args)
    base = jax.jit(transformer.bind(config, params).logits)(*args)
    logits = jax.jit(transformer.bind(config, merged).logits)(*args)
    assert np.abs(base - expected).max() > 1
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-3)
