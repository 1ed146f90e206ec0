"""Fast-dLLM's samplers token for token, with the caches as it released them.

The recordings were made by running its code (arXiv:2505.22618) on a tiny random
LLaDA, one row at a time.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agrpo_jax import types
from agrpo_jax.policies import base
from agrpo_jax.policies import row as row_lib
from agrpo_jax.samplers import host
from agrpo_jax.samplers import noise as noise_lib
from agrpo_jax.samplers import rollout as rollout_lib
from agrpo_jax.samplers import sampling as sampling_lib
from fixtures import recordings

FOLDER = pathlib.Path(__file__).parents[1] / "testdata" / "golden2"
CACHES = ("none", "prefix", "dual")
CASES = ("steps12", "thr", "factor", "oneshot", "thr_noise_t08")


def load(cache, case):
  with np.load(FOLDER / f"fast_dllm_{cache}_{case}.npz") as file:
    arrays = {key: file[key] for key in file.files}
  return arrays, json.loads(str(arrays.pop("meta")))


def sampling_of(cache, meta):
  s = meta["settings"]
  rule, of_rule = "confidence", {}
  for name in ("threshold", "factor"):
    if name in s:
      rule, of_rule = name, {name: s[name]}
  return sampling_lib.Sampling(
    mask_id=meta["special"]["mask"],
    eos_id=meta["special"]["eos"],
    completion_length=s["gen_length"],
    block_length=s["block_length"],
    num_denoise_steps=s["steps"],
    unmask_rule=rule,
    temperature=s["temperature"],
    confidence="model",
    cache=cache,
    stop_at_eos=False,
    **of_rule,
  )


def policy_of(sampling):
  draw = host.Draw(sampling, guidance=0.0, batch_size=1, num_slots=0)
  return draw.policy_for(sampling)


def first_calls(call_block):
  """The first forward of each block, of one row."""
  return [
    int(np.flatnonzero(call_block == b)[0]) for b in range(call_block.max() + 1)
  ]


def recorded_noise(arrays, meta, sampling, row):
  """The recording's uniforms, found by forward and column of the canvas."""
  size = meta["special"]["V"]
  prompt = int(arrays["prompt_len"][row])
  width = prompt + sampling.completion_length
  generator = np.random.Generator(np.random.PCG64(meta["noise_seed"] + row))
  uniform = generator.random((int(arrays["nfe"][row]), width, size))
  table = jnp.asarray(-np.log(-np.log(uniform)), jnp.float32)
  first = jnp.asarray(first_calls(arrays["call_block"][row]))
  per_block = sampling.steps_per_block

  def gumbel(key, denoise_step, offset_S, ids_SxK):
    block = denoise_step // per_block
    call = first[block] + denoise_step % per_block
    column_S = prompt + block * sampling.block_length + offset_S
    return table[call, column_S[:, None], ids_SxK]

  return noise_lib.NOISE._replace(gumbel=gumbel)


def prompts_of(arrays, rows):
  length = arrays["prompt_len"][rows]
  return types.Prompts(
    tokens=jnp.asarray(np.maximum(arrays["prompt_ids"][rows], 0), jnp.int32),
    length=jnp.asarray(length, jnp.int32),
    key=jax.random.split(jax.random.key(0), len(length)),
  )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cache", CACHES)
def test_tokens_and_steps(cache, case):
  arrays, meta = load(cache, case)
  sampling = sampling_of(cache, meta)
  _, _, network = recordings.network(meta["checkpoint"])
  rows = np.arange(len(arrays["gen_ids"]))
  noise = noise_lib.NOISE
  if meta["noise_seed"] is not None:
    assert len(rows) == 1
    noise = recorded_noise(arrays, meta, sampling, 0)
  rollout = jax.jit(
    lambda prompts: rollout_lib.sample_rollout(
      network, prompts, sampling, policy=policy_of(sampling), noise=noise
    )
  )(prompts_of(arrays, rows))
  np.testing.assert_array_equal(rollout.completion, arrays["gen_ids"])
  for row in rows:
    first = first_calls(arrays["call_block"][row])
    step_C = np.asarray(rollout.unmask_step[row])
    call_C = [
      first[step // sampling.steps_per_block] + step % sampling.steps_per_block
      for step in step_C
    ]
    np.testing.assert_array_equal(call_C, arrays["fill_call"][row])
    if not meta["settings"]["temperature"]:
      np.testing.assert_allclose(
        np.exp(rollout.logprob[row]), arrays["conf_at_fill"][row], atol=1e-4
      )


def test_a_last_block_that_is_shorter():
  """dllm's copy of the sampler, which draws a batch at a time."""
  name = "fast_dllm_batched_prefix_steps_partial_last"
  with np.load(FOLDER / f"{name}.npz") as file:
    arrays = {key: file[key] for key in file.files}
  meta = json.loads(str(arrays.pop("meta")))
  s = meta["settings"]
  sampling = sampling_lib.Sampling(
    mask_id=meta["special"]["mask"],
    eos_id=meta["special"]["eos"],
    completion_length=s["max_new_tokens"],
    block_length=s["block_size"],
    num_denoise_steps=s["steps"],
    schedule="mdlm",
    unmask_rule="confidence",
    temperature=0.0,
    confidence="model",
    cache=meta["cache"],
    stop_at_eos=False,
  )
  _, _, network = recordings.network(meta["checkpoint"])
  rollout = jax.jit(
    lambda prompts: rollout_lib.sample_rollout(
      network, prompts, sampling, policy=policy_of(sampling)
    )
  )(prompts_of(arrays, np.arange(len(arrays["prompt_len"]))))
  own = slice(-sampling.completion_length, None)
  np.testing.assert_array_equal(rollout.completion, arrays["final_ids"][:, own])
  np.testing.assert_array_equal(
    rollout.unmask_step, arrays["fill_call"][:, own]
  )


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize(
  "cache,case", [("prefix", "thr"), ("dual", "thr"), ("dual", "steps12")]
)
def test_logits_of_cached_steps(cache, case, keeps):
  arrays, meta = load(cache, case)
  sampling = sampling_of(cache, meta)
  policy = policy_of(sampling)
  _, _, network = recordings.network(meta["checkpoint"])
  prompts = prompts_of(arrays, np.array([0]))
  completion, call_C = arrays["gen_ids"][0], arrays["fill_call"][0]
  first = first_calls(arrays["call_block"][0])
  for number, call in enumerate(meta["settings"]["logits_cached_calls"]):
    block = int(arrays["call_block"][0, call])
    start = block * sampling.block_length

    def state(before):
      return jnp.where(call_C < before, completion, sampling.mask_id)[None]

    memory = policy.open(
      network,
      None,
      prompts.tokens,
      prompts.length,
      state(first[block]),
      jnp.array([start], jnp.int32),
      keeps,
    )
    offset_W = start + np.arange(sampling.block_length)
    rest = prompts.tokens, prompts.length, state(call)[:, None]
    found = policy.logits(
      network,
      memory,
      *rest,
      jnp.array([[start]], jnp.int32),
      jnp.asarray(offset_W[None, None], jnp.int32),
      is_start=False,
    )[0, 0]
    expected = arrays[f"logits_row0_cached{number}"]
    np.testing.assert_allclose(found, expected[:, : found.shape[-1]], atol=3e-4)
    # The cache matters: the whole row's logits are others.
    whole = row_lib.logits_at(
      network,
      *(prompts.tokens, prompts.length, state(call)),
      jnp.asarray(offset_W[None], jnp.int32),
    )[0]
    assert np.abs(whole - expected[:, : found.shape[-1]]).max() > 0.01


def test_start_steps():
  class Refreshed:
    refresh = 3
    spans = False

  found = [int(base.start_step(Refreshed(), k, 8)) for k in range(16)]
  assert found == [0, 0, 0, 3, 3, 3, 6, 6, 8, 8, 8, 11, 11, 11, 14, 14]
  Refreshed.refresh = 0
  assert [int(base.start_step(Refreshed(), k, 4)) for k in (0, 3, 4, 7)] == [
    0,
    0,
    4,
    4,
  ]
