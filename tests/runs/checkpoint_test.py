"""Tests of agrpo_jax.checkpoint: what is saved comes back, or is refused."""

import dataclasses
import json
import shutil
import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agrpo_jax import errors
from agrpo_jax import optimizer
from agrpo_jax import types
from agrpo_jax.runs import checkpoint
from agrpo_jax.runs import checkpoint_meta
from agrpo_jax.runs import checkpoint_read

MODEL = checkpoint_meta.describe_base(
  "models/tiny", "main", {"x": jnp.arange(3.0)}
)
META = {
  "base_model": MODEL.to_json(),
  "config": {"rank": 4},
  "metrics": {"reward": 0.5},
}

TRANSFORMATION = optimizer.make(optimizer.Optimizer(learning_rate=0.1))


def _state(train_step=0, *, has_lora=True, rank=4) -> types.TrainState:
  """A state whose arrays tell the train step they are of."""
  params = {"q": {"kernel": jnp.full((6, 8), 100.0 + train_step)}}
  lora = {
    "q": {
      "a": jnp.arange(6.0 * rank).reshape(6, rank) + train_step,
      "b": jnp.full((rank, 8), -1.0 * train_step),
    }
  }
  trained = lora if has_lora else params
  opt_state = TRANSFORMATION.init(trained)
  for _ in range(train_step):
    _, opt_state = TRANSFORMATION.update(trained, opt_state, trained)
  return types.TrainState(
    train_step=jnp.asarray(train_step, jnp.int32),
    params=params,
    lora=lora if has_lora else None,
    opt_state=opt_state,
  )


def _abstract(state: types.TrainState) -> types.TrainState:
  return jax.eval_shape(lambda: state)


def _save_steps(workdir, steps, **options):
  with checkpoint.Checkpoints(workdir, **options) as checkpoints:
    return [checkpoints.save(_state(step), META) for step in steps]


def _train_step_read(reader) -> int:
  (items, _) = reader.read({"trainable": _abstract(_state()).lora})
  return -int(items["trainable"]["q"]["b"][0, 0])


@pytest.mark.parametrize("has_lora", [True, False])
def test_what_is_saved_comes_back(tmp_path, has_lora):
  state = _state(3, has_lora=has_lora)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    reader = checkpoint_read.Reader(tmp_path)
    assert checkpoints.restore(_abstract(state)) is None
    assert reader.meta() is None
    assert reader.latest_step is None
    assert checkpoints.save(state, META)
    checkpoints.wait()
    assert reader.latest_step == 3
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    restored, meta = checkpoints.restore(
      _abstract(_state(has_lora=has_lora)), base_model=MODEL
    )
    assert reader.meta() == meta
  chex.assert_trees_all_equal_structs(restored, state)
  chex.assert_trees_all_equal(restored.opt_state, state.opt_state)
  chex.assert_trees_all_equal(restored.trainable, state.trainable)
  assert restored.train_step == 3
  assert restored.train_step.dtype == jnp.int32
  assert {name: meta[name] for name in META} == META
  assert meta["versions"]["jax"] == jax.__version__


def test_a_frozen_base_is_neither_saved_nor_touched(tmp_path):
  _save_steps(tmp_path, [1])
  base = {"q": {"kernel": jnp.full((6, 8), 7.0)}}
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    restored, _ = checkpoints.restore(_state(0).replace(params=base))
  assert restored.params is base
  trainable = tmp_path / "checkpoints" / "1" / "trainable" / "_METADATA"
  assert "kernel" not in trainable.read_text()


def test_the_trained_arrays_alone(tmp_path):
  _save_steps(tmp_path, [2])
  items, meta = checkpoint_read.Reader(tmp_path).read(
    {"trainable": _abstract(_state()).lora}
  )
  chex.assert_trees_all_equal(items["trainable"], _state(2).lora)
  assert meta["config"] == {"rank": 4}


def test_reading_makes_nothing(tmp_path):
  reader = checkpoint_read.Reader(tmp_path / "x")
  assert reader.read({"trainable": _state().lora}) is None
  assert reader.meta() is None
  assert list(tmp_path.iterdir()) == []


def test_reading_beside_a_run_sees_what_it_saves(tmp_path):
  reader = checkpoint_read.Reader(tmp_path)
  assert reader.meta() is None
  _save_steps(tmp_path, [2])
  assert _train_step_read(reader) == 2


def test_which_train_steps_are_saved_and_kept(tmp_path):
  saved = _save_steps(tmp_path, range(1, 8), every=2, keep=2)
  assert saved == [False, True, False, True, False, True, False]
  with checkpoint.Checkpoints(tmp_path, every=2, keep=2) as checkpoints:
    assert checkpoints.save(_state(7), META, force=True)
    assert not checkpoints.save(_state(7), META, force=True)
  names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
  assert names == ["6", "7"]


def test_a_save_that_is_due_waits_for_a_train_step_when_none_is_written(
  tmp_path,
):
  with checkpoint.Checkpoints(tmp_path, every=2, keep=9) as checkpoints:
    for step, is_busy, is_saved in (
      (1, False, False),
      (2, False, True),
      (3, True, False),
      (4, True, False),  # due from here on
      (5, True, False),
      (6, False, True),  # once, although two are due
      (7, False, False),
      (8, True, False),
      (9, False, True),
    ):
      assert checkpoints.save(_state(step), META, is_busy=is_busy) == is_saved
    assert checkpoints.save(_state(10), META, is_busy=True, force=True)
    assert not checkpoints.save(_state(11), META)


def test_a_new_best_is_not_put_off(tmp_path):
  options = dict(every=9, keep=1, keep_best=1)
  with checkpoint.Checkpoints(tmp_path, **options) as checkpoints:
    for step, accuracy, is_saved in ((1, 0.1, True), (2, 0.1, False)):
      saved = checkpoints.save(
        _state(step), {}, accuracy=accuracy, is_busy=True
      )
      assert saved == is_saved


def test_busy_while_a_checkpoint_is_being_written(tmp_path):
  go_on = threading.Event()
  seen = []

  def before_commit():
    go_on.wait(timeout=30)
    seen.extend(checkpoint_read.Reader(tmp_path).steps())

  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.before_commit = before_commit
    assert not checkpoints.is_busy
    checkpoints.save(_state(1), META)
    assert checkpoints.is_busy
    go_on.set()
    checkpoints.wait()
    assert not checkpoints.is_busy
  # What is called has happened before anybody can see the checkpoint.
  assert seen == []
  assert checkpoint_read.Reader(tmp_path).steps() == [1]


def _save_evaluated(workdir, accuracies, **options):
  with checkpoint.Checkpoints(workdir, **options) as checkpoints:
    return [
      checkpoints.save(_state(step), META, accuracy=accuracy)
      for step, accuracy in accuracies.items()
    ]


def _kept(workdir) -> list[int]:
  return checkpoint_read.Reader(workdir).steps()


def test_the_best_is_saved_when_it_is_evaluated_and_stays(tmp_path):
  options = dict(every=10, keep=1, keep_best=1)
  accuracies = {5: 0.1, 10: None, 15: 0.3, 20: 0.2, 25: 0.2, 30: None}
  saved = _save_evaluated(tmp_path, accuracies, **options)
  assert saved == [True, True, True, True, False, True]
  assert _kept(tmp_path) == [30, 15]
  # A process of its own knows the best from the files.
  saved = _save_evaluated(tmp_path, {35: 0.3, 40: 0.2, 45: 0.4}, **options)
  assert saved == [False, True, True]
  assert _kept(tmp_path) == [45]
  assert checkpoint_read.Reader(tmp_path).best_step == 45
  # What a run goes on from is the newest one.
  _save_evaluated(tmp_path, {50: 0.0}, **options)
  with checkpoint.Checkpoints(tmp_path, **options) as checkpoints:
    restored, meta = checkpoints.restore(_abstract(_state()))
  assert restored.train_step == 50
  assert meta["accuracy"] == 0.0


def test_of_equally_good_ones_the_earlier_stay(tmp_path):
  accuracies = {1: 0.5, 2: 0.5, 3: 0.5, 4: 0.7, 5: 0.1}
  _save_evaluated(tmp_path, accuracies, keep=1, keep_best=2)
  assert _kept(tmp_path) == [5, 4, 1]
  assert checkpoint_read.Reader(tmp_path).accuracies() == {
    5: 0.1,
    4: 0.7,
    1: 0.5,
  }


def test_without_keep_best_accuracy_changes_nothing(tmp_path):
  saved = _save_evaluated(tmp_path, {1: 0.9, 2: 0.1, 4: 0.1}, every=2, keep=1)
  assert saved == [False, True, True]
  assert _kept(tmp_path) == [4]
  assert checkpoint_read.Reader(tmp_path).best_step == 4


@pytest.mark.parametrize("damage", ["meta", "arrays"])
def test_a_damaged_best_stops_no_run(tmp_path, damage):
  options = dict(keep=1, keep_best=1)
  _save_evaluated(tmp_path, {1: 0.9, 2: 0.1}, **options)
  best = tmp_path / "checkpoints" / "1"
  (_truncate_meta if damage == "meta" else _truncate_data)(best)
  with checkpoint.Checkpoints(tmp_path, **options) as checkpoints:
    restored, _ = checkpoints.restore(_abstract(_state()))
    assert restored.train_step == 2
    checkpoints.save(_state(3), META, accuracy=0.5)
  # Whose accuracy cannot be read is not known to be the best.
  assert _kept(tmp_path) == ([3] if damage == "meta" else [3, 1])


def test_an_unreadable_best_is_forgotten(tmp_path):
  """It was the newest too: its train step is done and judged again."""
  options = dict(keep=1, keep_best=1)
  _save_evaluated(tmp_path, {1: 0.1, 2: 0.9}, keep=2, keep_best=1)
  _truncate_data(tmp_path / "checkpoints" / "2")
  with checkpoint.Checkpoints(tmp_path, every=9, **options) as checkpoints:
    restored, _ = checkpoints.restore(_abstract(_state()))
    assert restored.train_step == 1
    assert checkpoints.save(_state(2), META, accuracy=0.9)
  assert _kept(tmp_path) == [2]


def test_donated_arrays_do_not_change_a_save_under_way(tmp_path):
  """`save` returns before the files are written; the next update reuses the
  memory at once."""
  overwrite = jax.jit(lambda x: jnp.sin(x) + 1e6, donate_argnums=0)
  with checkpoint.Checkpoints(tmp_path, keep=3) as checkpoints:
    for step in (1, 2, 3):
      lora = {"a": jax.random.normal(jax.random.key(step), (1500, 1500))}
      state = _state(0).replace(
        train_step=jnp.int32(step), lora=lora, opt_state=()
      )
      jax.block_until_ready(state)
      checkpoints.save(state, {})
      for _ in range(3):
        lora = overwrite(lora["a"])
        lora = {"a": jax.block_until_ready(lora)}
  for step in (3, 2, 1):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
      restored, _ = checkpoints.restore(_abstract(state))
    want = jax.random.normal(jax.random.key(step), (1500, 1500))
    chex.assert_trees_all_equal(restored.lora, {"a": want})
    shutil.rmtree(tmp_path / "checkpoints" / str(step))


def _truncate_data(folder):
  for path in (folder / "trainable").rglob("d/*"):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty_manifest(folder):
  for path in folder.rglob("manifest.ocdbt"):
    path.write_bytes(b"")


def _truncate_meta(folder):
  path = folder / "meta" / "metadata"
  path.write_text(path.read_text()[:20])


def _remove_optimizer(folder):
  shutil.rmtree(folder / "optimizer")


def _empty_everything(folder):
  for path in folder.rglob("*"):
    if path.is_file():
      path.write_bytes(b"")


DAMAGES = [
  _truncate_data,
  _empty_manifest,
  _truncate_meta,
  _remove_optimizer,
  _empty_everything,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
  tmp_path, damage, caplog
):
  _save_steps(tmp_path, [4, 5])
  damage(tmp_path / "checkpoints" / "5")
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    restored, _ = checkpoints.restore(_abstract(_state()))
    assert restored.train_step == 4
    chex.assert_trees_all_equal(restored.lora, _state(4).lora)
    assert "checkpoints/5 is unreadable" in caplog.text
    assert "Restored train step 4 instead" in caplog.text
    # The run gets to train step 5 again.
    assert checkpoints.save(_state(5), META)
  assert (tmp_path / "unreadable_checkpoints" / "5").is_dir()
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    restored, _ = checkpoints.restore(_abstract(_state()))
  assert restored.train_step == 5


def test_a_flipped_bit_in_a_large_array_is_noticed(tmp_path):
  def state(step):
    lora = {"a": jax.random.normal(jax.random.key(step), (1000, 1000))}
    return types.TrainState(jnp.int32(step), {}, lora, ())

  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(state(1), {})
    checkpoints.save(state(2), {})
  trainable = tmp_path / "checkpoints" / "2" / "trainable"
  (path,) = [p for p in trainable.rglob("d/*") if p.stat().st_size > 1e6]
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    restored, _ = checkpoints.restore(_abstract(state(0)))
  assert restored.train_step == 1


def test_reading_moves_no_damaged_checkpoint(tmp_path):
  _save_steps(tmp_path, [4, 5])
  _truncate_meta(tmp_path / "checkpoints" / "5")
  reader = checkpoint_read.Reader(tmp_path)
  assert _train_step_read(reader) == 4
  assert reader.meta()["config"] == {"rank": 4}
  assert (tmp_path / "checkpoints" / "5").is_dir()


def test_no_readable_checkpoint_is_an_error_not_a_fresh_start(tmp_path):
  _save_steps(tmp_path, [4, 5])
  for step in ("4", "5"):
    _empty_everything(tmp_path / "checkpoints" / step)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(errors.UserError, match="None of the checkpoints") as e:
      checkpoints.restore(_abstract(_state()))
  assert "\n  5: " in str(e.value)
  assert "\n  4: " in str(e.value)
  assert (tmp_path / "checkpoints" / "5").is_dir()


def test_another_base_model_is_refused_and_both_are_named(tmp_path):
  _save_steps(tmp_path, [1])
  other = checkpoint_meta.describe_base("models/other", "", {"x": jnp.ones(3)})
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(errors.UserError) as caught:
      checkpoints.restore(_abstract(_state()), base_model=other)
    assert str(MODEL) in str(caught.value) and str(other) in str(caught.value)
    # The same model in another place is the same model.
    moved = dataclasses.replace(MODEL, path="elsewhere/tiny")
    assert checkpoints.restore(_abstract(_state()), base_model=moved)


def test_other_shapes_are_refused_and_both_are_named(tmp_path):
  _save_steps(tmp_path, [1])
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(errors.UserError) as caught:
      checkpoints.restore(_abstract(_state(rank=2)))
    message = str(caught.value)
    assert "trainable/q/a: float32 (6, 4) there, float32 (6, 2) here" in message
    with pytest.raises(errors.UserError, match="q/kernel: absent there"):
      checkpoints.restore(_abstract(_state(has_lora=False)))
  assert (tmp_path / "checkpoints" / "1").is_dir()


def test_an_unwritable_work_directory_is_a_users_mistake(tmp_path):
  (tmp_path / "file").write_text("not a folder")
  with pytest.raises(errors.UserError, match=r"--config\.workdir"):
    checkpoint.Checkpoints(tmp_path / "file")


def test_a_killed_save_leaves_the_one_before(tmp_path, run_in_subprocess):
  """kill -9 while the second checkpoint is being written."""
  script = f"""
    import os, signal
    import jax
    import jax.numpy as jnp
    from agrpo_jax.runs import checkpoint
    from agrpo_jax import types

    def state(step):
      lora = {{"a": jax.random.normal(jax.random.key(step), (4000, 4000))}}
      return types.TrainState(jnp.int32(step), {{}}, lora, ())

    checkpoints = checkpoint.Checkpoints({str(tmp_path)!r})
    checkpoints.save(state(1), {{}})
    checkpoints.wait()
    second = jax.block_until_ready(state(2))
    checkpoints.save(second, {{}})
    os.kill(os.getpid(), signal.SIGKILL)
  """
  with pytest.raises(AssertionError, match="exit code -9"):
    run_in_subprocess(script, devices=1)
  names = {p.name for p in (tmp_path / "checkpoints").iterdir()}
  assert "1" in names
  lora = {"a": jax.random.normal(jax.random.key(1), (4000, 4000))}
  state = types.TrainState(jnp.int32(0), {}, lora, ())
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    restored, _ = checkpoints.restore(_abstract(state))
  assert restored.train_step in (1, 2)
  key = jax.random.key(int(restored.train_step))
  want = jax.random.normal(key, (4000, 4000))
  np.testing.assert_array_equal(restored.lora["a"], want)
  left = [p.name for p in (tmp_path / "checkpoints").iterdir()]
  assert all(name.isdigit() for name in left), left


def test_one_device_then_eight_then_one(tmp_path, run_in_subprocess):
  _save_steps(tmp_path, [1])
  run_in_subprocess(f"""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from agrpo_jax.runs import checkpoint
    from agrpo_jax.parallel import mesh
    from agrpo_jax import optimizer
    from agrpo_jax import types

    m = mesh.make(data=1, fsdp=2, tensor=4)
    kernel = {{"a": (6, 4), "b": (4, 8)}}
    axes = {{"q": {{"a": ("embed", "rank"), "b": ("rank", "heads")}}}}
    lora = {{"q": {{
      name: jax.ShapeDtypeStruct(shape, jnp.float32)
      for name, shape in kernel.items()}}}}
    where = mesh.shardings(m, axes, lora)
    tx = optimizer.make(optimizer.Optimizer(learning_rate=0.1))
    opt_where = optimizer.state_shardings(tx, lora, where, mesh.replicated(m))
    state = types.TrainState(
      jax.ShapeDtypeStruct((), jnp.int32), {{}}, lora,
      jax.eval_shape(tx.init, lora))
    state = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state,
      types.TrainState(mesh.replicated(m), {{}}, where, opt_where))
    with checkpoint.Checkpoints({str(tmp_path)!r}) as checkpoints:
      restored, _ = checkpoints.restore(state)
      b = restored.lora["q"]["b"]
      assert b.addressable_shards[0].data.shape == (4, 2), b.sharding
      mu = restored.opt_state[1].mu["q"]["b"]
      assert mu.sharding == b.sharding
      np.testing.assert_array_equal(b, -1.0)
      np.testing.assert_array_equal(
        restored.lora["q"]["a"], np.arange(24.0).reshape(6, 4) + 1)
      doubled = jax.jit(lambda s: jax.tree.map(lambda x: 2 * x, s))(restored)
      assert checkpoints.save(doubled, {{"from": 8}})
  """)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    restored, meta = checkpoints.restore(_abstract(_state()))
  assert restored.train_step == 2
  assert meta["from"] == 8
  twice = jax.tree.map(lambda x: 2 * x, _state(1))
  chex.assert_trees_all_equal(restored.lora, twice.lora)
  chex.assert_trees_all_equal(restored.opt_state, twice.opt_state)


def test_meta_is_plain_json(tmp_path):
  _save_steps(tmp_path, [1])
  path = tmp_path / "checkpoints" / "1" / "meta" / "metadata"
  assert json.loads(path.read_text())["arrays"]["trainable"]["q/a"] == [
    [6, 4],
    "float32",
  ]
