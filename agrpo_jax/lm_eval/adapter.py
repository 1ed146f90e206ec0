"""A model as lm-eval knows models: its requests in, answers out.

`register` makes the class known to lm-eval, whose base class it needs. The
functions below it order, group and cut what lm-eval asks for.
"""

from __future__ import annotations

import collections
import functools
import itertools
import json
import math
import zlib
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from agrpo_jax import config as config_lib
from agrpo_jax import errors
from agrpo_jax import settings as settings_lib
from agrpo_jax import types
from agrpo_jax.evaluation import likelihood
from agrpo_jax.objectives import elbo
from agrpo_jax.parallel import mesh as mesh_lib
from agrpo_jax.parallel import processes
from agrpo_jax.port import model as model_lib
from agrpo_jax.runs import progress
from agrpo_jax.samplers import rules
from agrpo_jax.samplers import sampling as sampling_lib

# Marks a context that `apply_chat_template` made.
_CHAT = "\x02chat\x03"


class Request(Protocol):
  """What is used of lm-eval's `Instance`."""

  args: tuple


class Adapter:
  """lm-eval's interface of a model, without its base class (see `register`)."""

  cache_hook: Any  # of the base class: keeps answers under --use_cache

  def __init__(
    self,
    path: str = "",
    *,
    batch_size: int | str = 8,
    num_draws: int = 128,
    seed: int = 0,
    sampler: str = "config",
    dtype: str = "bfloat16",
    quantize: str = "none",
    tokenizer: str = "",
    revision: str = "",
    attention_block: int = 0,
    bucket: int = 64,
    max_batch_size: int | None = None,
    device: str | None = None,
    **settings: Any,
  ):
    """Loads a model.

    Args:
      path: folder or hub id of a checkpoint.
      batch_size: completions drawn, or masked copies scored, at once.
      num_draws: masks per log-likelihood; 1 is exact for a single token.
      seed: of draws and masks.
      sampler: sampling settings by name, see `config.SAMPLERS`.
      dtype: of activations.
      quantize: how the model's layers are kept, "none" or "int8".
      tokenizer: another folder or hub id, or "bytes".
      revision: on the hub.
      attention_block: of a block-causal model whose files do not tell, as
        Tiny-A2D's bd3lm (32).
      bucket: prompts and continuations are padded to a multiple of this.
      max_batch_size: lm-eval passes it; without effect.
      device: lm-eval passes it; without effect, JAX knows its devices.
      **settings: keys of `config.evaluate`.

    Raises:
      UserError: anything that the user has to change.
    """
    del max_batch_size, device
    super().__init__()
    if not path:
      raise errors.UserError("Which model? Give path=FOLDER or a hub id.")
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
      raise errors.UserError(
        f"{batch_size=} must be a number; a batch is not fitted to memory."
      )
    c = config_lib.rl()
    c.seed = seed
    c.data.bucket = bucket
    c.model.update(
      path=path,
      dtype=dtype,
      quantize=quantize,
      tokenizer=tokenizer,
      revision=revision,
      attention_block=attention_block,
    )
    config_lib.use_sampler(c, sampler)
    config_lib.set_evaluate(c, {**settings, "batch_size": int(batch_size)})
    s = settings_lib.drawing(c)
    self._settings = s
    self._num_draws = num_draws
    self._model = model_lib.load_trained(s.model, None, s.mesh.make(), "")
    self._tokenizer = self._model.tokenizer
    self._sampler = self._model.sampler(s.evaluate, bucket)
    self._greedy = jax.jit(
      lambda params, pairs: match_greedy(
        self._model.bind(params, None),
        pairs,
        s.evaluate.sampling_for(self._tokenizer),
      )
    )

  def apply_chat_template(
    self,
    chat_history: Sequence[dict[str, str]],
    add_generation_prompt: bool = True,
  ) -> str:
    """The chat as a context, which `encode` reads.

    Not the text that the template makes of it: in that, what a message says
    could not be told from the template's special tokens.
    """
    del add_generation_prompt  # without it, the last turn is the model's own
    return _CHAT + json.dumps(list(chat_history), ensure_ascii=False)

  @property
  def tokenizer_name(self) -> str:
    return self._settings.model.tokenizer or self._settings.model.path

  def encode(self, context: str) -> list[int]:
    """Token ids of a context, plain or from `apply_chat_template`."""
    if not context.startswith(_CHAT):
      return self._tokenizer.encode(context)
    messages = json.loads(context.removeprefix(_CHAT))
    prefill = ""
    if messages[-1]["role"] == "assistant":
      prefill = messages.pop()["content"]
    return self._tokenizer.encode_chat(messages, prefill)

  def encode_pair(
    self, context: str, continuation: str
  ) -> tuple[list[int], list[int]]:
    """Ids of both, cut where the context ends.

    After a plain context both are encoded as one text, and spaces at the
    context's end go to the continuation, where tokens have them.
    """
    if context.startswith(_CHAT):
      return self.encode(context), self._tokenizer.encode(continuation)
    bare = context.rstrip()
    continuation = context[len(bare) :] + continuation
    ids = self._tokenizer.encode(bare)
    return ids, self._tokenizer.encode(bare + continuation)[len(ids) :]

  def generate_until(
    self, requests: Sequence[Request], disable_tqdm: bool = False
  ) -> list[str]:
    """A completion per request, cut before the first of its stop strings."""
    del disable_tqdm
    warn_of_ignored(requests)
    prompts = [self.encode(request.args[0]) for request in requests]
    longest = max(map(len, prompts), default=0)
    sampling = self._settings.evaluate.sampling
    self._check_length(longest + sampling.completion_length)
    self._model.check_draw(longest, self._settings.evaluate)
    row_id_Bx2 = row_ids(requests)
    texts = [""] * len(requests)
    bar = progress.bar(len(requests), "completions")
    for group in groups(
      [(len(prompt),) for prompt in prompts], self._settings.data.bucket
    ):
      drawn = self._sampler.sample(
        self._model.params,
        None,
        [prompts[at] for at in group],
        jax.random.key(self._settings.seed),
        row_id_Bx2[group],
      )
      rows = itertools.chain.from_iterable(
        self._sampler.drawn(rollout).tolist() for rollout in drawn
      )
      # The last batch is filled up with repetitions.
      for at, ids in zip(group, rows, strict=False):
        request = requests[at]
        texts[at] = cut(self._text(ids), request.args[1].get("until"))
        self.cache_hook.add_partial("generate_until", request.args, texts[at])
        bar.update()
    bar.close()
    return texts

  def loglikelihood(
    self, requests: Sequence[Request], disable_tqdm: bool = False
  ) -> list[tuple[float, bool]]:
    """Per (context, continuation): its ELBO, and whether greedy decoding, one
    token a step, most confident first, gives just this continuation."""
    del disable_tqdm
    pairs = [self.encode_pair(*request.args) for request in requests]
    found = self._score(pairs, is_greedy_asked=True)
    for request, answer in zip(requests, found, strict=True):
      self.cache_hook.add_partial("loglikelihood", request.args, answer)
    return found

  def loglikelihood_rolling(
    self, requests: Sequence[Request], disable_tqdm: bool = False
  ) -> list[float]:
    """The ELBO of each text as a whole; texts are not cut into windows."""
    del disable_tqdm
    pairs: list[tuple[list[int], list[int]]] = [
      ([], self.encode(request.args[0])) for request in requests
    ]
    found = [value for value, _ in self._score(pairs, is_greedy_asked=False)]
    for request, value in zip(requests, found, strict=True):
      self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
    return found

  def _score(
    self,
    pairs: Sequence[tuple[list[int], list[int]]],
    is_greedy_asked: bool,
  ) -> list[tuple[float, bool]]:
    widths = [(len(prompt), len(rest)) for prompt, rest in pairs]
    self._check_length(max(map(sum, widths), default=0))
    # Nothing is certain: log 1.
    found = [(0.0, True)] * len(pairs)
    bar = progress.bar(len(pairs), "log-likelihoods")
    for group in groups(widths, self._settings.data.bucket):
      group = [at for at in group if pairs[at][1]]
      if not group:
        continue
      prompts = [pairs[at][0] for at in group]
      rest = [pairs[at][1] for at in group]
      # Masks come from the text, so that they do not depend on other requests.
      ids = [number(json.dumps(pairs[at])) for at in group]
      scorer = likelihood.Scorer(
        self._model,
        prompts,
        rest,
        ids,
        num_draws=self._num_draws,
        batch_size=self._settings.evaluate.batch_size,
        bucket=self._settings.data.bucket,
        seed=self._settings.seed,
      )
      is_greedy = [False] * len(group)
      if is_greedy_asked:
        is_greedy = list(self._match(prompts, rest))
      for at, draws_M, matches in zip(
        group, scorer.estimates(), is_greedy, strict=True
      ):
        found[at] = (float(draws_M.mean()), bool(matches))
        bar.update()
    bar.close()
    return found

  def _match(
    self, prompts: Sequence[list[int]], rest: Sequence[list[int]]
  ) -> Iterator[bool]:
    """`match_greedy` of each pair, batch by batch."""
    size = self._settings.evaluate.batch_size
    bucket = self._settings.data.bucket
    pairs = elbo.pack(prompts, rest, bucket, self._model.shape)
    rows = mesh_lib.rows(self._model.mesh)
    for start in range(0, len(rest), size):
      row = np.minimum(np.arange(start, start + size), len(rest) - 1)
      batch = jax.tree.map(lambda column, row=row: column[row], pairs)
      matches_B = self._greedy(self._model.params, jax.device_put(batch, rows))
      yield from processes.to_host(matches_B)[: len(rest) - start]

  def _text(self, ids: Sequence[int]) -> str:
    """What stands before the first end of text or turn."""
    tokenizer = self._tokenizer
    ends = {tokenizer.eos_id, *tokenizer.stop_ids, tokenizer.eot_id}
    kept = itertools.takewhile(lambda one: one not in ends, ids)
    return tokenizer.decode(list(kept))

  def _check_length(self, longest: int) -> None:
    limit = self._model.shape.max_length
    if longest > limit:
      raise errors.UserError(
        f"The longest request has {longest} tokens with its completion, more "
        f"than the model's {limit}: use fewer examples (--num_fewshot) or a "
        "shorter completion_length. Nothing is cut off."
      )


@functools.cache
def register() -> type:
  """Makes the model known to lm-eval as `agrpo_jax`, in this process.

  Raises:
    UserError: lm-eval is not installed.
  """
  try:
    from lm_eval.api import model
    from lm_eval.api import registry
  except ImportError as error:
    raise errors.UserError(
      f"lm-eval is needed: pip install 'agrpo_jax[lm-eval]' ({error})."
    ) from error
  found = type("AgrpoJax", (Adapter, model.LM), {"__doc__": Adapter.__doc__})
  registry.register_model("agrpo_jax")(found)
  return found


def cut(text: str, until: str | Sequence[str] | None) -> str:
  """The text before the first of the stop strings."""
  stops = [until] if isinstance(until, str) else until or []
  ends = [text.find(stop) for stop in stops if stop and stop in text]
  return text[: min(ends, default=len(text))]


def number(text: str) -> int:
  """32 bits that a text always gets."""
  # Not `hash`, which differs from process to process.
  return zlib.crc32(text.encode())


def row_ids(requests: Sequence[Request]) -> np.ndarray:
  """uint32 [B, 2]: a number of the context, and which of its repetitions."""
  seen: collections.Counter[str] = collections.Counter()
  found = []
  for request in requests:
    context = request.args[0]
    found.append((number(context), seen[context]))
    seen[context] += 1
  return np.array(found, np.uint32).reshape(-1, 2)


def warn_of_ignored(requests: Sequence[Request]) -> None:
  """Names the tasks' generation settings that are not heeded."""
  ignored = {
    f"{name}={value}"
    for request in requests
    for name, value in request.args[1].items()
    if name != "until"
  }
  if ignored:
    logging.warning(
      "Without effect, since the model's settings are those of --model_args: "
      "%s.",
      ", ".join(sorted(ignored)),
    )


def groups(widths: Sequence[tuple[int, ...]], bucket: int) -> list[list[int]]:
  """Indices of rows that are padded to the same widths, the widest first."""
  rounded = [tuple(-(-one // bucket) for one in row) for row in widths]
  order = sorted(range(len(rounded)), key=lambda at: rounded[at])
  found = itertools.groupby(order, key=lambda at: rounded[at])
  return [list(group) for _, group in found][::-1]


def match_greedy(
  network: types.Network, pairs: elbo.Pairs, sampling: sampling_lib.Sampling
) -> jax.Array:
  """Returns bool [B]: whether greedy decoding gives the completion.

  Of the masked positions the one with the most probable token gets it, one a
  denoising step. Where that is not the completion's own token, the answer is
  no and the rest need not be decoded.

  Args:
    network: bound to its parameters.
    pairs: prompts and completions.
    sampling: of block-causal models into which parts a block is divided and
      which position leads; nothing else of it but the mask's id.
  """
  size = block_length = pairs.completion.shape[1]
  if pairs.attention_block:
    block_length = math.gcd(pairs.attention_block, sampling.block_length)
  place_C = jnp.arange(size)

  def is_undecided(state: tuple[jax.Array, jax.Array]) -> jax.Array:
    is_masked_BxC, matches_B = state
    return (is_masked_BxC.any(axis=1) & matches_B).any()

  def denoise(
    state: tuple[jax.Array, jax.Array],
  ) -> tuple[jax.Array, jax.Array]:
    is_masked_BxC, matches_B = state
    # As long as all matched, what was decoded is the completion's own.
    logits_BxCxV = elbo.partial_logits(
      network, pairs, is_masked_BxC, sampling.mask_id
    )
    confidence_BxC = jax.nn.log_softmax(logits_BxCxV).max(axis=-1)
    # One block after the other, where there are blocks.
    block_C = place_C // block_length
    first_B = jnp.where(is_masked_BxC, block_C[None], size).min(axis=1)
    can_be_BxC = jax.vmap(rules.candidates, (0, None, None))(
      is_masked_BxC & (block_C[None] == first_B[:, None]),
      place_C,
      sampling.lead_every if pairs.attention_block else 0,
    )
    chosen_B = jnp.where(can_be_BxC, confidence_BxC, -jnp.inf).argmax(axis=1)
    is_chosen_BxC = (place_C[None, :] == chosen_B[:, None]) & is_masked_BxC
    is_same_BxC = logits_BxCxV.argmax(axis=-1) == pairs.completion
    return (
      is_masked_BxC & ~is_chosen_BxC,
      matches_B & (is_same_BxC | ~is_chosen_BxC).all(axis=1),
    )

  state = (pairs.is_asked, jnp.ones(pairs.length.shape, bool))
  return jax.lax.while_loop(is_undecided, denoise, state)[1]
