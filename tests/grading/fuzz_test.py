"""Hostile completions: graded fast, nothing executed, nothing hung."""

from fixtures import hostile


def test_2_000_hostile_completions(tmp_path):
  """Every bomb under every task; `fuzz_proof.py` has five times as many."""
  hostile.assert_graded(2_000, tmp_path)
