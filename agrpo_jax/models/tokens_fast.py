"""A checkpoint's fast tokenizer and chat template, without running its code."""

import contextlib
import functools
import itertools
import json
import math
import pathlib
import re
import threading
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders
from tokenizers import models as tokenizer_models
from tokenizers import normalizers
from tokenizers import pre_tokenizers

from agrpo_jax import errors
from agrpo_jax.models import base
from agrpo_jax.models import chat_template
from agrpo_jax.models import folder as folder_lib

_REMEDY = (
  "Set model.tokenizer to a folder or hub id that has one, or to 'bytes' for "
  "raw bytes."
)
_FILE = "tokenizer.json"
# What stands in its place, and the classes that split text as Qwen2's does.
_PARTS = ("vocab.json", "merges.txt")
_CLASSES = ("DreamTokenizer", "Qwen2Tokenizer", "Qwen2TokenizerFast")
_QWEN2_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Names of special tokens that a tokenizer_config.json may give.
_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "mask_token")

_MAX_ID = 1 << 24  # a hundred times what networks have
_MAX_ADDED = 1 << 15  # tokens; each is looked for at each character
# How often the steps of a part may double a text; those of released ones: 2.
_MAX_DOUBLINGS = 6
SECONDS = 20.0  # for one text or batch of texts, by the clock
_TEXTS = 64  # in a batch that is encoded: its time is bounded as a whole

Messages = Sequence[Mapping[str, str]]


class FastTokenizer:
  """The tokenizer and chat template of a folder; no code of it is run.

  It is `tokenizer.json`, or what is made of `vocab.json` and `merges.txt` where
  the class that they are for is known (Dream's).
  """

  def __init__(self, folder: pathlib.Path, vocabulary: base.Vocabulary):
    settings = _settings(folder)
    self._tokenizer = _read(folder, settings)
    self._template = _chat_template(folder, settings)
    self._names = {name: settings[name] for name in _NAMED if name in settings}
    # A mask that was added as an ordinary token is special all the same.
    added = self._tokenizer.get_added_tokens_decoder()
    if vocabulary.mask_id in added:
      mask = added[vocabulary.mask_id].content
      self._tokenizer.add_special_tokens([mask])
    _check_ids(folder, self._tokenizer, self._names, vocabulary)
    self.mask_id = vocabulary.mask_id
    self.eos_id = vocabulary.eos_id
    self.stop_ids = vocabulary.stop_ids
    self.pad_id = vocabulary.pad_id
    self._vocab_size = vocabulary.size
    end = vocabulary.end_of_turn
    self.eot_id = self._tokenizer.token_to_id(end)
    if self.eot_id is not None:
      self._tokenizer.add_special_tokens([end])  # if it was not special yet
    self._special = {
      token.content: at
      for at, token in self._tokenizer.get_added_tokens_decoder().items()
      if token.special
    }
    longest_first = sorted(self._special, key=len, reverse=True)
    self._pattern = re.compile("|".join(map(re.escape, longest_first)))
    with _reading(folder):  # one in parts may be none when it is put together
      self._plain = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
    self._plain.encode_special_tokens = True

  def encode_chat(self, messages: Messages, prefill: str = "") -> list[int]:
    return self.encode_chats([(messages, prefill)])[0]

  def encode_chats(
    self, chats: Sequence[tuple[Messages, str]]
  ) -> list[list[int]]:
    shields = [
      _Shield(self._pattern, prefill, *map(_content, messages))
      for messages, prefill in chats
    ]
    texts = chat_template.render(
      self._template,
      self._names,
      [
        [
          {**message, "content": shield.hide(message["content"])}
          for message in messages
        ]
        for shield, (messages, _) in zip(shields, chats, strict=True)
      ],
    )
    texts = [
      text + shield.hide(prefill)
      for text, shield, (_, prefill) in zip(texts, shields, chats, strict=True)
    ]
    is_plain = [not shield.hidden for shield in shields]
    plain = iter(
      self._ids(self._tokenizer, [*itertools.compress(texts, is_plain)])
    )
    return [
      next(plain) if one else self._encode_around(text, shield)
      for one, text, shield in zip(is_plain, texts, shields, strict=True)
    ]

  def _encode_around(self, text: str, shield: "_Shield") -> list[int]:
    """Encodes a chat whose messages contain names of special tokens.

    Text between special tokens is encoded by itself anyhow, so this makes a
    difference only to those names.
    """
    ids: list[int] = []
    at = 0
    for match in self._pattern.finditer(text):
      ids += self.encode(shield.show(text[at : match.start()]))
      ids.append(self._special[match.group()])
      at = match.end()
    return ids + self.encode(shield.show(text[at:]))

  def encode(self, text: str) -> list[int]:
    return self._ids(self._plain, [text])[0]

  def decode(self, ids: Sequence[int]) -> str:
    return self._decode([list(ids)])[0]

  def decode_raw(self, ids: Sequence[int]) -> str:
    pieces = []
    for is_token, run in itertools.groupby(
      ids, key=lambda one: self._tokenizer.id_to_token(one) is not None
    ):
      if is_token:
        pieces += self._decode([list(run)], skip_special_tokens=False)
      else:
        pieces += [f"<|id {one}|>" for one in run]
    return "".join(pieces)

  def decode_batch(self, ids_BxC: np.ndarray) -> list[str]:
    return self._decode(np.asarray(ids_BxC).tolist())

  def _decode(
    self, rows: list[list[int]], skip_special_tokens: bool = True
  ) -> list[str]:
    return _bounded(
      lambda: self._tokenizer.decode_batch(
        rows, skip_special_tokens=skip_special_tokens
      )
    )

  def _ids(
    self, tokenizer: tokenizers.Tokenizer, texts: Sequence[str]
  ) -> list[list[int]]:
    ids: list[list[int]] = []
    for at in range(0, len(texts), _TEXTS):
      some = [*texts[at : at + _TEXTS]]
      # A batch, because that lets go of the interpreter and `encode` does not.
      encode = functools.partial(
        tokenizer.encode_batch, some, add_special_tokens=False
      )
      ids += [one.ids for one in _bounded(encode)]
    used = {*itertools.chain.from_iterable(ids)}
    beyond = sorted(one for one in used if one >= self._vocab_size)
    if beyond:
      listed = ", ".join(
        f"{tokenizer.id_to_token(one)!r} {one}" for one in beyond
      )
      raise errors.UserError(
        f"The tokenizer has tokens that the network lacks (vocab_size "
        f"{self._vocab_size}): {listed}. Use the tokenizer that the network "
        "was trained with."
      )
    return ids


def _bounded(call: Callable[[], Any]) -> Any:
  """Runs `call` and returns its result, within bounded time.

  A tokenizer's patterns may try exponentially many ways to match a text.

  Raises:
    UserError: it took too long or failed. What took too long goes on in a
      thread that ends with this process: nothing can stop it.
  """
  returned: list[Any] = []
  raised: list[BaseException] = []

  def run() -> None:
    try:
      returned.append(call())
    except BaseException as error:  # panics of Rust code are no `Exception`
      raised.append(error)

  thread = threading.Thread(target=run, daemon=True)
  thread.start()
  thread.join(SECONDS)
  if returned:
    return returned[0]
  why = f"it takes longer than {SECONDS:g} seconds"
  if raised:
    why = f"{type(raised[0]).__name__}: {raised[0]}"
  raise errors.UserError(
    f"The tokenizer cannot encode or decode a text: {why}. A pattern in its "
    f"tokenizer.json may try too many ways to match. {_REMEDY}"
  )


class _Shield:
  """Hides the names of special tokens in what a template is given.

  The template may trim or join texts; what stands for a name survives that,
  and is turned back when the special tokens of the template are known.

  Attributes:
    hidden: the names found so far.
  """

  def __init__(self, pattern: re.Pattern[str], *texts: str):
    self._pattern = pattern
    # A character of Unicode's private use area that no text contains.
    used = {*itertools.chain(*texts)}
    free = (one for one in map(chr, range(0xE000, 0xF900)) if one not in used)
    self._mark = next(free, "")
    if not self._mark:
      raise errors.UserError(
        "A text cannot be encoded: it has all of the 6,400 characters that "
        "Unicode keeps for private use. Leave one of them out."
      )
    self.hidden: list[str] = []

  def hide(self, text: str) -> str:
    def put(match: re.Match[str]) -> str:
      self.hidden.append(match.group())
      return f"{self._mark}{len(self.hidden) - 1}{self._mark}"

    return self._pattern.sub(put, text)

  def show(self, text: str) -> str:
    # The template may have written the mark itself.
    names = {str(at): name for at, name in enumerate(self.hidden)}
    return re.sub(
      f"{self._mark}([0-9]+){self._mark}",
      lambda match: names.get(match.group(1), match.group()),
      text,
    )


def _content(message: Mapping[str, str]) -> str:
  text = message.get("content")
  if not isinstance(text, str) or not isinstance(message.get("role"), str):
    raise errors.UserError(
      f"A message needs the texts 'role' and 'content'; it is {dict(message)!r}"
    )
  return text


def special_ids(folder: pathlib.Path) -> dict[str, int]:
  """Returns the ids of special tokens by their keys in a config.json.

  They are those that tokenizer_config.json names, e.g. {"mask_token_id": 5};
  none where the folder has no tokenizer.

  Raises:
    UserError: a tokenizer that cannot be read.
  """
  settings = _settings(folder)
  if not (folder / _FILE).is_file() and not _is_in_parts(folder, settings):
    return {}
  tokenizer = _read(folder, settings)
  ids = {
    f"{name}_id": tokenizer.token_to_id(settings[name])
    for name in _NAMED
    if name in settings
  }
  return {key: at for key, at in ids.items() if at is not None}


def _is_in_parts(folder: pathlib.Path, settings: Mapping[str, Any]) -> bool:
  return settings.get("tokenizer_class") in _CLASSES and all(
    (folder / name).is_file() for name in _PARTS
  )


def _read(
  folder: pathlib.Path, settings: Mapping[str, Any]
) -> tokenizers.Tokenizer:
  path, make = folder / _FILE, tokenizers.Tokenizer.from_file
  if not path.is_file():
    if not _is_in_parts(folder, settings):
      raise errors.UserError(f"{folder} has no {_FILE}. {_REMEDY}")
    path, make = folder / _PARTS[0], functools.partial(_of_parts, settings)
    folder_lib.check(folder / _PARTS[1])
  folder_lib.check(path)
  with _reading(path):
    tokenizer = make(str(path))
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest > _MAX_ID:
      # The library fills up memory with what is missing below it.
      raise ValueError(f"a token has the id {largest}")
    _check_size(tokenizer)
  # A saved tokenizer may still carry the last call's limits.
  tokenizer.no_truncation()
  tokenizer.no_padding()
  return tokenizer


def _check_size(tokenizer: tokenizers.Tokenizer) -> None:
  """Raises ValueError for what makes short texts take much time or memory."""
  num_added = len(tokenizer.get_added_tokens_decoder())
  if num_added > _MAX_ADDED:
    raise ValueError(f"it adds {num_added:,} tokens, more than {_MAX_ADDED:,}")
  for name in ("normalizer", "pre_tokenizer", "decoder"):
    part = getattr(tokenizer, name)
    if part and _doublings(json.loads(part.__getstate__())) > _MAX_DOUBLINGS:
      raise ValueError(
        f"its {name} may make a text more than {2**_MAX_DOUBLINGS} times as "
        "long"
      )


def _doublings(step: Mapping[str, Any]) -> float:
  """How often a step of a tokenizer's part may double the characters."""
  if step["type"] == "Sequence":
    (steps,) = (value for key, value in step.items() if key != "type")
    return sum(map(_doublings, steps))
  if step["type"] == "ByteLevel":
    return 2  # the four bytes of a character
  if step["type"] == "Prepend":
    return math.log2(1 + len(step["prepend"]))
  if step["type"] == "Replace":
    # A regular expression may match at every place, and take nothing away.
    before = len(step["pattern"].get("String", ""))
    after = len(step["content"]) if before else 1 + len(step["content"])
    return math.log2(max(after / max(before, 1), 1))
  return 0


@contextlib.contextmanager
def _reading(path: pathlib.Path) -> Iterator[None]:
  """Raises UserError for what a tokenizer's files make the library raise."""
  try:
    yield
  # It raises nothing more specific, and panics of its Rust code, which are no
  # `Exception`.
  except BaseException as error:
    if isinstance(error, KeyboardInterrupt | SystemExit):
      raise
    raise errors.UserError(
      f"{path} cannot be read: {error}. {_REMEDY}"
    ) from error


def _of_parts(settings: Mapping[str, Any], path: str) -> tokenizers.Tokenizer:
  """Makes Qwen2's tokenizer of vocab.json and of merges.txt beside it.

  Args:
    settings: tokenizer_config.json, which has the tokens that were added.
    path: of vocab.json.

  Raises:
    ValueError: added tokens whose ids do not follow those of vocab.json.
  """
  merges = pathlib.Path(path).with_name(_PARTS[1])
  tokenizer = tokenizers.Tokenizer(
    tokenizer_models.BPE.from_file(path, str(merges))
  )
  tokenizer.normalizer = normalizers.NFC()
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(_QWEN2_SPLIT), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  added = settings.get("added_tokens_decoder") or {}
  in_order = sorted(added.items(), key=lambda one: int(one[0]))
  # At once: for each call the library looks at all of them.
  tokenizer.add_tokens([tokenizers.AddedToken(**one) for _, one in in_order])
  for at, token in in_order:
    found = tokenizer.token_to_id(token["content"])
    if found != int(at):
      raise ValueError(
        f"{token['content']!r} of tokenizer_config.json has the id {at} there, "
        f"and {found} after vocab.json"
      )
  return tokenizer


def _settings(folder: pathlib.Path) -> dict[str, Any]:
  """tokenizer_config.json, with the names of special tokens as strings."""
  path = folder / "tokenizer_config.json"
  raw = folder_lib.read_json(path) if path.exists() else {}
  if not isinstance(raw, dict):
    raise errors.UserError(f"{path} does not hold a JSON object")
  for name in _NAMED:
    value = raw.pop(name, None)
    if isinstance(value, dict):
      value = value.get("content")
    if isinstance(value, str):
      raw[name] = value
  return raw


def _chat_template(folder: pathlib.Path, settings: dict[str, Any]) -> str:
  path = folder / "chat_template.jinja"
  template: Any = settings.get("chat_template")
  if path.exists():
    template = folder_lib.read_text(path)
  if isinstance(template, list):  # several, by name
    by_name = {
      one.get("name"): one.get("template")
      for one in template
      if isinstance(one, dict)
    }
    template = by_name.get("default")
  if not isinstance(template, str):
    raise errors.UserError(
      f"{folder} has no chat template: neither chat_template.jinja nor "
      f"'chat_template' in tokenizer_config.json. Add one, or: {_REMEDY}"
    )
  return template


def _check_ids(
  folder: pathlib.Path,
  tokenizer: tokenizers.Tokenizer,
  names: Mapping[str, str],
  vocabulary: base.Vocabulary,
) -> None:
  """UserError unless the network's special ids are the tokenizer's."""
  special = {
    at
    for at, one in tokenizer.get_added_tokens_decoder().items()
    if one.special
  }
  problems = []
  # Which of several ends a text, the tokenizer may see otherwise.
  named = tokenizer.token_to_id(names.get("eos_token", ""))
  eos = "" if named in vocabulary.stop_ids else "eos_token"
  for key, name, at in (
    ("mask_token_id", "mask_token", vocabulary.mask_id),
    ("eos_token_id", eos, vocabulary.eos_id),
    *(("eos_token_id", "", at) for at in vocabulary.stop_ids),
  ):
    token = tokenizer.id_to_token(at)
    if token is None:
      problems.append(f"{key} is {at}, which is no token of the tokenizer")
    elif at not in special:
      problems.append(f"{key} is {at}, the ordinary token {token!r}")
    elif names.get(name, token) != token:
      problems.append(
        f"{key} is {at}, {token!r}, but the tokenizer's {name} is "
        f"{names[name]!r} ({tokenizer.token_to_id(names[name])})"
      )
  if problems:
    raise errors.UserError(
      f"The tokenizer in {folder} does not belong to this network: "
      + "; ".join(problems)
      + ". Correct config.json, or use the network's own tokenizer."
    )
