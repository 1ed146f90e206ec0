"""Reading config.json: what is honoured, and what is refused by name."""

import json
import pathlib

import pytest

from agrpo_jax import errors
from agrpo_jax import models
from agrpo_jax.models import base

GOLDEN = pathlib.Path(__file__).parents[1] / "testdata" / "golden"


def golden_json():
  return json.loads((GOLDEN / "ckpt" / "tiny_mha" / "config.json").read_text())


def tiny(**changes):
  return base.Shape(
    **{
      "model_type": "llada",
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
      "tied_head": True,
      "scale_logits": True,
      "max_length": 64,
      "mask_id": 36,
      "eos_id": 35,
      "pad_id": 34,
      **changes,
    }
  )


class TestConfig:
  def test_golden(self):
    config = models.read_shape(golden_json(), remat="dots")
    assert config == base.Shape(
      model_type="llada",
      vocab_size=512,
      embedding_size=512,
      num_layers=2,
      width=64,
      num_heads=4,
      num_kv_heads=4,
      mlp_width=160,
      rope_theta=500_000.0,
      norm_eps=1e-5,
      qkv_bias=False,
      tied_head=False,
      max_length=4096,
      mask_id=510,
      eos_id=505,
      pad_id=505,
      remat="dots",
    )
    assert config.head_dim == 16

  def test_round_trip(self):
    config = tiny()
    raw = json.loads(json.dumps(models.write_shape(config)))
    assert models.read_shape(raw) == config
    # Every key of a real config.json, but for what the library itself adds.
    assert set(golden_json()) - set(raw) == {"dtype", "transformers_version"}

  @pytest.mark.parametrize(
    ("key", "value"),
    [
      ("alibi", True),
      ("rope", False),
      ("rope_full_precision", False),
      ("layer_norm_type", "low_precision"),
      ("layer_norm_with_affine", False),
      ("bias_for_layer_norm", True),
      ("attention_layer_norm", True),
      ("input_emb_norm", True),
      ("include_bias", True),
      ("block_type", "sequential"),
      ("block_group_size", 2),
      ("activation_type", "gelu"),
      ("attention_dropout", 0.1),
      ("residual_dropout", 0.1),
      ("embedding_dropout", 0.1),
      ("clip_qkv", 8.0),
      ("n_kv_heads", 3),
      ("n_heads", 5),
      ("n_heads", "4"),
      ("n_layers", 0),
      ("d_model", 64.5),
      ("d_model", 12),
      ("mask_token_id", 512),
      ("mask_token_id", 505),
      ("eos_token_id", -1),
      ("eos_token_id", None),
      ("embedding_size", 511),
      ("rms_norm_eps", 0),
      ("rope_theta", "big"),
      ("weight_tying", None),
      ("weight_tying", 0),
      ("multi_query_attention", True),
      ("max_sequence_length", None),
      ("model_type", "llama"),
    ],
  )
  def test_refuses_by_name(self, key, value):
    with pytest.raises(errors.UserError, match=key):
      models.read_shape({**golden_json(), key: value})

  def test_reports_everything_at_once(self):
    raw = {
      **golden_json(),
      "alibi": True,
      "n_kv_heads": 3,
      "mask_token_id": 9999,
      "residual_dropout": 0.5,
    }
    del raw["d_model"]
    with pytest.raises(errors.UserError) as caught:
      models.read_shape(raw, remat="all", dtype="int8")
    for part in (
      "alibi=True",
      "n_kv_heads=3",
      "mask_token_id=9999",
      "residual_dropout=0.5",
      "d_model is missing",
      "remat='all'",
      "dtype='int8'",
    ):
      assert part in str(caught.value)

  def test_absent_keys_mean_what_the_original_takes(self):
    raw = golden_json()
    for key in ("n_kv_heads", "embedding_size", "pad_token_id", "scale_logits"):
      del raw[key]
    raw |= {"mlp_hidden_size": None, "mlp_ratio": 2.5}
    config = models.read_shape(raw)
    assert config.num_kv_heads == 4
    assert config.embedding_size == 512
    assert config.pad_id == 505
    assert config.mlp_width == 160
    assert not config.scale_logits
    assert (
      models.read_shape({**raw, "multi_query_attention": True}).num_kv_heads
      == 1
    )
    del raw["rope"]
    with pytest.raises(errors.UserError, match=r"rope=False .* absent"):
      models.read_shape(raw)

  def test_not_an_object(self):
    with pytest.raises(errors.UserError, match="list"):
      models.read_shape([])

  def test_settings_are_checked_too(self):
    config = tiny()
    with pytest.raises(errors.UserError, match="attention='flash'"):
      tiny(attention="flash")
    assert hash(config) == hash(tiny())
