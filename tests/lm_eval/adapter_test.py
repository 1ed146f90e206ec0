"""The adapter with a stand-in for lm-eval; run_lm_eval.py has the real one."""

import json
import multiprocessing
import pathlib
import shutil
import sys
import types

import jax
import numpy as np
import pytest
import tokenizers
from absl import logging
from tokenizers import decoders
from tokenizers import models as tokenizer_models
from tokenizers import pre_tokenizers

from agrpo_jax import config as config_lib
from agrpo_jax import errors
from agrpo_jax import evaluate
from agrpo_jax import settings as settings_lib
from agrpo_jax.lm_eval import __main__ as lm_eval_command
from agrpo_jax.lm_eval import adapter
from fixtures import recordings
from fixtures import sudoku

MODEL = str(sudoku.MODEL)
SETTINGS = dict(
  completion_length=16,
  block_length=16,
  num_denoise_steps=4,
  dtype="float32",
  bucket=8,
)
FILE = pathlib.Path(__file__).parents[1] / "testdata" / "lm_eval" / "toy.jsonl"
PUZZLES = [json.loads(line) for line in FILE.read_text("utf-8").splitlines()]


class Kept:
  """Stands in for lm-eval's cache hook."""

  def __init__(self):
    self.answers = []

  def add_partial(self, kind, args, answer):
    self.answers.append((kind, args, answer))


class LM:
  """Stands in for lm-eval's base class."""

  def __init__(self):
    self.cache_hook = Kept()


class Model(adapter.Adapter, LM):
  pass


@pytest.fixture(scope="module")
def model() -> Model:
  return Model(MODEL, batch_size=4, num_draws=8, **SETTINGS)


@pytest.fixture(scope="module")
def lively() -> Model:
  """Draws at a temperature that makes repetitions differ."""
  return Model(MODEL, batch_size=4, temperature=3.0, seed=1, **SETTINGS)


def request(*args) -> types.SimpleNamespace:
  return types.SimpleNamespace(args=args)


def chat(model: Model, text: str) -> str:
  return model.apply_chat_template([{"role": "user", "content": text}])


def test_contexts(model):
  tokenizer = model._tokenizer
  messages = [
    {"role": "system", "content": "<|eot_id|>"},
    {"role": "user", "content": "Why?"},
  ]
  context = model.apply_chat_template(messages)
  assert model.encode(context) == tokenizer.encode_chat(messages)
  begun = [*messages, {"role": "assistant", "content": "Because"}]
  context = model.apply_chat_template(begun, add_generation_prompt=False)
  assert model.encode(context) == tokenizer.encode_chat(messages, "Because")
  assert model.encode("a <|eot_id|>") == tokenizer.encode("a <|eot_id|>")


def test_spaces_go_to_the_continuation(model):
  encode = model._tokenizer.encode
  assert model.encode_pair("ab ", "cd") == (encode("ab"), encode(" cd"))
  assert model.encode_pair("", "cd") == ([], encode("cd"))
  context = chat(model, "ab ")
  assert model.encode_pair(context, "cd") == (
    model.encode(context),
    encode("cd"),
  )


def test_generates_what_was_learned_and_cuts_it(model):
  contexts = [chat(model, one["puzzle"]) for one in PUZZLES]
  texts = model.generate_until([request(one, {}) for one in contexts])
  assert all(len(text) == 16 and {*text} <= {*"1234"} for text in texts)
  assert texts[1] == PUZZLES[1]["solution"]
  stop = texts[0][5:7]
  (cut,) = model.generate_until([request(contexts[0], {"until": [stop]})])
  assert cut == texts[0][: texts[0].index(stop)]
  assert model.generate_until([]) == []


def test_draws_do_not_depend_on_other_requests(lively):
  lively.cache_hook = Kept()
  contexts = [chat(lively, one["puzzle"]) for one in PUZZLES[:2]]
  wide = chat(lively, "a much longer context than that")
  requests = [request(one, {}) for one in (*contexts, wide, contexts[0])]
  first, second, _, again = lively.generate_until(requests)
  assert first != again  # a repetition is another draw
  assert lively.generate_until(requests[:1]) == [first]
  assert lively.generate_until([requests[1], requests[0], requests[0]]) == [
    second,
    first,
    again,
  ]
  kinds = [kind for kind, _, _ in lively.cache_hook.answers]
  assert kinds == ["generate_until"] * 8
  assert ("generate_until", requests[0].args, first) in (
    lively.cache_hook.answers
  )


@pytest.fixture(scope="module")
def in_parts(tmp_path_factory):
  """The folder of a tiny Fast-dLLM v2, whose tokens are characters."""
  golden2 = pathlib.Path(__file__).parents[1] / "testdata" / "golden2"
  folder = tmp_path_factory.mktemp("in_parts") / "model"
  shutil.copytree(golden2 / "ckpt" / "tiny_fast_dllm_v2", folder)
  known = {chr(0x30 + at): at for at in range(80)}
  tokenizer = tokenizers.Tokenizer(
    tokenizer_models.WordLevel(known, unk_token="?")
  )
  tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
  tokenizer.decoder = decoders.Fuse()
  special = {88: "<|im_end|>", 91: "<|mask|>"}
  tokenizer.add_special_tokens(
    [special.get(at, f"<|{at}|>") for at in range(80, 96)]
  )
  tokenizer.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(
    json.dumps(
      {
        "mask_token": "<|mask|>",
        "eos_token": "<|im_end|>",
        "chat_template": "{% for m in messages %}{{ m['content'] }}"
        "{% endfor %}",
      }
    )
  )
  return str(folder)


def test_generates_what_evaluate_does_where_a_position_leads(in_parts):
  drawing = dict(completion_length=64, num_denoise_steps=64)
  c = sudoku.config(num_examples=3)
  c.model.path = in_parts
  config_lib.use_sampler(c, "fast_dllm_v2")
  c.evaluate.update(drawing)
  done = evaluate.run(settings_lib.rl(c)).records

  def generated(**changes):
    model = Model(
      in_parts,
      batch_size=4,
      sampler="fast_dllm_v2",
      dtype="float32",
      bucket=8,
      **drawing | changes,
    )
    return model.generate_until(
      [request(chat(model, record["prompt"]), {}) for record in done]
    )

  texts = [record["completion"] for record in done]
  assert all(texts)
  assert generated() == texts
  assert generated(lead_every=0) != texts
  with pytest.raises(errors.UserError, match="completion_length=32 or 64"):
    generated(completion_length=40, num_denoise_steps=40)


def test_the_end_of_the_text_is_where_the_first_eos_is(model):
  ids = model._tokenizer.encode("ab")
  eos, eot = model._tokenizer.eos_id, model._tokenizer.eot_id
  assert model._text([*ids, eos, *ids]) == "ab"
  assert model._text([*ids, eot, *ids]) == "ab"
  assert model._text(ids) == "ab"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(model._tokenizer, "stop_ids", (ids[1],))
    assert model._text(ids) == "a"


def test_a_single_token_has_its_exact_probability(model):
  config, _, network = recordings.network_at(MODEL)
  context = chat(model, PUZZLES[0]["puzzle"])
  ids = model.encode(context)
  row_1xL = np.array([[*ids, config.mask_id]])
  logits_V = jax.jit(network.logits)(
    row_1xL, np.array([len(ids) + 1]), np.array([[len(ids)]])
  )[0, 0]
  found = model.loglikelihood([request(context, digit) for digit in "1234"])
  digits = [model._tokenizer.encode(digit)[0] for digit in "1234"]
  np.testing.assert_allclose(
    [value for value, _ in found],
    jax.nn.log_softmax(logits_V)[np.array(digits)],
    atol=1e-4,
  )
  assert [matches for _, matches in found] == [
    digit == int(logits_V.argmax()) for digit in digits
  ]


def test_likelihoods_do_not_depend_on_other_requests(model):
  requests = [
    request(chat(model, one["puzzle"]), one[name])
    for one in PUZZLES
    for name in ("solution", "wrong")
  ]
  found = model.loglikelihood(requests)
  right, wrong = found[::2], found[1::2]
  assert all(a[0] > b[0] for a, b in zip(right, wrong, strict=True))
  assert not any(matches for _, matches in wrong)
  assert right[1][1]  # this one it solves
  text = PUZZLES[0]["solution"]
  others = [requests[2], request("", ""), request("", text)]
  again, nothing, whole = model.loglikelihood(others)
  np.testing.assert_allclose(again[0], found[2][0], rtol=1e-5)
  assert nothing == (0.0, True)
  assert model.loglikelihood([]) == []
  # Rolling is the likelihood of all of a text.
  assert model.loglikelihood_rolling([request(text)]) == [whole[0]]


@pytest.mark.parametrize(
  "settings, message",
  [
    (dict(batch_size="auto"), "batch_size='auto' must be a number"),
    (dict(completion_len=3), "Unknown settings completion_len"),
    (dict(unmask_rule="best"), "unmask_rule='best'"),
    (dict(temperature="warm"), "temperature='warm'"),
    (dict(sampler="best"), "'best' is unknown"),
    (dict(path="nowhere"), "no folder 'nowhere'"),
    (dict(path=""), "Which model"),
  ],
)
def test_mistakes_are_named(settings, message):
  with pytest.raises(errors.UserError, match=message):
    Model(**(dict(path=MODEL) | SETTINGS | settings))


def test_nothing_is_cut_off_silently(model):
  long = "1" * model._model.shape.max_length
  with pytest.raises(errors.UserError, match="Nothing is cut off"):
    model.loglikelihood_rolling([request(long + "1")])
  with pytest.raises(errors.UserError, match="Nothing is cut off"):
    model.generate_until([request(long, {})])


def test_registers_under_its_name(monkeypatch):
  known = {}

  def register_model(name):
    return lambda found: known.setdefault(name, found)

  api = types.ModuleType("lm_eval.api")
  api.model = types.SimpleNamespace(LM=LM)
  api.registry = types.SimpleNamespace(register_model=register_model)
  monkeypatch.setitem(sys.modules, "lm_eval", types.ModuleType("lm_eval"))
  monkeypatch.setitem(sys.modules, "lm_eval.api", api)
  found = adapter.register.__wrapped__()
  assert known == {"agrpo_jax": found}
  assert issubclass(found, LM) and issubclass(found, adapter.Adapter)


def test_says_what_to_install(monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "lm_eval", None)
  monkeypatch.setitem(sys.modules, "lm_eval.api", None)
  with pytest.raises(errors.UserError, match="pip install"):
    adapter.register.__wrapped__()
  monkeypatch.setattr(sys, "argv", ["lm_eval", "--help"])
  monkeypatch.setattr(multiprocessing, "set_start_method", lambda method: None)
  with pytest.raises(SystemExit) as end:
    lm_eval_command.main()
  assert end.value.code == 0
  said = capsys.readouterr()
  assert "--model_args path=FOLDER" in said.out and "pip install" in said.err


@pytest.mark.parametrize(
  "until, expected",
  [
    (["\n\n", "Q:"], "a "),
    ("\n", "a Q: b"),
    (["never"], "a Q: b\n\nc"),
    (["", "b"], "a Q: "),
    ([], "a Q: b\n\nc"),
    (None, "a Q: b\n\nc"),
  ],
)
def test_cut(until, expected):
  assert adapter.cut("a Q: b\n\nc", until) == expected


def test_rows_are_numbered_by_context_and_repetition():
  found = adapter.row_ids([request("a"), request("b"), request("a")])
  assert found.dtype == np.uint32
  np.testing.assert_array_equal(found[:, 1], [0, 0, 1])
  assert found[0, 0] == found[2, 0] != found[1, 0]
  assert found[0, 0] == 0xE8B7BE43  # CRC-32 of "a"
  assert adapter.row_ids([]).shape == (0, 2)


def test_groups_of_one_padded_width():
  assert adapter.groups([(3,), (9,), (8,), (1,), (17,)], 8) == [
    [4],
    [1],
    [0, 2, 3],
  ]
  assert adapter.groups([(1, 9), (1, 1), (9, 1), (2, 2)], 8) == [
    [2],
    [0],
    [1, 3],
  ]


def test_what_is_not_heeded_is_named(caplog):
  logging.use_python_logging()
  adapter.warn_of_ignored([request("a", {"until": ["x"]})])
  assert not caplog.records
  adapter.warn_of_ignored(
    [request("a", {"until": [], "temperature": 0.5, "do_sample": True})]
  )
  (record,) = caplog.records
  assert "do_sample=True, temperature=0.5" in record.getMessage()
