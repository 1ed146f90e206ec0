"""What a run keeps for its report: of whom, and how much."""

import numpy as np

from agrpo_jax import data
from agrpo_jax import tasks
from agrpo_jax.grading import pool
from agrpo_jax.report import keep
from fixtures import completions

TEXTS = ("a1", "b2", "c3", "d4")


def rollout_of(texts):
  """Two characters each, the second first."""
  return completions.rollout(
    [(completions.TOKENIZER.encode(text), [1, 0]) for text in texts]
  )


def batch():
  prompts = [
    data.Prompt(
      tasks.Example(id, ({"role": "user", "content": f"{id}?"},), {}), [id]
    )
    for id in (11, 12)
  ]
  return data.Batch.of(prompts, 2)


def graded(rewards, failures=()):
  reward_B = np.array(rewards)
  return pool.Graded(
    reward_B, {}, {"accuracy": reward_B}, 0, 0, TEXTS, dict(failures)
  )


def of_train_step(train_step, num_steps, rewards, failures=()):
  return keep.of_train_step(
    train_step,
    num_steps,
    rollout_of(TEXTS),
    batch(),
    TEXTS,
    graded(rewards, failures),
    completions.TOKENIZER,
  )


def test_the_first_completions_of_an_evaluation():
  held_out = keep.HeldOut(completions.TOKENIZER, 3)
  for texts in (TEXTS[:2], TEXTS[2:], TEXTS[:2]):
    held_out.look(rollout_of(texts))
  evaluated = [
    dict(
      id=id,
      prompt="?",
      completion=text,
      reward=0.5,
      grades={"accuracy": 1.0},
      answer="",
    )
    for id, text in enumerate(TEXTS)
  ]
  found = held_out.records(evaluated)
  assert [one["completion"] for one in found] == ["a1", "b2", "c3"]
  assert {one["source"] for one in found} == {"held out"}
  assert found[2]["unmasking"] == {
    "text": ["c", "3"],
    "unmask_step": [1, 0],
    "logprob": [-0.25, -0.5],
    "entropy": [0.5, 1.0],
    "special": [],
    "num_steps": 2,
  }


def test_rows_that_fill_up_a_batch_are_not_kept():
  held_out = keep.HeldOut(completions.TOKENIZER, 9)
  held_out.look(rollout_of(TEXTS))
  only = dict(id=0, prompt="?", completion="a1", reward=0, grades={}, answer="")
  (found,) = held_out.records([only])
  assert found["accuracy"] == 0  # its grader failed and gave no verdict


def test_the_best_and_the_worst_of_a_train_step():
  best, worst = of_train_step(0, 10, [0.5, 0.0, 1.0, 0.5])
  assert (best["completion"], best["reward"]) == ("c3", 1.0)
  assert (worst["completion"], worst["reward"]) == ("b2", 0.0)
  assert (best["id"], best["prompt"], best["answer"]) == (12, "12?", "c3")
  assert "".join(best["unmasking"]["text"]) == "c3"
  assert "".join(worst["unmasking"]["text"]) == "b2"
  # All earn the same: one of them says it.
  assert len(of_train_step(0, 10, [0.5] * 4)) == 1


def test_a_long_run_keeps_no_more_than_a_short_one():
  for num_steps in (10, 64, 65, 1000, 12_345):
    kept = [
      step for step in range(num_steps) if step % -(-num_steps // 64) == 0
    ]
    assert len(kept) <= 64
  rewards = [0.0, 1.0, 0.0, 0.0]
  sizes = [len(of_train_step(step, 640, rewards)) for step in range(30)]
  assert sizes == [2, *[0] * 9] * 3


def test_a_few_that_could_not_be_graded_with_their_reasons():
  failures = {3: "took too long", 1: "raised E: no", 2: "crashed its worker"}
  found = of_train_step(1, 640, [0.0] * 4, failures)
  assert [(one["completion"], one["failure"]) for one in found] == [
    ("b2", "raised E: no"),
    ("c3", "crashed its worker"),
  ]
