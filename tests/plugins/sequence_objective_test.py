"""An objective from outside whose loss is no sum over visits.

The policy ratio is one number per completion, of all that its visits read (as
in ESPO), and every group competes in a softmax: no visit has a loss of its own.
The learner's two passes must give the gradient of the whole in one graph.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agrpo_jax import learner as learner_lib
from agrpo_jax import types
from agrpo_jax.models import transformer
from agrpo_jax.objectives import base
from agrpo_jax.policies import row as row_lib
from agrpo_jax.samplers import noise
from agrpo_jax.samplers import rollout as rollout_lib
from agrpo_jax.samplers import sampling as sampling_lib
from fixtures import recordings
from fixtures import states

C, NUM_ROWS, GROUP_SIZE = 8, 8, 4


@dataclasses.dataclass(frozen=True)
class Sequence:
  """-log softmax_G(score - behaviour + reference) times the advantage."""

  num_masks: int = 3
  updates_per_batch: int = 1
  replays = False
  is_sum_over_visits = False
  behaviour = "scored"
  has_reference = True
  skips_zero_advantage = False

  def problems(self, sampling):
    return []

  def advantage(self, reward_NxG):
    return reward_NxG

  def visits(self, rollout, advantage_B, batch_key, key_B, sampling):
    shape = (self.updates_per_batch, self.num_masks, 1, C)
    is_masked = jax.vmap(lambda key: jax.random.bernoulli(key, 0.6, shape))(
      key_B
    ).swapaxes(0, 1)
    size = is_masked.shape[:-1]
    # The second mask of the first row is not visited.
    weight = jnp.ones(size).at[:, 0, 1].set(0.0)
    return base.Visits(
      is_masked=is_masked,
      offset=jnp.broadcast_to(jnp.arange(C), is_masked.shape),
      block=jnp.zeros(size, jnp.int32),
      denoise_step=jnp.zeros(size, jnp.int32),
      weight=weight,
    ), {}

  def score(self, logits_WxV, row, visit, sampling, top_k):
    logprob_WxV = jax.nn.log_softmax(logits_WxV)
    logprob_W = logprob_WxV[jnp.arange(C), row.completion]
    return base.Factors(logprob=logprob_W, is_factor=visit.is_masked)

  def loss(self, policy, behaviour, reference, advantage_G, visits, rows):
    def bound(logprob):
      used = policy.is_factor & (visits.weight > 0)[..., None]
      return jnp.where(used, logprob, 0.0).sum(axis=(1, 2, 3)) / C

    score_G = bound(policy.logprob)
    tilt_G = 2 * score_G - bound(behaviour) - bound(reference)
    loss = -(advantage_G * jax.nn.log_softmax(tilt_G)).sum() / NUM_ROWS
    return base.Terms.zeros().replace(
      loss=loss, kl=(score_G - bound(reference)).sum()
    )


def setting(microbatch: int):
  config, params, network = recordings.network("tiny_loss")
  sampling = sampling_lib.Sampling(
    mask_id=config.mask_id,
    eos_id=config.eos_id,
    completion_length=C,
    block_length=4,
    num_denoise_steps=4,
  )
  row_id = np.stack([np.arange(8) // 4, np.arange(8) % 4], 1).astype(np.uint32)
  prompts = types.Prompts(
    tokens=jax.random.randint(jax.random.key(1), (NUM_ROWS, 6), 0, 80),
    length=jnp.array([6, 3, 5, 4, 6, 2, 1, 6]),
    key=noise.row_keys(jax.random.key(2), row_id),
  )
  learner = learner_lib.Learner(
    bind=lambda params, lora: transformer.bind(config, params, lora),
    optimizer=optax.sgd(1.0),
    sampling=sampling,
    objective=Sequence(),
    group_size=GROUP_SIZE,
    microbatch=microbatch,
  )
  rollout = rollout_lib.sample_rollout(network, prompts, sampling)
  return learner, params, rollout, row_id


@pytest.mark.parametrize("microbatch", [5, 32])
def test_two_passes_give_the_gradient_of_one_graph(microbatch):
  learner, params, rollout, row_id = setting(microbatch)
  objective, sampling = learner.objective, learner.sampling
  visits, _ = objective.visits(
    rollout, None, None, noise.row_keys(jax.random.key(3), row_id), sampling
  )
  visits = jax.tree.map(lambda x: x[0], visits)
  advantage = jnp.array([1.0, -0.5, 0.0, -0.5, 0.3, 0.3, -0.2, -0.4])
  moved = jax.tree.map(lambda x: 1.1 * x, params)
  reference = jax.tree.map(lambda x: 0.9 * x, params)
  behaviour = jax.random.normal(
    jax.random.key(4), (NUM_ROWS, objective.num_masks, 1, C)
  )

  def factors(params):
    """All visits at once, mask by mask."""
    every = []
    for mask in range(objective.num_masks):
      visit = jax.tree.map(lambda x, mask=mask: x[:, mask, 0], visits)
      logits = row_lib.logits_at(
        learner.bind(params, None),
        rollout.prompt,
        rollout.prompt_length,
        jnp.where(visit.is_masked, sampling.mask_id, rollout.completion),
        visit.offset,
      )
      every.append(
        jax.vmap(lambda *x: objective.score(*x, sampling, None))(
          logits, rollout, visit
        )
      )
    return jax.tree.map(lambda *x: jnp.stack(x, axis=1)[:, :, None], *every)

  def loss(params):
    read = factors(params)
    fixed = jax.lax.stop_gradient(factors(reference)).logprob
    total = 0.0
    for group in (slice(0, 4), slice(4, 8)):
      part = jax.tree.map(
        lambda x, group=group: x[group],
        (read, behaviour, fixed, advantage, visits, rollout),
      )
      total += objective.loss(*part).loss
    return total

  expected_loss, expected = jax.jit(jax.value_and_grad(loss))(moved)
  gradient, terms, num_units = jax.jit(learner.gradient)(
    states.initial(learner, moved),
    rollout,
    advantage,
    visits,
    behaviour,
    reference,
  )
  # Nor is anything differentiated of the row whose advantage is 0: those of its
  # group add up to 0, and so the loss does not depend on it.
  num_visited = (NUM_ROWS - 1) * objective.num_masks - 1
  assert int(num_units) == num_visited
  np.testing.assert_allclose(terms.loss, expected_loss, rtol=1e-4)
  difference = jax.tree.map(jnp.subtract, gradient, expected)
  assert optax.tree.norm(difference) < 1e-4 * optax.tree.norm(expected)


def test_behaviour_is_scored_before_the_first_update():
  """Without a change yet, all completions of a group are equally likely."""
  learner, params, rollout, row_id = setting(16)
  _, metrics = jax.jit(learner.train_step)(
    states.initial(learner, params),
    rollout,
    jnp.arange(8.0),
    jax.random.key(5),
    row_id,
    params,
  )
  # Policy, behaviour and reference are one network: softmax of zeros.
  expected = -(np.arange(8.0) * np.log(0.25)).sum() / NUM_ROWS
  np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
  np.testing.assert_allclose(metrics["kl"], 0.0, atol=1e-6)
