"""The laboratory: what it says of estimates whose bias is known."""

import csv

import jax
import numpy as np
import pytest

from agrpo_jax import errors
from agrpo_jax import settings
from agrpo_jax.lab import gradients
from agrpo_jax.objectives import espo
from fixtures import commands
from fixtures import recordings


def small_config(**objective):
  c = recordings.config("sudoku_tiny", "blocks")
  c.rollout.update(num_prompts=4, group_size=4, batch_size=16)
  c.objective.update(microbatch=32, **objective)
  c.grading.num_workers = 1
  return c


@pytest.fixture(scope="module")
def batch():
  return gradients.draw(settings.rl(small_config(step_price=0.5)))


def test_an_exact_estimate_has_neither_bias_nor_variance(batch, capsys):
  word = "agrpo/step_rule=all"
  (row,) = gradients.measure(
    batch, {word: gradients.parse(small_config(), word)}, 2
  )
  assert row.bias < 1e-2 and row.relative_variance < 1e-5
  assert row.mean_cosine > 1 - 1e-6 and row.cosine > 1 - 1e-6
  # A visit per executed step, of the groups whose rewards differ.
  has_spread = np.ptp(np.asarray(batch.reward_NxG), axis=1) > 0
  assert row.passes == pytest.approx(8 * has_spread.mean())
  assert "agrpo/step_rule=all" in capsys.readouterr().out


def test_it_tells_a_biased_estimate_from_an_unbiased_one():
  """On made up gradients: the scale is taken out, the noise too."""
  rng = np.random.default_rng(0)
  exact = rng.normal(size=200)
  exact /= np.linalg.norm(exact)
  aside = rng.normal(size=200)
  aside -= (aside @ exact) * exact
  aside /= np.linalg.norm(aside)

  def noisy(mean, noise):
    def run(key):
      seed = int(jax.random.randint(key, (), 0, 2**30))
      draw = np.random.default_rng(seed).normal(size=200) * noise / np.sqrt(200)
      return mean + draw, 3.0

    return run

  unbiased = gradients._measure_one("a", noisy(5 * exact, 5.0), exact, 400)
  biased = gradients._measure_one(
    "b", noisy(5 * (exact + 0.5 * aside), 5.0), exact, 400
  )
  assert unbiased.bias < 0.15 and abs(biased.bias - 0.5) < 0.1
  assert unbiased.relative_variance == pytest.approx(1.0, rel=0.1)
  assert biased.mean_cosine == pytest.approx(1 / np.sqrt(1.25), rel=0.02)
  assert unbiased.passes == 3.0
  away = gradients._measure_one("c", noisy(-exact, 0.1), exact, 4)
  assert np.isnan(away.bias) and away.mean_cosine < 0


@pytest.mark.parametrize(
  "word,message",
  [
    ("grpo", "objective 'grpo' is unknown"),
    ("espo/masks=3", "'masks=3' is no SETTING=VALUE of espo"),
    ("espo/num_masks", "is no SETTING=VALUE"),
    ("espo/num_masks=0", "num_masks=0 must be at least 1"),
    ("espo/num_masks=many", "espo/num_masks=many: "),
    ("espo/num_masks=2.5", "num_masks=2.5 must be of type int"),
    ("espo/num_masks=True", "num_masks=True must be of type int"),
    ("agrpo/updates_per_batch=2.5", "updates_per_batch=2.5 must be of type"),
    ("agrpo/kl_coef=True", "kl_coef=True must be of type float"),
    ("agrpo/kl_coef=nan", "kl_coef='nan' must be of type float"),
    ("vine_ppo", "its estimate is that of agrpo with the same step_rule"),
  ],
)
def test_a_word_that_means_nothing_is_refused(word, message):
  with pytest.raises(errors.UserError, match=message):
    gradients.parse(small_config(), word)


def test_the_configs_own_objective_keeps_its_settings():
  c = small_config(clip_high=0.3, kl_coef=0.1, updates_per_batch=2)
  own = gradients.parse(c, "agrpo")
  assert (own.num_mc_steps, own.step_rule) == (2, "entropy")
  # At the parameters that drew the batch there is one update, without a KL.
  assert (own.clip_high, own.kl_coef, own.updates_per_batch) == (0.3, 0.0, 1)
  assert gradients.parse(c, "agrpo/kl_coef=0.2").kl_coef == 0.2
  assert gradients.parse(c, "espo") == espo.Espo(updates_per_batch=1, kl_coef=0)


def test_completions_pay_for_their_steps(batch):
  # All of them execute all steps; what they are paid for is a share of cells.
  assert -0.5 <= batch.reward_NxG.min() < 0
  assert batch.reward_NxG.max() <= 0.5


def test_every_default_estimate_is_legal(batch):
  words = gradients.default_estimators(batch.sampling)
  assert len(words) == len({*words}) > 20
  for word in words:
    gradients.parse(small_config(), word)


def test_the_command_writes_a_table_and_a_figure(tmp_path):
  commands.alone(
    "-m",
    "agrpo_jax.lab",
    "gradients",
    f"--config={recordings.CONFIGS / 'sudoku_tiny.py'}",
    "--config.rollout.num_prompts=2",
    "--config.rollout.group_size=4",
    "--config.rollout.batch_size=8",
    "--estimators=wd1",
    "--draws=2",
    f"--output={tmp_path / 'lab'}",
  )
  with (tmp_path / "lab" / "gradients.csv").open() as file:
    rows = [*csv.DictReader(file)]
  assert [row["estimate"] for row in rows] == ["wd1"]
  assert all(float(row["passes"]) > 0 for row in rows)
  assert (tmp_path / "lab" / "gradients.png").stat().st_size > 1000
