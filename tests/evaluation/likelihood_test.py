"""The any-order bound against enumeration, and the command around it."""

import itertools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agrpo_jax import config as config_lib
from agrpo_jax import errors
from agrpo_jax import likelihood
from agrpo_jax import settings
from agrpo_jax import types
from agrpo_jax.models import transformer
from agrpo_jax.objectives import elbo
from fixtures import recordings
from fixtures import sudoku

V, MASK = 2, 2  # tokens 0 and 1; 2 is [MASK]
C = 3


def make_table(length: int) -> np.ndarray:
  """float64 [states, length, V]: logits for every partial completion."""
  rng = np.random.default_rng(length)
  return 2 * rng.normal(size=((V + 1) ** length, length, V))


def state_of(partial: list[int]) -> int:
  return sum(token * (V + 1) ** place for place, token in enumerate(partial))


def table_logits(table: np.ndarray, prompt_length: int):
  """The network that looks its logits up; garbage beyond the completion."""
  length = table.shape[1]

  def logits(tokens_BxL, length_B, position_BxS):
    del length_B
    completion_BxC = tokens_BxL[:, prompt_length : prompt_length + length]
    place_C = (V + 1) ** jnp.arange(length)
    state_B = (completion_BxC * place_C[None]).sum(axis=1)
    offset_BxS = position_BxS - prompt_length
    found = jnp.asarray(table, jnp.float32)[
      state_B[:, None], jnp.minimum(offset_BxS, length - 1)
    ]
    return jnp.where((offset_BxS < length)[..., None], found, jnp.nan)

  return logits


def any_order_bound(table: np.ndarray, completion: list[int]) -> float:
  """Mean over orders of the log-probability of one token after the other."""
  orders = list(itertools.permutations(range(len(completion))))
  total = 0.0
  for order in orders:
    partial = [MASK] * len(completion)
    for place in order:
      logits_V = table[state_of(partial), place]
      shifted = logits_V - logits_V.max()
      logprob_V = shifted - math.log(np.exp(shifted).sum())
      total += logprob_V[completion[place]]
      partial[place] = completion[place]
  return total / len(orders)


def pairs_of(completion: list[int], num_rows: int) -> elbo.Pairs:
  """The same pair in every row; prompt of 2 in 4, completion padded to C+1."""
  row = [*completion, *[0] * (C + 1 - len(completion))]
  return elbo.Pairs(
    prompt=jnp.tile(jnp.array([[1, 0, 1, 1]], jnp.int32), (num_rows, 1)),
    prompt_length=jnp.full((num_rows,), 2, jnp.int32),
    completion=jnp.tile(jnp.array([row], jnp.int32), (num_rows, 1)),
    length=jnp.full((num_rows,), len(completion), jnp.int32),
    num_given=jnp.zeros((num_rows,), jnp.int32),
  )


def estimates(
  table: np.ndarray, completion: list[int], masks_BxC: np.ndarray
) -> np.ndarray:
  pairs = pairs_of(completion, len(masks_BxC))
  network = types.Network(table_logits(table, 2))
  return np.array(
    jax.jit(lambda masks: elbo.estimate(network, pairs, masks, MASK))(
      masks_BxC
    ),
    np.float64,
  )


@pytest.mark.parametrize("completion", [[0, 1, 1], [1, 0], [1]])
def test_expectation_is_the_any_order_bound(completion):
  length = len(completion)
  table = make_table(length)
  masks, probabilities = [], []
  for n in range(1, length + 1):
    for chosen in itertools.combinations(range(length), n):
      masks.append([place in chosen for place in range(C + 1)])
      probabilities.append(1 / length / math.comb(length, n))
  estimate_B = estimates(table, completion, np.array(masks))
  np.testing.assert_allclose(
    np.dot(probabilities, estimate_B),
    any_order_bound(table, completion),
    rtol=1e-5,
  )


@pytest.mark.parametrize("length", [1, 2, 5, 7])
@pytest.mark.parametrize("num_draws", [1, 3, 5, 16])
def test_every_draw_has_each_count_as_often(length, num_draws):
  count_SxM = np.array(
    [
      [elbo.count(shift, length, j, num_draws) for j in range(num_draws)]
      for shift in range(length)
    ]
  )
  np.testing.assert_array_equal(
    np.sort(count_SxM, axis=0),
    np.tile(np.arange(1, length + 1)[:, None], (1, num_draws)),
  )
  # Stratified: within one completion no count is more than one ahead.
  for count_M in count_SxM:
    often = np.bincount(count_M, minlength=length + 1)[1:]
    assert often.max() - often.min() <= 1


def masks_of(length: int, num_ids: int, num_draws: int) -> np.ndarray:
  """bool [ids, M, C + 1]."""

  def one(row_id):
    return elbo.draw_mask(
      jax.random.key(0),
      row_id,
      jnp.arange(C + 1) < length,
      num_draws=num_draws,
    )

  row_id = np.stack(
    np.meshgrid(np.arange(num_ids), np.arange(num_draws), indexing="ij"), -1
  )
  return np.array(jax.jit(jax.vmap(jax.vmap(one)))(row_id.astype(np.uint32)))


def test_all_masks_of_a_size_are_as_likely():
  masks = masks_of(C, 2000, 3).reshape(-1, C + 1)
  assert not masks[:, C:].any()  # padding is never masked
  code = (masks * 2 ** np.arange(C + 1)).sum(axis=1)
  often = np.bincount(code, minlength=8) / len(code)
  expected = [0, *(1 / 3 / math.comb(3, m.bit_count()) for m in range(1, 8))]
  np.testing.assert_allclose(often, expected, atol=0.02)
  assert often[0] == 0


def test_draws_reach_the_bound():
  completion = [0, 1, 1]
  table = make_table(3)
  masks = masks_of(3, 500, 4).reshape(-1, C + 1)
  estimate_B = estimates(table, completion, masks)
  error = np.std(estimate_B) / np.sqrt(len(masks))
  assert abs(np.mean(estimate_B) - any_order_bound(table, completion)) < (
    4 * error
  )


def config() -> config_lib.ConfigDict:
  return sudoku.config(num_examples=3)


def run(c: config_lib.ConfigDict, *arguments, **options):
  return likelihood.run(settings.rl(c), *arguments, **options)


@pytest.fixture
def pairs(tmp_path) -> str:
  file = tmp_path / "pairs.jsonl"
  lines = [("1420200000313142", "1423231442313142"), ("12", "1"), ("1", "124")]
  file.write_text(
    "".join(
      json.dumps({"prompt": prompt, "completion": completion}) + "\n"
      for prompt, completion in lines
    )
  )
  return str(file)


def test_batch_size_and_interruption_are_without_effect(pairs, tmp_path):
  output = tmp_path / "out"
  c = config()
  model = sudoku.use_copy(c, tmp_path / "model")
  whole = run(c, pairs, "", str(output), num_draws=6)
  assert [line["num_tokens"] for line in whole] == [16, 1, 3]
  assert all(line["log_likelihood"] < 0 for line in whole)
  # The solution of a puzzle is likelier per token than half an answer.
  assert whole[0]["log_likelihood"] / 16 > whole[2]["log_likelihood"] / 3

  c.evaluate.batch_size = 5
  sudoku.cut(output, num_records=1)
  kept = (output / "examples.jsonl").read_bytes().splitlines()[0]
  assert run(c, pairs, "", str(output), num_draws=6) == [
    {**line, **{k: pytest.approx(line[k], rel=1e-5) for k in ROUNDED}}
    for line in whole
  ]
  lines = (output / "examples.jsonl").read_bytes().splitlines()
  assert (lines[0], len(lines)) == (kept, 3)
  # Complete: nothing is loaded any more.
  shutil.rmtree(model)
  assert len(run(c, pairs, "", str(output), num_draws=6)) == 3
  with pytest.raises(errors.UserError, match="num_draws: 6 before, 7 now"):
    run(c, pairs, "", str(output), num_draws=7)


ROUNDED = ("log_likelihood", "standard_error")


def test_demonstrations_of_the_task():
  done = run(config(), num_draws=1)
  assert len(done) == 3
  assert {len(line["completion"]) for line in done} == {16}
  assert done[0]["standard_error"] is None
  found = likelihood.figures(done)
  total = sum(line["log_likelihood"] for line in done)
  np.testing.assert_allclose(found["log_likelihood"], total / 3)
  np.testing.assert_allclose(found["per_token"], total / 48)


def test_mistakes_of_the_user(tmp_path):
  c = config()
  with pytest.raises(errors.UserError, match=r"--pairs=.* does not exist"):
    run(c, str(tmp_path / "nothing.jsonl"))
  with pytest.raises(errors.UserError, match="--num_draws=0"):
    run(c, num_draws=0)
  file = tmp_path / "pairs.jsonl"
  file.write_text('{"prompt": "1", "completion": ""}\n')
  with pytest.raises(errors.UserError, match="without tokens"):
    run(c, str(file))
  file.write_text(json.dumps({"prompt": "1", "completion": "1" * 5000}))
  with pytest.raises(errors.UserError, match=r"50\d\d tokens, more .* 4096"):
    run(c, str(file))
  file.write_text('{"question": "1"}\n')
  with pytest.raises(errors.UserError, match=r"pairs\.jsonl, line 1"):
    run(c, str(file))


@pytest.mark.parametrize("blocks_from", ["start", "end"])
def test_blocks_one_by_one_where_attention_is_block_causal(blocks_from):
  """Every mask of every block, against orders walked through by whole rows."""
  shape, params = recordings.random_network(
    attention_block=2, blocks_from=blocks_from
  )
  network = transformer.bind(shape, params)
  logits = jax.jit(network.logits)
  prompt, completion = [5, 6, 7], [8, 9, 3, 4, 11]
  pairs = elbo.pack([prompt], [completion], 1, shape)
  # Of SDAR's first block the prompt has one token; the other kind's last block
  # is filled up with EOS.
  filled = completion + [shape.eos_id] * (blocks_from == "end")
  ends = range(4, 9, 2) if blocks_from == "start" else (5, 7, 9)
  expected, begin = 0.0, len(prompt)
  for end in ends:
    own = range(begin, min(end, len(prompt) + len(completion)))
    orders = list(itertools.permutations(own))
    for order in orders:
      row = np.array(prompt + filled)
      row[[*own]] = shape.mask_id
      # What stands behind is not seen; of a block counted from the end it tells
      # where that begins.
      for place in order:
        found = logits(row[None], np.array([len(row)]), np.array([[place]]))
        target = (prompt + filled)[place]
        expected += float(jax.nn.log_softmax(found)[0, 0, target]) / len(orders)
        row[place] = target
    begin = end
  num_draws = 4
  masks = [
    elbo.draw_mask(
      jax.random.key(0),
      jnp.array([number, draw], jnp.uint32),
      pairs.is_asked[0],
      num_draws=num_draws,
      attention_block=2,
    )
    for number in range(40)
    for draw in range(num_draws)
  ]
  distinct, count = np.unique(np.array(masks), axis=0, return_counts=True)
  assert not distinct[:, : int(pairs.num_given[0])].any()
  # Each block's masks by their chances: one of two 1/4 each, both 1/2.
  each = np.arange(distinct.shape[1]).reshape(-1, 2)
  asked = np.asarray(pairs.is_asked[0])
  chance = np.ones(len(distinct))
  for block in each:
    num = distinct[:, block].sum(axis=1)
    if asked[block].all():
      chance *= np.where(num == 1, 0.25, 0.5)
  assert chance.sum() == 1.0  # all that can be
  rows = jax.tree.map(lambda x: jnp.repeat(x, len(distinct), axis=0), pairs)
  values = jax.jit(lambda rows, m: elbo.estimate(network, rows, m, 36))(
    rows, jnp.asarray(distinct)
  )
  np.testing.assert_allclose(chance @ values, expected, rtol=1e-4)
  # And each as often as it should be.
  np.testing.assert_allclose(count / count.sum(), chance, atol=0.12)
