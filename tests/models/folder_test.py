"""Files of a model's folder: which are opened, and what is said of others."""

import json
import os

import pytest

from agrpo_jax import errors
from agrpo_jax.models import folder as folder_lib


@pytest.fixture
def folder(tmp_path):
  made = tmp_path / "model"
  made.mkdir()
  (tmp_path / "secret.json").write_text('{"secret": 1}')
  return made


def refused(path):
  with pytest.raises(errors.UserError) as caught:
    folder_lib.read_json(path)
  assert str(path.parent) in str(caught.value)
  return str(caught.value)


def test_links_out_of_the_folder(folder):
  path = folder / "config.json"
  for target in ("../secret.json", folder.parent / "secret.json", "/dev/zero"):
    path.symlink_to(target)
    assert "is a link out of its folder" in refused(path)
    path.unlink()
  (folder / "real.json").write_text("[1]")
  path.symlink_to("real.json")
  assert folder_lib.read_json(path) == [1]


def test_a_folder_that_is_a_link_itself(folder):
  (folder / "config.json").write_text("[1]")
  link = folder.with_name("link")
  link.symlink_to(folder)
  assert folder_lib.read_json(link / "config.json") == [1]


def test_the_hubs_cache_is_links(tmp_path):
  snapshot = tmp_path / "models--owner--name" / "snapshots" / "0123abc"
  snapshot.mkdir(parents=True)
  blobs = snapshot.parents[1] / "blobs"
  blobs.mkdir()
  (blobs / "e3b0").write_text("[1]")
  path = snapshot / "config.json"
  path.symlink_to("../../blobs/e3b0")
  assert folder_lib.read_json(path) == [1]
  path.unlink()
  path.symlink_to("../../refs")
  (snapshot.parents[1] / "refs").write_text("[1]")
  assert "is a link out of its folder" in refused(path)


def test_what_has_no_end_is_not_read(folder):
  path = folder / "config.json"
  os.mkfifo(path)  # to open it would wait for a writer
  assert "no file that can be read to an end" in refused(path)
  path.unlink()
  path.symlink_to(path.name)  # a circle
  assert "has no config.json" in refused(path)
  path.unlink()
  path.write_text("{}")
  os.truncate(path, (1 << 25) + 1)
  assert "33,554,433 bytes, more than 33,554,432" in refused(path)
  os.truncate(path, folder_lib.MAX_BYTES + 1)
  with pytest.raises(errors.UserError, match="more than 268,435,456"):
    folder_lib.read_text(path)


@pytest.mark.parametrize(
  "content",
  [b"\xff\xfe", b"{", b"[" * 100_000, b'"\\ud800"', b"9" * 5000, b"{'a': 1}"],
)
def test_what_is_no_json(folder, content):
  path = folder / "config.json"
  path.write_bytes(content)
  assert "cannot be read" in refused(path)
  assert "again" in refused(path)


def test_whole_characters_may_be_escaped(folder):
  (folder / "a.json").write_text(json.dumps("\U0001f600"))
  assert folder_lib.read_json(folder / "a.json") == "\U0001f600"
