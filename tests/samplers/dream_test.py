"""Dream's released sampler, token for token and step by step.

The recordings were made by running `diffusion_generate` on a tiny random Dream.
All rows of each have as many masks, so that its mean over the batch is the
row's own number.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agrpo_jax.samplers import noise as noise_lib
from agrpo_jax.samplers import rollout as rollout_lib
from agrpo_jax.samplers import sampling as sampling_lib
from fixtures import recordings

FOLDER = pathlib.Path(__file__).parents[1] / "testdata" / "golden2"
RULES = {
  "origin": "origin",
  "entropy": "entropy",
  "topk_margin": "margin",
  "maskgit_plus": "confidence",
}
CASES = (
  "entropy_t0",
  "entropy_t08_p09",
  "entropy_t0_eps01_steps_gt",
  "margin_t0",
  "margin_t07",
  "maskgit_t0_leftpad",
  "maskgit_t1_k15",
  "origin_t0_noise_order",
  "origin_t1_p095",
)


def load(case):
  with np.load(FOLDER / f"dream_{case}.npz") as file:
    arrays = {key: file[key] for key in file.files}
  return arrays, json.loads(str(arrays.pop("meta")))


def sampling_of(meta):
  s, num_tokens = meta["settings"], meta["max_new_tokens"]
  return sampling_lib.Sampling(
    mask_id=meta["special"]["mask"],
    eos_id=meta["special"]["eos"],
    completion_length=num_tokens,
    block_length=num_tokens,
    num_denoise_steps=s["steps"],
    schedule="dream",
    last_time=s.get("eps", 1e-3),
    unmask_rule=RULES[s["alg"]],
    temperature=s.get("temperature", 0.0),
    top_k=s.get("top_k", 0),
    top_p=s.get("top_p", 1.0),
    truncate_first="top_p",
    stop_at_eos=False,
  )


def recorded_noise(meta, shape):
  """The noise that the released code was given; a row's key is its number."""
  if meta["noise_seed"] is None:
    return noise_lib.NOISE
  start = shape[2] - meta["max_new_tokens"]

  def uniform(seed, shape):
    return np.random.Generator(np.random.PCG64(seed)).random(shape)

  order = jnp.asarray(uniform(meta["noise_seed"] + 1, shape), jnp.float32)
  of_tokens = uniform(meta["noise_seed"], (*shape, meta["special"]["V"]))
  gumbel = jnp.asarray(-np.log(-np.log(of_tokens)), jnp.float32)
  return noise_lib.NOISE._replace(
    order=lambda row, step, length: order[step, row, start:],
    gumbel=lambda row, step, offset_S, ids_SxK: gumbel[
      step, row, start + offset_S[:, None], ids_SxK
    ],
  )


@pytest.mark.parametrize("case", CASES)
def test_tokens_and_steps(case):
  arrays, meta = load(case)
  sampling = sampling_of(meta)
  _, _, network = recordings.network_at(FOLDER / "ckpt" / meta["checkpoint"])
  prompts = recordings.prompts(
    arrays["prompt_ids"], arrays.get("attention_mask")
  )
  num_rows, width = arrays["final_ids"].shape
  noise = recorded_noise(meta, (sampling.num_denoise_steps, num_rows, width))
  if noise is noise_lib.NOISE:
    keys = jax.random.split(jax.random.key(0), num_rows)
    prompts = prompts.replace(key=keys)
  rollout = jax.jit(
    lambda prompts: rollout_lib.sample_rollout(
      network, prompts, sampling, noise=noise
    )
  )(prompts)
  own = slice(width - sampling.completion_length, None)
  np.testing.assert_array_equal(rollout.completion, arrays["final_ids"][:, own])
  np.testing.assert_array_equal(
    rollout.unmask_step, arrays["fill_step"][:, own]
  )
  # Its steps run even where they unmask nothing.
  np.testing.assert_array_equal(
    rollout.num_executed_steps, sampling.num_denoise_steps
  )
  if sampling.unmask_rule == "origin":
    return
  step = np.asarray(rollout.unmask_step)
  rows = np.arange(num_rows)[:, None]
  conf = arrays["conf"][:, :, own][step, rows, np.arange(step.shape[1])]
  if sampling.unmask_rule == "entropy":
    np.testing.assert_allclose(-rollout.entropy, conf, atol=2e-4)
  if sampling.unmask_rule == "confidence":
    np.testing.assert_allclose(np.exp(rollout.logprob), conf, atol=1e-4)


@pytest.mark.parametrize(
  "case", [case for case in CASES if not case.startswith("origin")]
)
def test_how_many_a_step_unmasks(case):
  arrays, meta = load(case)
  (counts,) = sampling_lib.step_amounts(sampling_of(meta))
  np.testing.assert_array_equal(counts, arrays["n_transfer"])
