"""Values of states within completions: who is drawn anew, and what comes out.

And whole runs with them, on a recorded tiny checkpoint.
"""

import dataclasses
import json
import pathlib
import shutil
from concurrent import futures

import numpy as np
import optax
import pytest

from agrpo_jax import actor
from agrpo_jax import config as config_lib
from agrpo_jax import data
from agrpo_jax import learner as learner_lib
from agrpo_jax import tasks
from agrpo_jax import types
from agrpo_jax.grading import pool
from agrpo_jax.objectives import base
from agrpo_jax.objectives import vine_ppo
from agrpo_jax.runs import checkpoint_read
from agrpo_jax.runs import metrics
from agrpo_jax.samplers import sampling as sampling_lib
from fixtures import runs

SAMPLING = sampling_lib.Sampling(
  mask_id=9,
  eos_id=0,
  completion_length=6,
  block_length=2,
  num_denoise_steps=6,
)
# Two prompts of two completions; the second one ends with its first block, the
# last with its second.
COMPLETION = np.array(
  [
    [1, 2, 3, 4, 5, 6],
    [0, 0, 0, 0, 0, 0],
    [1, 1, 2, 2, 3, 3],
    [7, 7] + [0] * 4,
  ],
  np.int32,
)
UNMASK_STEP = np.array(
  [
    [0, 1, 2, 3, 5, 4],
    [1, 0, 6, 6, 6, 6],
    [0, 0, 2, 3, 4, 4],  # as a threshold has it: some blocks in one step
    [0, 1, 2, 2, 6, 6],
  ],
  np.int32,
)
REWARD = np.array([1.0, 0.25, 0.5, 0.75])


class Sampler:
  """Ends every completion with its block and row number, and tells of all."""

  batch_size = 4

  def __init__(self):
    self.asked = []

  def sample(self, params, lora, prompts, key, row_id_Bx2, start=None):
    self.asked.append((prompts, key, row_id_Bx2, start))
    for first in range(0, len(prompts), self.batch_size):
      row = np.arange(first, first + self.batch_size)
      row = np.minimum(row, len(prompts) - 1)
      completion = start.completion[row].copy()
      completion[:, -1] = row_id_Bx2[row, 1] % 5
      num_steps = 6 - 2 * start.block[row]
      yield rollout_of(completion, start.unmask_step[row], num_steps)

  def drawn(self, rollout):
    return rollout.completion


def rollout_of(completion, unmask_step, num_steps):
  zeros = np.zeros(completion.shape)
  return types.Rollout(
    prompt=zeros,
    prompt_length=zeros,
    completion=completion,
    unmask_step=unmask_step,
    logprob=zeros,
    entropy=zeros,
    support=None,
    order_logprob=zeros,
    num_executed_steps=num_steps,
    num_whole_passes=num_steps,
    num_slot_steps=num_steps,
  )


class Tokenizer:
  def decode_batch(self, completion_BxC):
    return [json.dumps(row) for row in completion_BxC.tolist()]


class Grader:
  """Pays the last token."""

  def submit(self, completions, fields):
    assert len(completions) == len(fields)
    last = np.array([json.loads(text)[-1] for text in completions], float)
    done = futures.Future()
    done.set_result(
      pool.Graded(last, {}, {"accuracy": last}, 0, 0, ("",) * len(last))
    )
    return done


def values_of(step_price=0.0, unmask_step=UNMASK_STEP, **restarts):
  learner = learner_lib.Learner(
    bind=lambda params, lora: None,
    optimizer=optax.sgd(1.0),
    sampling=SAMPLING,
    objective=vine_ppo.VinePpo(),
    group_size=2,
    microbatch=4,
    step_price=step_price,
  )
  prompts = [
    data.Prompt(tasks.Example(id, ({"role": "user", "content": ""},), {}), [id])
    for id in (11, 12)
  ]
  sampler = Sampler()
  found = actor.Actor(sampler, Tokenizer(), Grader()).values(
    base.Restarts(**({"blocks": (1, 2), "num": 3} | restarts)),
    learner,
    types.TrainState(0, None, None, None),
    data.Batch.of(prompts, 2),
    rollout_of(COMPLETION, unmask_step, np.zeros(4)),
    REWARD,
    "key",
  )
  return *found, sampler


def test_states_that_a_completion_came_to_are_drawn_on_from():
  value_BxV, scalars, sampler = values_of()
  ((prompts, key, row_id, start),) = sampler.asked
  assert key == "key"
  # State by state; of each so many restarts, with ids that nobody shares.
  row = np.repeat([0, 2, 3, 0, 2], 3)
  np.testing.assert_array_equal(start.block, np.repeat([1, 1, 1, 2, 2], 3))
  np.testing.assert_array_equal(start.completion, COMPLETION[row])
  np.testing.assert_array_equal(start.unmask_step, UNMASK_STEP[row])
  assert prompts == [[11 + r // 2] for r in row]
  np.testing.assert_array_equal(row_id[:, 0], 11 + row // 2)
  assert len({tuple(one) for one in row_id.tolist()}) == len(row)
  # What it never came to is worth what it got.
  assert value_BxV.dtype == np.float32
  mean = (row_id[:, 1] % 5).reshape(-1, 3).mean(axis=1)
  np.testing.assert_allclose(
    value_BxV,
    [[mean[0], mean[3]], [0.25, 0.25], [mean[1], mean[4]], [mean[2], 0.75]],
  )
  assert scalars["values/restarts"] == 15
  assert scalars["values/mean_denoise_steps"] == (9 * 4 + 6 * 2) / 4
  assert scalars["values/mean_whole_passes"] == (9 * 4 + 6 * 2) / 4
  change = [
    mean[3] - mean[0],
    mean[4] - mean[1],
    0.75 - mean[2],
    1.0 - mean[3],
    0.5 - mean[4],
  ]
  np.testing.assert_allclose(
    scalars["values/mean_change"], np.abs(change).mean()
  )


def test_values_are_what_is_left_after_the_price_of_all_steps():
  value_BxV, _, _ = values_of()
  paid_BxV, _, _ = values_of(step_price=3.0)
  # Of six indices: those executed before the state, and those after.
  steps = [[2 + 4, 4 + 2], [2, 2], [1 + 4, 3 + 2], [2 + 4, 3]]
  np.testing.assert_allclose(
    value_BxV - paid_BxV, np.array(steps) / 2, rtol=1e-6
  )


def test_steps_that_unmask_nothing_are_paid_too():
  """Both steps of a block run, though the second unmasks all of it."""
  idle = np.where(UNMASK_STEP < 6, UNMASK_STEP // 2 * 2 + 1, 6)
  value_BxV, _, _ = values_of(unmask_step=idle)
  paid_BxV, _, _ = values_of(step_price=3.0, unmask_step=idle)
  steps = [[2 + 4, 4 + 2], [2, 2], [2 + 4, 4 + 2], [2 + 4, 4]]
  np.testing.assert_allclose(
    value_BxV - paid_BxV, np.array(steps) / 2, rtol=1e-6
  )


def test_the_steps_of_a_shorter_last_block_are_counted():
  s = dataclasses.replace(SAMPLING, completion_length=5)
  found = actor._steps_done(UNMASK_STEP[:, :5], s)
  assert found.tolist() == [[2, 2, 1, 2], [4, 2, 3, 3], [6, 2, 4, 3]]


def test_without_a_state_nothing_is_drawn():
  ended = np.where(np.arange(6) < 2, UNMASK_STEP, 6)
  value_BxV, scalars, sampler = values_of(unmask_step=ended)
  assert not sampler.asked
  np.testing.assert_allclose(value_BxV, np.stack([REWARD] * 2, axis=1))
  assert set(scalars.values()) == {0.0}


def config(tmp_path):
  c = runs.varied(tmp_path)
  c.rollout.update(block_length=2, completion_length=6, num_denoise_steps=6)
  c.evaluate.update(block_length=2, completion_length=6, num_denoise_steps=6)
  config_lib.use_objective(
    c, "vine_ppo", num_restarts=2, step_rule="all", microbatch=4
  )
  c.train.update(num_steps=3, keep=3)
  return c


VALUES = ("values/restarts", "values/mean_change", "values/mean_denoise_steps")


def log_of(c):
  log = metrics.read(pathlib.Path(c.workdir) / "metrics.jsonl")
  names = ("loss", "grad_norm", "reward", *VALUES)
  return [[record[name] for name in names] for record in log]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  c = config(tmp_path_factory.mktemp("whole"))
  runs.train(c)
  return c, log_of(c)


def test_a_killed_run_with_values_goes_on_bit_equal(whole):
  c, log = whole
  record = next(metrics.read(pathlib.Path(c.workdir) / "metrics.jsonl"))
  assert record["values/restarts"] == 4 * 2 * 2
  assert record["values/mean_change"] > 0 and record["seconds/values"] > 0
  assert record["values/mean_denoise_steps"] == 2 * (4 + 2)
  assert record["policy_ratio/max_deviation"] < 1e-4
  assert record["grad_norm"] > 0
  for step in checkpoint_read.Reader(c.workdir).steps():
    if step > 1:
      shutil.rmtree(pathlib.Path(c.workdir) / "checkpoints" / str(step))
  runs.train(c)
  assert log_of(c) == log


def test_on_two_devices_the_values_are_the_same(
  whole, tmp_path, run_in_subprocess
):
  c = config(tmp_path)
  c.train.num_steps = 2
  c.train.checkpoint_every = 2
  (tmp_path / "config.json").write_text(c.to_json())
  run_in_subprocess(
    f"""
    import json
    import pathlib
    from agrpo_jax import config as config_lib
    from fixtures import runs

    c = config_lib.rl()
    config_lib.use_objective(c, "vine_ppo")
    path = pathlib.Path({str(tmp_path / "config.json")!r})
    c.unlock()
    c.update(json.loads(path.read_text()))
    runs.train(c)
    """,
    devices=2,
    PYTHONPATH="tests",
  )
  np.testing.assert_allclose(log_of(c), whole[1][:2], rtol=2e-3, atol=1e-5)
