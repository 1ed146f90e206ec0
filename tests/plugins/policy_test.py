"""A second policy from outside: its logits depend on two states of the row.

A table indexed by the block's start state and the present one: what a sampler
that keeps keys and values from the start of the block is, with the attention
left out.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agrpo_jax import learner as learner_lib
from agrpo_jax import types
from agrpo_jax.objectives import agrpo
from agrpo_jax.policies import plain
from agrpo_jax.samplers import noise
from agrpo_jax.samplers import rollout as rollout_lib
from agrpo_jax.samplers import sampling as sampling_lib
from fixtures import states

V, C, T = 3, 4, 2  # tokens 0 (EOS), 1, 2; 3 is [MASK]


@dataclasses.dataclass(frozen=True)
class TwoStates:
  """Shows the network the start state before the present one."""

  refresh: int = 0
  spans: bool = False
  passes: int = 1

  def open(
    self,
    network,
    before,
    prompt_BxP,
    prompt_length_B,
    start_BxC,
    block_start_B,
    keeps,
  ):
    del network, before, prompt_BxP, prompt_length_B, block_start_B, keeps
    return start_BxC

  def logits(
    self,
    network,
    memory,
    prompt_BxP,
    prompt_length_B,
    partial_BxSxC,
    block_start_BxS,
    offset_BxSxW,
    is_start,
  ):
    del is_start

    def one_state(partial_BxC, offset_BxW):
      tokens = jnp.concatenate([memory, partial_BxC], axis=1)
      return network.logits(tokens, prompt_length_B, offset_BxW)

    return jax.vmap(one_state, in_axes=1, out_axes=1)(
      partial_BxSxC, offset_BxSxW
    )


def table_network(table: jax.Array) -> types.Network:
  """Logits [start state, present state, position]."""

  def index(tokens_BxC):
    return (tokens_BxC * (V + 1) ** jnp.arange(C)[None]).sum(axis=1)

  def logits(tokens_BxL, length_B, offset_BxW):
    del length_B
    # A plain policy shows the prompt, of one token, and one state.
    start_B = index(tokens_BxL[:, :C]) if tokens_BxL.shape[1] == 2 * C else 0
    present_B = index(tokens_BxL[:, -C:])
    if tokens_BxL.shape[1] != 2 * C:
      offset_BxW -= 1
    return table[start_B, present_B][
      jnp.arange(len(tokens_BxL))[:, None], offset_BxW
    ]

  return types.Network(logits)


@functools.cache
def trained(rule: str, scored_by: type):
  """Metrics of a train step on rollouts of the two-state policy."""
  sampling = sampling_lib.Sampling(
    mask_id=V,
    eos_id=0,
    completion_length=C,
    block_length=T,
    num_denoise_steps=C,
    unmask_rule=rule,
    threshold=0.5 if rule == "threshold" else None,
    stop_at_eos=False,
  )
  num_states = (V + 1) ** C
  table = jax.random.normal(
    jax.random.key(0), (num_states, num_states, C, V), jnp.float32
  )
  row_id = np.stack([np.arange(64) // 8, np.arange(64) % 8], 1)
  row_id = jnp.asarray(row_id, jnp.uint32)
  rollout = jax.jit(
    lambda table, prompts: rollout_lib.sample_rollout(
      table_network(table), prompts, sampling, policy=TwoStates()
    )
  )(
    table,
    types.Prompts(
      tokens=jnp.ones((64, 1), jnp.int32),
      length=jnp.ones((64,), jnp.int32),
      key=noise.row_keys(jax.random.key(1), row_id),
    ),
  )
  learner = learner_lib.Learner(
    bind=lambda table, lora: table_network(table),
    optimizer=optax.sgd(1.0),
    sampling=sampling,
    objective=agrpo.Agrpo(num_mc_steps=3),
    group_size=8,
    microbatch=16,
    policy=scored_by(),
  )
  reward = jnp.asarray(np.arange(64) % 5, jnp.float32)
  _, metrics = jax.jit(learner.train_step)(
    states.initial(learner, table),
    rollout,
    reward,
    jax.random.key(2),
    row_id,
    None,
  )
  return rollout, metrics


@pytest.mark.parametrize(
  "rule", ["random", "confidence", "entropy", "threshold"]
)
def test_the_first_policy_ratio_is_one(rule):
  _, metrics = trained(rule, TwoStates)
  assert metrics["policy_ratio/max_deviation"] < 1e-4
  assert metrics["grad_norm"] > 0


def test_scored_without_its_start_state_the_ratio_is_not_one():
  _, metrics = trained("random", plain.Plain)
  assert metrics["policy_ratio/max_deviation"] > 0.1


def test_a_block_is_opened_on_its_start_state():
  """The recorded log-probabilities are the table's at (start, present)."""
  rollout, _ = trained("random", TwoStates)
  num_states = (V + 1) ** C
  table = np.asarray(
    jax.nn.log_softmax(
      jax.random.normal(
        jax.random.key(0), (num_states, num_states, C, V), jnp.float32
      )
    )
  )
  place = (V + 1) ** np.arange(C)
  for row in range(16):
    completion = np.asarray(rollout.completion[row])
    step_C = np.asarray(rollout.unmask_step[row])
    for position in range(C):
      present = np.where(step_C >= step_C[position], V, completion)
      start = np.where(np.arange(C) < position // T * T, completion, V)
      expected = table[
        (start * place).sum(),
        (present * place).sum(),
        position,
        completion[position],
      ]
      np.testing.assert_allclose(
        rollout.logprob[row, position], expected, atol=1e-5
      )
