"""Rollouts against recordings of the released code, and what must hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agrpo_jax.policies import guided
from agrpo_jax.samplers import noise as noise_lib
from agrpo_jax.samplers import rollout as rollout_lib
from agrpo_jax.samplers import sampling as sampling_lib
from fixtures import recordings

AGRPO = sorted(p.stem for p in recordings.GOLDEN.glob("rollout/*.npz"))
LLADA = sorted(p.stem for p in recordings.GOLDEN.glob("llada_generate/l*.npz"))
FAST = sorted(p.stem for p in recordings.GOLDEN.glob("llada_generate/f*.npz"))


def recorded_noise(meta: dict, num_rows: int) -> noise_lib.Noise:
  """The noise that the released code was given; a row's key is its number."""
  if meta["noise_seed"] is None:
    return noise_lib.NOISE
  steps, length = meta["sampling_steps"], meta["block_length"]
  shape = (steps, num_rows, length)
  draws = np.random.Generator(np.random.PCG64(meta["noise_seed"]))
  uniform = draws.random((*shape, meta["V"]))
  gumbel = jnp.asarray(-np.log(-np.log(uniform)), jnp.float32)
  orders = np.random.Generator(np.random.PCG64(meta["noise_seed"] + 1))
  order = jnp.asarray(orders.random(shape).astype(np.float32))
  return noise_lib.NOISE._replace(
    order=lambda row, step, length: order[step, row],
    gumbel=lambda row, step, offset_S, ids_SxK: gumbel[
      step, row, offset_S[:, None], ids_SxK
    ],
  )


@pytest.mark.parametrize("name", AGRPO)
def test_equals_the_released_rollout(name):
  golden, meta = recordings.load(f"rollout/{name}")
  config, _, network = recordings.network(meta["checkpoint"])
  prompts = recordings.prompts(golden["prompt_ids"], golden.get("prompt_mask"))
  if meta["noise_seed"] is None:
    prompts = prompts.replace(
      key=jax.random.split(jax.random.key(0), 64)[: prompts.length.shape[0]]
    )
  sampling = recordings.sampling(config, meta)
  rollout = rollout_lib.sample_rollout(
    network,
    prompts,
    sampling,
    noise=recorded_noise(meta, prompts.length.shape[0]),
  )
  num_tokens = sampling.completion_length
  rows = np.arange(prompts.length.shape[0])
  if "quirk" in name:
    # The released code ends a row before its first block when the end of the
    # prompt is EOS, or when the prompt is shorter than a block. Ours looks at
    # completions only; rows that this did not touch must agree.
    rows = rows[np.asarray(meta["row_removed_at_block"]) > 0]
    assert (np.asarray(rollout.num_executed_steps) > 0).all()
  ours = jax.tree.map(lambda x: np.asarray(x)[rows], rollout)
  recorded = {key: value[rows] for key, value in golden.items()}

  np.testing.assert_array_equal(
    ours.completion, recorded["final_ids"][:, -num_tokens:]
  )
  # Where nothing was unmasked the released code writes the step at which the
  # row ended; ours writes K.
  carries = ours.unmask_step < sampling.max_steps
  removed = np.asarray(meta["row_removed_at_block"])[rows]
  block = np.arange(num_tokens) // sampling.block_length
  np.testing.assert_array_equal(carries, block[None] < removed[:, None])
  np.testing.assert_array_equal(
    np.where(carries, ours.unmask_step, ours.num_executed_steps[:, None]),
    recorded["unmask_steps"],
  )
  np.testing.assert_allclose(ours.logprob, recorded["token_logps"], atol=2e-4)
  np.testing.assert_allclose(
    ours.entropy, recorded["token_entropies"], atol=2e-4
  )
  if sampling.is_truncated:
    kept = recordings.keep_mask(ours.support, meta["V"])
    expected = np.unpackbits(recorded["sampling_masks_packed"], axis=-1)
    expected = expected[..., : meta["V"]].astype(bool)
    np.testing.assert_array_equal(kept[carries], expected[carries])
  else:
    assert rollout.support is None


@pytest.mark.parametrize("name", LLADA + FAST)
def test_equals_the_original_llada_sampler(name):
  golden, meta = recordings.load(f"llada_generate/{name}")
  config, _, network = recordings.network(meta["checkpoint"])
  prompts = recordings.prompts(golden["prompt_ids"], golden.get("prompt_mask"))
  prompts = prompts.replace(
    key=jax.random.split(jax.random.key(0), prompts.length.shape[0])
  )
  rollout = rollout_lib.sample_rollout(
    network,
    prompts,
    sampling_lib.Sampling(
      mask_id=config.mask_id,
      eos_id=config.eos_id,
      completion_length=meta["gen_length"],
      block_length=meta["block_length"],
      num_denoise_steps=meta["steps"],
      unmask_rule="confidence"
      if meta.get("threshold") is None
      else "threshold",
      temperature=0.0,
      confidence="model",
      threshold=meta.get("threshold"),
      stop_at_eos=False,
    ),
    policy=guided.Guided(meta.get("cfg_scale", 0.0), config.mask_id),
  )
  np.testing.assert_array_equal(
    rollout.completion, golden["final_ids"][:, -meta["gen_length"] :]
  )
  if "unmask_call" in golden:
    np.testing.assert_array_equal(rollout.unmask_step, golden["unmask_call"])
  if "nfe" in golden:
    np.testing.assert_array_equal(rollout.num_executed_steps, golden["nfe"])
