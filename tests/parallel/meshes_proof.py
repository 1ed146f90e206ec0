"""AGRPO, every other objective and every family on every mesh: same parameters.

    python -m pytest tests/parallel/meshes_proof.py

Minutes; the suite has a part of it, `processes_agree_test.py`.
"""

import pytest

from agrpo_jax import objectives
from fixtures import mesh_run

# Its values take a grader: `tests/actor_test.py` has a mesh.
_NAMES = [n for n in objectives.NAMES if n not in ("agrpo", "vine_ppo")]


@pytest.fixture(
  scope="module",
  params=[[], _NAMES, [*mesh_run.FAMILIES]],
  ids=["agrpo", "objectives", "families"],
)
def one_device(request, tmp_path_factory):
  output = tmp_path_factory.mktemp("mesh") / "one.npz"
  return request.param, mesh_run.one_device(output, request.param)


@pytest.mark.parametrize(
  "mesh",
  [
    "data=8,fsdp=1,tensor=1",
    "data=1,fsdp=8,tensor=1",
    "data=2,fsdp=2,tensor=2",
  ],
)
def test_eight_devices_give_what_one_gives(mesh, tmp_path, one_device):
  names, expected = one_device
  output = tmp_path / "eight.npz"
  mesh_run.finish(mesh_run.start(mesh, output, names, devices=8))
  mesh_run.assert_same(output, expected)


def test_two_processes_give_what_one_gives(tmp_path, one_device):
  names, expected = one_device
  mesh_run.two_processes(tmp_path / "two.npz", names)
  mesh_run.assert_same(tmp_path / "two.npz", expected)
