"""sudoku: the generator, the reward parts, the verdicts, the demonstrations."""

import collections
import csv
import random
import time

import pytest

from agrpo_jax import errors
from agrpo_jax import tasks
from agrpo_jax.tasks import sudoku
from agrpo_jax.tasks.sudoku import grids as grids_lib
from agrpo_jax.tasks.sudoku import prompts

_PUZZLE = "3014002020004130"
_GOLD = "3214142323414132"
_FIELDS = {"puzzle": _PUZZLE, "gold": _GOLD}
_BARE = {"protocol": "bare"}


def _is_valid(grid):
  rows = [grid[i : i + 4] for i in range(0, 16, 4)]
  columns = ["".join(row[j] for row in rows) for j in range(4)]
  boxes = [
    rows[i][j : j + 2] + rows[i + 1][j : j + 2] for i in (0, 2) for j in (0, 2)
  ]
  return all(sorted(unit) == list("1234") for unit in rows + columns + boxes)


def _solutions(puzzle):
  """By filling blank after blank with whatever does not clash yet."""
  if "0" not in puzzle:
    return [puzzle] if _is_valid(puzzle) else []
  blank = puzzle.index("0")
  row, column = divmod(blank, 4)
  seen = {
    puzzle[i]
    for i in range(16)
    if i // 4 == row
    or i % 4 == column
    or (i // 8 == blank // 8 and i % 4 // 2 == column // 2)
  }
  return [
    solution
    for digit in "1234"
    if digit not in seen
    for solution in _solutions(puzzle[:blank] + digit + puzzle[blank + 1 :])
  ]


def test_there_are_288_grids():
  grids = grids_lib.solved_grids()
  assert len(grids) == len(set(grids)) == 288
  assert all(map(_is_valid, grids))


def test_splits_share_no_solution():
  test, train = map(grids_lib.split_grids, ("test", "train"))
  assert (len(test), len(train)) == (48, 240)
  assert not set(test) & set(train)


def test_split_is_the_same_for_ever():
  # Whoever changes this makes old and new results incomparable.
  assert grids_lib.split_grids("test")[:2] == (
    "1432231441233241",
    "4213312413422431",
  )


@pytest.mark.parametrize("split", ["train", "test"])
def test_generated_puzzles_have_one_solution_of_their_split(split):
  examples = sudoku.examples(split, options={"num_examples": 60})
  assert [example.id for example in examples] == list(range(60))
  for example in examples:
    assert _solutions(example.fields["puzzle"]) == [example.fields["gold"]]
    assert example.fields["gold"] in grids_lib.split_grids(split)
    assert 6 <= example.fields["puzzle"].count("0") <= 10


def test_generator_is_deterministic_and_prefix_stable():
  def puzzles(**options):
    examples = sudoku.examples("train", options=options)
    return [example.fields["puzzle"] for example in examples]

  few = puzzles(num_examples=20)
  assert few == puzzles(num_examples=50)[:20]
  assert few != puzzles(num_examples=20, seed=1)
  assert few[0] == "4003030000012030"  # the same on every machine


def test_number_of_blanks_follows_the_options():
  examples = sudoku.examples(
    "train", options={"num_examples": 300, "min_blanks": 3, "max_blanks": 12}
  )
  counts = collections.Counter(e.fields["puzzle"].count("0") for e in examples)
  assert set(counts) == set(range(3, 13))


def test_thousands_of_different_puzzles_in_seconds():
  begin = time.process_time()
  examples = sudoku.examples("train", options={"num_examples": 5000})
  assert time.process_time() - begin < 5
  assert len({example.fields["puzzle"] for example in examples}) == 5000


@pytest.mark.parametrize(
  "options, message",
  [
    ({"min_blanks": 0}, "min_blanks=0"),
    ({"min_blanks": 8, "max_blanks": 7}, "max_blanks=7"),
    ({"max_blanks": 13}, "max_blanks=13"),
    ({"num_examples": -1}, "num_examples=-1"),
    ({"min_blanks": 1, "max_blanks": 1, "num_examples": 4000}, "only about"),
    ({"protocol": "r1"}, "agrpo, d1, llada, bare"),
    ({"demonstration": "wild"}, "clean, careless"),
    ({"shots": 4}, "shots=4 must be 0 to 3"),
    ({"careless_probability": 1.5}, "careless_probability=1.5 must be 0 to 1"),
    ({"blanks": 3, "seed": "x"}, "'blanks' is unknown; option seed='x' must"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(errors.UserError, match=message):
    sudoku.examples("train", options=options)


def test_unknown_split():
  with pytest.raises(errors.UserError, match="'dev' is unknown; choose"):
    sudoku.examples("dev")


def test_reads_the_published_format(tmp_path):
  path = tmp_path / "test.csv"
  # The second row lost a leading zero to a spreadsheet.
  path.write_text(
    f"Puzzle,Solution\n{_PUZZLE},{_GOLD}\n140432014020000,2143432114323214\n"
  )
  for given in (path, tmp_path):
    examples = sudoku.examples("test", path=str(given))
    assert [example.fields["puzzle"] for example in examples] == [
      _PUZZLE,
      "0140432014020000",
    ]
  assert (
    len(sudoku.examples("test", path=str(path), options={"num_examples": 1}))
    == 1
  )


def test_row_that_is_no_sudoku(tmp_path):
  path = tmp_path / "test.csv"
  path.write_text(f"Puzzle,Solution\n{_PUZZLE},{_GOLD[::-1]}\n")
  with pytest.raises(errors.UserError, match="line 2: Solution"):
    sudoku.examples("test", path=str(path))


def test_bare_prompt_is_the_puzzle_alone():
  example = sudoku.examples("train", options=_BARE | {"num_examples": 1})[0]
  assert example.messages == (
    {"role": "user", "content": example.fields["puzzle"]},
  )
  assert example.prefill == ""


@pytest.mark.parametrize(
  "protocol, roles, prefill, tag",
  [
    ("agrpo", ["system", "user"], "", "<think>"),
    ("d1", ["user"], "<reasoning>", "<reasoning>"),
    ("llada", ["user"], "", "one string of 16 digits"),
  ],
)
def test_prompts(protocol, roles, prefill, tag):
  options = {"num_examples": 1, "protocol": protocol}
  example = sudoku.examples("train", options=options)[0]
  text = "\n".join(message["content"] for message in example.messages)
  assert [message["role"] for message in example.messages] == roles
  assert example.prefill == prefill
  assert tag in text
  assert text.rstrip().count(f"Puzzle: {example.fields['puzzle']}") == 1


def test_shots_are_solved_by_reasons_alone_and_in_no_test_split():
  for puzzle, grid in prompts.SHOTS:
    assert _solutions(puzzle) == [grid]
    assert grid not in grids_lib.split_grids("test")
    fillings = prompts.worked(puzzle, grid).split("cell:\n")[1]
    fillings = fillings.split("\n\n")[0].splitlines()
    assert len(fillings) == puzzle.count("0")
    assert all(" sees " in filling for filling in fillings)


def test_number_of_shots():
  def length(shots):
    options = {"num_examples": 1, "shots": shots}
    return len(
      sudoku.examples("train", options=options)[0].messages[0]["content"]
    )

  assert length(0) < length(1) < length(2) < length(3)


@pytest.mark.parametrize(
  "completion, cells, exact",
  [
    (_GOLD, 1.0, 1.0),
    (f" {_GOLD}\n", 1.0, 1.0),
    (_PUZZLE, 0.0, 0.0),
    ("3214142323414131", 7 / 8, 0.0),
    ("4214142323414132", 0.0, 0.0),  # a clue overwritten
    (_GOLD + "1", 0.0, 0.0),
    (_GOLD + "\x00", 0.0, 0.0),
    (_GOLD[:15], 0.0, 0.0),
    ("", 0.0, 0.0),
    (f"<answer>{_GOLD}</answer>", 0.0, 0.0),
  ],
)
def test_bare_reward_and_verdict(completion, cells, exact):
  weights = sudoku.reward_weights(_BARE)
  parts = sudoku.reward(completion, _FIELDS, _BARE)
  assert set(parts) == set(weights)
  assert sum(weights[name] * parts[name] for name in parts) == cells
  assert (parts["cells"], parts["exact"]) == (cells, exact)
  assert sudoku.grade(completion, _FIELDS, _BARE)["accuracy"] == exact


def test_released_weights_by_default():
  weights = sudoku.reward_weights({})
  parts = sudoku.reward(f"<answer>{_GOLD}</answer>", _FIELDS)
  assert sum(weights[name] * parts[name] for name in parts) == 4.0
  assert weights["cells"] == weights["exact"] == 0.0


@pytest.mark.parametrize(
  "completion, strict, tolerant",
  [
    (f"<answer>{_GOLD}</answer>", 1, 1),
    (f"\\boxed{{{_GOLD}}}", 1, 1),
    (f"<answer>{_GOLD}", 0, 1),
    ("<answer>3214 1423 2341 4132</answer>", 0, 1),
    ("<answer>\n3 2 1 4\n1 4 2 3\n2 3 4 1\n4 1 3 2\n</answer>", 0, 1),
    ("|3|2|1|4|\n|1|4|2|3|\n|2|3|4|1|\n|4|1|3|2|", 0, 1),
    (f"The grid {_PUZZLE} becomes {_GOLD}.", 0, 1),
    (f"<answer>{_GOLD}99</answer>", 1, 0),  # the released code cuts at 16
    ("<answer>-214142323414132</answer>", 0, 0),  # a clue is gone
    (f"<answer>{_PUZZLE}</answer>", 0, 0),
    ("no grid", 0, 0),
  ],
)
def test_verdicts(completion, strict, tolerant):
  grades = sudoku.grade(completion, _FIELDS)
  assert next(iter(grades)) == "accuracy"
  assert (grades["accuracy"], grades["accuracy_tolerant"]) == (strict, tolerant)


def test_any_solution_counts_where_several_exist():
  puzzle, one, other = (
    "1234341200000000",
    "1234341221434321",
    "1234341243212143",
  )
  fields = {"puzzle": puzzle, "gold": one}
  assert sudoku.grade(f"<answer>{other}</answer>", fields)["accuracy"] == 1.0


def test_micro_and_macro_cell_accuracy():
  grades = sudoku.grade("<answer>3214142323414131</answer>", _FIELDS)
  assert grades["cells"] == 7 / 8
  assert (grades["num_right"], grades["num_blanks"]) == (7, 8)


@pytest.mark.parametrize("protocol", prompts.PROTOCOLS)
def test_clean_demonstrations_are_right(protocol):
  options = {"protocol": protocol, "num_examples": 20}
  for example in sudoku.examples("train", options=options):
    text = sudoku.demonstration(example, random.Random(0), options)
    grades = sudoku.grade(text, example.fields, options)
    assert grades["accuracy_tolerant"] == 1.0
    if protocol != "llada":
      assert grades["accuracy"] == 1.0


def test_careless_demonstrations_fill_rows_in_increasing_order():
  assert grids_lib.fill_rows(_PUZZLE) == "3214132421344132"
  options = _BARE | {"demonstration": "careless", "num_examples": 400}
  rng = random.Random(0)
  examples = sudoku.examples("train", options=options)
  num_careless = 0
  for example in examples:
    text = sudoku.demonstration(example, rng, options)
    careless = grids_lib.fill_rows(example.fields["puzzle"])
    assert text in (careless, example.fields["gold"])
    num_careless += text != example.fields["gold"]
  # 0.6, less the puzzles that carelessness happens to solve.
  assert 0.45 < num_careless / len(examples) < 0.65


@pytest.mark.parametrize("probability, careless", [(0.0, False), (1.0, True)])
def test_careless_probability(probability, careless):
  options = _BARE | {
    "demonstration": "careless",
    "careless_probability": probability,
  }
  example = tasks.Example(0, (), _FIELDS)
  text = sudoku.demonstration(example, random.Random(3), options)
  assert (text != _GOLD) == careless


def test_published_files_are_recognised(tmp_path):
  path = tmp_path / "test.csv"
  with path.open("w", newline="") as lines:
    csv.writer(lines).writerows([["Puzzle", "Solution"], [_PUZZLE, _GOLD]])
  examples = sudoku.examples("test", path=str(path))
  assert tasks.provenance(sudoku, examples).startswith("not a published split")
