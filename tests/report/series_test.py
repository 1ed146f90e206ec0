"""Series thinned out, and seconds per phase."""

import math

from agrpo_jax.report import series
from fixtures import run_logs


def test_thinning_keeps_first_last_and_every_extreme():
  points = [(x, math.sin(x / 50)) for x in range(10_000)]
  points[4321] = (4321, 9.0)
  points[7777] = (7777, -9.0)
  thin = series.thin(points, 100)
  assert len(thin) <= 100
  assert thin[0] == points[0] and thin[-1] == points[-1]
  assert {(4321, 9.0), (7777, -9.0)} <= {*thin}
  assert thin == sorted(thin)
  assert {*thin} <= {*points}


def test_short_series_stay_as_they_are():
  points = [(x, float(x)) for x in range(7)]
  assert series.thin(points, 8) == points


def test_a_gap_stays_a_gap_and_hides_no_value():
  nothing = [(x, math.nan) for x in range(100)]
  assert series.as_json(series.thin(nothing, 10))[1] == [None] * 6
  mixed = [(x, math.nan if x % 2 else float(x)) for x in range(100)]
  inner = series.thin(mixed, 10)[1:-1]
  assert all(math.isfinite(y) for _, y in inner)


def test_numbers_are_brief():
  assert series.brief(0.123456789) == 0.12346
  assert series.brief(3.0) == 3 and isinstance(series.brief(3.0), int)
  assert series.brief(math.inf) is None
  assert series.brief(None) is None


def test_phases_are_means_over_spans():
  records = run_logs.records(
    5, seconds__rollout=[8.0, 2.0, 2.0, 4.0, 4.0], seconds__update=1.0
  )
  records[3]["seconds/evaluate"] = 6.0
  found = series.phases(records, most=3)
  assert found == {
    "names": ["rollout", "update", "evaluate"],
    "first": [1, 3, 5],
    "last": [2, 4, 5],
    "seconds": [[5, 3, 4], [1, 1, 1], [0, 3, 0]],
  }
  assert series.phases([])["names"] == []
