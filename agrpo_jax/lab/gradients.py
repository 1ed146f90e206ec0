"""How far the gradient estimates are from the exact gradient, and from theirs.

On one fixed batch of graded completions the exact gradient e visits every
executed denoising step through the policy that drew it. An estimate g is drawn
again and again, at the parameters that drew the batch. Objectives differ by
constants (a mean over steps or their sum), so g is first scaled by

    s = |e|^2 / <E g, e>

after which, of its mean and of one draw,

    bias = |s E g - e| / |e|      relative variance = E |s (g - E g)|^2 / |e|^2

and the cosines with e, which need no scale. The first is freed of the noise of
a mean over finitely many draws. The noise of the completions themselves comes
on top, the same for all, and so does the objective's own advantage.
"""

import csv
import dataclasses
import importlib.util
import math
import pathlib
import statistics
import time
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from agrpo_jax import config as config_lib
from agrpo_jax import data
from agrpo_jax import errors
from agrpo_jax import learner as learner_lib
from agrpo_jax import objectives as objectives_lib
from agrpo_jax import settings as settings_lib
from agrpo_jax import types
from agrpo_jax.grading import shares
from agrpo_jax.lab import prices
from agrpo_jax.lab import words
from agrpo_jax.objectives import agrpo
from agrpo_jax.objectives import base
from agrpo_jax.parallel import mesh as mesh_lib
from agrpo_jax.policies import base as policies
from agrpo_jax.port import model as model_lib
from agrpo_jax.samplers import sampling as sampling_lib

EXACT = agrpo.Agrpo(step_rule="all")


@dataclasses.dataclass(frozen=True)
class Batch:
  """A graded batch of rollouts, and the model that drew it.

  Attributes:
    model: with its parameters.
    sampling: how the rollout was drawn.
    policy: through which.
    rollout: B completions.
    reward_NxG: float32, the price of steps taken off.
    num_states: partial completions per forward and backward pass.
  """

  model: model_lib.Model
  sampling: sampling_lib.Sampling
  policy: policies.Policy
  rollout: types.Rollout
  reward_NxG: jax.Array
  num_states: int


@dataclasses.dataclass(frozen=True)
class Row:
  """What was found of one estimate; see the head of the file.

  Attributes:
    estimate: its name.
    passes: of the gradient, per completion; see `prices`.
    seconds: of a gradient, the median after the one that compiles.
    bias: NaN if the mean points away from the exact gradient.
    relative_variance: of one draw.
    mean_cosine: of the mean over the draws with the exact gradient.
    cosine: of one draw with it, the mean.
  """

  estimate: str
  passes: float
  seconds: float
  bias: float
  relative_variance: float
  mean_cosine: float
  cosine: float


def default_estimators(sampling: sampling_lib.Sampling) -> list[str]:
  """Returns all objectives, some of them at several budgets.

  Without those whose advantages are values of states: `parse` refuses them.
  """
  found = ["agrpo/step_rule=all"]
  for rule in ("uniform", "entropy"):
    found += [
      f"agrpo/step_rule={rule}/num_mc_steps={num}"
      for num in (1, 2, 4, 8, 24)
      if num <= sampling.max_steps
    ]
  found += [
    f"agrpo/step_rule=blocks/num_mc_blocks={num}"
    for num in (1, 2, 4)
    if num < sampling.num_blocks
  ]
  found += [
    name
    for name in objectives_lib.NAMES
    if name != "agrpo"
    and not issubclass(objectives_lib.get(name), objectives_lib.Valued)
  ]
  found += [f"espo/num_masks={num}" for num in (1, 8)]
  return found + [f"bgpo/num_masks={num}" for num in (2, 64)]


def parse(c: config_lib.ConfigDict, word: str) -> objectives_lib.Objective:
  """Returns the objective that OBJECTIVE/SETTING=VALUE/... means in a config.

  One optimizer update per rollout, and no KL penalty: at the parameters that
  drew the batch it has no gradient.

  Raises:
    UserError: an unknown objective or setting, or a value that is not legal; or
      an objective with values, whose advantages are what it is about and would
      have to be drawn beside the batch.
  """
  c = c.copy_and_resolve_references()
  try:
    words.put(c, word, updates_per_batch=1, kl_coef=0.0)
    objective = settings_lib.rl(c).objective
  except errors.UserError as error:
    raise errors.UserError(f"{word}: {error}") from None
  if isinstance(objective, objectives_lib.Valued):
    raise errors.UserError(
      f"{word}: given its advantages, its estimate is that of agrpo with the "
      "same step_rule, which can be measured here. What the advantages are "
      "worth is told by benchmarks/values.py."
    )
  return objective


def draw(s: settings_lib.Rl) -> Batch:
  """Draws and grades the first batch of a run."""
  mesh = s.mesh.make()
  model = model_lib.load_model(s.model, s.lora, mesh, seed=s.seed)
  dataset = data.load_dataset(s.task, s.data, model.tokenizer, "train")
  data.check_size(len(dataset), s.rollout.num_prompts)
  learner = s.make_learner(model.bind, model.tokenizer, mesh)
  # All in one call: it is one batch.
  whole = dataclasses.replace(s.rollout, batch_size=s.rollout.num_rows)
  model.check_draw(s.data.max_prompt_length, whole)
  sampler = model.sampler(whole, s.data.bucket)
  prompts = dataset.batch(0, s.rollout.num_prompts, s.seed)
  batch = data.Batch.of(prompts, s.rollout.group_size)
  (rollout,) = sampler.sample(
    model.params,
    model.lora,
    batch.tokens,
    jax.random.key(s.seed),
    batch.id_Bx2,
  )
  with s.start_grader() as grader:
    graded = shares.submit(
      sampler.drawn(rollout), batch, model.tokenizer, grader
    )
    reward_B = shares.collect([graded]).reward_B
  reward_B = reward_B - np.asarray(learner.price(rollout.num_executed_steps))
  if not np.ptp(reward_B.reshape(-1, s.rollout.group_size), axis=1).any():
    raise errors.UserError(
      "No group of the batch has rewards that differ: there is no gradient to "
      "estimate. Take another config.seed, or more rollout.num_prompts."
    )
  return Batch(
    model=model,
    sampling=learner.sampling,
    policy=learner.policy,
    rollout=rollout,
    reward_NxG=jnp.asarray(reward_B, jnp.float32).reshape(
      -1, s.rollout.group_size
    ),
    num_states=s.microbatch,
  )


def estimator(
  batch: Batch, objective: objectives_lib.Objective
) -> Callable[[jax.Array], tuple[np.ndarray, float]]:
  """Returns a compiled function: key -> the gradient, flat, and its passes."""
  sampling, model = batch.sampling, batch.model
  advantage_B = objective.advantage(batch.reward_NxG).reshape(-1)

  num_shards = mesh_lib.num_row_shards(model.mesh)
  learner = learner_lib.Learner(
    bind=model.bind,
    optimizer=optax.sgd(1.0),
    sampling=sampling,
    objective=objective,
    group_size=batch.reward_NxG.shape[1],
    microbatch=num_shards,
    policy=batch.policy,
    shard_rows=mesh_lib.shard_rows(model.mesh),
  )

  def visits_of(key: jax.Array, rollout: types.Rollout) -> base.Visits:
    key_B = jax.random.split(key, len(advantage_B))
    visits, _ = learner.visits(rollout, advantage_B, key, key_B)
    return jax.tree.map(lambda x: x[0], visits)

  weight = jax.eval_shape(visits_of, jax.random.key(0), batch.rollout).weight
  units_at_once = batch.num_states // weight.shape[2] // num_shards
  learner = dataclasses.replace(
    learner, microbatch=max(1, units_at_once) * num_shards
  )
  state = types.TrainState(jnp.int32(0), model.params, model.lora, ())

  @jax.jit
  def gradient(
    state: types.TrainState, rollout: types.Rollout, key: jax.Array
  ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    visits = visits_of(key, rollout)
    # The reference policy is the one that training starts from.
    tree, _, num_units = learner.gradient(
      state, rollout, advantage_B, visits, reference=state.params
    )
    leaves = [x.reshape(-1) for x in jax.tree.leaves(tree)]
    asked = learner.asked(jax.tree.map(lambda x: x[None], visits), advantage_B)
    return jnp.concatenate(leaves), (num_units, *asked)

  price = prices.of_policy(
    sampling,
    model.shape,
    batch.rollout.prompt.shape[1],
    has_adapter=model.lora is not None,
  )

  def run(key: jax.Array) -> tuple[np.ndarray, float]:
    found, counts = gradient(state, batch.rollout, key)
    passes = prices.of_updates(objective, price, *map(float, counts))
    return np.asarray(found, np.float64), passes / len(advantage_B)

  return run


def measure(
  batch: Batch,
  objectives: Mapping[str, objectives_lib.Objective],
  num_draws: int,
) -> list[Row]:
  """Draws every estimate `num_draws` times, and prints a line of each."""
  exact, _ = estimator(batch, EXACT)(jax.random.key(0))
  if not exact.any():
    raise errors.UserError("The exact gradient of this batch is zero.")
  rows = []
  print(
    f"{'estimate':<42} {'passes':>7} {'seconds':>8} {'bias':>7} "
    f"{'variance':>9} {'mean cos':>8} {'cosine':>7}"
  )
  for name, objective in objectives.items():
    row = _measure_one(name, estimator(batch, objective), exact, num_draws)
    rows.append(row)
    print(
      f"{name:<42} {row.passes:7.2f} {row.seconds:8.3f} {row.bias:7.3f} "
      f"{row.relative_variance:9.3f} {row.mean_cosine:8.3f} {row.cosine:7.3f}",
      flush=True,
    )
  return rows


def _measure_one(
  name: str,
  run: Callable[[jax.Array], tuple[np.ndarray, float]],
  exact: np.ndarray,
  num_draws: int,
) -> Row:
  run(jax.random.key(0))  # compiles
  total, squares = np.zeros_like(exact), 0.0
  cosines, passes, seconds = [], [], []
  for draw in range(num_draws):
    begin = time.perf_counter()
    found, cost = run(jax.random.key(draw + 1))
    seconds.append(time.perf_counter() - begin)
    passes.append(cost)
    total += found
    squares += found @ found
    cosines.append(_cosine(found, exact))
  mean = total / num_draws
  # Of a sample: the mean's own square holds a share of the variance.
  variance = (squares / num_draws - mean @ mean) * num_draws / (num_draws - 1)
  mean_square = max(mean @ mean - variance / num_draws, 0.0)
  along = mean @ exact / (exact @ exact)  # 1 / s
  bias = math.nan
  if along > 0:
    bias = math.sqrt(max(mean_square / (along**2 * (exact @ exact)) - 1.0, 0.0))
  return Row(
    estimate=name,
    passes=statistics.mean(passes),
    seconds=statistics.median(seconds),
    bias=bias,
    relative_variance=max(variance, 0.0) / (along**2 * (exact @ exact)),
    mean_cosine=_cosine(mean, exact),
    cosine=statistics.mean(cosines),
  )


def _cosine(x: np.ndarray, y: np.ndarray) -> float:
  norm = np.linalg.norm(x) * np.linalg.norm(y)
  return float(x @ y / norm) if norm else 0.0


def write(rows: Sequence[Row], folder: pathlib.Path) -> None:
  """Writes `gradients.csv`, and `gradients.png` where matplotlib is."""
  with (folder / "gradients.csv").open("w", newline="") as file:
    writer = csv.DictWriter(file, dataclasses.asdict(rows[0]))
    writer.writeheader()
    writer.writerows(dataclasses.asdict(row) for row in rows)
  if importlib.util.find_spec("matplotlib") is None:
    print("No figure without matplotlib: pip install 'agrpo_jax[plot]'")
    return
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, 6))
  for row in rows:
    kind = row.estimate.split("/")[0]
    color = f"C{objectives_lib.NAMES.index(kind) % 10}"
    marker = "o" if kind == "agrpo" else "s"
    # An unbiased one has no place on a logarithmic axis.
    bias = max(row.bias, 1e-2)
    variance = max(row.relative_variance, 1e-3)
    for axes, x, y in (
      (left, bias, variance),
      (right, row.passes, row.cosine),
    ):
      if math.isfinite(x) and math.isfinite(y):
        axes.plot(x, y, marker, color=color)
        axes.annotate(row.estimate, (x, y), fontsize=6)
  left.set(
    xscale="log",
    yscale="log",
    xlabel="bias (0.01: that or less)",
    ylabel="relative variance of a draw",
  )
  right.set(
    xscale="log", xlabel="passes per completion", ylabel="cosine of a draw"
  )
  figure.tight_layout()
  figure.savefig(folder / "gradients.png", dpi=120)
  pyplot.close(figure)
