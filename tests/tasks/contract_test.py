"""contract: a task that does not keep to it is refused, by name and value."""

import types

import numpy as np
import pytest

from agrpo_jax import errors
from agrpo_jax import tasks
from agrpo_jax.tasks import base
from agrpo_jax.tasks import contract

_TURNS = base.user_turn("What?")


def _task(**functions) -> types.ModuleType:
  task = types.ModuleType("mine")
  task.__file__ = "mine.py"
  for name, returned in functions.items():
    setattr(task, name, lambda *a, returned=returned, **k: returned)
  return task


def _example(index=0, messages=_TURNS, fields=None, prefill=""):
  return tasks.Example(
    index, messages, {} if fields is None else fields, prefill
  )


def test_good_examples_come_back_as_they_are():
  given = [
    _example(0),
    _example(np.uint32(7), list(_TURNS), {"gold": [1, {"a": None}]}, "<r>"),
    _example(2**32 - 1),
  ]
  assert contract.examples(_task(examples=given), "train") == given
  assert contract.examples(_task(examples=tuple(given)), "train") == given


@pytest.mark.parametrize(
  "given, part",
  [
    (None, r"examples\('train'\) gave a NoneType"),
    ([_example(3), _example(3)], "example 1 has the id=3 of example 0"),
    ([_example(-1)], "example 0 has id=-1"),
    ([_example(2**32)], "example 0 has id=4294967296"),
    ([_example("7")], "example 0 has id='7'"),
    ([_example(1.0)], "example 0 has id=1.0"),
    ([_example(True)], "example 0 has id=True"),
    ([_example(messages=())], r"example 0 has messages=\(\)"),
    ([_example(messages="hello")], "messages='hello'"),
    ([_example(messages=[{"role": "user"}])], "messages="),
    ([_example(messages=[{"role": "user", "content": 3}])], "'content': 3"),
    ([_example(messages=["hello"])], "messages="),
    ([_example(messages=base.user_turn("a\ud800"))], "messages=.*ud800"),
    ([_example(prefill="\udc80")], "prefill="),
    ([_example(fields={"gold": {1, 2}})], r"fields=\{'gold': \{1, 2\}\}"),
    ([_example(fields={1: 2})], r"fields=\{1: 2\}"),
    ([_example(fields=["gold"])], "fields="),
    ([_example(prefill=None)], "prefill=None"),
    ([{"id": 0}], "example 0 is a dict"),
    (
      [_example(-1), _example(0, prefill=3), *[_example(-1)] * 9],
      "example 0 has id=-1; example 1 has prefill=3; .*and 6 more problems",
    ),
  ],
)
def test_bad_examples(given, part):
  with pytest.raises(errors.UserError, match=f"task 'mine.py': .*{part}"):
    contract.examples(_task(examples=given), "train")


@pytest.mark.parametrize(
  "own, changed, part",
  [
    (["exact"], {}, r"reward_weights gave \['exact'\]"),
    ({"exact": "1"}, {}, "reward_weights gave 'exact': '1'"),
    ({"exact": None}, {}, "reward_weights gave 'exact': None"),
    ({1: 1.0}, {}, "reward_weights gave 1: 1.0"),
    ({"exact": float("nan")}, {}, "exact=nan .* must be finite"),
    ({"exact": 1.0}, {"exact": float("inf")}, "exact=inf .* must be finite"),
    ({"exact": 1.0}, {"exakt": 1.0}, "parts: exakt. The parts are exact"),
    ({"exact": 1.0}, {"exact": "much"}, "config.task.reward_weights gave"),
  ],
)
def test_bad_weights(own, changed, part):
  with pytest.raises(errors.UserError, match=part):
    contract.reward_weights(_task(reward_weights=own), {}, changed)


def test_weights_are_the_tasks_own_but_those_changed():
  task = _task(reward_weights={"exact": 1, "length": np.float32(0.5)})
  weights = contract.reward_weights(task, {}, {"exact": 3})
  assert weights == {"exact": 3.0, "length": 0.5}


def test_what_a_task_raises_is_named_with_its_line(tmp_path):
  file = tmp_path / "mine.py"
  file.write_text(
    "import json\n"
    "def examples(split, *, path=None, options=None):\n"
    "  return json.loads('')\n"
    "def reward_weights(options):\n"
    "  return {'exact': options['weight']}\n"
    "def reward(completion, fields, options): pass\n"
    "grade = reward\n"
  )
  task = tasks.get("", str(file))
  with pytest.raises(
    errors.UserError,
    match=r"mine.py': examples\('test'\) failed with JSONDecodeError: .*"
    r"mine\.py, line 3\.",
  ):
    contract.examples(task, "test")
  with pytest.raises(
    errors.UserError, match=r"_weights failed with KeyError: .*, line 5\."
  ):
    contract.reward_weights(task, {})


def test_a_task_gets_its_path_without_a_tilde(monkeypatch):
  monkeypatch.setenv("HOME", "/nowhere")
  task = _task()
  task.examples = lambda split, path, options: [_example(fields={"path": path})]
  for given, found in (("~/x.csv", "/nowhere/x.csv"), (None, None)):
    (example,) = contract.examples(task, "train", path=given)
    assert example.fields["path"] == found


@pytest.mark.parametrize("text", [None, 5, b"bytes", ["a"], "\ud83d"])
def test_demonstrations_are_text(text):
  task = _task(demonstration=text)
  with pytest.raises(errors.UserError, match=r"demonstration gave .* id=4"):
    contract.demonstration(task, _example(4), None, {})
