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
  assert (
    "num_denoise_steps=0" in sampling_lib.problems(make(num_denoise_steps=0))[0]
  )


@pytest.mark.parametrize(
  "settings,part",
  [
    (dict(cache="both"), "cache='both' is not one of none, prefix, dual"),
    (dict(cache="dual", cache_refresh=-1), "cache_refresh=-1 is negative"),
    (dict(cache_refresh=2), "cache_refresh=2 needs a cache"),
    (
      dict(cache="prefix", unmask_rule="confidence", redraw_mask=True),
      "cache='prefix' runs the block alone",
    ),
  ],
)
def test_caches_that_cannot_be(settings, part):
  (found,) = sampling_lib.problems(make(**settings))
  assert part in found


def test_steps_that_share_a_memory():
  assert make().steps_per_memory == 1
  assert make(cache="dual").steps_per_memory == 2
  assert make(cache="dual", cache_refresh=1).steps_per_memory == 1
  threshold = dict(unmask_rule="threshold", threshold=0.5)
  assert make(cache="dual", **threshold).steps_per_memory == 4


OWN = {
  "threshold": dict(threshold=0.9),
  "dynamic": dict(threshold=0.9),
  "factor": dict(factor=1.0),
  "entropy_bounded": dict(gamma=0.0),
  "soft_threshold": dict(threshold=0.9, soft_width=0.5),
}
WRONG = dict(
  threshold=(0.0, 1.1, float("nan")),
  factor=(0.0, float("inf"), float("nan")),
  gamma=(-0.1, float("inf"), float("nan")),
  soft_width=(0.0, -1.0, float("inf")),
)


@pytest.mark.parametrize("rule", sampling_lib.RULES)
def test_settings_of_rules_are_asked_for_and_refused_by_name(rule):
  own = OWN.get(rule, {})
  assert {*sampling_lib.parameters(rule)} == {*own}
  assert sampling_lib.problems(make(unmask_rule=rule, **own)) == []
  assert make(unmask_rule=rule, **own).rule is not None
  for name, values in WRONG.items():
    if name in own:
      for value in (None, *values):
        (found,) = sampling_lib.problems(
          make(unmask_rule=rule, **own | {name: value})
        )
        assert found.startswith(f"{name}={value} must be ")
        assert f"unmask_rule={rule!r}" in found
    else:
      (found,) = sampling_lib.problems(
        make(unmask_rule=rule, **own, **{name: 0.5})
      )
      assert found.startswith(f"{name}=0.5 needs unmask_rule=")
      assert all(repr(having) in found for having in OWN if name in OWN[having])


@pytest.mark.parametrize("rule", sampling_lib.RULES)
def test_how_many_steps_a_rule_may_take(rule):
  """Two blocks of 4 positions, 3 steps each by the schedule: 2, 1, 1."""
  own = OWN.get(rule, {})
  sampling = make(unmask_rule=rule, num_denoise_steps=6, **own)
  is_free = rule in OWN and rule != "dynamic"
  assert sampling.steps_per_block == (4 if is_free else 3)
  assert sampling.max_steps == 2 * sampling.steps_per_block
  assert sampling.tokens_per_step == (4 if rule in OWN else 2)
