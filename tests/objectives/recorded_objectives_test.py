"""Losses and gradients of the other objectives against the released code's.

`recorded_objectives_proof.py` has those of a second network.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agrpo_jax import learner as learner_lib
from agrpo_jax.models import transformer
from agrpo_jax.objectives import advantage as advantage_lib
from agrpo_jax.objectives import diffu_grpo
from agrpo_jax.objectives import wd1
from fixtures import recorded_losses
from fixtures import recordings
from fixtures import states

TINY = recorded_losses.TINY


def test_every_recording_is_known():
  assert len(TINY.names) == 24 and TINY.names == recorded_losses.WIDE.names


@pytest.mark.parametrize("name", TINY.names)
def test_equals_the_released_loss_and_gradient(name):
  gradient = recorded_losses.gradient(TINY, name)
  config = recordings.network(TINY.checkpoint)[0]
  expected = recordings.tree_of(config, f"objectives/{name}.grads.safetensors")
  difference = optax.tree.norm(jax.tree.map(jnp.subtract, gradient, expected))
  assert difference < 1e-4 * optax.tree.norm(expected)


def test_advantages_are_the_released_ones():
  data = TINY.batch
  rewards = jnp.asarray(data["rewards"]).reshape(2, 4)
  order = data["justgrpo_row_order"]
  for name, ours in (
    ("adv_mean", advantage_lib.group_advantage(rewards, "group_mean")),
    ("adv_loo", advantage_lib.group_advantage(rewards, "leave_one_out")),
    ("adv_gdpo_port", advantage_lib.standard_score(rewards, 1, 1e-4)),
    ("adv_zscore_population", advantage_lib.standard_score(rewards, 0, 0.0)),
  ):
    np.testing.assert_allclose(
      np.asarray(ours).reshape(-1), data[name], atol=1e-5, err_msg=name
    )
  assert sorted(order) == list(range(8))


def test_wd1_weights_are_the_released_ones():
  rewards = jnp.asarray(TINY.batch["rewards"]).reshape(2, 4)
  recorded, _ = TINY.load("wd1.one_group")
  group = int(recorded["rows"][0]) // 4
  ours = wd1.Wd1().advantage(rewards)[group] * 2  # ours is a mean over groups
  np.testing.assert_allclose(ours, -recorded["weights"], atol=1e-6)
  recorded, _ = TINY.load("wd1.positive_only")
  group = int(recorded["rows"][0]) // 4
  positive = wd1.Wd1(negative_weight=0.0).advantage(rewards)[group] * 2
  np.testing.assert_allclose(positive, -recorded["weights"], atol=1e-6)


@pytest.mark.parametrize(
  "name",
  [
    "p015_iter1",
    "p015_iter1_beta",
    "p015_iter2_off_beta",
    "p03_iter1",
    "p0_iter1",
  ],
)
def test_diffu_grpo_equals_the_released_one(name):
  recorded, meta = recordings.load(f"diffu_grpo/{name}")
  data, _ = recordings.load("diffu_grpo/batch")
  config, params, _ = recordings.network("tiny_loss")
  old_params = params
  if meta["policy"].endswith(".safetensors"):
    params = recordings.tree_of(config, f"diffu_grpo/{meta['policy']}")
  reference = recordings.tree_of(config, "diffu_grpo/reference.safetensors")
  rollout = recorded_losses.rollout_of(data, False, np.zeros((6, 8)))
  objective = diffu_grpo.DiffuGrpo(
    updates_per_batch=meta["num_iterations"],
    clip_low=meta["epsilon"],
    clip_high=meta["epsilon"],
    kl_coef=meta["beta"],
  )
  visits = TINY.visits_of(
    recorded["noisy_ids"][:, None], 1 / data["completion_mask"].sum()
  )
  learner = learner_lib.Learner(
    bind=lambda params, lora: transformer.bind(config, params, lora),
    optimizer=optax.sgd(1.0),
    sampling=TINY.sampling_of(1, 8, length=8),
    objective=objective,
    group_size=3,
    microbatch=4,
  )
  advantage = jnp.asarray(data["advantages"])
  behaviour = None
  if meta["num_iterations"] > 1:
    behaviour = learner.factors(
      learner.bind(old_params, None), rollout, advantage, visits
    ).logprob
  gradient, terms, _ = jax.jit(learner.gradient)(
    states.initial(learner, jax.tree.map(jnp.asarray, params)),
    rollout,
    advantage,
    visits,
    behaviour=behaviour,
    reference=reference,
  )
  np.testing.assert_allclose(terms.loss, recorded["loss"], rtol=1e-4, atol=3e-5)
  expected = recordings.tree_of(config, f"diffu_grpo/{name}.grads.safetensors")
  difference = optax.tree.norm(jax.tree.map(jnp.subtract, gradient, expected))
  assert difference < 1e-4 * optax.tree.norm(expected)
