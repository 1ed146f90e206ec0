"""Losses and gradients of the other objectives against the released code's.

Visits are built from the recorded network inputs; masks that an objective draws
itself are another matter (`masks_test.py`). No recording but SPG's hides the
padding of its prompts from attention, so it belongs to the prompt there.
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
from agrpo_jax.objectives import advantage as advantage_lib
from agrpo_jax.objectives import base
from agrpo_jax.objectives import coupled_grpo
from agrpo_jax.objectives import diffu_grpo
from agrpo_jax.objectives import dmpo
from agrpo_jax.objectives import espo
from agrpo_jax.objectives import gdpo
from agrpo_jax.objectives import just_grpo
from agrpo_jax.objectives import random_mask
from agrpo_jax.objectives import spg
from agrpo_jax.objectives import trace_rl
from agrpo_jax.objectives import wd1
from agrpo_jax.samplers import sampling as sampling_lib
from fixtures import recordings
from fixtures import states

MASK, EOS, P, C = 95, 90, 7, 16


@dataclasses.dataclass
class Case:
  """One recorded loss, and what our learner needs to compute it.

  Attributes:
    name: of the recording.
    objective: ours.
    visits: [B, Q, 1].
    advantage: [B].
    scale: our loss, times this, is the recorded one.
    rows: of the batch; all if None.
    behaviour: [B, Q, 1, F], or None to score the recorded old weights.
    is_shifted: whether the logits of a position are read one before it.
    checks_loss: whether the value of the loss means something.
  """

  name: str
  objective: object
  visits: base.Visits
  advantage: np.ndarray
  scale: float = 1.0
  rows: np.ndarray | None = None
  behaviour: jax.Array | None = None
  is_shifted: bool = False
  checks_loss: bool = True


def batch() -> dict[str, np.ndarray]:
  return recordings.load("objectives/batch")[0]


def rollout_of(
  recorded: dict, hides_padding: bool, unmask_step: np.ndarray
) -> types.Rollout:
  """The recorded batch as a rollout; padding is hidden or a part of prompts."""
  ids = recorded["prompt_ids"]
  valid = recorded["prompt_mask"] if hides_padding else None
  prompts = recordings.prompts(ids, valid)
  num_rows, num_tokens = recorded["completion_ids"].shape
  zeros = jnp.zeros((num_rows, num_tokens))
  ones = jnp.ones((num_rows,), jnp.int32)
  return types.Rollout(
    prompt=prompts.tokens,
    prompt_length=prompts.length,
    completion=jnp.asarray(recorded["completion_ids"]),
    unmask_step=jnp.asarray(unmask_step, jnp.int32),
    logprob=zeros,
    entropy=zeros,
    support=None,
    order_logprob=zeros,
    num_executed_steps=ones,
    num_whole_passes=ones,
    num_slot_steps=ones,
  )


def visits_of(state_BxQxT, weight, scale=None, shift_B=None) -> base.Visits:
  """Visits [B, Q, 1] of recorded network inputs, all positions read.

  shift_B: left padding of the prompts, where it is hidden.
  """
  is_masked = np.asarray(state_BxQxT) == MASK
  num_rows, num_visits, width = is_masked.shape
  num_prompt = width - (C if width == P + C else 8)
  prompt = is_masked[:, :, :num_prompt]
  if shift_B is not None:
    prompt = np.stack(
      [np.roll(x, -n, axis=-1) for x, n in zip(prompt, shift_B, strict=True)]
    )
  completion = is_masked[:, :, num_prompt:]
  size = (num_rows, num_visits, 1)
  zeros = jnp.zeros(size, jnp.int32)

  def filled(x):
    return jnp.broadcast_to(jnp.asarray(x, jnp.float32), size[:2])[..., None]

  return base.Visits(
    is_masked=jnp.asarray(completion)[:, :, None],
    offset=jnp.broadcast_to(
      jnp.arange(completion.shape[-1]), (*size, completion.shape[-1])
    ),
    block=zeros,
    denoise_step=zeros,
    weight=filled(weight),
    scale=None if scale is None else filled(scale),
    is_prompt_masked=jnp.asarray(prompt)[:, :, None],
  )


def num_masked(state_BxQxT) -> np.ndarray:
  return (np.asarray(state_BxQxT)[..., P:] == MASK).sum(-1)


def coupled_case(name: str) -> Case:
  recorded, meta = recordings.load(f"objectives/{name}")
  state = recorded["state_ids"].swapaxes(0, 1)
  num_tokens = batch()["completion_mask"].sum()
  ratio = float(recorded["mask_ratio_t"][0])
  return Case(
    name,
    coupled_grpo.CoupledGrpo(
      updates_per_batch=meta["num_iterations"],
      clip_low=meta["epsilon_low"],
      clip_high=meta["epsilon_high"],
      kl_coef=meta["beta"],
    ),
    visits_of(
      state, 1 / num_tokens, np.array([1, 1 / ratio, 1 / (1 - ratio)]) / 2
    ),
    recorded["advantages"],
    is_shifted=meta["logits_shifted"],
  )


def wd1_case(name: str) -> Case:
  recorded, _ = recordings.load(f"objectives/{name}")
  # Positive weights of the recorded loss push a likelihood down.
  return Case(
    name,
    wd1.Wd1(),
    visits_of(recorded["state_ids"][:, None], 1.0),
    -recorded["weights"],
    rows=recorded["rows"],
  )


def espo_case(name: str) -> Case:
  recorded, meta = recordings.load(f"objectives/{name}")
  state = recorded["state_ids"].swapaxes(0, 1)
  count = num_masked(state)
  return Case(
    name,
    espo.Espo(
      clip_low=meta["epsilon_low"],
      clip_high=meta["epsilon_high"],
      kl_coef=meta["beta"],
    ),
    visits_of(
      state,
      np.where(count > 0, 1 / len(count), 0.0),
      (C + 1) / np.maximum(count, 1) / count.shape[1],
    ),
    recorded["advantages"],
  )


def gdpo_case(name: str) -> Case:
  recorded, meta = recordings.load(f"objectives/{name}")
  state = recorded["state_ids"].swapaxes(0, 1)
  scale = recorded["node_weights"] / recorded["nodes_t"]
  behaviour = None
  if meta["num_iterations"] > 1:
    # The recorded old values are of other masks; put each into one token.
    is_masked = state[..., P:] == MASK
    behaviour = np.zeros(is_masked.shape, np.float32)
    first = is_masked[:, 0].argmax(-1)
    old = recorded["old_elbo"][meta["iteration_index"]]
    behaviour[np.arange(8), 0, first] = old / scale[0]
    behaviour = jnp.asarray(behaviour)[:, :, None]
  return Case(
    name,
    gdpo.Gdpo(
      updates_per_batch=meta["num_iterations"],
      clip_low=meta["epsilon"],
      clip_high=meta["epsilon"],
    ),
    visits_of(state, 1 / len(state), scale),
    recorded["advantages"],
    behaviour=behaviour,
  )


def spg_case(name: str) -> Case:
  recorded, meta = recordings.load(f"objectives/{name}")
  content = batch()["completion_mask"]
  length = content.sum(-1)
  state = recorded["state_ids"]
  scored = (state[..., P:] == MASK) & content[:, None].astype(bool)
  np.testing.assert_array_equal(scored, recorded["scored"])
  upper = {"mix": meta["mix_weight"], "elbo": 0.0, "eubo": 1.0}
  return Case(
    name,
    spg.Spg(
      num_masks=meta["num_t"],
      upper_weight=upper[meta["logp_estimation"]],
      upper_power=meta["eubo_beta"],
    ),
    visits_of(
      state,
      (length / length.sum())[:, None],
      length[:, None] / scored.sum(-1),
      P - batch()["prompt_mask"].sum(-1),
    ),
    recorded["advantages"],
  )


def dmpo_case(name: str) -> Case:
  recorded, meta = recordings.load(f"objectives/{name}")
  bound = recorded["elbo_state_ids"].swapaxes(0, 1)
  own = recorded["state_ids"].swapaxes(0, 1)
  state = np.concatenate([bound, own], axis=1)
  scale = np.concatenate(
    [np.full((8, 4), C / 4), np.full((8, 4), 1 / 4)], axis=1
  ) / np.maximum(num_masked(state), 1)
  objective = dmpo.Dmpo(
    alpha=meta["alpha"],
    coefficient=meta["coeff"],
    centring="negative" if meta["advantage_centering_neg"] else "mean",
  )
  rewards = jnp.asarray(batch()["rewards"]).reshape(2, 4)
  return Case(
    name,
    objective,
    visits_of(state, 1 / 8, scale),
    np.asarray(objective.advantage(rewards)).reshape(-1),
    scale=2.0,  # ours is the mean over groups
  )


def just_grpo_case(name: str) -> Case:
  recorded, meta = recordings.load(f"objectives/{name}")
  objective = just_grpo.JustGrpo(temperature=meta["temperature"])
  data = batch()
  rewards = jnp.asarray(data["rewards"]).reshape(2, 4)
  advantage = np.asarray(objective.advantage(rewards)).reshape(-1)
  order = recorded["row_order"]
  np.testing.assert_allclose(
    advantage[order] * (meta["valid_samples"] + 1e-5),
    recorded["advantages"],
    atol=1e-5,
  )
  rollout = rollout_of(data, False, np.zeros((8, C)))
  visits = drawn(objective, rollout, sampling_of(1, C))
  np.testing.assert_array_equal(
    np.asarray(visits.is_masked)[order][:, 3, 0],
    recorded["state_ids_step3"][:, P:] == MASK,
  )
  # Its ratio is 1 by construction, and so is the value of its loss.
  return Case(name, objective, visits, advantage, checks_loss=False)


def trace_rl_case(name: str) -> Case:
  recorded, meta = recordings.load(f"objectives/{name}")
  max_eos = C if meta["post_num"] is None else meta["post_num"]
  objective = trace_rl.TraceRl(
    updates_per_batch=1,
    clip_low=meta["eps"],
    clip_high=meta["eps"],
    behaviour_kl_coef=meta["beta"],
    max_eos=max_eos,
    shrink=meta["shrink"],
  )
  data = batch()
  num_steps = int(recorded["step_map"].max()) + 1
  rollout = rollout_of(data, False, recorded["step_map"])
  sampling = sampling_of(C // num_steps, C)
  visits = drawn(objective, rollout, sampling)
  # As recorded: the same inputs and targets, in some order.
  ours = set()
  for row, visit in np.ndindex(visits.weight.shape[:2]):
    if visits.weight[row, visit, 0] > 0:
      is_masked = np.asarray(visits.is_masked[row, visit, 0])
      one = jax.tree.map(lambda x, r=row, v=visit: x[r, v, 0], visits)
      factors = objective.score(
        jnp.zeros((one.offset.shape[0], 96)),
        jax.tree.map(lambda x, r=row: x[r], rollout),
        one,
        sampling,
        jax.lax.top_k,
      )
      targets = np.zeros(C, int)
      targets[np.asarray(one.offset)[np.asarray(factors.is_factor)]] = 1
      ours.add((row, tuple(is_masked), tuple(targets)))
  theirs = {
    (int(row), tuple(state[P:] == MASK), tuple(target.astype(int)))
    for row, state, target in zip(
      recorded["source_row"],
      recorded["state_ids"],
      recorded["target_mask"],
      strict=True,
    )
  }
  assert ours == theirs and len(theirs) == meta["rows"]
  return Case(
    name,
    dataclasses.replace(objective, updates_per_batch=2),
    visits,
    data["adv_zscore_population"],
  )


def random_mask_case(name: str) -> Case:
  recorded, meta = recordings.load(f"objectives/{name}")
  objective = random_mask.RandomMask(
    updates_per_batch=2,
    clip_low=meta["eps"],
    clip_high=meta["eps"],
    behaviour_kl_coef=meta["beta"],
    max_eos=meta["post_num"],
  )
  source = recorded["source_row"]
  most = np.bincount(source, minlength=8).max()
  state = np.zeros((8, most, P + C), np.int32)
  weight = np.zeros((8, most), np.float32)
  for row in range(8):
    mine = recorded["state_ids"][source == row]
    state[row, : len(mine)] = mine
    weight[row, : len(mine)] = 1 / len(source)
  return Case(
    name, objective, visits_of(state, weight), batch()["adv_zscore_population"]
  )


def sampling_of(tokens_per_step: int, block_length: int):
  return sampling_lib.Sampling(
    mask_id=MASK,
    eos_id=EOS,
    completion_length=C,
    block_length=block_length,
    num_denoise_steps=C // tokens_per_step,
  )


def drawn(objective, rollout, sampling) -> base.Visits:
  """The visits of the first update."""
  keys = jax.random.split(jax.random.key(0), rollout.completion.shape[0])
  visits, _ = objective.visits(rollout, None, jax.random.key(1), keys, sampling)
  return jax.tree.map(lambda x: x[0], visits)


MAKERS = {
  "coupled_grpo": coupled_case,
  "wd1": wd1_case,
  "espo": espo_case,
  "gdpo_port": gdpo_case,
  "spg": spg_case,
  "dmpo": dmpo_case,
  "justgrpo": just_grpo_case,
  "dllm_rl.tracerl": trace_rl_case,
  "dllm_rl": random_mask_case,
}
# Not ours: a softmax over the batch in place of the group; and a tie of clipped
# and unclipped, which rounding breaks (see espo.py).
LEFT_OUT = {
  "dmpo.wdce_R4_unbiased_centering",
  "espo.mc2_mu2_eps0_ratio_exactly_one",
}
CASES = sorted(
  path.stem
  for path in recordings.GOLDEN.glob("objectives/*.npz")
  if path.stem != "batch"
)


def test_every_recording_is_known():
  assert len(CASES) == 26 and set(CASES) >= LEFT_OUT


@pytest.mark.parametrize("name", [x for x in CASES if x not in LEFT_OUT])
def test_equals_the_released_loss_and_gradient(name):
  maker = next(make for key, make in MAKERS.items() if name.startswith(key))
  case = maker(name)
  check(case, recordings.load(f"objectives/{name}")[0]["loss"])


def check(case: Case, recorded_loss) -> None:
  config, old_params, _ = recordings.network("tiny_loss")

  def bind(params, lora):
    del lora
    network = transformer.bind(config, params)
    if not case.is_shifted:
      return network
    return network._replace(
      logits=lambda tokens, length, positions: network.logits(
        tokens, length, positions - 1
      )
    )

  params = recordings.tree_of(config, "objectives/policy.safetensors")
  reference = recordings.tree_of(config, "objectives/reference.safetensors")
  data = batch()
  is_spg = isinstance(case.objective, spg.Spg)
  unmask_step = data.get("step_map", np.zeros((8, C)))
  if isinstance(case.objective, trace_rl.TraceRl):
    unmask_step = recordings.load(f"objectives/{case.name}")[0]["step_map"]
  rollout = rollout_of(data, is_spg, unmask_step)
  if case.rows is not None:
    rollout = jax.tree.map(lambda x: x[case.rows], rollout)
  sampling = sampling_of(1, C)
  if isinstance(case.objective, trace_rl.TraceRl):
    sampling = sampling_of(C // (int(unmask_step.max()) + 1), C)
  learner = learner_lib.Learner(
    bind=bind,
    optimizer=optax.sgd(1.0),
    sampling=sampling,
    objective=case.objective,
    group_size=4,
    microbatch=5,
  )
  advantage = jnp.asarray(case.advantage, jnp.float32)
  behaviour = case.behaviour
  is_off_policy = getattr(case.objective, "updates_per_batch", 1) > 1
  if behaviour is None and case.objective.behaviour == "scored":
    if is_off_policy:
      behaviour = learner.factors(
        bind(old_params, None), rollout, advantage, case.visits
      ).logprob
  gradient, terms, _ = jax.jit(learner.gradient)(
    states.initial(learner, params),
    rollout,
    advantage,
    case.visits,
    behaviour=behaviour,
    reference=reference,
  )
  if case.checks_loss:
    np.testing.assert_allclose(
      terms.loss * case.scale, recorded_loss, rtol=1e-4, atol=3e-5
    )
  expected = recordings.tree_of(
    config, f"objectives/{case.name}.grads.safetensors"
  )
  ours = jax.tree.map(lambda x: np.asarray(x) * case.scale, gradient)
  difference = optax.tree.norm(jax.tree.map(jnp.subtract, ours, expected))
  assert difference < 1e-4 * optax.tree.norm(expected)


def test_advantages_are_the_released_ones():
  data = batch()
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
  rewards = jnp.asarray(batch()["rewards"]).reshape(2, 4)
  recorded, _ = recordings.load("objectives/wd1.one_group")
  group = int(recorded["rows"][0]) // 4
  ours = wd1.Wd1().advantage(rewards)[group] * 2  # ours is a mean over groups
  np.testing.assert_allclose(ours, -recorded["weights"], atol=1e-6)
  recorded, _ = recordings.load("objectives/wd1.positive_only")
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
  rollout = rollout_of(data, False, np.zeros((6, 8)))
  objective = diffu_grpo.DiffuGrpo(
    updates_per_batch=meta["num_iterations"],
    clip_low=meta["epsilon"],
    clip_high=meta["epsilon"],
    kl_coef=meta["beta"],
  )
  visits = visits_of(
    recorded["noisy_ids"][:, None], 1 / data["completion_mask"].sum()
  )
  learner = learner_lib.Learner(
    bind=lambda params, lora: transformer.bind(config, params, lora),
    optimizer=optax.sgd(1.0),
    sampling=dataclasses.replace(
      sampling_of(1, 8), completion_length=8, num_denoise_steps=8
    ),
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
