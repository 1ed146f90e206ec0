"""The bundled model of word problems answers as its README says."""

import pathlib

import pytest

import agrpo_jax
from agrpo_jax import evaluate
from agrpo_jax import settings
from fixtures import recordings

MODEL = pathlib.Path(agrpo_jax.__file__).parent / "assets" / "tiny-reasoning"


def test_accuracy_of_the_readme():
  """On fewer problems, within three standard errors of so few."""
  c = recordings.config("word_problems_tiny", "dual")
  assert c.model.path == MODEL.name
  c.grading.num_workers = 1
  c.evaluate.update(num_examples=48, batch_size=48)
  result = evaluate.run(settings.rl(c))
  assert result.accuracy == pytest.approx(0.289, abs=0.2)
  assert result.grades["equations"].mean() == pytest.approx(0.573, abs=0.2)
