"""Fast-dLLM v2: the released code, parts of blocks, and positions that lead.

The recordings were made by running its `generate` (of the model's folder) and
`batch_sample` (of its evaluation) on a tiny random model.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agrpo_jax import errors
from agrpo_jax import learner as learner_lib
from agrpo_jax import types
from agrpo_jax.models import transformer
from agrpo_jax.objectives import agrpo
from agrpo_jax.objectives import mc_steps
from agrpo_jax.parallel import mesh as mesh_lib
from agrpo_jax.policies import block_causal
from agrpo_jax.policies import plain
from agrpo_jax.port import model as model_lib
from agrpo_jax.samplers import host
from agrpo_jax.samplers import rollout as rollout_lib
from agrpo_jax.samplers import sampling as sampling_lib
from fixtures import recordings
from fixtures import states

GOLDEN2 = pathlib.Path(__file__).parents[1] / "testdata" / "golden2"
TINY = GOLDEN2 / "ckpt" / "tiny_fast_dllm_v2"
CASES = (
  "one_a_step",
  "several",
  "whole_blocks",
  "short_prompt",
  "rows",
  "rows_lengths",
  "rows_of_one_block",
  "stops",
)


def forward():
  with np.load(GOLDEN2 / "forward" / "tiny_fast_dllm_v2.npz") as file:
    return dict(file)


def policy_of(sampling):
  draw = host.Draw(sampling, guidance=0.0, batch_size=1, num_slots=0)
  return draw.policy_for(sampling)


def test_logits_of_the_released_code():
  """Shifted over all of the row, as its evaluation of likelihoods has them."""
  recorded = forward()
  shape, _, network = recordings.network_at(TINY)
  assert (shape.attention_block, shape.blocks_from, shape.shift) == (
    32,
    "start",
    1,
  )
  ids = recorded["ids"]
  found = jax.jit(network.logits)(
    ids, np.full(*ids.shape), np.tile(recorded["at"], (len(ids), 1))
  )
  np.testing.assert_allclose(found, recorded["aligned"], atol=3e-4)


@pytest.mark.parametrize("keeps", [True, False])
def test_all_blocks_of_a_row_at_once(keeps):
  """The noisy copy beside the clean one, as it is trained.

  What predicts the first position of a block is the clean copy's, as in the
  sampler: the released loss has the noisy copy's there.
  """
  recorded = forward()
  place = {at: i for i, at in enumerate(recorded["twocopy_at"].tolist())}
  expected = recorded["logits_twocopy"]
  _, _, network = recordings.network_at(TINY)
  size = recorded["twocopy_ids"].shape[1] // 2
  noisy, clean = np.split(recorded["twocopy_ids"], 2, axis=1)
  length, start = np.full(1, size), np.array([[0, 32]])
  shared = jax.jit(network.keys_values)(clean, length) if keeps else clean
  found = jax.jit(network.window_logits)(
    jax.tree.map(jnp.asarray, shared),
    length,
    noisy.reshape(1, 2, 32),
    start,
    start[..., None] + np.arange(32),
  ).reshape(1, size, -1)
  compared = 0
  for position in range(size):
    output = max(position - 1, 0)
    if position == 32:
      output += size
    if output in place:
      compared += 1
      np.testing.assert_allclose(
        found[:, position], expected[:, place[output]], atol=3e-4
      )
  assert compared > 50
  # The two differ.
  assert np.abs(found[:, 32] - expected[:, place[31]]).max() > 0.1


def rollout_of(sampling, network, prompts):
  """Drawn without chance, of prompts of any lengths."""
  cut, ends = host.row_lib.cut(prompts, 32)
  tokens, length = host.row_lib.pack(cut, 32)
  rows = types.Prompts(
    tokens=jnp.asarray(tokens),
    length=jnp.asarray(length),
    key=jax.random.split(jax.random.key(0), len(prompts)),
    start=jax.tree.map(jnp.asarray, host._begun(ends, sampling)),
  )
  return jax.jit(
    lambda rows: rollout_lib.sample_rollout(
      network, rows, sampling, policy=policy_of(sampling)
    )
  )(rows)


def sampling_of(meta, num_tokens, cache):
  s = meta["settings"]
  return sampling_lib.Sampling(
    mask_id=meta["special"]["mask"],
    eos_id=s["stop_token"],
    completion_length=num_tokens,
    block_length=s["small_block_size"],
    lead_every=s["block_size"],
    num_denoise_steps=num_tokens,
    unmask_rule="dynamic",
    threshold=s["threshold"],
    temperature=0.0,
    cache=cache,
    eos_per_block="any",
  )


def ranked(step_T):
  """Steps of a part of a block, numbered from 0; others as they are."""
  drawn = sorted({*step_T[step_T >= 0].tolist()})
  return [drawn.index(step) if step >= 0 else step for step in step_T.tolist()]


def check(case, network, cache):
  """Compares tokens and the order in which they came; returns the share."""
  with np.load(GOLDEN2 / f"fast_dllm_v2_{case}.npz") as file:
    recorded = dict(file)
  meta = json.loads(str(recorded["meta"]))
  part = meta["settings"]["small_block_size"]
  prompts = [
    ids[:length].tolist()
    for ids, length in zip(
      recorded["prompt_ids"], recorded["prompt_len"], strict=True
    )
  ]
  width = recorded["final_ids"].shape[1] // 32 * 32
  whole = [len(prompt) // 32 * 32 for prompt in prompts]
  sampling = sampling_of(meta, width - min(whole), cache)
  rollout = rollout_of(sampling, network, prompts)
  num_steps = num_tokens = 0
  for row, start in enumerate(whole):
    ids = recorded["final_ids"][row, start:width]
    step = recorded["fill_step"][row, start:width]
    is_stop = (ids == sampling.eos_id) & (step >= 0)
    end = len(ids[ids >= 0])
    if is_stop.any():
      # It fills the block, and cuts at the stop; here it ends with the part.
      end = is_stop.argmax() + 1
    np.testing.assert_array_equal(rollout.completion[row, :end], ids[:end])
    for begin in range(0, end - part + 1, part):
      here = slice(begin, begin + part)
      own = np.asarray(rollout.unmask_step[row, here])
      assert ranked(own) == ranked(step[here]), (row, begin)
      num_steps += len({*own[own >= 0].tolist()})
      num_tokens += (own >= 0).sum()
  return num_steps / num_tokens


@pytest.mark.parametrize("cache", ["block", "none"])
@pytest.mark.parametrize("case", CASES)
def test_the_released_sampler_token_for_token(case, cache):
  _, _, network = recordings.network_at(TINY)
  share = check(case, network, cache)
  assert share == 1.0 if case == "one_a_step" else share < 1.0


def test_a_block_s_first_position_is_the_matter_of_the_one_before():
  """Neither its own output tells of it, nor that of the unfinished block."""
  _, _, network = recordings.network_at(TINY)

  def stays(tokens_BxL, length_B, positions_BxS):
    """As if the shift stopped at every block."""
    ahead = positions_BxS + (positions_BxS % 32 == 0)
    return network.logits(tokens_BxL, length_B, ahead)

  with pytest.raises(AssertionError):
    check("one_a_step", types.Network(stays), "none")
  assert check("one_a_step", types.Network(network.logits), "none") == 1.0


B = 12
ROW_ID = np.stack([np.arange(B) // 4, np.arange(B) % 4], 1).astype(np.uint32)


@functools.cache
def toy():
  shape, params = recordings.random_network(attention_block=8, shift=1)
  rng = np.random.default_rng(1)
  return shape, jax.tree.map(
    lambda x: jnp.asarray(rng.normal(0.1, 0.4, x.shape), jnp.float32), params
  )


def sampling_with(**changes):
  shape, _ = toy()
  settings = dict(
    mask_id=shape.mask_id,
    eos_id=shape.eos_id,
    completion_length=24,
    block_length=4,
    lead_every=8,
    num_denoise_steps=24,
    unmask_rule="threshold",
    threshold=0.1,
    cache="block",
  )
  return sampling_lib.Sampling(**(settings | changes))


def sample(num_slots=0, **changes):
  """(settings, rollout, the sampler, what it was called with)."""
  sampling = sampling_with(**changes)
  shape, params = toy()
  model = model_lib.Model(
    mesh=mesh_lib.make(),
    shape=shape,
    params=params,
    lora=None,
    lora_settings=None,
    tokenizer=shape,
    base_model=None,
  )
  draw = host.Draw(sampling, 0.0, batch_size=B, num_slots=num_slots)
  sampler = model.sampler(draw, 1)
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, 30, 4 + row).tolist() for row in range(B)]
  given = params, None, prompts, jax.random.key(1), ROW_ID
  (rollout,) = sampler.sample(*given)
  return sampling, rollout, sampler, given


@pytest.mark.parametrize("lead_every", [0, 8])
def test_the_cache_is_exact_and_slots_change_nothing(lead_every):
  _, whole, _, given = sample(cache="none", lead_every=lead_every)
  assert len({*np.asarray(whole.num_executed_steps).tolist()}) > 2
  for num_slots in (0, 1, 5):
    _, found, _, _ = sample(num_slots, lead_every=lead_every)
    for name in ("completion", "unmask_step", "num_executed_steps"):
      np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
    for name in ("logprob", "order_logprob"):
      np.testing.assert_allclose(
        getattr(found, name), getattr(whole, name), atol=1e-4
      )
    np.testing.assert_array_equal(found.num_whole_passes, 1)
  # The first position of a block is alone in its step, if it has one.
  for row, step in enumerate(np.asarray(whole.unmask_step)):
    num_given = len(given[2][row]) % 8
    np.testing.assert_array_equal(step < 0, np.arange(24) < num_given)
    first, rest = step.reshape(3, 8)[:, 0], step.reshape(3, 8)[:, 1:4]
    is_drawn = (first >= 0) & (first < 24)
    if lead_every:
      assert (rest > first[:, None])[is_drawn].all()
      assert (first % 4 == 0)[is_drawn].all()
  if not lead_every:
    steps = np.asarray(whole.unmask_step).reshape(-1, 8)
    assert (steps[:, 0] >= steps[:, 1:4].min(axis=1)).any()


@pytest.mark.parametrize(
  "rule, step_rule",
  [("threshold", "all"), ("random", "uniform"), ("confidence", "blocks")],
)
def test_the_first_policy_ratio_is_one(rule, step_rule):
  """And the gradient is that of whole passes, step by step."""
  threshold = 0.1 if rule == "threshold" else None
  sampling, rollout, _, _ = sample(unmask_rule=rule, threshold=threshold)
  shape, params = toy()
  gradients = []
  for policy in (policy_of(sampling), plain.PLAIN):
    learner = learner_lib.Learner(
      bind=lambda params, lora: transformer.bind(shape, params),
      optimizer=optax.sgd(1.0),
      sampling=sampling,
      objective=agrpo.Agrpo(step_rule=step_rule, num_mc_steps=5),
      group_size=4,
      microbatch=4,
      policy=policy,
    )
    if step_rule in mc_steps.DRAWN_BLOCKS and policy is plain.PLAIN:
      # Its units have one step each.
      learner = dataclasses.replace(
        learner, sampling=dataclasses.replace(sampling, cache="none")
      )
    state, metrics = jax.jit(learner.train_step)(
      states.initial(learner, params),
      rollout,
      jnp.asarray(np.arange(B) % 5, jnp.float32),
      jax.random.key(2),
      ROW_ID,
      None,
    )
    assert metrics["policy_ratio/max_deviation"] < 1e-4
    assert metrics["grad_norm"] > 0
    if policy is not plain.PLAIN:
      assert metrics["draws/units"] <= B  # a completion is one
    gradients.append(jax.tree.map(jnp.subtract, state.params, params))
  for one, other in zip(*map(jax.tree.leaves, gradients), strict=True):
    np.testing.assert_allclose(one, other, atol=2e-3 * np.abs(other).max())


def test_a_completion_is_taken_up_amid_a_block_of_the_network():
  settings = dict(unmask_rule="confidence", threshold=None, temperature=0.0)
  _, whole, sampler, given = sample(5, **settings)
  # What is the prompt's of a first block does not end it.
  assert (np.asarray(whole.num_executed_steps) > 12).all()
  for block in (1, 2, 5):
    start = types.Start(
      completion=np.asarray(whole.completion),
      unmask_step=np.asarray(whole.unmask_step),
      block=np.full(B, block, np.int32),
    )
    (again,) = sampler.sample(*given, start=start)
    for name in ("completion", "unmask_step"):
      np.testing.assert_array_equal(getattr(again, name), getattr(whole, name))


def test_partial_completions_have_the_logits_of_whole_passes():
  """A block's first position sees nothing of its own block."""
  shape, params = toy()
  network = transformer.bind(shape, params)
  rng = np.random.default_rng(2)
  prompt = rng.integers(0, 30, (3, 16))
  length = np.array([16, 8, 0])
  completion = rng.integers(0, 30, (3, 24))
  partial = np.where(rng.random((3, 24)) < 0.5, shape.mask_id, completion)
  found = jax.jit(
    lambda *rows: block_causal.partial_logits(network, 8, *rows)
  )(prompt, length, completion, partial)
  logits = jax.jit(network.logits)
  for row in range(3):
    for begin in (0, 8, 16):
      tokens = np.concatenate(
        [
          prompt[row, : length[row]],
          completion[row, :begin],
          partial[row, begin:],
        ]
      )[None]
      at = length[row] + begin + np.arange(8)[None]
      expected = logits(tokens, np.array(tokens.shape[1:]), at)[0]
      np.testing.assert_allclose(
        found[row, begin : begin + 8], expected, atol=1e-4
      )


@pytest.mark.parametrize(
  "changes, words",
  [
    (dict(block_length=3), "in blocks of 8; use block_length=8 or a divisor"),
    (dict(completion_length=12, num_denoise_steps=12), "and whole blocks"),
    (dict(lead_every=4), "use lead_every=8 or 0"),
  ],
)
def test_what_does_not_fit_the_model_is_refused(changes, words):
  draw = host.Draw(sampling_with(**changes), 0.0, batch_size=B, num_slots=0)
  with pytest.raises(errors.UserError, match=words):
    model_lib.check_draw(toy()[0], 16, draw)


def test_a_shift_without_windows_has_no_cache():
  shape = dataclasses.replace(toy()[0], blocks_from="end")
  draw = host.Draw(sampling_with(), 0.0, batch_size=B, num_slots=0)
  model_lib.check_draw(toy()[0], 16, draw)
  with pytest.raises(errors.UserError, match="logits are shifted"):
    model_lib.check_draw(shape, 16, draw)


@pytest.mark.parametrize(
  "changes, words",
  [
    (dict(lead_every=6), "lead_every=6 is not a multiple of block_length=4"),
    (dict(lead_every=-4), "lead_every=-4 is not a multiple"),
    (
      dict(unmask_rule="random", threshold=None, num_denoise_steps=12),
      "all must: num_denoise_steps=24",
    ),
  ],
)
def test_settings_of_positions_that_lead(changes, words):
  assert sampling_lib.problems(sampling_with()) == []
  (found,) = sampling_lib.problems(sampling_with(**changes))
  assert words in found
