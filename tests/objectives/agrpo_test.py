"""Losses, weights and gradients against recordings of the released code."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agrpo_jax import learner as learner_lib
from agrpo_jax import types
from agrpo_jax.models import transformer
from agrpo_jax.objectives import agrpo
from agrpo_jax.objectives import mc_steps
from agrpo_jax.policies import row as row_lib
from fixtures import recordings
from fixtures import states

CASES = sorted(
  p.stem
  for p in recordings.GOLDEN.glob("agrpo_loss/*.npz")
  if p.stem.startswith(("on_", "off_"))
)
GROUP_SIZE = 4


def recorded_rollout():
  """The stored rollout in our record, its advantages, and its settings."""
  arrays, meta = recordings.load("agrpo_loss/rollout")
  config, params, _ = recordings.network(meta["checkpoint"])
  sampling = recordings.sampling(config, meta)
  prompts = recordings.prompts(arrays["prompt_ids"], arrays["prompt_mask"])
  unmask_step = arrays["unmask_steps"]
  # A row that ended early repeats one step number; those positions carry no
  # step of ours.
  counts = np.array([np.bincount(row, minlength=9) for row in unmask_step])
  num_steps = (counts[:, :8] == sampling.tokens_per_step).sum(axis=1)
  unmask_step = np.where(
    unmask_step >= num_steps[:, None], sampling.max_steps, unmask_step
  )
  kept = np.unpackbits(arrays["sampling_masks_packed"], axis=-1)[..., :96]
  ids = np.where(kept, np.arange(96), 96)
  ids = np.sort(ids, axis=-1)[..., :48]
  rollout = types.Rollout(
    prompt=prompts.tokens,
    prompt_length=prompts.length,
    completion=jnp.asarray(arrays["completion_ids"]),
    unmask_step=jnp.asarray(unmask_step, jnp.int32),
    logprob=jnp.asarray(arrays["old_per_token_logps"]),
    entropy=jnp.asarray(arrays["old_per_token_entropies"]),
    support=jnp.asarray(np.where(ids < 96, ids, -1), jnp.int32),
    order_logprob=jnp.zeros((8, sampling.max_steps)),
    num_executed_steps=jnp.asarray(num_steps, jnp.int32),
    num_whole_passes=jnp.asarray(num_steps, jnp.int32),
    num_slot_steps=jnp.asarray(num_steps, jnp.int32),
  )
  return rollout, arrays, config, params, sampling


def make_learner(config, sampling, objective, microbatch):
  return learner_lib.Learner(
    bind=lambda params, lora: transformer.bind(config, params, lora),
    optimizer=optax.sgd(1.0),
    sampling=sampling,
    objective=objective,
    group_size=GROUP_SIZE,
    microbatch=microbatch,
  )


def relative_error(tree, expected) -> float:
  difference = jax.tree.map(lambda a, b: a - b, tree, expected)
  return float(optax.tree.norm(difference) / optax.tree.norm(expected))


@pytest.mark.parametrize(
  "name,microbatch", [(name, 8) for name in CASES] + [(CASES[0], 5)]
)
def test_equals_the_released_loss(name, microbatch):
  rollout, recorded, config, params, sampling = recorded_rollout()
  golden, meta = recordings.load(f"agrpo_loss/{name}")
  if meta["policy"].endswith(".safetensors"):
    params = recordings.tree_of(config, f"agrpo_loss/{meta['policy']}")
  reference = recordings.tree_of(config, "agrpo_loss/reference.safetensors")
  objective = agrpo.Agrpo(
    num_mc_steps=meta["mc_samples"],
    step_rule=meta["importance_sampling"],
    stratified="batch" if meta["low_discrepancy"] else "none",
    visited_steps="content",
    normalize="mean",
    baseline="group_mean",
    clip_low=meta["epsilon_low"],
    clip_high=meta["epsilon_high"],
    kl_coef=meta["beta"],
    kl_estimator="k3_ratio",
  )
  drawn = mc_steps.draw(rollout, jnp.asarray(golden["u"]), objective, sampling)
  np.testing.assert_array_equal(drawn.step, golden["mc_steps"])
  if "importance_weights" in golden:
    np.testing.assert_allclose(
      drawn.weight, golden["importance_weights"], rtol=1e-4
    )

  learner = make_learner(config, sampling, objective, microbatch)
  gradient, terms, num_units = jax.jit(learner.gradient)(
    states.initial(learner, jax.tree.map(jnp.asarray, params)),
    rollout,
    jnp.asarray(recorded["advantages"]),
    agrpo.visits_of(rollout, drawn, sampling, objective),
    reference=reference,
  )
  # Ours is the mean over rows; the released code divides by the group size.
  scale = rollout.completion.shape[0] / GROUP_SIZE
  np.testing.assert_allclose(
    terms.loss * scale, golden["total_loss"], atol=3e-5, rtol=1e-4
  )
  expected = recordings.tree_of(config, f"agrpo_loss/{name}.grads.safetensors")
  ours = jax.tree.map(lambda x: np.asarray(x) * scale, gradient)
  assert relative_error(ours, expected) < 1e-4
  jax.tree.map(
    lambda a, b: chex.assert_scalar_positive(1e-3 - relative_error([a], [b])),
    ours,
    expected,
  )
  assert 0 < int(num_units) <= drawn.step.size
  if name.startswith("on_"):
    assert float(terms.ratio_deviation) < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_equals_the_released_log_probabilities(name):
  rollout, _, config, params, sampling = recorded_rollout()
  golden, meta = recordings.load(f"agrpo_loss/{name}")
  if meta["policy"].endswith(".safetensors"):
    params = recordings.tree_of(config, f"agrpo_loss/{meta['policy']}")
  objective = agrpo.Agrpo()
  network = transformer.bind(config, params)
  for draw in range(meta["mc_samples"]):
    step_B = jnp.asarray(golden["mc_steps"][:, draw], jnp.int32)
    drawn = mc_steps.Drawn(step=step_B[:, None], weight=jnp.ones((8, 1)))
    visits = jax.tree.map(
      lambda x: x[:, 0, 0],
      agrpo.visits_of(rollout, drawn, sampling, objective),
    )
    partial_BxC = jnp.where(
      visits.is_masked, sampling.mask_id, rollout.completion
    )
    np.testing.assert_array_equal(
      partial_BxC, golden["input_ids"][draw][:, -16:]
    )
    logits = row_lib.logits_at(
      network,
      rollout.prompt,
      rollout.prompt_length,
      partial_BxC,
      visits.offset,
    )
    factors = jax.vmap(lambda *x: agrpo.step_logprob(*x, sampling, objective))(
      logits, rollout, visits
    )
    assert np.asarray(factors.is_factor).sum(axis=1).tolist() == [2] * 8
    np.testing.assert_allclose(
      factors.logprob[:, :2].reshape(-1), golden["new_logps"][draw], atol=2e-4
    )


@pytest.mark.parametrize("normalize", ["sum", "mean"])
def test_every_step_once_is_the_exact_gradient(normalize):
  rollout, recorded, config, params, sampling = recorded_rollout()
  settings = agrpo.Agrpo(
    num_mc_steps=8,
    visited_steps="content",
    normalize=normalize,
    baseline="group_mean",
  )
  visitable_B = mc_steps.visitable(rollout, settings, sampling.eos_ids).sum(1)
  np.testing.assert_array_equal(visitable_B, recorded["last_step"] + 1)
  step_BxM = jnp.tile(jnp.arange(8, dtype=jnp.int32)[None], (8, 1))
  weight_BxM = jnp.where(step_BxM < visitable_B[:, None], 8.0, 0.0)
  if normalize == "mean":
    weight_BxM /= visitable_B[:, None]
  learner = make_learner(config, sampling, settings, 16)
  drawn = mc_steps.Drawn(step=step_BxM, weight=weight_BxM)
  gradient, _, _ = jax.jit(learner.gradient)(
    states.initial(learner, params),
    rollout,
    jnp.asarray(recorded["advantages"]),
    agrpo.visits_of(rollout, drawn, sampling, settings),
  )
  expected = recordings.tree_of(
    config, f"agrpo_loss/exact_{normalize}_over_timesteps.grads.safetensors"
  )
  ours = jax.tree.map(lambda x: np.asarray(x) * 2.0, gradient)
  assert relative_error(ours, expected) < 1e-4
