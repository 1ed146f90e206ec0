"""Fast-dLLM v2: forward passes and samplers of the released code.

The recordings were made by running its `generate` (of the model's folder) and
`batch_sample` (of its evaluation) on a tiny random model.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agrpo_jax import types
from agrpo_jax.samplers import host
from agrpo_jax.samplers import rollout as rollout_lib
from agrpo_jax.samplers import sampling as sampling_lib
from fixtures import recordings

GOLDEN2 = pathlib.Path(__file__).parents[1] / "testdata" / "golden2"
TINY = GOLDEN2 / "ckpt" / "tiny_fast_dllm_v2"
CASES = (
  "one_a_step",
  "several",
  "whole_blocks",
  "short_prompt",
  "rows",
  "rows_lengths",
  "rows_whole_blocks",
  "stops",
)
WITHOUT_CACHE = ("several", "rows", "stops")


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


@pytest.mark.parametrize(
  "case, cache",
  [(case, "block") for case in CASES]
  + [(case, "none") for case in WITHOUT_CACHE],
)
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
