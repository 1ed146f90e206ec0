"""10,000 hostile completions: graded fast, nothing executed, nothing hung.

    python -m pytest tests/grading/fuzz_proof.py

The suite has a part of it, `fuzz_test.py`.
"""

from fixtures import hostile


def test_10_000_hostile_completions(tmp_path):
  hostile.assert_graded(10_000, tmp_path)
