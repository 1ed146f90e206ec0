"""Settings of a sampler and their schedule."""

import pathlib

import numpy as np
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
  assert sampling_lib.step_amounts(sampling).tolist() == [expected]


@pytest.mark.parametrize(
  "length,steps,last_time,expected",
  [
    # Of 4 positions 0.999, 1.33 and 1.498 in the first three steps.
    (4, 4, 1e-3, [0, 1, 1, 2]),
    # Times 1, 0.7, 0.4 and 0.1: of 5 positions 1.5, then of 4 1.71.
    (5, 3, 0.1, [1, 1, 3]),
    (2, 6, 1e-3, [0, 0, 0, 0, 0, 2]),
  ],
)
def test_counts_of_dream(length, steps, last_time, expected):
  sampling = make(
    completion_length=2 * length,
    block_length=length,
    num_denoise_steps=2 * steps,
    schedule="dream",
    last_time=last_time,
  )
  assert sampling_lib.step_amounts(sampling).tolist() == [expected, expected]
  assert sampling.tokens_per_step == max(expected)


def test_counts_of_mdlm_are_those_of_the_released_code():
  """Some differ from exact rounding: 4 positions in 3 steps are 1, 1, 2."""
  folder = pathlib.Path(__file__).parents[1] / "testdata" / "golden2"
  with np.load(folder / "dllm_schedule.npz") as file:
    cases, released = file["linear_masks_steps"], file["linear_counts"]
  assert len(cases) > 400
  for (length, steps), expected in zip(cases.tolist(), released, strict=True):
    sampling = make(
      completion_length=length,
      block_length=length,
      num_denoise_steps=steps,
      schedule="mdlm",
    )
    (found,) = sampling_lib.step_amounts(sampling)
    expected = expected[expected > 0].tolist()
    # Steps that it leaves out come last, and never run.
    assert found.tolist() == expected + [0] * (steps - len(expected))


@pytest.mark.parametrize(
  "schedule,expected",
  [
    # Of 4 positions 2, 1, 1; time 1, 0.7, 0.4, 0.1; time 1, 2/3, 1/3, 0.
    ("equal", [1 / 2, 1 / 2, 1]),
    ("dream", [0.3, 3 / 7, 1]),
    ("mdlm", [1 / 3, 1 / 2, 1]),
  ],
)
def test_shares_of_a_rule_of_chance(schedule, expected):
  sampling = make(
    unmask_rule="origin",
    num_denoise_steps=6,
    schedule=schedule,
    last_time=0.1,
  )
  shares = sampling_lib.step_amounts(sampling)
  np.testing.assert_allclose(shares, [expected, expected], rtol=1e-6)
  assert (shares[:, -1] == 1).all()


@pytest.mark.parametrize(
  "settings,expected",
  [
    (dict(), [[2, 1, 1], [2, 1, 1], [1, 0, 0]]),
    (dict(schedule="mdlm"), [[1, 1, 2], [1, 1, 2], [1, 0, 0]]),
    # Of 1 position 0.3 and 0.43; what is left goes in the last step.
    (dict(schedule="dream", last_time=0.1), [[1, 1, 2], [1, 1, 2], [0, 0, 1]]),
    (
      dict(unmask_rule="origin"),
      [[1 / 2, 1 / 2, 1], [1 / 2, 1 / 2, 1], [1, 0, 0]],
    ),
    (dict(unmask_rule="threshold", threshold=0.5), None),
  ],
)
def test_a_last_block_that_is_shorter(settings, expected):
  """9 positions in blocks of 4, 3 steps each where there is a schedule."""
  sampling = make(completion_length=9, num_denoise_steps=9, **settings)
  assert sampling_lib.problems(sampling) == []
  assert (sampling.num_blocks, sampling.last_length) == (3, 1)
  assert sampling.max_steps == (9 if expected else 12)
  # The last one's steps look back at three positions before it.
  starts = [int(sampling.window_start(np.int32(block))) for block in range(3)]
  assert starts == [0, 4, 5]
  if expected:
    found = sampling_lib.step_amounts(sampling)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_block_is_no_longer_than_the_completion():
  (found,) = sampling_lib.problems(make(block_length=9, num_denoise_steps=1))
  assert found.startswith("block_length=9 is more than completion_length=8")


@pytest.mark.parametrize(
  "settings,part",
  [
    (dict(schedule="even"), "schedule='even' is not one of equal, dream, mdlm"),
    (dict(schedule="dream", last_time=1.0), "last_time=1.0 is outside [0, 1)"),
    (
      dict(schedule="dream", unmask_rule="threshold", threshold=0.5),
      "schedule='dream' needs a rule that takes as many positions",
    ),
    (
      dict(schedule="mdlm", unmask_rule="dynamic", threshold=0.5),
      "not unmask_rule='dynamic'",
    ),
    (
      dict(schedule="dream", unmask_rule="confidence", redraw_mask=True),
      "schedule='dream' counts on every drawn token",
    ),
    (dict(truncate_first="both"), "truncate_first='both' is not one of top_k"),
  ],
)
def test_schedules_that_cannot_be(settings, part):
  (found,) = sampling_lib.problems(make(**settings))
  assert part in found


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
  takes_all = rule in OWN or rule == "origin"
  assert sampling.tokens_per_step == (4 if takes_all else 2)
