"""Losses and gradients of other objectives on a second, wider network.

    python -m pytest tests/objectives/recorded_objectives_proof.py

Minutes; the suite has the same of a smaller one. Of every tensor's gradient its
length and its product with a fixed wave were recorded.
"""

import numpy as np
import pytest

from fixtures import recorded_losses
from fixtures import recordings

WIDE = recorded_losses.WIDE


@pytest.mark.parametrize("name", WIDE.names)
def test_equals_the_released_loss_and_gradient(name):
  recorded, _ = WIDE.load(name)
  config, _, _ = recordings.network(WIDE.checkpoint)
  ours = recordings.under_their_names(
    config, recorded_losses.gradient(WIDE, name)
  )
  assert set(ours) == set(recorded["grad_names"])
  whole = np.linalg.norm(recorded["grad_norms"])
  for tensor, norm, dot in zip(
    recorded["grad_names"],
    recorded["grad_norms"],
    recorded["grad_dots"],
    strict=True,
  ):
    gradient = np.float64(ours[tensor])
    wave = np.sin(1 + 2.0 * np.arange(gradient.size)).reshape(gradient.shape)
    assert abs(np.linalg.norm(gradient) - norm) < 1e-4 * whole, tensor
    assert abs((gradient * wave).sum() - dot) < 1e-4 * whole, tensor
