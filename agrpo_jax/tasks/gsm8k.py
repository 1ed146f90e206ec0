"""GSM8K: grade-school mathematics with a number for an answer.

Rows have the columns question and answer; the gold number follows "####".
They come from a local file, or from the hub at a pinned revision. With
`source="platinum"` the test split is GSM8K-Platinum, whose labels were cleaned
and which the released AGRPO evaluation uses.

Reward as in the released AGRPO code: 0.5 for a <think> pair, 0.5 for an
<answer> pair, 3 for a right answer by math-verify.
"""

import re
from collections.abc import Mapping
from typing import Any

from agrpo_jax import errors
from agrpo_jax.tasks import base
from agrpo_jax.tasks import boxed
from agrpo_jax.tasks import files
from agrpo_jax.tasks.verdicts import answers
from agrpo_jax.tasks.verdicts import d1
from agrpo_jax.tasks.verdicts import equality
from agrpo_jax.tasks.verdicts import tolerant

NAME = "gsm8k"
DEFAULTS = {
  "protocol": "agrpo",  # agrpo, d1, llada or bare
  "source": "main",  # main or platinum: which test split the hub gives
  "num_examples": 0,  # only the first so many; 0: all
}
HUB = {
  "main": files.Hub(
    "openai/gsm8k",
    config="main",
    revision="740312add88f781978c0658806c59bc2815b9866",
  ),
  # Not pinned: no revision of it could be checked when this was written.
  "platinum": files.Hub(
    "madrylab/gsm8k-platinum", config="main", revision="main"
  ),
}
PUBLISHED = {  # `base.fingerprint` of all examples
  "08a5785033078dc2": "GSM8K test split",
  "cb8799da4c7c6dae": "GSM8K train split",
}


def _settings(options: Mapping[str, Any] | None) -> dict[str, Any]:
  chosen = base.settings(options, DEFAULTS, NAME)
  base.check_range(NAME, chosen, "num_examples", 0)
  base.check_choice(NAME, "protocol", chosen["protocol"], boxed.PROTOCOLS)
  base.check_choice(NAME, "source", chosen["source"], HUB)
  return chosen


def examples(
  split: str,
  *,
  path: str | None = None,
  options: Mapping[str, Any] | None = None,
) -> list[base.Example]:
  """Returns the problems of `split`, from `path` or the hub.

  Raises:
    UserError: bad options, a file that is missing, empty, malformed or
      of other columns, or an answer without a gold number.
  """
  base.check_split(NAME, split)
  chosen = _settings(options)
  columns = ("question", "answer")
  if path is not None:
    rows = files.read(path, split, columns)
  else:
    source = chosen["source"] if split == "test" else "main"
    rows = files.from_hub(HUB[source], split, columns)
  return [
    boxed.example(
      index,
      files.text(where, row, "question"),
      _gold(where, files.text(where, row, "answer")),
      chosen["protocol"],
    )
    for index, (where, row) in enumerate(rows[: chosen["num_examples"] or None])
  ]


def _gold(where: str, answer: str) -> str:
  _, mark, gold = answer.partition("####")
  gold = gold.partition("####")[0].strip()
  if not mark or tolerant.number(gold) is None:
    raise errors.UserError(
      f"{where}: answer {answer[-60:]!r} does not end in '#### ' and a number."
    )
  return gold


def reward_weights(options: Mapping[str, Any] | None) -> dict[str, float]:
  """Returns the released weights, those of the options' protocol."""
  return boxed.reward_weights(_settings(options)["protocol"])


reward = boxed.reward  # GSM8K's and MATH's are the same


def grade(
  completion: str,
  fields: Mapping[str, Any],
  options: Mapping[str, Any] | None = None,
) -> dict[str, float]:
  """Returns verdicts, 1 or 0.

  accuracy: as published. As in the released AGRPO evaluation, the first run of
    digits in the answer, without sign, decimals or thousands separator,
    against the gold answer; under the protocol d1 as in d1's evaluation.
  accuracy_tolerant: the number the completion means, however it is written.
  """
  text = answers.clip(completion)
  gold = tolerant.number(fields["gold"])
  if _settings(options)["protocol"] == "d1":
    found = d1.gsm8k_number(text)
    strict = found is not None and gold is not None and found == float(gold)
  else:
    strict = _released_grade(answers.released_answer(text), fields["gold"])
  number = tolerant.answer_number(text)
  return {
    "accuracy": float(strict),
    "accuracy_tolerant": float(number is not None and number == gold),
  }


def answer(
  completion: str,
  fields: Mapping[str, Any],
  options: Mapping[str, Any] | None = None,
) -> str:
  """Returns the number a completion means, as an integer or a fraction.

  "" if it means none.
  """
  del fields, options
  number = tolerant.answer_number(answers.clip(completion))
  return "" if number is None else str(number)


def _released_grade(answer: str, gold: str) -> bool:
  """Returns whether the first run of digits equals the gold number."""
  if digits := re.search(r"\d+", answer):
    answer = digits.group()
  plain_gold = gold.replace(",", "")
  if re.fullmatch("[0-9]{1,99}", answer) and re.fullmatch("[0-9]+", plain_gold):
    return int(answer) == int(plain_gold)  # the same verdict in no time
  return equality.equal(f"${gold}$", f"${answer}$")
