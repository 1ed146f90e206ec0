"""Checkpoints: read, written, and refused with everything said at once."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tracemalloc

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from agrpo_jax import errors
from agrpo_jax import models
from agrpo_jax.models import tokens
from agrpo_jax.models import transformer
from agrpo_jax.port import hub
from agrpo_jax.port import model_folder
from fixtures import commands

CKPT = pathlib.Path(__file__).parents[1] / "testdata" / "golden" / "ckpt"
MHA, GQA = CKPT / "tiny_mha", CKPT / "tiny_gqa_sharded"
NORM = "model.transformer.ln_f.weight"
Q = "model.transformer.blocks.1.q_proj.weight"


@pytest.fixture
def broken(tmp_path):
  """A copy of a checkpoint in one file, whose tensors a test may change."""

  def make(change=None, source=MHA):
    folder = tmp_path / "broken"
    shutil.copytree(source, folder)
    if change is not None:
      tensors = safetensors.numpy.load_file(folder / "model.safetensors")
      change(tensors)
      safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder

  return make


def stored(folder):
  tensors = {}
  for file in folder.glob("*.safetensors"):
    tensors |= safetensors.numpy.load_file(file)
  return tensors


def dtypes(params):
  return {leaf.dtype.name for leaf in jax.tree.leaves(params)}


def command(*args):
  return commands.run("-m", "agrpo_jax.port", *args)


class TestLoad:
  def test_as_stored(self):
    config, params = model_folder.load(GQA)
    tensors = stored(GQA)
    assert dtypes(params) == {"bfloat16"}
    blocks = "model.transformer.blocks"
    for layer in range(2):
      np.testing.assert_array_equal(
        params["layers"]["down"]["kernel"][layer],
        tensors[f"{blocks}.{layer}.ff_out.weight"].T,
      )
    np.testing.assert_array_equal(
      params["last_layer"]["mlp_norm"]["scale"],
      tensors[f"{blocks}.2.ff_norm.weight"],
    )
    np.testing.assert_array_equal(
      params["embed"]["table"], tensors["model.transformer.wte.weight"]
    )
    np.testing.assert_array_equal(
      params["head"]["kernel"], tensors["model.transformer.ff_out.weight"].T
    )
    chex.assert_trees_all_equal_shapes(
      params, transformer.abstract_params(config)
    )

  def test_dtype_and_switches(self):
    config, params = model_folder.load(
      str(GQA), dtype="float32", compute_dtype="bfloat16", remat="full"
    )
    assert config.dtype == "bfloat16" and config.remat == "full"
    assert dtypes(params) == {"float32"}
    _, as_stored = model_folder.load(GQA)
    chex.assert_trees_all_equal(
      params, jax.tree.map(lambda x: x.astype(jnp.float32), as_stored)
    )

  def test_config_alone(self):
    assert model_folder.load_shape(str(MHA), remat="dots").remat == "dots"

  def test_host_holds_one_array_at_a_time(self, tmp_path):
    config = models.read_shape(
      {
        **json.loads((MHA / "config.json").read_text()),
        "n_layers": 9,
        "d_model": 128,
        "mlp_hidden_size": 512,
      }
    )
    params = jax.tree.map(
      lambda one: jnp.ones(one.shape, one.dtype),
      transformer.abstract_params(config),
    )
    model_folder.save(tmp_path, config, params)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    tracemalloc.start()
    _, loaded = model_folder.load(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # On a CPU the parameters may be the host's own memory: once, not twice.
    assert peak < total + largest
    assert total > 4 * largest
    chex.assert_trees_all_equal(loaded, params)

  def test_sharded(self, run_in_subprocess):
    """Every device reads its own part, and the parts are right."""
    run_in_subprocess(f"""
      import jax, numpy as np
      from agrpo_jax.models import transformer
      from agrpo_jax.parallel import mesh as mesh_lib
      from agrpo_jax.port import model_folder
      mesh = mesh_lib.make(2, 2, 2)
      def where(config):
        return mesh_lib.shardings(
          mesh,
          transformer.logical_axes(config),
          transformer.abstract_params(config),
        )
      config, params = model_folder.load("{GQA}", shardings=where)
      _, whole = model_folder.load("{GQA}")
      for ours, theirs, sharding in zip(
        *map(jax.tree.leaves, (params, whole, where(config))), strict=True
      ):
        assert ours.sharding == sharding
        np.testing.assert_array_equal(ours, theirs)
      q = params["layers"]["q"]["kernel"]
      assert q.addressable_shards[0].data.shape == (2, 32, 32)
    """)


class TestRefusals:
  def test_all_problems_in_one_message(self, broken):
    def change(tensors):
      del tensors[NORM]
      tensors[Q] = tensors[Q][:32]
      tensors["model.transformer.wpe.weight"] = np.zeros((2, 2), np.float32)
      tensors["model.transformer.wte.weight"][3, 3] = np.nan
      tensors["model.transformer.ff_out.weight"][0, 0] = np.inf
      name = "model.transformer.blocks.0.ff_proj.weight"
      tensors[name] = tensors[name].astype(np.int32)

    with pytest.raises(errors.UserError) as caught:
      model_folder.load(broken(change))
    message = str(caught.value)
    assert f"{NORM} is missing" in message
    assert f"{Q} has shape (32, 64), expected (64, 64)" in message
    assert "wpe.weight is unexpected" in message
    assert "wte.weight has values that are NaN or infinite" in message
    assert "transformer.ff_out.weight has values that are NaN" in message
    assert "blocks.0.ff_proj.weight is I32" in message
    assert message.count("\n  ") == 6

  @pytest.mark.parametrize("name", ["x", NORM])
  def test_a_header_that_speaks_of_more_than_memory_holds(self, broken, name):
    folder = broken(lambda tensors: tensors.pop(NORM))
    file = folder / "model.safetensors"
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header, values = json.loads(content[8:end]), content[end:]
    size = len(values) + (1 << 42)
    header[name] = {
      "dtype": "F32",
      "shape": [1 << 40],
      "data_offsets": [len(values), size],
    }
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + values)
    os.truncate(file, 8 + len(text) + size)  # 4 TiB that take no room
    with pytest.raises(errors.UserError, match=f"{name} (is un|has shape)"):
      model_folder.load(folder)

  @pytest.mark.parametrize("dtype", [None, "float32"])
  def test_not_finite_only(self, broken, dtype):
    def change(tensors):
      tensors[Q][0, 5] = -np.inf
      tensors[NORM][0] = np.nan

    with pytest.raises(errors.UserError) as caught:
      model_folder.load(broken(change), dtype=dtype)
    for name in (Q, NORM):
      assert f"{name} has values that are NaN or infinite" in str(caught.value)

  def test_not_finite_in_bfloat16(self, broken):
    def change(tensors):
      for name in tensors:
        tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
      tensors[Q][1, 1] = np.nan

    with pytest.raises(errors.UserError, match=r"q_proj.*NaN"):
      model_folder.load(broken(change))

  def test_too_large_for_float16(self, broken):
    def change(tensors):
      tensors[Q][1, 1] = 1e6

    with pytest.raises(errors.UserError, match=r"q_proj.*float16"):
      model_folder.load(broken(change), dtype="float16")

  def test_layers_of_two_dtypes(self, broken):
    def change(tensors):
      name = Q.replace("blocks.1", "blocks.0")
      tensors[name] = tensors[name].astype(np.float16)
      for one in list(tensors):
        if "blocks.1" in one:
          tensors[one.replace("blocks.1", "blocks.2")] = tensors[one]

    folder = broken(change)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "n_layers": 3}))
    with pytest.raises(errors.UserError, match="differ in dtype"):
      model_folder.load(folder)
    _, params = model_folder.load(folder, dtype="float32")
    assert params["layers"]["q"]["kernel"].dtype == jnp.float32

  @pytest.mark.parametrize("size", [0, 5, 100, 20_000])
  def test_truncated(self, broken, size):
    folder = broken()
    os.truncate(folder / "model.safetensors", size)
    with pytest.raises(errors.UserError, match=r"model.safetensors is trunc"):
      model_folder.load(folder)

  def test_not_safetensors(self, broken):
    folder = broken()
    (folder / "model.safetensors").write_text("<!DOCTYPE html>" * 9)
    with pytest.raises(errors.UserError, match="not a safetensors file"):
      model_folder.load(folder)

  def test_missing_shard_and_bad_shard(self, broken):
    folder = broken(source=GQA)
    (folder / "model-00001-of-00002.safetensors").unlink()
    os.truncate(folder / "model-00002-of-00002.safetensors", 999)
    with pytest.raises(errors.UserError) as caught:
      model_folder.load(folder)
    assert "model-00001-of-00002.safetensors is missing" in str(caught.value)
    assert "model-00002-of-00002.safetensors is trunc" in str(caught.value)

  def test_index_that_lies(self, broken):
    folder = broken(source=GQA)
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"][Q] = "model-00002-of-00002.safetensors"
    file.write_text(json.dumps(index))
    with pytest.raises(errors.UserError, match=r"q_proj.weight is (not )?in"):
      model_folder.load(folder)

  @pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../b"}}'],
  )
  def test_bad_index(self, broken, text):
    folder = broken(source=GQA)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(errors.UserError, match=r"index\.json"):
      model_folder.load(folder)

  def test_no_config(self, broken):
    folder = broken()
    (folder / "config.json").unlink()
    with pytest.raises(errors.UserError, match=r"has no config\.json"):
      model_folder.load(folder)

  def test_malformed_config(self, broken):
    folder = broken()
    (folder / "config.json").write_text('{"d_model": 64,')
    with pytest.raises(errors.UserError, match=r"config\.json cannot be read"):
      model_folder.load(folder)

  def test_pickles_are_not_opened(self, broken):
    folder = broken()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(errors.UserError, match=r"pytorch_model\.bin.*code"):
      model_folder.load(folder)

  @pytest.mark.parametrize(
    "path", ["./no/such/folder", "/no/such", "~/no-such", "nosuch", "a/b/c"]
  )
  def test_no_such_folder(self, path):
    with pytest.raises(errors.UserError, match="looked for"):
      model_folder.load(path)

  def test_bundled_models_have_names(self, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (hub.folder("tiny-sudoku", hub.CHECKPOINT) / "config.json").exists()
    (tmp_path / "tiny-sudoku").mkdir()
    assert hub.folder("tiny-sudoku", []) == pathlib.Path("tiny-sudoku")

  def test_file_instead_of_folder(self):
    with pytest.raises(errors.UserError, match="is a file"):
      model_folder.load(MHA / "config.json")

  def test_git_lfs_pointers(self, broken):
    """As git leaves them where git-lfs is not installed."""
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n"
    folder = broken()
    (folder / "model.safetensors").write_text(text)
    with pytest.raises(errors.UserError, match="git lfs pull") as caught:
      model_folder.load(folder)
    assert "model.safetensors" in str(caught.value)
    (folder / "config.json").write_text(text)
    with pytest.raises(errors.UserError, match="git lfs pull") as caught:
      model_folder.load_shape(str(folder))
    assert "config.json" in str(caught.value)

  @pytest.mark.parametrize("num_layers", [30, 10**9])
  def test_more_layers_than_there_are_tensors(self, broken, num_layers):
    folder = broken()
    raw = json.loads((folder / "config.json").read_text())
    raw["n_layers"] = num_layers
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(errors.UserError) as caught:
      model_folder.load(folder)
    assert f"{num_layers} layers" in str(caught.value)
    assert "21 tensors" in str(caught.value)

  def test_hub_id_offline(self, tmp_path):
    """In a process of its own: the hub's client reads its settings once."""
    done = subprocess.run(
      [
        sys.executable,
        "-c",
        "from agrpo_jax.port import model_folder;"
        "model_folder.load('no-such-owner/no-such-model')",
      ],
      env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
      capture_output=True,
      text=True,
      check=False,
    )
    assert "UserError" in done.stderr
    assert "offline" in done.stderr and "path of the folder" in done.stderr

  @pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
  def test_links_out_of_the_folder(self, broken, name):
    folder = broken()
    (folder / name).unlink()
    (folder / name).symlink_to(MHA / name)
    with pytest.raises(errors.UserError, match="is a link out of its folder"):
      model_folder.load(folder)

  @pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "/a", "a\x00", "\ud800", "long " * 1000]
  )
  def test_an_index_that_names_no_file_of_the_folder(self, broken, name):
    folder = broken(source=GQA)
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"][Q] = name
    file.write_text(json.dumps(index))
    with pytest.raises(errors.UserError, match=str(folder)):
      model_folder.load(folder)

  @pytest.mark.parametrize(
    "changes",
    [
      {"rope_theta": 10**400},
      {"rms_norm_eps": 1e39},
      {"mlp_ratio": 10**400, "mlp_hidden_size": None},
      {"mlp_ratio": 0.5, "mlp_hidden_size": None, "d_model": 10**400},
      {"d_model": 10**400},
      {"vocab_size": 2**64},
    ],
  )
  def test_numbers_that_nothing_holds(self, broken, changes):
    folder = broken()
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))
    named = "|".join(changes)
    with pytest.raises(errors.UserError, match=f"({named})=1|expected"):
      model_folder.load(folder)


class TestSave:
  def test_a_link_in_the_source_gives_nothing_away(self, broken, tmp_path):
    """What it leads to would be a file of the folder that is published."""
    (tmp_path / "key.txt").write_text("secret")
    source, to = broken(), tmp_path / "to"
    (source / "notes.txt").symlink_to("../key.txt")
    config, params = model_folder.load(source)
    with pytest.raises(errors.UserError, match=r"notes\.txt is a link out"):
      model_folder.save(to, config, params, source=source)
    assert not to.exists()

  @pytest.mark.parametrize("umask", [0o022, 0o027])
  def test_files_have_the_mode_that_the_umask_gives(self, umask, tmp_path):
    config, params = model_folder.load(MHA)
    before = os.umask(umask)
    try:
      model_folder.save(tmp_path, config, params)
    finally:
      os.umask(before)
    for file in tmp_path.iterdir():
      assert file.stat().st_mode & 0o777 == 0o666 & ~umask, file.name

  @pytest.mark.parametrize("name", ["tiny_mha", "tiny_gqa_sharded"])
  def test_round_trip_is_byte_equal(self, name, tmp_path):
    config, params = model_folder.load(CKPT / name)
    model_folder.save(
      tmp_path, config, params, source=CKPT / name, max_shard_bytes=200_000
    )
    ours, theirs = stored(tmp_path), stored(CKPT / name)
    assert set(ours) == set(theirs)
    for tensor, expected in theirs.items():
      assert ours[tensor].dtype == expected.dtype
      assert ours[tensor].tobytes() == expected.tobytes()
    for file in ("config.json", "generation_config.json"):
      assert (tmp_path / file).read_bytes() == (CKPT / name / file).read_bytes()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
      x.nbytes for x in theirs.values()
    )
    assert set(index["weight_map"]) == set(theirs)
    for file in set(index["weight_map"].values()):
      held = safetensors.numpy.load_file(tmp_path / file)
      assert set(held) == {
        one for one, where in index["weight_map"].items() if where == file
      }
      assert len(held) == 1 or sum(x.nbytes for x in held.values()) <= 200_000

  def test_without_source(self, tmp_path):
    config, params = model_folder.load(GQA)
    model_folder.save(tmp_path, config, params)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["dtype"] == "bfloat16"
    golden = json.loads((GQA / "config.json").read_text())
    assert set(golden) - set(raw) == {"transformers_version"}
    assert {key: raw[key] for key in golden if key in raw} == {
      key: value
      for key, value in golden.items()
      if key != "transformers_version"
    }
    assert [file.name for file in tmp_path.glob("*.safetensors")] == [
      "model.safetensors"
    ]
    again, loaded = model_folder.load(tmp_path)
    assert again == config
    chex.assert_trees_all_equal(loaded, params)

  def test_variants(self, tmp_path):
    """Biases and a tied head have names of their own, or none."""
    config = models.read_shape(
      {
        **json.loads((MHA / "config.json").read_text()),
        "include_qkv_bias": True,
        "weight_tying": True,
        "n_layers": 1,
        "n_kv_heads": 2,
      }
    )
    params = transformer.init(config, jax.random.key(0))
    model_folder.save(tmp_path, config, params)
    tensors = stored(tmp_path)
    blocks = "model.transformer.blocks.0"
    assert tensors[f"{blocks}.q_proj.bias"].shape == (64,)
    assert tensors[f"{blocks}.k_proj.bias"].shape == (32,)
    assert "model.transformer.ff_out.weight" not in tensors
    again, loaded = model_folder.load(tmp_path)
    assert again == config
    chex.assert_trees_all_equal(loaded, params)

  def test_source_files_are_copied_and_dtype_is_said(self, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(MHA, source)
    tokens.write_byte_tokenizer(source)
    (source / "modeling_llada.py").write_text("raise RuntimeError('run')")
    (source / "notes.md").write_text("not part of a checkpoint")
    config, params = model_folder.load(source, dtype="bfloat16")
    model_folder.save(target, config, params, source=source)
    expected = {
      "config.json",
      "generation_config.json",
      "model.safetensors",
      "modeling_llada.py",
      "special_tokens_map.json",
      "tokenizer.json",
      "tokenizer_config.json",
    }
    assert {file.name for file in target.iterdir()} == expected
    for name in expected - {"config.json", "model.safetensors"}:
      assert (target / name).read_bytes() == (source / name).read_bytes()
    raw = json.loads((source / "config.json").read_text())
    assert json.loads((target / "config.json").read_text()) == {
      **raw,
      "dtype": "bfloat16",
    }

  def test_source_of_another_network(self, tmp_path):
    config, params = model_folder.load(MHA)
    with pytest.raises(errors.UserError, match=r"num_layers 3 there, 2 here"):
      model_folder.save(tmp_path / "out", config, params, source=GQA)
    assert not (tmp_path / "out").exists()

  def test_replaces_what_was_there(self, tmp_path):
    """Shards and index of an older checkpoint would be mixed with the new."""
    config, params = model_folder.load(GQA)
    model_folder.save(tmp_path, config, params, max_shard_bytes=100_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    zeros = jax.tree.map(jnp.zeros_like, params)
    model_folder.save(tmp_path, config, zeros, source=tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
      "config.json",
      "model.safetensors",
    ]
    chex.assert_trees_all_equal(model_folder.load(tmp_path)[1], zeros)

  def test_unwritable(self, tmp_path):
    config, params = model_folder.load(MHA)
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.UserError, match="cannot be written"):
      model_folder.save(tmp_path / "file" / "out", config, params)


class TestCommand:
  def test_round_trip(self, tmp_path):
    done = command(f"--from={GQA}", f"--to={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert "204,224 parameters" in done.stdout
    ours, theirs = stored(tmp_path / "out"), stored(GQA)
    assert {k: v.tobytes() for k, v in ours.items()} == {
      k: v.tobytes() for k, v in theirs.items()
    }
    written = (tmp_path / "out" / "README.md").read_text()
    assert f"Base model: `{GQA.name}`; its licence" in written
    assert f"    agrpo port --from={GQA.name} --to=FOLDER\n" in written
    assert str(tmp_path) not in written

  def test_a_card_that_is_there_is_kept(self, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    done = command(f"--from={GQA}", f"--to={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "README.md").read_text() == "mine"

  def test_mistakes_end_with_one_message_and_code_2(self, tmp_path):
    for args, message in (
      ((f"--from={MHA}",), "Give --to="),
      ((f"--from={MHA}", f"--to={MHA}"), "already holds weights"),
      (("--from=./none", f"--to={tmp_path / 'out'}"), "There is no folder"),
    ):
      done = command(*args)
      assert done.returncode == 2
      assert message in done.stderr and "Traceback" not in done.stderr
