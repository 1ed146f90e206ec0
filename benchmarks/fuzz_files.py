"""Damages files that come from elsewhere and loads them, many thousand times.

    python benchmarks/fuzz_files.py --mutations=10000 --seed=0 [--kinds=index]

A healthy folder of each kind is made, then for each number a copy of it is
damaged (`mutations`: broken bytes, values that cannot be, links, pipes, names
of other folders, keys twice, ...) and loaded by the package's own loaders, in a
process of its own with bounds on memory and time. Allowed is

  refused  a `UserError` that names the folder or a file in it,
  same     what the healthy folder gives,
  other    something else, if it is what the files say now.

Wrong is all else: other exceptions, a process that dies or hangs, a file
outside of the folder that is opened or changed (by Python: an audit hook,
`watched/sitecustomize.py`, in programs that it starts too; by any code:
the system tells of files beside the folder that links and names lead to), a
program or socket that is opened. Prints a table and what was wrong with its
numbers; `--first=NUMBER --mutations=1 --folder=DIR` shows one again. The exit
code is 1 if something was wrong.
"""

import argparse
import collections
import ctypes
import dataclasses
import importlib.util
import itertools
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import mutations
import numpy as np
from absl import logging

from agrpo_jax import data
from agrpo_jax import errors
from agrpo_jax import models
from agrpo_jax import sft
from agrpo_jax import tasks
from agrpo_jax import types
from agrpo_jax.models import base
from agrpo_jax.models import chat_template
from agrpo_jax.models import lora as lora_lib
from agrpo_jax.models import tokens_fast
from agrpo_jax.models import transformer
from agrpo_jax.port import arrays
from agrpo_jax.port import files
from agrpo_jax.port import model as model_lib
from agrpo_jax.port import model_folder
from agrpo_jax.port import peft
from agrpo_jax.runs import checkpoint
from agrpo_jax.runs import checkpoint_read
from agrpo_jax.tasks import contract

ROOT = pathlib.Path(__file__).resolve().parents[1]
_WATCHED = pathlib.Path(__file__).with_name("watched")

_SECONDS = 60  # for one folder, by the clock
_MAX_BYTES = 4 << 30  # of memory, besides what a process starts with
_MAX_MESSAGE = 20_000  # characters of a refusal
_NETWORK = dict(num_layers=2, width=8, num_heads=2, mlp_width=8)
_CHAT = [{"role": "user", "content": "4*5 <|eot_id|>"}]
# The worker for templates; and by what Python looks for a C library.
_STARTED = ("agrpo_jax.models.chat_template_worker", "'/sbin/ldconfig'")


@dataclasses.dataclass(frozen=True)
class Kind:
  """Files of one kind.

  Attributes:
    make: writes a healthy folder.
    files: of these one is damaged; shell patterns.
    damage: (rng, file, the folder with files of the same names) -> damages it.
    load: what the package makes of a folder.
    misread: (folder, what was loaded) -> how it is not what the files say, "".
    follows_links: out of the folder: people keep data on other disks.
  """

  make: Callable[[pathlib.Path], None]
  files: tuple[str, ...]
  damage: Callable[[random.Random, pathlib.Path, pathlib.Path], None]
  load: Callable[[pathlib.Path], Any]
  misread: Callable[[pathlib.Path, Any], str]
  follows_links: bool = False


# ---------------------------------------------------------------- the kinds


def _make_model(folder: pathlib.Path) -> None:
  sft.make_initial(sft.initial_shape(_NETWORK), 0, folder)
  text = json.dumps({"eos_token_id": [261, 262]})
  (folder / "generation_config.json").write_text(text)


def _make_sharded(folder: pathlib.Path) -> None:
  _make_model(folder)
  shape, params = model_folder.load(folder)
  model_folder.save(folder, shape, params, max_shard_bytes=6000)


def _make_parts(folder: pathlib.Path) -> None:
  """A model whose tokenizer is Qwen2's, in parts."""
  _make_model(folder)
  raw = json.loads((folder / "tokenizer.json").read_text())
  (folder / "tokenizer.json").unlink()
  letters = {one: at for one, at in raw["model"]["vocab"].items() if at < 256}
  vocab = letters | {"us": 256, "use": 257, "user": 258, "12": 259}
  (folder / "vocab.json").write_text(json.dumps(vocab))
  (folder / "merges.txt").write_text("#version: 0.2\nu s\nus e\nuse r\n1 2\n")
  file = folder / "tokenizer_config.json"
  settings = json.loads(file.read_text()) | {
    "tokenizer_class": "DreamTokenizer",
    "added_tokens_decoder": {
      str(token["id"]): {k: v for k, v in token.items() if k != "id"}
      for token in raw["added_tokens"]
    },
  }
  file.write_text(json.dumps(settings))


def _shape() -> base.Shape:
  return sft.initial_shape(_NETWORK)


def _make_adapter(folder: pathlib.Path) -> None:
  settings = lora_lib.Lora(2, 4.0, ("q", "down"))
  params = transformer.abstract_params(_shape())
  adapter = lora_lib.init(settings, params, jax.random.key(0))
  peft.save(folder, _shape(), adapter, settings)


_ROWS: dict[str, list[dict[str, Any]]] = {
  "pairs.jsonl": [
    {"prompt": "1 + 1?", "completion": "2"},
    {"prompt": [{"role": "user", "content": "2?"}], "completion": "é 2"},
  ],
  "gsm8k.jsonl": [{"question": "1 + 1?", "answer": "It is #### 2"}] * 2,
  "math.jsonl": [
    {"problem": "1?", "level": "Level 1", "solution": "\\boxed{\\frac{1}{2}}"}
  ],
  "countdown.jsonl": [
    {"input": "30,100,93", "output": "23"},
    {"nums": [30, 100, 93], "target": 23},
  ],
  "sudoku.jsonl": [
    {"Puzzle": "3014002020004130", "Solution": "3214142323414132"}
  ],
  "gsm8k.csv": [{"question": "1 + 1?", "answer": "It is #### 2"}] * 2,
}


def _make_data(folder: pathlib.Path) -> None:
  folder.mkdir()
  for name, rows in _ROWS.items():
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    if name.endswith(".csv"):
      lines = [",".join(row) for row in [rows[0], *map(dict.values, rows)]]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _make_parquet(folder: pathlib.Path) -> None:
  import pyarrow.parquet  # an optional extra

  folder.mkdir()
  for compression in ("none", "snappy", "zstd"):
    (folder / compression).mkdir()
    table = pyarrow.Table.from_pylist(_ROWS["gsm8k.jsonl"])
    file = folder / compression / "gsm8k.parquet"
    pyarrow.parquet.write_table(table, file, compression=compression)


def _make_run(folder: pathlib.Path) -> None:
  """A work directory with two checkpoints whose arrays hold their steps."""
  with checkpoint.Checkpoints(folder, keep_best=1) as checkpoints:
    for step in (1, 2):
      lora = {"a": jnp.full((4, 4), 1.0 * step), "b": jnp.full(3, 1.0 * step)}
      state = types.TrainState(jnp.int32(step), {}, lora, ())
      checkpoints.save(state, {}, accuracy=step / 4)
      checkpoints.wait()
  source = dataclasses.asdict(base.Source("somewhere"))
  config = {
    "model": source,
    "lora": {"rank": 2, "alpha": 4.0, "targets": ["q", "v"]},
  }
  (folder / "config.json").write_text(json.dumps(config))


def _damage_json(
  rng: random.Random, file: pathlib.Path, outside: pathlib.Path
) -> None:
  del outside
  text = mutations.json_text(rng, file.read_text("utf-8"))
  file.write_text(text, "utf-8", "surrogatepass")


def _damage_index(
  rng: random.Random, file: pathlib.Path, outside: pathlib.Path
) -> None:
  if rng.random() < 0.5:
    _damage_json(rng, file, outside)
    return
  index = json.loads(file.read_text())
  names = index["weight_map"]
  shard = rng.choice([*names.values()])
  other = rng.choice(
    [
      f"../{outside.name}/{shard}",
      str(outside / shard),
      f"./{shard}",
      f"x/../{shard}",
      f"{shard}\x00",
      f"{shard}/",
      "tokenizer.json",
      "config.json",
      *mutations.TEXTS,
    ]
  )
  kind = rng.random()
  if kind < 0.4:
    index["weight_map"] = {
      name: other if one == shard else one for name, one in names.items()
    }
  elif kind < 0.7:
    names[rng.choice([*names])] = other
  elif kind < 0.71:
    names |= {f"extra.{i}": shard for i in range(100_000)}
  elif kind < 0.9:
    (file.parent / shard).unlink()
    (file.parent / shard).symlink_to(outside / shard)
  else:
    file.unlink()
  if file.exists():
    file.write_text(json.dumps(index))


def _damage_tensors(
  rng: random.Random, file: pathlib.Path, outside: pathlib.Path
) -> None:
  if file.suffix == ".json":
    _damage_json(rng, file, outside)
  else:
    file.write_bytes(mutations.safetensors(rng, file.read_bytes()))


def _damage_template(
  rng: random.Random, file: pathlib.Path, outside: pathlib.Path
) -> None:
  settings = json.loads(file.read_text())
  made = mutations.template(rng, settings["chat_template"], outside)
  kind = rng.random()
  if kind < 0.5:
    file.with_name("chat_template.jinja").write_text(made, "utf-8")
    return
  settings["chat_template"] = made
  if kind < 0.7:
    settings["chat_template"] = [{"name": "default", "template": made}]
  if kind < 0.8:
    name = rng.choice(["bos_token", "eos_token", "pad_token"])
    settings[name] = rng.choice([made, mutations.value(rng)])
  file.write_text(json.dumps(settings))


def _damage_text(
  rng: random.Random, file: pathlib.Path, outside: pathlib.Path
) -> None:
  if file.suffix == ".json":
    _damage_json(rng, file, outside)
    return
  content = file.read_bytes()
  if file.suffix == ".jsonl" and rng.random() < 0.8:
    lines = content.decode().splitlines()
    at = rng.randrange(len(lines))
    lines[at] = mutations.json_text(rng, lines[at])
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
  elif file.suffix == ".csv" and rng.random() < 0.3:
    content += b'"' * rng.choice([1, 3]) + b"x," * rng.choice([9, 200_000])
  else:
    content = mutations.bytes_of(rng, content)
  file.write_bytes(content)


def _damage_bytes(
  rng: random.Random, file: pathlib.Path, outside: pathlib.Path
) -> None:
  del outside
  file.write_bytes(mutations.bytes_of(rng, file.read_bytes()))


def _damage_run(
  rng: random.Random, file: pathlib.Path, outside: pathlib.Path
) -> None:
  del outside
  try:
    text = file.read_text("utf-8")
    is_json = isinstance(json.loads(text), dict)
  except ValueError:
    is_json = False
  if is_json and rng.random() < 0.7:
    text = mutations.json_text(rng, text)
    file.write_text(text, "utf-8", "surrogatepass")
  else:
    file.write_bytes(mutations.bytes_of(rng, file.read_bytes()))
  folders = [one for one in file.parents if one.name == "checkpoints"]
  if folders and rng.random() < 0.05:
    name = rng.choice(["²", "٣", "0002", "9" * 200, "-1", "3"])
    (folders[0] / name).mkdir(exist_ok=True)


def _load_model(folder: pathlib.Path) -> Any:
  shape, params = model_folder.load(folder)
  return dataclasses.asdict(shape), params


def _load_tokenizer(folder: pathlib.Path) -> Any:
  shape = model_folder.load_shape(str(folder))
  tokenizer = model_folder.load_tokenizer(str(folder), shape)
  ids = tokenizer.encode_chat(_CHAT, "<answer>")
  ids_BxC = np.array([[1, 2, shape.vocab_size + 7]])
  return (
    (shape.vocab_size, ids),
    (tokenizer.decode(ids), tokenizer.decode_raw(ids)),
    tokenizer.decode_batch(ids_BxC),
  )


def _load_adapter(folder: pathlib.Path) -> Any:
  adapter, settings = peft.load(folder, _shape())
  return dataclasses.asdict(settings), adapter


def _load_data(folder: pathlib.Path) -> Any:
  found: list[Any] = []
  for file in sorted(folder.rglob("*")):
    if file.name == "pairs.jsonl":
      found.append(data.from_jsonl(str(file)))
    elif file.name in _ROWS or file.name == "gsm8k.parquet":
      task = tasks.get(file.stem)
      found.append(contract.examples(task, "train", path=str(file)))
  return [[dataclasses.asdict(one) for one in part] for part in found]


def _load_run(folder: pathlib.Path) -> Any:
  reader = checkpoint_read.Reader(folder)
  best = reader.best_step
  source, lora = model_lib.trained_by(str(folder))
  wanted = {
    "a": jax.ShapeDtypeStruct((4, 4), jnp.float32),
    "b": jax.ShapeDtypeStruct((3,), jnp.float32),
  }
  found = reader.read({"trainable": wanted})
  if found is None:
    raise ValueError("no checkpoint is found")
  items, meta = found
  return (
    (dataclasses.asdict(source), lora and dataclasses.asdict(lora), best),
    meta["train_step"],
    items["trainable"],
  )


def _plain(file: pathlib.Path) -> dict[str, bytes]:
  """Reads tensors without a library."""
  content = file.read_bytes()
  (size,) = struct.unpack("<Q", content[:8])
  body = content[8 + size :]
  return {
    name: body[slice(*entry["data_offsets"])]
    for name, entry in json.loads(content[8 : 8 + size]).items()
    if name != "__metadata__"
  }


_SHAPE_KEYS = (
  *("vocab_size", "embedding_size", "n_layers", "d_model", "n_heads"),
  *("n_kv_heads", "mlp_hidden_size", "rope_theta", "rms_norm_eps"),
  *("max_sequence_length", "mask_token_id", "pad_token_id", "weight_tying"),
)


def _misread_model(folder: pathlib.Path, loaded: Any) -> str:
  values, params = loaded
  shape = base.Shape(**values)
  index = folder / files.INDEX
  names = [files.SINGLE]
  if index.exists():
    names = sorted({*json.loads(index.read_text())["weight_map"].values()})
  said: dict[str, bytes] = {}
  for name in names:
    said |= _plain(folder / name)
  held: dict[str, bytes] = {}

  def hold(entry: arrays.Entry, array: jax.Array) -> None:
    for layer, name in enumerate(entry.names):
      held[name] = arrays.stored(array, entry, layer).tobytes()

  jax.tree.map(hold, arrays.table(shape, models.family_of(shape)), params)
  if held != said:
    return "the tensors are not those of the files"
  raw = json.loads((folder / files.CONFIG).read_text())
  written = models.write_shape(shape)
  for key in _SHAPE_KEYS:
    if raw.get(key) not in (written[key], None):
      value = written[key]
      return f"{key} is {raw[key]!r} in config.json and {value!r} here"
  return ""


def _misread_tokenizer(folder: pathlib.Path, loaded: Any) -> str:
  del folder
  (vocab_size, ids), texts, batch = loaded
  if not all(0 <= one < vocab_size for one in ids):
    return "an id is none of the network's"
  if not all(isinstance(one, str) for one in (*texts, *batch)):
    return "what was decoded is no text"
  return ""


def _misread_adapter(folder: pathlib.Path, loaded: Any) -> str:
  settings, adapter = loaded
  said = _plain(folder / peft.WEIGHTS)
  held = jax.tree.leaves(adapter)
  if not all(np.isfinite(x).all() for x in held):
    return "not all are numbers"
  if {settings["rank"]} != {min(x.shape[-2:]) for x in held}:
    return "the rank is another"
  num_bytes = sum(map(len, said.values()))
  if sum(x.size for x in held) * 4 not in (num_bytes, num_bytes * 2):
    return "the tensors are not those of the file"
  return ""


def _misread_data(folder: pathlib.Path, loaded: Any) -> str:
  del folder
  for part in loaded:
    if not part:
      return "no examples"
    for one in part:
      json.dumps(one, ensure_ascii=False).encode()
      if not all(turn["content"] is not None for turn in one["messages"]):
        return "a message without text"
  return ""


def _misread_run(folder: pathlib.Path, loaded: Any) -> str:
  del folder
  (source, _, best), train_step, trained = loaded
  if not isinstance(source["path"], str):
    return "the model's path is no text"
  if best not in (None, 1, 2) or train_step not in (1, 2):
    return f"the best is {best}, the newest {train_step}"
  if not all((x == train_step).all() for x in jax.tree.leaves(trained)):
    return "the arrays are not those of the train step"
  return ""


_TENSORS = ("*.safetensors",)
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
KINDS: dict[str, Kind] = {
  "safetensors": Kind(
    _make_model, _TENSORS, _damage_tensors, _load_model, _misread_model
  ),
  "index": Kind(
    _make_sharded, (files.INDEX,), _damage_index, _load_model, _misread_model
  ),
  "config": Kind(
    _make_model,
    ("config.json", "config.json", "generation_config.json"),
    _damage_json,
    _load_model,
    _misread_model,
  ),
  "tokenizer": Kind(
    _make_model, _TOKENIZER, _damage_json, _load_tokenizer, _misread_tokenizer
  ),
  "tokenizer_parts": Kind(
    _make_parts,
    ("vocab.json", "merges.txt", "tokenizer_config.json"),
    _damage_text,
    _load_tokenizer,
    _misread_tokenizer,
  ),
  "template": Kind(
    _make_model,
    ("tokenizer_config.json",),
    _damage_template,
    _load_tokenizer,
    _misread_tokenizer,
  ),
  "adapter": Kind(
    _make_adapter,
    (peft.CONFIG, peft.WEIGHTS),
    _damage_tensors,
    _load_adapter,
    _misread_adapter,
  ),
  "data": Kind(
    _make_data,
    ("*",),
    _damage_text,
    _load_data,
    _misread_data,
    follows_links=True,
  ),
  "parquet": Kind(
    _make_parquet,
    ("**/*",),
    _damage_bytes,
    _load_data,
    _misread_data,
    follows_links=True,
  ),
  "checkpoint": Kind(
    _make_run, ("**/*",), _damage_run, _load_run, _misread_run
  ),
}


# ---------------------------------------------------------------- the reader


class _Opened:
  """Tells of the files of a folder that anybody opens, as Linux sees it."""

  _OPEN = 0x20

  def __init__(self, folder: pathlib.Path):
    libc = ctypes.CDLL(None, use_errno=True)
    self._descriptor = libc.inotify_init1(os.O_NONBLOCK)
    for path in (folder, *folder.rglob("*/")):
      watch = os.fsencode(path)
      if libc.inotify_add_watch(self._descriptor, watch, self._OPEN) < 0:
        raise OSError(ctypes.get_errno(), f"cannot watch {path}")

  def any(self) -> bool:
    """Returns whether one was opened since the last call."""
    try:
      return bool(os.read(self._descriptor, 65_536))
    except BlockingIOError:
      return False


def _read(seed: int, jobs: Sequence[tuple[str, int]], at: int) -> None:
  """Damages, loads and judges, a line of JSON for each job from the at-th."""
  folder = pathlib.Path(os.environ["WATCHED_FOLDER"])
  log = open(os.environ["WATCHED_LOG"])  # once: that is written there too
  reports = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # for what a library prints
  logging.set_verbosity(logging.FATAL)
  chat_template.SECONDS = 2
  tokens_fast.SECONDS = 4.0
  num_threads = 0
  for name, some in itertools.groupby(jobs[at:], key=lambda job: job[0]):
    kind = KINDS[name]
    healthy, outside = _beside(folder, name)
    if not outside.exists():
      kind.make(healthy)
      shutil.copytree(healthy, outside)
    expected = kind.load(healthy)
    opened = _Opened(outside)
    if not num_threads:
      _bound_memory()
    num_threads = threading.active_count()
    for _, number in some:
      signal.alarm(_SECONDS)  # not caught: it ends the process in any place
      rng = random.Random(f"{name}/{seed}/{number}")
      _damage(rng, kind, healthy, folder, outside)
      opened.any()
      log.seek(0, os.SEEK_END)
      outcome, detail = _outcome(kind, folder, expected)
      done = [line for line in log if not any(one in line for one in _STARTED)]
      if done and not kind.follows_links:
        outcome, detail = "wrong", f"did {done[0].strip()}"
      if opened.any() and not kind.follows_links:
        outcome, detail = "wrong", "opened a file beside the folder"
      signal.alarm(0)
      print(json.dumps([outcome, detail]), file=reports, flush=True)
      if threading.active_count() > num_threads:
        os._exit(0)  # what took too long goes on in a thread, and would on


def _beside(folder: pathlib.Path, name: str) -> list[pathlib.Path]:
  """The healthy folder of a kind, and the one that must not be read."""
  return [folder.with_name(f"{name}_{one}") for one in ("healthy", "outside")]


def _bound_memory() -> None:
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
  limit = pages * resource.getpagesize() + _MAX_BYTES
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _damage(
  rng: random.Random,
  kind: Kind,
  healthy: pathlib.Path,
  folder: pathlib.Path,
  outside: pathlib.Path,
) -> None:
  shutil.rmtree(folder, ignore_errors=True)
  shutil.copytree(healthy, folder)
  pattern = rng.choice(kind.files)
  found = sorted(one for one in folder.glob(pattern) if one.is_file())
  file = rng.choice(found)
  same = outside / file.parent.relative_to(folder)
  if rng.random() < 0.1:
    mutations.entry(rng, file, same)
  else:
    kind.damage(rng, file, same)


def _outcome(
  kind: Kind, folder: pathlib.Path, expected: Any
) -> tuple[str, str]:
  try:
    loaded = kind.load(folder)
    if _is_same(loaded, expected):
      return "same", ""
    misread = kind.misread(folder, loaded)
    return ("wrong", misread) if misread else ("other", "")
  except errors.UserError as error:
    return _judge(str(error), folder)
  except BaseException as error:
    if isinstance(error, KeyboardInterrupt):
      raise
    frames = traceback.extract_tb(error.__traceback__)
    own = [one for one in frames if one.filename.startswith(str(ROOT))]
    at = f"{pathlib.Path(own[-1].filename).relative_to(ROOT)}:{own[-1].lineno}"
    return "wrong", f"{type(error).__name__} at {at}: {str(error)[:200]}"


def _judge(message: str, folder: pathlib.Path) -> tuple[str, str]:
  """Whether a refusal can be read and says what it is about."""
  known = {str(folder), "config.json", "chat template", "The tokenizer"}
  if not any(one in message for one in known):
    return "wrong", f"a refusal that names nothing: {message[:200]!r}"
  if len(message) > _MAX_MESSAGE:
    return "wrong", f"a refusal of {len(message)} characters"
  return "refused", message


def _is_same(a: Any, b: Any) -> bool:
  if str(jax.tree.structure(a)) != str(jax.tree.structure(b)):
    return False
  leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(
    np.shape(x) == np.shape(y) and np.array_equal(x, y) for x, y in leaves
  )


# ---------------------------------------------------------------- the command


def _fuzz(
  jobs: Sequence[tuple[str, int]], words: Sequence[str], folder: pathlib.Path
) -> Iterator[tuple[str, str]]:
  """Yields (outcome, detail) of jobs, in as many processes as it takes."""
  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": os.pathsep.join([str(_WATCHED), str(ROOT)]),
    "RUST_BACKTRACE": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "WATCHED_FOLDER": str(folder / "case"),
    "WATCHED_LOG": str(folder / "log"),
  }
  at = 0
  while at < len(jobs):
    with (folder / "said").open("w") as said:
      reader = subprocess.Popen(
        [sys.executable, __file__, *words, f"--as_reader={at}"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=said,
      )
      with reader.stdout or open(os.devnull, "rb") as lines:
        for line in lines:
          at += 1
          outcome, detail = json.loads(line)
          yield outcome, detail
      code = reader.wait()
    if code:
      last = (folder / "said").read_text(errors="replace").strip()[-300:]
      if code == 1:  # an exception of its own
        raise RuntimeError(f"the reader failed: {last}")
      at += 1
      what = "hung" if code == -signal.SIGALRM else f"ended with {code}"
      yield "wrong", f"{what}: {last}"


def main(argv: Sequence[str]) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--mutations", type=int, default=100, help="of each kind")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--first", type=int, default=0, help="number to begin at")
  known = [*KINDS]
  if importlib.util.find_spec("pyarrow") is None:
    known.remove("parquet")
  parser.add_argument("--kinds", default=",".join(known))
  parser.add_argument("--folder", help="to work in; default: a temporary one")
  parser.add_argument("--say", action="store_true", help="show each outcome")
  parser.add_argument("--as_reader", type=int, help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  numbers = range(args.first, args.first + args.mutations)
  names = args.kinds.split(",")
  jobs = [(name, number) for name in names for number in numbers]
  if args.as_reader is not None:
    _read(args.seed, jobs, args.as_reader)
    return 0
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(args.folder or temporary).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = zip(jobs, _fuzz(jobs, argv, folder), strict=True)
    return _report(outcomes, args.say)


def _report(
  outcomes: Iterator[tuple[tuple[str, int], tuple[str, str]]],
  is_wordy: bool,
) -> int:
  """Prints a row per kind and what was wrong; 1 if anything was."""
  row = "{:<16} {:>9} {:>8} {:>6} {:>6} {:>6} {:>8}"
  columns = ("refused", "same", "other", "wrong")
  print(row.format("kind", "mutations", *columns, "seconds"))
  wrongs: list[str] = []
  for name, some in itertools.groupby(outcomes, key=lambda one: one[0][0]):
    began, num_before = time.monotonic(), len(wrongs)
    counts: collections.Counter[str] = collections.Counter()
    for (_, number), (outcome, detail) in some:
      counts[outcome] += 1
      if outcome == "wrong":
        wrongs.append(f"{name} {number}: {detail[:300]!r}")
      if is_wordy:
        print(f"{number} {outcome} {detail[:300]!r}")
    seconds = f"{time.monotonic() - began:.0f}"
    total = sum(counts.values())
    print(row.format(name, total, *(counts[c] for c in columns), seconds))
    for wrong in wrongs[num_before:]:
      print(f"WRONG: {wrong}")
    sys.stdout.flush()
  return min(len(wrongs), 1)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
