"""Block-causal models: the released samplers, the cache, slots, the ratio.

The recordings were made by running SDAR's `generate.py` (and DARE's copy of it)
and dllm's sampler of Tiny-A2D's bd3lm on tiny random models.
"""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agrpo_jax import errors
from agrpo_jax import learner as learner_lib
from agrpo_jax.models import transformer
from agrpo_jax.objectives import agrpo
from agrpo_jax.objectives import mc_steps
from agrpo_jax.parallel import mesh as mesh_lib
from agrpo_jax.policies import plain
from agrpo_jax.port import model as model_lib
from agrpo_jax.samplers import host
from agrpo_jax.samplers import noise as noise_lib
from agrpo_jax.samplers import rollout as rollout_lib
from agrpo_jax.samplers import sampling as sampling_lib
from fixtures import recordings
from fixtures import states

GOLDEN2 = pathlib.Path(__file__).parents[1] / "testdata" / "golden2"
SDAR = GOLDEN2 / "ckpt" / "tiny_sdar"
RULES = {
  "sequential": "sequential",
  "low_confidence_static": "confidence",
  "low_confidence_dynamic": "dynamic",
}
RELEASED = (
  "seq_topk1",
  "seq_steps2_noise_t1",
  "static_greedy_dare",
  "static_noise_t08_k20_p09",
  "static_steps2_noise_t1",
  "dynamic_greedy_dare",
  "dynamic_noise_t1",
  "dynamic_steps2_greedy_dare",
  "dynamic_stop_greedy_dare",
)


def load(name):
  with np.load(GOLDEN2 / f"{name}.npz") as file:
    arrays = {key: file[key] for key in file.files}
  return arrays, json.loads(str(arrays.pop("meta")))


def draw_of(sampling):
  return host.Draw(sampling, guidance=0.0, batch_size=1, num_slots=0)


def prompts_of(arrays):
  return [
    ids[:length].tolist()
    for ids, length in zip(
      arrays["prompt_ids"], arrays["prompt_len"], strict=True
    )
  ]


@pytest.mark.parametrize("size", [3, 4, 8])
def test_logits_of_the_released_code(size):
  """The last block is incomplete, and each row has its own length."""
  with np.load(GOLDEN2 / "forward" / "tiny_sdar.npz") as file:
    recorded = dict(file)
  shape, params, network = recordings.network_at(SDAR)
  assert (shape.attention_block, shape.blocks_from) == (4, "start")
  ids = recorded["ids"]
  positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
  sized = transformer.bind(
    dataclasses.replace(shape, attention_block=size), params
  )
  found = jax.jit(sized.logits)(ids, np.full(*ids.shape), positions)
  np.testing.assert_allclose(
    found, recorded[f"logits_blockcausal{size}"], atol=3e-4
  )
  if size == 4:
    length = np.array([13, 9, 6])
    found = jax.jit(network.logits)(ids, length, positions)
    for row, own in enumerate(length):
      expected = recorded[f"logits_row{row}_len{own}_blockcausal4"][0]
      np.testing.assert_allclose(found[row, :own], expected, atol=3e-4)


@pytest.mark.parametrize("keeps", [True, False])
def test_all_blocks_of_a_row_at_once(keeps):
  """The noisy copy beside the clean one, as SDAR is trained."""
  with np.load(GOLDEN2 / "forward" / "tiny_sdar.npz") as file:
    ids, expected = file["twocopy_ids"], file["logits_twocopy4"]
  _, _, network = recordings.network_at(SDAR)
  num_rows, size = ids.shape[0], ids.shape[1] // 2
  num_blocks = -(-size // 4)
  noisy = np.pad(ids[:, :size], ((0, 0), (0, num_blocks * 4 - size)))
  clean, length = jnp.asarray(ids[:, size:]), np.full(num_rows, size)
  start = np.tile(np.arange(num_blocks) * 4, (num_rows, 1))
  at = np.minimum(start[..., None] + np.arange(4), size - 1)
  shared = jax.jit(network.keys_values)(clean, length) if keeps else clean
  found = jax.jit(network.window_logits)(
    shared, length, noisy.reshape(num_rows, num_blocks, 4), start, at
  )
  np.testing.assert_allclose(
    found.reshape(num_rows, num_blocks * 4, -1)[:, :size],
    expected[:, :size],
    atol=3e-4,
  )


@pytest.mark.parametrize("name", ["tiny_a2d_qwen2", "tiny_a2d_qwen3"])
@pytest.mark.parametrize("size", [4, 8])
def test_blocks_that_are_counted_from_the_end(tmp_path, name, size):
  """The released code fills prompts up on the left."""
  with np.load(GOLDEN2 / "forward" / f"{name}.npz") as file:
    ids, expected = file[f"ids_bd3lm{size}"], file[f"logits_bd3lm{size}"]
    pad = json.loads(str(file["meta"]))["special"]["pad"]
  _, _, network = recordings.network_at(a2d(tmp_path, name, size))
  logits = jax.jit(network.logits)
  length = (ids != pad).sum(axis=1)
  # On the right what fills up is without effect.
  rows = np.full_like(ids, pad)
  for row, own in enumerate(length):
    rows[row, :own] = ids[row, -own:]
  positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
  found = logits(rows, length, positions)
  for row, own in enumerate(length):
    np.testing.assert_allclose(
      found[row, :own], expected[row, -own:], atol=3e-4
    )


def a2d(tmp_path, name, size, **changes):
  """A folder of Tiny-A2D whose attention is block-causal."""
  folder = tmp_path / name
  shutil.copytree(GOLDEN2 / "ckpt" / name, folder)
  raw = json.loads((folder / "config.json").read_text())
  mask_id = {"tiny_a2d_qwen2": 188, "tiny_a2d_qwen3": 197}[name]
  raw |= {"mask_token_id": mask_id, "block_size": size, **changes}
  (folder / "config.json").write_text(json.dumps(raw))
  return folder


def sdar_noise(meta, sampling, rows, unmask_step):
  """The recording's uniforms of each row, found by the step as it counted."""
  noise = noise_lib.NOISE._replace(
    order=lambda row, step, size: jnp.zeros(size),
    gumbel=lambda row, step, offset_S, ids_SxK: jnp.zeros(ids_SxK.shape),
  )
  if meta["noise_seed"] is None:
    return noise
  size, block = meta["special"]["V"], sampling.block_length
  # Steps of a block whose indices are not used leave gaps.
  index = np.zeros((len(unmask_step), sampling.max_steps), np.int32)
  for row, steps in enumerate(unmask_step):
    executed = sorted({*steps[(steps >= 0) & (steps < sampling.max_steps)]})
    index[row, executed] = np.arange(len(executed))
  tables = [
    np.random.Generator(np.random.PCG64(meta["noise_seed"] + row)).random(
      (sampling.max_steps + 1, block, size)
    )
    for row in rows
  ]
  gumbel = jnp.asarray(-np.log(-np.log(np.array(tables))), jnp.float32)
  index = jnp.asarray(index)
  return noise._replace(
    gumbel=lambda row, step, offset_S, ids_SxK: gumbel[
      row, index[row, step], offset_S[:, None], ids_SxK
    ]
  )


def sdar_sampling(meta, num_tokens, cache):
  s = meta["settings"]
  is_greedy = s.get("top_k") == 1
  return sampling_lib.Sampling(
    mask_id=meta["special"]["mask"],
    eos_id=meta["special"]["eos"],
    completion_length=num_tokens,
    block_length=s["block_length"],
    num_denoise_steps=s["denoising_steps"] * num_tokens // s["block_length"],
    unmask_rule=RULES[s["remasking_strategy"]],
    threshold=s.get("confidence_threshold"),
    temperature=0.0 if is_greedy else s.get("temperature", 1.0),
    top_k=0 if is_greedy else s.get("top_k", 0),
    top_p=s.get("top_p", 1.0),
    cache=cache,
    stop_at_eos="stopping_criteria_idx" in s,
    eos_per_block="any",
  )


@pytest.mark.parametrize("cache", ["block", "none"])
@pytest.mark.parametrize("case", RELEASED)
def test_sdar_token_for_token(case, cache):
  """The prompt's last tokens share a block with the first that are drawn."""
  arrays, meta = load(f"sdar_{case}")
  size = meta["settings"]["block_length"]
  prompts = prompts_of(arrays)
  width = arrays["final_ids"].shape[1]
  whole = [len(prompt) // size * size for prompt in prompts]
  sampling = sdar_sampling(meta, width - min(whole), cache)
  _, _, network = recordings.network_at(SDAR)
  # Row by row, with the keys of the noise their number in the recording.
  expected_step = np.full((len(prompts), sampling.completion_length), -1)
  count = np.full_like(expected_step, sampling.max_steps)
  for row, start in enumerate(whole):
    own = arrays["fill_step"][row, start:]
    expected_step[row, : len(own)] = own
    count[row, : len(own)] = block_aligned(own, sampling)
  cut, ends = zip(
    *((p[:w], p[w:]) for p, w in zip(prompts, whole, strict=True)),
    strict=True,
  )
  tokens, length = host.row_lib.pack(cut, 1)
  prompt = host.types.Prompts(
    tokens=jnp.asarray(tokens),
    length=jnp.asarray(length),
    key=jnp.arange(len(prompts)),
    start=jax.tree.map(jnp.asarray, host._begun(ends, sampling)),
  )
  noise = sdar_noise(meta, sampling, range(len(prompts)), count)
  rollout = jax.jit(
    lambda prompts: rollout_lib.sample_rollout(
      network,
      prompts,
      sampling,
      policy=draw_of(sampling).policy_for(sampling),
      noise=noise,
    )
  )(prompt)
  for row, start in enumerate(whole):
    canvas = arrays["final_ids"][row]
    own = canvas[start : start + (canvas[start:] >= 0).sum()]
    # The released code leaves [MASK] where it has stopped.
    own = np.where(own == sampling.mask_id, sampling.eos_id, own)
    found = rollout.completion[row, : len(own)]
    np.testing.assert_array_equal(found, own)
    np.testing.assert_array_equal(
      rollout.unmask_step[row, : len(own)], count[row, : len(own)]
    )


def block_aligned(fill_step, sampling):
  """Steps as recorded, numbered on and on, to indices that tell the block."""
  steps = np.full(len(fill_step), sampling.max_steps)
  for block in range(len(fill_step) // sampling.block_length):
    place = slice(
      block * sampling.block_length, (block + 1) * sampling.block_length
    )
    own = fill_step[place]
    drawn = own >= 0
    if drawn.any():
      first = own[drawn].min()
      steps[place] = np.where(
        drawn, own - first + block * sampling.steps_per_block, own
      )
  return steps


BD3LM = (
  "tiny_a2d_qwen3_greedy_b4",
  "tiny_a2d_qwen3_greedy_b8_lens",
  "tiny_a2d_qwen3_greedy_cfg1_b4",
  "tiny_a2d_qwen3_greedy_eos_two_rows",
  "tiny_a2d_qwen3_greedy_shift_b4",
  "tiny_a2d_qwen3_noise_t1_b8",
  "tiny_a2d_qwen2_noise_t1_b8",
)


@pytest.mark.parametrize(
  "case, cache",
  [
    (case, "block")
    for case in BD3LM
    if "cfg" not in case and "shift" not in case
  ]
  + [(BD3LM[1], "none"), (BD3LM[2], "none"), (BD3LM[4], "none")]
  # Whose last block has 4 of its 6 positions.
  + [("tiny_a2d_qwen3_greedy_b6_partial_last", "block")],
)
def test_bd3lm_token_for_token(tmp_path, case, cache):
  """dllm's, of Tiny-A2D: guided, shifted, until every row has had an EOS."""
  arrays, meta = load(f"bd3lm_{case}")
  s, num_tokens = meta["settings"], meta["max_new_tokens"]
  folder = a2d(
    tmp_path,
    meta["checkpoint"],
    s["block_size"],
    right_shift_logits=s.get("right_shift_logits", False),
  )
  _, _, network = recordings.network_at(folder)
  num_blocks = -(-num_tokens // s["block_size"])
  draw = host.Draw(
    sampling_lib.Sampling(
      mask_id=meta["special"]["mask"],
      eos_id=meta["eos_of_this_run"],
      completion_length=num_tokens,
      block_length=s["block_size"],
      # As released, where both are given the greater number of steps counts.
      num_denoise_steps=num_blocks
      * max(-(-s["steps"] // num_blocks), s.get("steps_per_block", 0)),
      schedule="mdlm",
      unmask_rule="confidence",
      temperature=s.get("temperature", 0.0),
      confidence="model",
      cache=cache,
      stop_at_eos=False,
    ),
    guidance=s.get("cfg_scale", 0.0),
    batch_size=len(arrays["prompt_len"]),
    num_slots=0,
  )
  length = arrays["prompt_len"]
  noise = noise_lib.NOISE._replace(
    gumbel=lambda row, step, offset_S, ids_SxK: jnp.zeros(ids_SxK.shape)
  )
  if meta["noise_seed"] is not None:
    shape = len(length), s["block_size"], meta["special"]["V"]
    generator = np.random.Generator(np.random.PCG64(meta["noise_seed"]))
    uniform = generator.random((draw.sampling.max_steps, *shape))
    gumbel = jnp.asarray(-np.log(-np.log(uniform)), jnp.float32)
    noise = noise._replace(
      gumbel=lambda row, step, offset_S, ids_SxK: gumbel[
        step, row, offset_S[:, None], ids_SxK
      ]
    )
  prompts = host.types.Prompts(
    tokens=jnp.asarray(np.maximum(arrays["prompt_ids"], 0)),
    length=jnp.asarray(length),
    key=jnp.arange(len(length)),
  )
  rollout = jax.jit(
    lambda prompts: rollout_lib.sample_rollout(
      network,
      prompts,
      draw.sampling,
      policy=draw.policy_for(draw.sampling),
      noise=noise,
    )
  )(prompts)
  own = arrays["final_ids"][:, meta["prefix_width"] :]
  size = own.shape[1]
  np.testing.assert_array_equal(rollout.completion[:, :size], own)
  np.testing.assert_array_equal(
    rollout.unmask_step[:, :size], arrays["fill_step"][:, -size:]
  )


B = 12
ROW_ID = np.stack([np.arange(B) // 4, np.arange(B) % 4], 1).astype(np.uint32)


@functools.cache
def toy(blocks_from):
  shape, params = recordings.random_network(
    attention_block=4, blocks_from=blocks_from
  )
  rng = np.random.default_rng(1)
  return shape, jax.tree.map(
    lambda x: jnp.asarray(rng.normal(0.1, 0.4, x.shape), jnp.float32), params
  )


def model_of(blocks_from):
  shape, params = toy(blocks_from)
  return model_lib.Model(
    mesh=mesh_lib.make(),
    shape=shape,
    params=params,
    lora=None,
    lora_settings=None,
    tokenizer=shape,
    base_model=None,
  )


def sample(
  blocks_from,
  rule="threshold",
  cache="block",
  num_slots=0,
  num_tokens=16,
  widths=range(2, 2 + B),
):
  """(settings, prompts, rollout, what is text of it)."""
  shape = toy(blocks_from)[0]
  sampling = sampling_lib.Sampling(
    mask_id=shape.mask_id,
    eos_id=shape.eos_id,
    completion_length=num_tokens,
    block_length=min(4, num_tokens),
    num_denoise_steps=16,
    unmask_rule=rule,
    cache=cache,
    threshold=0.1 if rule == "threshold" else None,
  )
  draw = host.Draw(sampling, 0.0, batch_size=B, num_slots=num_slots)
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, 30, width).tolist() for width in widths]
  model = model_of(blocks_from)
  sampler = model.sampler(draw, 1)
  (rollout,) = sampler.sample(
    model.params, None, prompts, jax.random.key(1), ROW_ID
  )
  return sampling, prompts, rollout, sampler.drawn(rollout)


@pytest.mark.parametrize("blocks_from", ["start", "end"])
def test_the_cache_is_exact_and_slots_change_nothing(blocks_from):
  _, prompts, whole, text = sample(blocks_from, cache="none")
  num = np.asarray(whole.num_executed_steps)
  assert len({*num.tolist()}) > 2
  for num_slots in (0, 1, 3):
    _, _, found, _ = sample(blocks_from, num_slots=num_slots)
    for name in ("completion", "unmask_step", "num_executed_steps"):
      np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
    np.testing.assert_allclose(found.logprob, whole.logprob, atol=1e-4)
    np.testing.assert_array_equal(found.num_whole_passes, 1)
  # What the prompt has of the first block is not drawn, nor decoded.
  given = [len(p) % 4 if blocks_from == "start" else 0 for p in prompts]
  np.testing.assert_array_equal((whole.unmask_step < 0).sum(axis=1), given)
  for row, num_given in enumerate(given):
    completion = np.asarray(whole.completion[row])
    assert (
      completion[:num_given].tolist() == prompts[row][-num_given:][:num_given]
    )
    np.testing.assert_array_equal(
      text[row], [*completion[num_given:], *[35] * num_given]
    )
    assert whole.prompt_length[row] == len(prompts[row]) - num_given


def test_a_row_that_is_shorter_than_a_block():
  """As beside one that is not, which makes all rows as wide."""
  found, beside = (
    sample("end", num_tokens=2, widths=[1] * (B - 1) + [last])[2]
    for last in (1, 9)
  )
  np.testing.assert_array_equal(found.completion[:-1], beside.completion[:-1])
  np.testing.assert_allclose(found.logprob[:-1], beside.logprob[:-1], atol=1e-4)


@pytest.mark.parametrize("blocks_from", ["start", "end"])
@pytest.mark.parametrize(
  "rule, step_rule",
  [("threshold", "all"), ("random", "uniform"), ("confidence", "blocks")],
)
def test_the_first_policy_ratio_is_one(blocks_from, rule, step_rule):
  """And the gradient is that of whole passes, step by step."""
  sampling, _, rollout, _ = sample(blocks_from, rule)
  cached = draw_of(sampling).policy_for(sampling)
  assert_alike(
    *(
      gradient_on_policy(blocks_from, sampling, rollout, policy, step_rule)
      for policy in (cached, plain.PLAIN)
    )
  )


def gradient_on_policy(blocks_from, sampling, rollout, policy, step_rule):
  """That of a first update, of which nothing is clipped."""
  shape, params = toy(blocks_from)
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
  moved, metrics = states.first_step(learner, params, rollout, ROW_ID)
  assert metrics["policy_ratio/max_deviation"] < 1e-4
  assert metrics["grad_norm"] > 0
  if policy is not plain.PLAIN:
    assert metrics["draws/units"] <= B  # a completion is one
  return moved


def assert_alike(*gradients):
  for one, other in zip(*map(jax.tree.leaves, gradients), strict=True):
    np.testing.assert_allclose(one, other, atol=2e-3 * np.abs(other).max())


@pytest.mark.parametrize(
  "rule, step_rule", [("threshold", "all"), ("confidence", "uniform")]
)
def test_a_last_block_that_is_shorter(rule, step_rule):
  """Behind prompts of whole blocks, where whole passes tell what is exact.

  It makes no difference there from which end of the prompt blocks are counted.
  """
  widths = 4 + np.arange(B) % 3 * 4
  found, whole = (
    sample(*kind, num_tokens=14, widths=widths)
    for kind in (("end", rule, "block"), ("start", rule, "none"))
  )
  for name in ("completion", "unmask_step", "num_executed_steps"):
    np.testing.assert_array_equal(
      getattr(found[2], name), getattr(whole[2], name)
    )
  assert (found[2].unmask_step[:, 12:] >= 12).all()
  assert_alike(
    *(
      gradient_on_policy(
        kind,
        sampling,
        rollout,
        draw_of(sampling).policy_for(sampling),
        step_rule,
      )
      for kind, (sampling, _, rollout, _) in (("end", found), ("start", whole))
    )
  )
  # Behind prompts of any length.
  sampling, _, rollout, _ = sample("end", rule, num_tokens=14)
  policy = draw_of(sampling).policy_for(sampling)
  gradient_on_policy("end", sampling, rollout, policy, step_rule)


def four_blocks(**settings):
  return sampling_lib.Sampling(
    mask_id=36,
    eos_id=35,
    completion_length=16,
    block_length=4,
    num_denoise_steps=16,
    **settings,
  )


@pytest.mark.parametrize(
  "changes, settings, words",
  [
    (dict(attention_block=4), dict(cache="dual"), "is block-causal .*'block'"),
    (dict(), dict(cache="block"), "is not block-causal .*'dual'"),
    (dict(attention_block=2), dict(cache="block"), "use block_length=2 or"),
    (dict(attention_block=2), dict(cache="none"), "use block_length=2 or"),
    (
      dict(attention_block=12),
      dict(cache="block"),
      "use completion_length=12 or 24.$",
    ),
    (
      dict(attention_block=20, blocks_from="end"),
      dict(cache="none"),
      "use completion_length=20, or cache='block'.$",
    ),
  ],
)
def test_what_does_not_fit_the_model_is_refused(changes, settings, words):
  shape, _ = recordings.random_network(**changes)
  sampling = four_blocks(**settings)
  with pytest.raises(errors.UserError, match=words):
    model_lib.check_draw(shape, 8, draw_of(sampling))


def test_where_blocks_begin_with_the_completion_its_last_may_be_shorter():
  shape, _ = recordings.random_network(attention_block=12, blocks_from="end")
  sampling = four_blocks(cache="block")
  model_lib.check_draw(shape, 8, draw_of(sampling))


def test_guidance_is_refused_where_prompts_share_a_block():
  """Of the two kinds only one has prompts that do."""
  sampling = four_blocks()
  draw = dataclasses.replace(draw_of(sampling), guidance=1.0)
  with pytest.raises(errors.UserError, match="use guidance=0"):
    model_lib.check_draw(toy("start")[0], 8, draw)
  model_lib.check_draw(toy("end")[0], 8, draw)


@pytest.mark.parametrize("eos_per_block", ["all", "any"])
def test_what_ends_a_completion_and_what_is_text(eos_per_block):
  """A stop id in a block ends it behind the block, or one full of them does."""
  shape, params = toy("start")
  # Most tokens end something, and all are about as likely.
  stop_ids = tuple(range(10, 35))
  sampling = sampling_lib.Sampling(
    mask_id=36,
    eos_id=35,
    stop_ids=stop_ids,
    completion_length=16,
    block_length=4,
    num_denoise_steps=16,
    cache="block",
    temperature=50.0,
    eos_per_block=eos_per_block,
  )
  rng = np.random.default_rng(0)
  # The prompts are full of ends, as chats are.
  prompts = [rng.integers(30, 36, 3 + row).tolist() for row in range(B)]
  model = dataclasses.replace(
    model_of("start"),
    tokenizer=dataclasses.replace(shape, stop_ids=stop_ids),
  )
  draw = host.Draw(sampling, 0.0, batch_size=B, num_slots=0)
  sampler = model.sampler(draw, 1)
  (rollout,) = sampler.sample(params, None, prompts, jax.random.key(1), ROW_ID)
  text = sampler.drawn(rollout)
  ended = 0
  for row in range(B):
    steps = np.asarray(rollout.unmask_step[row]).reshape(4, 4)
    is_end = np.isin(
      np.asarray(rollout.completion[row]), (*stop_ids, 35)
    ).reshape(4, 4)
    is_end_drawn = is_end & (steps >= 0)
    ends = (
      is_end_drawn.any(axis=1)
      if eos_per_block == "any"
      else (is_end | (steps < 0)).all(axis=1)
    )
    last = ends.argmax() if ends.any() else 3
    ended += bool(ends[:3].any())
    assert (steps[: last + 1] < 16).all()
    assert (steps[last + 1 :] == 16).all()
    num_given = int((steps < 0).sum())
    own = np.asarray(rollout.completion[row])[num_given:].tolist()
    if eos_per_block == "any" and ends.any():
      first = next(i for i, token in enumerate(own) if token in (*stop_ids, 35))
      own[first:] = [35] * (len(own) - first)
    assert text[row].tolist() == own + [35] * num_given
  assert 0 < ended


@pytest.mark.parametrize("blocks_from", ["start", "end"])
def test_a_completion_is_taken_up_at_a_block(blocks_from):
  """As values of states are found; without chance the rest is the same."""
  shape, params = toy(blocks_from)
  sampling = sampling_lib.Sampling(
    mask_id=shape.mask_id,
    eos_id=shape.eos_id,
    completion_length=16,
    block_length=4,
    num_denoise_steps=16,
    unmask_rule="confidence",
    temperature=0.0,
    cache="block",
  )
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, 30, 2 + row).tolist() for row in range(B)]
  draw = host.Draw(sampling, 0.0, batch_size=B, num_slots=5)
  sampler = model_of(blocks_from).sampler(draw, 1)
  given = params, None, prompts, jax.random.key(1), ROW_ID
  (whole,) = sampler.sample(*given)
  for block in (1, 3):
    start = host.types.Start(
      completion=np.asarray(whole.completion),
      unmask_step=np.asarray(whole.unmask_step),
      block=np.full(B, block, np.int32),
    )
    (again,) = sampler.sample(*given, start=start)
    for name in ("completion", "unmask_step"):
      np.testing.assert_array_equal(getattr(again, name), getattr(whole, name))
    own = np.arange(16) >= 4 * block
    np.testing.assert_allclose(
      again.logprob[:, own], whole.logprob[:, own], atol=1e-4
    )
    assert not np.asarray(again.logprob[:, ~own]).any()
