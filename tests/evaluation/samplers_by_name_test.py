"""Samplers by name."""

import pytest

from agrpo_jax import config as config_lib
from agrpo_jax import config_check
from agrpo_jax import errors
from agrpo_jax import presets


def config() -> config_lib.ConfigDict:
  c = config_lib.rl()
  c.workdir = c.model.path = "x"
  config_lib.use_task(c, "sudoku")
  return c


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_sampler_holds(name):
  c = config()
  presets.apply(c, name)
  assert config_check.problems(c) == []


def test_a_sampler_sets_what_is_not_kept():
  c = config()
  c.evaluate.temperature = 0.7
  c.evaluate.num_denoise_steps = 16
  presets.apply(c, "config")
  assert c.evaluate.num_denoise_steps == 16
  presets.apply(c, "fast_dllm", keep=["temperature", "num_denoise_steps"])
  assert c.evaluate.temperature == 0.7
  assert c.evaluate.num_denoise_steps == 16
  assert c.evaluate.threshold == 0.9
  presets.apply(c, "llada")
  assert c.evaluate.threshold is None
  assert c.evaluate.temperature == 0.0


def test_an_unknown_sampler_is_refused():
  with pytest.raises(errors.UserError, match=r"'dream' is unknown.*fast_dllm"):
    presets.apply(config(), "dream")
