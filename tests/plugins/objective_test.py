"""A second objective from outside: REINFORCE over random masks."""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agrpo_jax import config as config_lib
from agrpo_jax import errors
from agrpo_jax import learner as learner_lib
from agrpo_jax import objectives
from agrpo_jax import settings
from agrpo_jax import types
from agrpo_jax.objectives import base
from agrpo_jax.runs import metrics
from agrpo_jax.samplers import noise
from agrpo_jax.samplers import rollout as rollout_lib
from agrpo_jax.samplers import sampling as sampling_lib
from fixtures import runs
from fixtures import states

V, C = 3, 4  # tokens 0 (EOS), 1, 2; 3 is [MASK]


@dataclasses.dataclass(frozen=True)
class Reinforce:
  """-A log p of the tokens that a random mask hides, mean over masks."""

  num_masks: int = 2
  updates_per_batch: int = 1
  replays = False
  is_sum_over_visits = True
  behaviour = "none"
  has_reference = False
  skips_zero_advantage = True

  def problems(self, sampling):
    return [] if self.num_masks >= 1 else [f"num_masks={self.num_masks}"]

  def advantage(self, reward_NxG):
    return reward_NxG - reward_NxG.mean(axis=1, keepdims=True)

  def visits(self, rollout, advantage_B, batch_key, key_B, sampling):
    shape = (1, self.num_masks, 1, rollout.completion.shape[1])
    is_masked = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, shape))(
      key_B
    ).swapaxes(0, 1)
    size = is_masked.shape[:-1]
    return base.Visits(
      is_masked=is_masked,
      offset=jnp.broadcast_to(jnp.arange(shape[-1]), is_masked.shape),
      block=jnp.zeros(size, jnp.int32),
      denoise_step=jnp.zeros(size, jnp.int32),
      weight=jnp.full(size, 1 / (size[1] * size[2])),
    ), {}

  def score(self, logits_WxV, row, visit, sampling, top_k):
    logprob_WxV = jax.nn.log_softmax(logits_WxV)
    logprob_W = jnp.take_along_axis(
      logprob_WxV, row.completion[:, None], axis=1
    )[:, 0]
    return base.Factors(logprob=logprob_W, is_factor=visit.is_masked)

  def loss(self, policy, behaviour, reference, advantage_G, visits, rows):
    logprob = jnp.where(policy.is_factor, policy.logprob, 0.0).sum(axis=-1)
    loss = -visits.weight * advantage_G[:, None, None] * logprob
    return base.Terms.zeros().replace(
      loss=loss.sum(), num_factors=policy.is_factor.sum() * 1.0
    )


def table_network(table: jax.Array) -> types.Network:
  """Logits of the number of masks and the position."""

  def logits(tokens_BxL, length_B, position_BxW):
    del length_B
    num_masked_B = (tokens_BxL[:, -C:] == V).sum(axis=1)
    return table[num_masked_B[:, None], position_BxW - 1]

  return types.Network(logits)


SAMPLING = sampling_lib.Sampling(
  mask_id=V,
  eos_id=0,
  completion_length=C,
  block_length=2,
  num_denoise_steps=4,
  stop_at_eos=False,
)


def test_its_gradient_is_that_of_its_formula():
  num_rows = 6
  row_id = np.stack([np.arange(num_rows), np.zeros(num_rows)], 1)
  row_id = jnp.asarray(row_id, jnp.uint32)
  table = jax.random.normal(jax.random.key(0), (C + 1, C, V))
  rollout = rollout_lib.sample_rollout(
    table_network(table),
    types.Prompts(
      tokens=jnp.ones((num_rows, 1), jnp.int32),
      length=jnp.ones((num_rows,), jnp.int32),
      key=noise.row_keys(jax.random.key(1), row_id),
    ),
    SAMPLING,
  )
  reward = jnp.array([1.0, 0.0, 1.25, 2.0, 0.25, 0.0])
  objective = Reinforce()
  learner = learner_lib.Learner(
    bind=lambda table, lora: table_network(table),
    optimizer=optax.sgd(1.0),
    sampling=SAMPLING,
    objective=objective,
    group_size=3,
    microbatch=4,
  )
  after, metrics = jax.jit(learner.train_step)(
    states.initial(learner, table),
    rollout,
    reward,
    jax.random.key(2),
    row_id,
    None,
  )

  # The same by hand: the masks again, a loop over rows, masks and positions.
  _, row_key = jax.random.split(jax.random.key(2))
  visits, _ = objective.visits(
    rollout, None, None, noise.row_keys(row_key, row_id), SAMPLING
  )
  is_masked = np.asarray(visits.is_masked)[0, :, :, 0]
  logprob = np.asarray(jax.nn.log_softmax(table), np.float64)
  expected, loss = np.zeros(table.shape), 0.0
  advantage = np.asarray(reward) - 0.75
  for row, mask in np.ndindex(num_rows, 2):
    for position in np.flatnonzero(is_masked[row, mask]):
      token = int(rollout.completion[row, position])
      at = is_masked[row, mask].sum(), position
      weight = advantage[row] / (num_rows * 2)
      loss -= weight * logprob[at][token]
      expected[at] += weight * ((np.arange(V) == token) - np.exp(logprob[at]))
  np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
  np.testing.assert_allclose(after.params - table, expected, atol=1e-6)
  assert int(metrics["draws/pairs"]) == num_rows * 2


OWN_FILE = re.findall(
  r"```python\n(.*?)```",
  (pathlib.Path(__file__).parents[2] / "docs/custom_objective.md").read_text(
    "utf-8"
  ),
  re.DOTALL,
)[0]


def test_a_run_uses_the_documented_file(tmp_path):
  file = tmp_path / "reinforce.py"
  file.write_text(OWN_FILE, "utf-8")
  c = runs.varied(tmp_path)
  config_lib.use_objective(c, "", path=str(file), num_masks=3)
  c.train.num_steps = 2
  runs.train(c)
  log = [*metrics.read(tmp_path / "run" / "metrics.jsonl")]
  # A group without spread teaches nothing; the others visit three masks a row.
  pairs = [record["draws/pairs"] for record in log]
  assert max(pairs) > 0
  assert [pair % 3 for pair in pairs] == [0, 0]
  c.objective.num_mc_steps = 4
  with pytest.raises(errors.UserError, match=r"num_mc_steps is no setting of"):
    runs.train(c)


@pytest.mark.parametrize(
  "text,message",
  [
    ("x = 1", "has no class `Objective`"),
    (
      "import dataclasses\n"
      "@dataclasses.dataclass(frozen=True)\n"
      "class Objective:\n"
      "  updates_per_batch: int = 1\n",
      "lacks .*advantage.*loss",
    ),
    ("import nothing_of_the_kind", "failed to load: ModuleNotFoundError"),
    ("import sys\nsys.exit(3)", "failed to load: SystemExit"),
    (
      "from agrpo_jax.objectives import masks\n"
      "class Objective(masks.Masks):\n"
      "  strength: float = 1.0\n",
      "that is a dataclass of its settings",
    ),
    (
      "import dataclasses\n"
      "from agrpo_jax.objectives import objective\n"
      "@dataclasses.dataclass(frozen=True)\n"
      "class Objective(objective.Objective):\n"
      "  pass\n",
      "lacks .*loss",
    ),
    (
      f"{OWN_FILE}\n  x: tuple = dataclasses.field(default_factory=tuple)\n",
      "as default: x",
    ),
    (
      f"{OWN_FILE}\n  microbatch: int = 2\n",
      "config.objective has .*microbatch",
    ),
    (f"{OWN_FILE}\n  has_reference = lambda self: False\n", "has_reference; a"),
    (
      f"{OWN_FILE}\n  def updates_per_batch(self):\n    return 1\n",
      "updates_per_batch; .* needs @property",
    ),
    (f"{OWN_FILE}\n  advantage = 1\n", "values for functions: advantage"),
  ],
)
def test_a_file_without_an_objective_is_refused(tmp_path, text, message):
  file = tmp_path / "own.py"
  file.write_text(text, "utf-8")
  with pytest.raises(errors.UserError, match=message):
    objectives.get("agrpo", str(file))


@pytest.mark.parametrize(
  "line,message",
  [
    ("pass", "TypeError: problems.. returned None"),
    ("return 'a word'", "TypeError: problems.. returned 'a word'"),
    ("return [self.nothing]", "AttributeError: "),
    ("return [{}[1]]", "KeyError: 1"),
    ("assert False, 'no'", "AssertionError: no"),
  ],
)
def test_an_objective_that_cannot_check_its_settings(tmp_path, line, message):
  said = refused(tmp_path, f"def problems(self, sampling):\n    {line}")
  assert re.search(rf"'.*own\.py' cannot be checked: {message}", said)


@pytest.mark.parametrize(
  "text,message",
  [
    (
      "behaviour = 'rememberd'",
      "behaviour='rememberd' must be one of recorded",
    ),
    (
      "updates_per_batch: int = 0",
      "updates_per_batch=0 must be a whole number",
    ),
    (
      "updates_per_batch: str = '2'",
      "updates_per_batch='2' must be a whole number",
    ),
    ("updates_per_batch: float = 2.0", "updates_per_batch=2.0"),
    ("updates_per_batch: bool = True", "updates_per_batch=True"),
    ("updates_per_batch: object = None", "updates_per_batch=None"),
    ("replays = None", "replays=None must be True or False"),
    (
      "is_sum_over_visits = False\n"
      "  def restarts(self, sampling): ...\n"
      "  def block_advantage(self, reward, value, sampling): ...",
      "is_sum_over_visits must be True",
    ),
  ],
)
def test_an_objective_that_tells_wrong_things_of_itself(
  tmp_path, text, message
):
  said = refused(tmp_path, text)
  assert re.search(
    r"objective\.path: in the class `Objective` of '.*own\.py'", said
  )
  assert message in said and "seed=-1" in said  # with all other mistakes


def refused(tmp_path: pathlib.Path, text: str) -> str:
  """What is said of the documented file with more text in its class."""
  file = tmp_path / "own.py"
  file.write_text(f"{OWN_FILE}\n  {text}\n", "utf-8")
  c = runs.small(tmp_path)
  c.seed = -1
  config_lib.use_objective(c, "", path=str(file))
  with pytest.raises(errors.UserError) as caught:
    settings.rl(c)
  return str(caught.value)


def test_a_name_on_the_command_line_brings_its_own_defaults():
  c = config_lib.rl()
  with c.objective.unlocked():
    c.objective.update(name="espo", num_masks=5, microbatch=3)
  given = {"objective.name": "agrpo", "objective.num_masks": None, "seed": 0}
  config_lib.choose_objective(c, given)
  assert dict(c.objective) == {
    "name": "espo",
    "path": "",
    "num_masks": 5,
    "microbatch": 3,
    "step_price": 0.0,
  }


def test_the_configs_own_name_changes_nothing():
  c = config_lib.rl()
  before = c.to_dict()
  config_lib.choose_objective(c, {"objective.name": "agrpo"})
  assert c.to_dict() == before
  config_lib.use_objective(c, "agrpo", path="own.py", num_masks=5)
  config_lib.choose_objective(c, {"objective.path": "own.py"})
  assert c.objective.num_masks == 5
  # The name alone: the file is left out, and with it what it was given.
  config_lib.choose_objective(c, {"objective.name": "agrpo"})
  assert c.objective.path == "" and "num_masks" not in c.objective
