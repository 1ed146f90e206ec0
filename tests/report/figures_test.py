"""Cost and speed by hand."""

import copy
import dataclasses

import pytest

from agrpo_jax.models import base
from agrpo_jax.models import transformer
from agrpo_jax.plan import chips
from agrpo_jax.report import figures
from fixtures import run_logs

NETWORK = dict(
  model_type="llada",
  vocab_size=64,
  embedding_size=64,
  num_layers=2,
  width=32,
  num_heads=2,
  num_kv_heads=2,
  mlp_width=48,
  rope_theta=1e4,
  norm_eps=1e-5,
  qkv_bias=False,
  tied_head=False,
  max_length=64,
  mask_id=0,
  eos_id=1,
  pad_id=2,
)


def session(device_kind="NVIDIA H100 80GB HBM3", **changes):
  found = {**run_logs.SESSION, "device_kind": device_kind, "num_devices": 4}
  return {**found, "network": NETWORK, **changes}


def speed(cache="none", device_kind="NVIDIA H100 80GB HBM3", **changes):
  config = copy.deepcopy(run_logs.CONFIG)
  config["rollout"]["cache"] = cache
  metrics = {
    "completions__mean_denoise_steps": 8.0,
    "completions__mean_whole_passes": 8.0 if cache == "none" else 2.0,
    "draws__units": 10.0,
    "draws__visits": 10.0 if cache == "none" else 40.0,
    "prompts__mean_length": 12.0,
    "seconds__rollout": 1.0,
    "seconds__update": 1.0,
    "seconds__evaluate": 7.0,
  }
  return figures.flops_per_second(
    run_logs.log(
      1,
      config=config,
      sessions=[session(device_kind)],
      **{**metrics, **changes},
    )
  )


def test_cost_by_hand():
  # 36 s a step on four chips, then on two devices of one chip each.
  log = run_logs.log(
    10,
    sessions=[
      session(),
      session("TPU7x", first_step=5, num_devices=4),
    ],
    seconds__rollout=30.0,
    seconds__update=6.0,
  )
  found = figures.cost(log)
  assert found.seconds == 360
  assert found.chip_hours == pytest.approx((5 * 4 + 5 * 2) * 36 / 3600)
  assert found.seconds_left == pytest.approx(90 * 36)
  assert found.chip_hours_left == pytest.approx(90 * 36 * 2 / 3600)


def test_cost_of_what_is_not_recorded_is_not_known():
  log = run_logs.log(10, sessions=[], seconds__rollout=1.0)
  found = figures.cost(log)
  assert found.seconds == 10 and found.chip_hours is None
  assert found.seconds_left == pytest.approx(90)


def test_cost_of_a_log_without_seconds_is_not_known():
  log = run_logs.log(10, loss=1.0)
  assert figures.cost(log) == figures.Cost(None, None, None, None)
  assert any("seconds of train steps" in one for one in figures.missing(log))
  # What has not begun has taken nothing.
  assert figures.cost(run_logs.log(0)) == figures.Cost(0, 0, None, None)
  # Of a run that an older version began, what is timed tells the pace.
  log.records[9]["seconds/update"] = 2.0
  found = figures.cost(log)
  assert (found.seconds, found.seconds_left) == (2, 90 * 2)


def test_nothing_is_left_of_a_run_that_has_stopped():
  log = run_logs.log(10, seconds__update=36.0)
  found = figures.cost(dataclasses.replace(log, is_stopped=True))
  assert found == figures.Cost(360, 0.1, None, None)


def test_tokens_per_second_by_hand():
  log = run_logs.log(
    2, seconds__rollout=[1.0, 3.0], seconds__update=1.0, seconds__evaluate=9.0
  )
  # 2 prompts x 4 completions x 16 tokens.
  assert figures.tokens_per_second(log) == [(1, 64.0), (2, 32.0)]


def test_model_flops_by_hand():
  shape = base.Shape(**NETWORK)
  row = transformer.forward_flops(shape, 28, 2)
  # 8 completions of 8 steps; 10 visits, forward and twice as much backward.
  ((step, rate, share),) = speed()
  assert step == 1
  assert rate == pytest.approx(row * (64 + 30) / 2)
  assert share == pytest.approx(rate / (4 * 989e12))


def test_model_flops_with_a_cache_by_hand():
  shape = base.Shape(**NETWORK)
  state = transformer.forward_flops(shape, 28, 2, 8)
  memory = transformer.forward_flops(shape, 28, 0)
  ((_, rate, _),) = speed("dual")
  assert rate == pytest.approx(
    (state * (64 + 3 * 40) + memory * (16 + 3 * 10)) / 2
  )
  window = transformer.forward_flops(shape, 28, 2, 12)
  ((_, rate, _),) = speed("prefix")
  assert rate == pytest.approx(
    (window * (64 + 3 * 40) + memory * (16 + 3 * 10)) / 2
  )


def test_a_network_of_another_version():
  more = {**NETWORK, "later": 1}
  metrics = dict(prompts__mean_length=12.0, seconds__update=1.0)
  log = run_logs.log(1, sessions=[session(network={"width": 3})], **metrics)
  assert figures.flops_per_second(log) == []
  metrics |= {
    "completions__mean_denoise_steps": 8.0,
    "completions__mean_whole_passes": 8.0,
    "draws__units": 1.0,
    "draws__visits": 1.0,
  }
  log = run_logs.log(1, sessions=[session(network=more)], **metrics)
  assert len(figures.flops_per_second(log)) == 1


def test_no_mfu_of_an_unknown_device():
  ((_, rate, share),) = speed(device_kind="cpu")
  assert rate > 0 and share is None


@pytest.mark.parametrize(
  "device_kind,chip",
  [
    ("NVIDIA H100 80GB HBM3", "h100"),
    ("NVIDIA H200", "h200"),
    ("NVIDIA A100-SXM4-40GB", "a100"),
    ("NVIDIA L4", "l4"),
    ("Tesla T4", "t4"),
    ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ("TPU v4", "v4"),
    ("TPU v5 lite", "v5e"),
    ("TPU v5p", "v5p"),
    ("TPU v5", "v5p"),
    ("TPU v6 lite", "v6e"),
    ("TPU7x", "tpu7x"),
    ("NVIDIA L40S", None),
    ("TPU v4 lite", None),
    ("NVIDIA RTX T400 4GB", None),
    ("cpu", None),
  ],
)
def test_chips_by_what_jax_calls_them(device_kind, chip):
  assert chips.of_device(device_kind) == (chip and chips.CHIPS[chip])
