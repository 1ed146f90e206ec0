"""Windows: states of a row that share the keys and values of one state."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agrpo_jax.models import lora as lora_lib
from agrpo_jax.models import transformer
from fixtures import recordings

B, L, S, Q = 3, 14, 2, 4
LENGTH = np.array([14, 11, 9], np.int32)
START = np.array([10, 4, 6], np.int32)  # the last window reaches into padding


@functools.cache
def toy(sharp=2.5):
  shape, params = recordings.random_network()
  # Large weights: attention that is sharp, keys and values that matter.
  params = jax.tree.map(lambda x: sharp * x if x.ndim > 1 else x, params)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, shape.vocab_size, (B, L), np.int32)
  windows = rng.integers(0, shape.vocab_size, (B, S, Q), np.int32)
  return shape, params, tokens, windows


def bind(*args):
  """Compiled: else every operation of every call is compiled by itself."""
  network = transformer.bind(*args)
  return network._replace(
    logits=jax.jit(network.logits),
    keys_values=jax.jit(network.keys_values),
    window_logits=jax.jit(network.window_logits),
  )


def positions(num_wanted=Q):
  at = START[:, None, None] + np.arange(num_wanted)
  return np.broadcast_to(at, (B, S, num_wanted))


def slow_logits(*row):
  """One row, written down layer by layer; [S, Q, V]."""
  with jax.numpy_rank_promotion("allow"):
    return _slow_logits(*row)


def _slow_logits(shape, params, tokens_L, length, windows_SxQ, start):
  def rms(x, scale):
    norm = jnp.sqrt((x * x).mean(-1, keepdims=True) + shape.norm_eps)
    return x / norm * scale

  def project(layer, name, x):
    y = x @ layer[name]["kernel"]
    return y + layer[name]["bias"] if "bias" in layer[name] else y

  def rotate(x, at):
    half = shape.head_dim // 2
    angle = np.asarray(at)[:, None] * shape.rope_theta ** (
      -np.arange(half) / half
    )
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

  def heads(x):
    return x.reshape(len(x), -1, shape.head_dim)

  def keys_values(layer, x, at):
    normed = rms(x, layer["attn_norm"]["scale"])
    k = rotate(heads(project(layer, "k", normed)), at)
    return k, heads(project(layer, "v", normed))

  def after(layer, x, at, k, v):
    normed = rms(x, layer["attn_norm"]["scale"])
    q = rotate(heads(project(layer, "q", normed)), at)
    group = shape.num_heads // shape.num_kv_heads
    k, v = (jnp.repeat(one, group, axis=1) for one in (k, v))
    score = jnp.einsum("qhd,khd->hqk", q, k) / np.sqrt(shape.head_dim)
    mixed = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(score), v)
    x = x + project(layer, "attn_out", mixed.reshape(len(x), -1))
    normed = rms(x, layer["mlp_norm"]["scale"])
    gate, up = project(layer, "gate", normed), project(layer, "up", normed)
    return x + project(layer, "down", jax.nn.silu(gate) * up)

  layers = [
    jax.tree.map(lambda x, i=i: x[i], params["layers"])
    for i in range(shape.num_layers - 1)
  ]
  layers.append(params["last_layer"])
  table = params["embed"]["table"]
  row, row_at = table[tokens_L[:length]], np.arange(length)
  size = min(windows_SxQ.shape[1], length - start)
  at = np.arange(start, start + size)
  states = [table[window[:size]] for window in windows_SxQ]
  for layer in layers:
    k, v = keys_values(layer, row, row_at)
    new = []
    for x in states:
      own_k, own_v = keys_values(layer, x, at)
      new.append(after(layer, x, at, k.at[at].set(own_k), v.at[at].set(own_v)))
    row, states = after(layer, row, row_at, k, v), new
  x = rms(jnp.stack(states), params["final_norm"]["scale"])
  head = table.T if shape.tied_head else params["head"]["kernel"]
  return (x @ head)[..., : shape.vocab_size]


def keep(network, tokens):
  """Keys and values, and the outputs of the window of each row."""
  at = START[:, None] + np.arange(Q)
  return network.keys_values(tokens, LENGTH, jnp.asarray(at))


def window_logits(params, keeps, lora=None, **changes):
  shape, _, tokens, windows = toy()
  shape = recordings.random_network(**changes)[0] if changes else shape
  network = transformer.bind(shape, params, lora)
  shared = network.keys_values(tokens, LENGTH) if keeps else jnp.asarray(tokens)
  return network.window_logits(
    shared, LENGTH, windows, START[:, None], positions()
  )


def real(row):
  return min(Q, LENGTH[row] - START[row])


def slow_rows(params):
  """The slow program's logits of each row."""
  shape, _, tokens, windows = toy()
  return [
    slow_logits(
      shape, params, tokens[row], LENGTH[row], windows[row], START[row]
    )
    for row in range(B)
  ]


def loss(rows):
  """A number in which every logit has a part of its own."""
  return sum(
    (jnp.sin(row) * jnp.cos(jnp.arange(row.shape[-1]))[None, None]).sum()
    for row in rows
  )


@functools.cache
def slow_gradient():
  params = toy(sharp=1.0)[1]
  return jax.jit(jax.grad(lambda params: loss(slow_rows(params))))(params)


@pytest.mark.parametrize("keeps", [True, False])
def test_logits_equal_those_of_a_slow_program(keeps):
  params = toy()[1]
  found = jax.jit(functools.partial(window_logits, keeps=keeps))(params)
  for row, expected in enumerate(jax.jit(slow_rows)(params)):
    np.testing.assert_allclose(found[row, :, : real(row)], expected, atol=1e-3)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_gradients_flow_through_the_shared_keys_and_values(remat):
  """Those of both ways equal those of the slow program."""
  params, expected = toy(sharp=1.0)[1], slow_gradient()

  def ours(params, keeps):
    logits = window_logits(params, keeps, remat=remat)
    return loss([logits[row, :, : real(row)] for row in range(B)])

  for keeps in (True, False):
    found = jax.jit(jax.grad(functools.partial(ours, keeps=keeps)))(params)
    for path, one in jax.tree_util.tree_leaves_with_path(expected):
      other = functools.reduce(lambda tree, key: tree[key.key], path, found)
      scale = np.abs(one).max() + 1e-6
      np.testing.assert_allclose(other / scale, one / scale, atol=1e-3)


def test_a_window_of_the_same_tokens_gives_what_the_row_does():
  shape, params, tokens, _ = toy()
  network = bind(shape, params)
  windows = jax.vmap(lambda row, at: jax.lax.dynamic_slice(row, (at,), (Q,)))(
    jnp.pad(tokens, ((0, 0), (0, Q))), START
  )
  windows = jnp.repeat(windows[:, None], S, axis=1)
  whole = network.logits(tokens, LENGTH, positions()[:, 0])
  for shared in (jnp.asarray(tokens), network.keys_values(tokens, LENGTH)):
    found = network.window_logits(
      shared, LENGTH, windows, START[:, None], positions()
    )
    for row in range(B):
      for state in range(S):
        np.testing.assert_allclose(
          found[row, state, : real(row)], whole[row, : real(row)], atol=2e-4
        )


@pytest.mark.parametrize("shift", [0, 1])
def test_the_state_that_is_shared_needs_no_window(shift):
  """Beside windows, where they are told to be it, and where they are not."""
  shape, params, tokens, windows = toy()
  network = bind(dataclasses.replace(shape, shift=shift), params)
  wanted = positions() + shift
  of_row = network.logits(tokens, LENGTH, wanted[:, 0])
  rest = LENGTH, windows, START[:, None]
  of_windows = network.window_logits(jnp.asarray(tokens), *rest, wanted)
  beside = network.window_logits(
    jnp.asarray(tokens), *rest, jnp.concatenate([wanted[:, :1], wanted], axis=1)
  )
  kept = keep(network, tokens)
  is_it, is_not = (
    network.window_logits(kept, *rest, wanted, jnp.bool_(is_kept))
    for is_kept in (True, False)
  )
  for row in range(B):
    for found in (beside[:, 0], is_it[:, 0], is_it[:, 1]):
      np.testing.assert_allclose(
        found[row, : real(row)], of_row[row, : real(row)], atol=2e-4
      )
    for found in (beside[:, 1:], is_not):
      np.testing.assert_allclose(
        found[row, :, : real(row)], of_windows[row, :, : real(row)], atol=2e-4
      )


def test_padding_batch_mates_and_other_states_change_nothing():
  shape, params, tokens, windows = toy()
  network = bind(shape, params)
  together = network.window_logits(
    jnp.asarray(tokens), LENGTH, windows, START[:, None], positions()
  )
  for row in range(B):
    size = LENGTH[row]
    alone = network.window_logits(
      jnp.pad(tokens[row : row + 1, :size], ((0, 0), (0, 5))),
      LENGTH[row : row + 1],
      windows[row : row + 1, 1:],
      START[row : row + 1, None],
      positions()[row : row + 1, 1:],
    )
    np.testing.assert_allclose(
      together[row, 1:, : real(row)], alone[0, :, : real(row)], atol=2e-4
    )


def test_wanted_positions_may_be_few_and_repeat():
  _, params, tokens, windows = toy()
  shape = toy()[0]
  network = bind(shape, params)
  every = network.window_logits(
    jnp.asarray(tokens), LENGTH, windows, START[:, None], positions()
  )
  few = jnp.asarray(START)[:, None, None] + jnp.array([[[2, 0, 2]]])
  found = network.window_logits(
    jnp.asarray(tokens),
    LENGTH,
    windows,
    START[:, None],
    jnp.broadcast_to(few, (B, S, 3)),
  )
  np.testing.assert_allclose(
    found, every[:, :, jnp.array([2, 0, 2])], atol=1e-5
  )


def test_an_adapter_acts_on_windows_and_on_what_they_share():
  shape, params, tokens, windows = toy()
  settings = lora_lib.Lora(rank=4, alpha=8.0)
  adapter = lora_lib.init(settings, params, jax.random.key(3))
  adapter = jax.tree.map(
    lambda x: (
      x + 0.1 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
    ),
    adapter,
  )
  merged = lora_lib.merge(params, adapter, settings.scale)
  found, expected = (
    network.window_logits(
      network.keys_values(tokens, LENGTH),
      LENGTH,
      windows,
      START[:, None],
      positions(),
    )
    for network in (
      bind(shape, params, adapter, settings.scale),
      bind(shape, merged),
    )
  )
  np.testing.assert_allclose(found, expected, atol=5e-3)


@pytest.mark.parametrize("keeps", [True, False])
def test_where_logits_are_shifted_they_come_out_one_position_before(keeps):
  shape, params, tokens, windows = toy()
  shifted = bind(dataclasses.replace(shape, shift=1), params)
  found = shifted.window_logits(
    shifted.keys_values(tokens, LENGTH) if keeps else jnp.asarray(tokens),
    LENGTH,
    windows,
    START[:, None],
    positions() + 1,
  )
  np.testing.assert_allclose(found, window_logits(params, keeps), atol=2e-4)
