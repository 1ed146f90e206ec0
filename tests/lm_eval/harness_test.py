"""lm-eval's requests by hand."""

import types

import numpy as np
import pytest
from absl import logging

from agrpo_jax.lm_eval import harness


def request(*args) -> types.SimpleNamespace:
  return types.SimpleNamespace(args=args)


@pytest.mark.parametrize(
  "until, expected",
  [
    (["\n\n", "Q:"], "a "),
    ("\n", "a Q: b"),
    (["never"], "a Q: b\n\nc"),
    (["", "b"], "a Q: "),
    ([], "a Q: b\n\nc"),
    (None, "a Q: b\n\nc"),
  ],
)
def test_cut(until, expected):
  assert harness.cut("a Q: b\n\nc", until) == expected


def test_rows_are_numbered_by_context_and_repetition():
  found = harness.row_ids([request("a"), request("b"), request("a")])
  assert found.dtype == np.uint32
  np.testing.assert_array_equal(found[:, 1], [0, 0, 1])
  assert found[0, 0] == found[2, 0] != found[1, 0]
  assert found[0, 0] == 0xE8B7BE43  # CRC-32 of "a"
  assert harness.row_ids([]).shape == (0, 2)


def test_groups_of_one_padded_width():
  assert harness.groups([(3,), (9,), (8,), (1,), (17,)], 8) == [
    [4],
    [1],
    [0, 2, 3],
  ]
  assert harness.groups([(1, 9), (1, 1), (9, 1), (2, 2)], 8) == [
    [2],
    [0],
    [1, 3],
  ]


def test_what_is_not_heeded_is_named(caplog):
  logging.use_python_logging()
  harness.warn_of_ignored([request("a", {"until": ["x"]})])
  assert not caplog.records
  harness.warn_of_ignored(
    [request("a", {"until": [], "temperature": 0.5, "do_sample": True})]
  )
  (record,) = caplog.records
  assert "do_sample=True, temperature=0.5" in record.getMessage()
