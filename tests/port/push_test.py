"""What is written goes to the hub: by a stand-in for its client."""

import types

import huggingface_hub
import pytest
from absl import flags

from agrpo_jax import errors
from agrpo_jax.port import __main__ as port
from agrpo_jax.port import hub
from fixtures import recordings

MODEL = recordings.GOLDEN / "ckpt" / "tiny_mha"


class Api:
  """Notes what it is asked for; `fails` is raised instead."""

  def __init__(self):
    self.calls = []
    self.fails = {}

  def __call__(self):
    return self

  def _note(self, name, *args, **kwargs):
    if name in self.fails:
      raise self.fails[name]
    self.calls.append((name, args, kwargs))

  def whoami(self):
    self._note("whoami")

  def create_repo(self, repository, **kwargs):
    self._note("create_repo", repository, **kwargs)
    return f"https://hub/{repository}"

  def upload_folder(self, **kwargs):
    self._note("upload_folder", **kwargs)


@pytest.fixture
def api(monkeypatch):
  made = Api()
  monkeypatch.setattr(huggingface_hub, "HfApi", made)
  return made


@pytest.fixture
def main(monkeypatch):
  """The command, given its flags."""
  defaults = dict.fromkeys(("from", "to", "checkpoint", "merge_adapter"))
  defaults |= dict(push="", public=False, adapter=False, dtype=None)
  defaults |= dict(max_shard_bytes=10**9)

  def run(**asked):
    values = types.SimpleNamespace(flag_values_dict=lambda: defaults | asked)
    monkeypatch.setattr(flags, "FLAGS", values)
    port.main([])

  return run


@pytest.mark.parametrize("public", [False, True])
def test_the_folder_is_pushed_when_it_is_written(
  api, main, tmp_path, capsys, public
):
  to = tmp_path / "out"
  asked = {"from": str(MODEL), "to": str(to), "push": "me/mine"}
  main(**asked, public=public)
  names = [name for name, *_ in api.calls]
  assert names == ["whoami", "create_repo", "upload_folder"]
  _, create, upload = api.calls
  assert create[1] == ("me/mine",)
  assert create[2] == {"private": not public, "exist_ok": True}
  assert upload[2]["repo_id"] == "me/mine"
  assert upload[2]["folder_path"] == str(to)
  assert (to / "model.safetensors").exists()
  assert "Pushed it to https://hub/me/mine" in capsys.readouterr().out


@pytest.mark.parametrize("repository", ["mine", "a/b/c", "https://hub/a", "/x"])
def test_what_is_no_repository(api, repository):
  with pytest.raises(errors.UserError, match="OWNER/NAME"):
    hub.check_push(repository)
  assert not api.calls


def test_nothing_is_written_when_nobody_is_logged_in(api, main, tmp_path):
  api.fails["whoami"] = OSError("Token is required\nmore")
  to = tmp_path / "out"
  with pytest.raises(errors.UserError, match="hf auth login"):
    main(**{"from": str(MODEL), "to": str(to), "push": "me/mine"})
  assert not to.exists()


@pytest.mark.parametrize("name", ["create_repo", "upload_folder"])
def test_a_push_that_fails_says_what_is_left(api, tmp_path, name):
  api.fails[name] = OSError("403 Forbidden\nmore")
  with pytest.raises(errors.UserError) as told:
    hub.push(tmp_path, "me/mine", is_public=False)
  assert f"hf upload me/mine {tmp_path}" in str(told.value)
  assert "403 Forbidden" in str(told.value)


def test_public_is_of_what_is_pushed(main, tmp_path):
  with pytest.raises(errors.UserError, match="--public goes with --push"):
    main(**{"from": str(MODEL), "to": str(tmp_path / "x")}, public=True)
