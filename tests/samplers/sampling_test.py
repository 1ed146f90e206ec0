"""Settings of a sampler and their schedule."""

import pytest

from agrpo_jax.samplers import sampling as sampling_lib


def make(**settings) -> sampling_lib.Sampling:
  defaults = dict(
    mask_id=9,
    eos_id=0,
    completion_length=8,
    block_length=4,
    num_denoise_steps=4,
  )
  return sampling_lib.Sampling(**(defaults | settings))


@pytest.mark.parametrize(
  "length,steps,expected",
  [
    (8, 4, [2, 2, 2, 2]),
    (8, 5, [2, 2, 2, 1, 1]),
    (4, 8, [1, 1, 1, 1, 0, 0, 0, 0]),
  ],
)
def test_step_counts(length, steps, expected):
  sampling = make(
    completion_length=length, block_length=length, num_denoise_steps=steps
  )
  assert sampling_lib.step_counts(sampling).tolist() == expected


def test_problems_are_reported_together():
  found = sampling_lib.problems(
    make(block_length=3, unmask_rule="low_confidence", top_p=0.0, top_k=-1)
  )
  text = "\n".join(found)
  for part in ("block_length=3", "low_confidence", "top_p=0.0", "top_k=-1"):
    assert part in text
  assert sampling_lib.problems(make()) == []
  assert "threshold" in sampling_lib.problems(make(threshold=0.9))[0]
  found = sampling_lib.problems(make(unmask_rule="threshold"))
  assert "threshold=None" in found[0]
  assert (
    "num_denoise_steps=0" in sampling_lib.problems(make(num_denoise_steps=0))[0]
  )
