"""The bundled models are the ones that their README files tell of."""

import hashlib
import pathlib

import pytest

import agrpo_jax

ASSETS = pathlib.Path(agrpo_jax.__file__).parent / "assets"


@pytest.mark.parametrize(
  "folder", sorted(ASSETS.iterdir()), ids=lambda f: f.name
)
def test_checksum(folder):
  weights = (folder / "model.safetensors").read_bytes()
  assert (
    hashlib.sha256(weights).hexdigest() in (folder / "README.md").read_text()
  )
