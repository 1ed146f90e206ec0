"""Tests of agrpo_jax.checkpoint_read: beside a run, and by many processes."""

import json
import os
import pathlib
import shutil
import textwrap

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
import tensorstore

from agrpo_jax import errors
from agrpo_jax import types
from agrpo_jax.runs import checkpoint
from agrpo_jax.runs import checkpoint_read
from fixtures import commands


def save(workdir, *train_steps, **options) -> None:
  """Checkpoints whose only array holds their train step."""
  with checkpoint.Checkpoints(workdir, **options) as checkpoints:
    for train_step in train_steps:
      lora = {"a": jnp.full((4, 4), 1.0 * train_step)}
      state = types.TrainState(jnp.int32(train_step), {}, lora, ())
      checkpoints.save(state, {})


def read(workdir) -> int | None:
  """The train step that the array read tells."""
  wanted = {"trainable": {"a": jax.ShapeDtypeStruct((4, 4), jnp.float32)}}
  found = checkpoint_read.Reader(workdir).read(wanted)
  return found and int(found[0]["trainable"]["a"][0, 0])


def test_a_checkpoint_deleted_while_it_is_read_gives_way_to_a_newer_one(
  tmp_path, monkeypatch, caplog
):
  """A run with `keep=1` saves and deletes faster than this process reads."""

  def overtaken(self, path, *args, **kwargs):
    train_step = int(path.parent.name)
    if train_step < 3:
      save(tmp_path, train_step + 1, keep=1)
    return original(self, path, *args, **kwargs)

  handler = ocp.StandardCheckpointHandler
  original = handler.restore
  save(tmp_path, 1, keep=1)
  monkeypatch.setattr(handler, "restore", overtaken)
  assert read(tmp_path) == 3
  assert "unreadable" not in caplog.text


def test_what_is_no_checkpoint_is_not_listed(tmp_path):
  save(tmp_path, 1)
  folder = tmp_path / "checkpoints"
  shutil.copytree(folder / "1", folder / "2.orbax-checkpoint-tmp")
  (folder / "notes").mkdir()
  assert checkpoint_read.Reader(tmp_path).steps() == [1]
  assert read(tmp_path) == 1


@pytest.mark.parametrize("name", ["²", "٣", "007", "9" * 200])
def test_names_that_are_no_numbers_of_ours(tmp_path, name):
  save(tmp_path, 1)
  (tmp_path / "checkpoints" / name).mkdir()
  assert checkpoint_read.Reader(tmp_path).steps() == [1]
  assert read(tmp_path) == 1


@pytest.mark.parametrize("accuracy", ["high", None, [], float("nan"), 10**400])
def test_an_accuracy_that_is_none(tmp_path, accuracy):
  save(tmp_path, 1, 2)
  file = tmp_path / "checkpoints" / "2" / "meta" / "metadata"
  meta = json.loads(file.read_text())
  file.write_text(json.dumps({**meta, "accuracy": accuracy}))
  assert checkpoint_read.Reader(tmp_path).best_step is None
  assert read(tmp_path) == 1


@pytest.mark.parametrize("name", ["2", "2/trainable"])
def test_links_in_a_checkpoint_are_not_followed(tmp_path, caplog, name):
  save(tmp_path, 1, 2)
  folder = tmp_path / "checkpoints" / name
  folder.rename(tmp_path / "elsewhere")
  folder.symlink_to(tmp_path / "elsewhere")
  assert read(tmp_path) == 1
  assert "is a link" in caplog.text


@pytest.mark.parametrize("name", ["meta/metadata", "trainable/d/*"])
def test_pipes_in_a_checkpoint_are_not_waited_for(tmp_path, caplog, name):
  save(tmp_path, 1, 2)
  file = next((tmp_path / "checkpoints" / "2").glob(name))
  file.unlink()
  os.mkfifo(file)
  assert read(tmp_path) == 1
  assert "is no file" in caplog.text


def test_files_that_no_memory_holds(tmp_path, caplog):
  save(tmp_path, 1, 2)
  file = tmp_path / "checkpoints" / "2" / "trainable" / "manifest.ocdbt"
  os.truncate(file, 1 << 36)
  assert read(tmp_path) == 1
  assert "has 68,719,476,736 bytes" in caplog.text


def test_chunks_that_no_memory_holds(tmp_path, caplog):
  save(tmp_path, 1, 2)
  folder = tmp_path / "checkpoints" / "2" / "trainable"
  spec = {"driver": "ocdbt", "base": f"file://{folder}/"}
  store = tensorstore.KvStore.open(spec).result()
  raw = json.loads(store["a/.zarray"])
  store["a/.zarray"] = json.dumps({**raw, "chunks": [1 << 20, 1 << 20]})
  assert read(tmp_path) == 1
  assert "has chunks of (1048576, 1048576)" in caplog.text


def test_nothing_to_read_is_no_mistake(tmp_path):
  assert read(tmp_path) is None


def together(workdir: pathlib.Path, scenario: str) -> list[str]:
  """What two processes print that read what they saved together."""
  script = f"""
    import jax
    import orbax.checkpoint as ocp
    from agrpo_jax.runs import checkpoint
    from agrpo_jax.runs import checkpoint_read
    from agrpo_jax.parallel import processes
    from agrpo_jax import errors
    from agrpo_jax.parallel import mesh
    from agrpo_jax import types

    processes.initialize()
    me = jax.process_index()
    m = mesh.make(data=1, fsdp=2, tensor=1)
    fill = jax.jit(
      lambda x: (x, jax.numpy.full((4, 4), x, jax.numpy.float32)),
      out_shardings=(mesh.replicated(m), mesh.rows(m)))
    states = [
      types.TrainState(train_step, {{}}, {{"a": a}}, ())
      for train_step, a in (fill(4), fill(5))]
    workdir = {str(workdir)!r}
    with checkpoint.Checkpoints(workdir) as checkpoints:
      for state in states:
        checkpoints.save(state, {{}})
    handler = ocp.StandardCheckpointHandler
    restore = handler.restore

    def fails_here(self, path, *args, **kwargs):
      if path.parent.name == "5" and me == 1:
        raise OSError("a broken disk")
      return restore(self, path, *args, **kwargs)

{textwrap.indent(textwrap.dedent(scenario), "    ")}
  """
  words = "-c", textwrap.dedent(script)
  with commands.Pair(workdir / "said", *words) as pair:
    assert pair.codes() == [0, 0], pair.said(0) + pair.said(1)
    return [pair.said(0), pair.said(1)]


def test_damage_that_one_process_sees_counts_for_all(tmp_path):
  outputs = together(
    tmp_path,
    """
    handler.restore = fails_here
    with checkpoint.Checkpoints(workdir) as checkpoints:
      restored, _ = checkpoints.restore(states[0])
      here = restored.lora["a"].addressable_shards[0].data
      print("restored", int(here[0, 0]), int(restored.train_step))
      checkpoints.save(states[1], {})
    """,
  )
  for output in outputs:
    assert "restored 4 4" in output
    assert "checkpoints/5 is unreadable" in output
  assert "OSError: a broken disk" in outputs[1]
  assert "on process 1: OSError: a broken disk" in outputs[0]
  assert (tmp_path / "unreadable_checkpoints" / "5").is_dir()
  assert (tmp_path / "checkpoints" / "5").is_dir()


def test_a_folder_that_is_not_shared_is_refused_by_all(tmp_path):
  outputs = together(
    tmp_path,
    """
    checkpoint_read._PATIENCE_SECONDS = 1
    if me == 1:
      checkpoint_read.Reader._own_steps = lambda self: [4]
    try:
      checkpoint_read.Reader(workdir).read({"trainable": states[0].lora})
    except errors.UserError as error:
      print(error)
    """,
  )
  for output in outputs:
    assert "process 0: [5, 4]; process 1: [4]" in output
    assert "mount it on all of them" in output


def test_none_readable_is_told_with_every_reason(tmp_path, monkeypatch):
  save(tmp_path, 1, 2)

  def broken(self, path, *args, **kwargs):
    raise OSError(f"no {path.parent.name}")

  monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", broken)
  with pytest.raises(errors.UserError) as caught:
    read(tmp_path)
  assert "2: OSError: no 2\n  1: OSError: no 1" in str(caught.value)
