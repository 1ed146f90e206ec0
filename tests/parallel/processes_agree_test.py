"""One program on any mesh: the same tokens, the same parameters."""

import json

import numpy as np
import pytest
from jax.experimental import multihost_utils

from agrpo_jax import data
from agrpo_jax import errors
from agrpo_jax import tasks
from agrpo_jax.grading import pool
from agrpo_jax.grading import shares as shares_lib
from agrpo_jax.parallel import processes
from fixtures import mesh_run


def test_two_processes_give_what_one_device_gives(tmp_path):
  """Split all ways; `meshes_proof.py` has more meshes, and all objectives.

  Of an objective that masks prompts, of one whose loss takes two passes, and of
  AGRPO through both kinds of caches; `restore_test.py` has it without one.
  """
  names = ("diffu_grpo", "espo", "dual", "block")
  expected = mesh_run.one_device(tmp_path / "one.npz", names)
  mesh_run.two_processes(tmp_path / "two.npz", names)
  mesh_run.assert_same(tmp_path / "two.npz", expected)


@pytest.mark.parametrize(
  "environment,part",
  [
    ({"AGRPO_COORDINATOR": "here:1"}, "AGRPO_PROCESS_ID=None"),
    (
      {
        "AGRPO_COORDINATOR": "here",
        "AGRPO_NUM_PROCESSES": "2",
        "AGRPO_PROCESS_ID": "0",
      },
      "host:port",
    ),
    (
      {
        "AGRPO_COORDINATOR": "here:1",
        "AGRPO_NUM_PROCESSES": "2",
        "AGRPO_PROCESS_ID": "2",
      },
      "ids go from 0",
    ),
  ],
)
def test_contradicting_environments(monkeypatch, environment, part):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(errors.UserError, match=part):
    processes.initialize()


def test_alone_there_is_nothing_to_exchange():
  processes.initialize()
  assert processes.is_main()
  assert processes.exchange({"a": 1}) == [{"a": 1}]
  assert processes.own_rows(3).tolist() == [0, 1, 2]


def test_a_process_grades_its_own_rows(monkeypatch):
  """The second of two; the fifth row only fills a batch of four up."""
  monkeypatch.setattr(
    multihost_utils, "process_allgather", lambda array, tiled: array
  )
  monkeypatch.setattr(processes.jax, "process_index", lambda: 1)
  monkeypatch.setattr(processes.jax, "process_count", lambda: 2)

  class Fake:
    def decode_batch(self, rows):
      return [f"text {row[0]}" for row in rows]

    def submit(self, completions, fields):
      return completions, fields

  batch = data.Batch.of(
    [
      data.Prompt(tasks.Example(id, messages=(), fields={"answer": id}), [])
      for id in range(4)
    ]
  )
  pending = shares_lib.submit(np.arange(5)[:, None], batch, Fake(), Fake())
  assert pending.texts == [f"text {row}" for row in range(4)]
  assert pending.own == (["text 1", "text 3"], [{"answer": 1}, {"answer": 3}])


def test_shares_of_rows_come_back_in_their_places(monkeypatch):
  """Two processes graded rows 0, 2, 4 and 1, 3; all of the second's failed."""
  shares = [
    {
      "reward": [0.0, 2.0, 4.0],
      "parts": {"right": [0.0, 0.2, 0.4]},
      "grades": {"accuracy": [0.0, 1.0, 0.0]},
      "num_failed": 0,
      "num_timed_out": 1,
      "answers": ["a", "c", "e"],
      "failures": [[2, "took too long"]],
    },
    {
      "reward": [0.0, 0.0],
      "parts": {"right": [0.0, 0.0]},
      "grades": {},
      "num_failed": 2,
      "num_timed_out": 0,
      "answers": ["b", ""],
      "failures": [[0, "raised"], [1, "crashed"]],
    },
  ]
  own = pool.Graded(np.zeros(3), {}, {}, 0, 0, ("",) * 3)
  monkeypatch.setattr(
    processes, "exchange", lambda value: [[share] for share in shares]
  )

  class Done:
    def result(self):
      return own

  graded = shares_lib.collect(
    [shares_lib.Pending(np.zeros((5, 1)), ["x"] * 5, Done())]
  )
  assert graded.reward_B.tolist() == [0.0, 0.0, 2.0, 0.0, 4.0]
  assert graded.parts["right"].tolist() == [0.0, 0.0, 0.2, 0.0, 0.4]
  assert graded.grades["accuracy"].tolist() == [0.0, 0.0, 1.0, 0.0, 0.0]
  assert graded.answers == ("a", "b", "c", "", "e")
  assert (graded.num_failed, graded.num_timed_out) == (2, 1)
  assert graded.failures == {1: "raised", 3: "crashed", 4: "took too long"}
  assert json.dumps(shares_lib._to_json(graded))
  twice = pool.concatenate([graded, graded])
  assert sorted(twice.failures) == [1, 3, 4, 6, 8, 9]
