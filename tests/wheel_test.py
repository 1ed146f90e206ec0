"""What is installed from the wheel has all that the commands read."""

import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
  """The wheel of a copy: what a build leaves lying would be put in again."""
  source = tmp_path_factory.mktemp("wheel") / "source"
  skip = shutil.ignore_patterns("__pycache__", ".*")
  for folder in ("agrpo_jax", "configs"):
    shutil.copytree(ROOT / folder, source / folder, ignore=skip)
  for file in ("pyproject.toml", "README.md", "LICENSE"):
    shutil.copyfile(ROOT / file, source / file)
  done = subprocess.run(
    [
      *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"),
      *("--no-build-isolation", "--wheel-dir", source.parent, source),
    ],
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  (file,) = source.parent.glob("*.whl")
  with zipfile.ZipFile(file) as opened:
    yield opened


def files(folder: str) -> list[pathlib.Path]:
  return [
    path.relative_to(ROOT)
    for path in (ROOT / folder).rglob("[!.]*")
    if path.is_file() and "__pycache__" not in path.parts
  ]


def test_every_file_of_the_package_is_in_the_wheel(wheel):
  """Code, models, pages of runs, and the mark that there are types."""
  missing = {str(file) for file in files("agrpo_jax")} - {*wheel.namelist()}
  assert not missing


def test_every_config_is_in_the_wheel(wheel):
  """They lie in the package there: --config=NAME finds them."""
  configs = {f"agrpo_jax/{file}" for file in files("configs")}
  assert len(configs) >= 10
  assert not configs - {*wheel.namelist()}


def test_the_wheel_brings_the_package_alone_and_its_command(wheel):
  (info,) = {
    name.split("/")[0]
    for name in wheel.namelist()
    if not name.startswith("agrpo_jax/")
  }
  points = wheel.read(f"{info}/entry_points.txt").decode()
  assert "agrpo = agrpo_jax.__main__:main" in points
