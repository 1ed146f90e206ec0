"""Damages files, at random and by design; see `fuzz_files`.

A mutation changes the files of one folder. What it draws comes from one
`random.Random`, so that a number names a mutation for good.
"""

import json
import os
import pathlib
import random
import re
import struct
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n"
# Texts that some layer takes for more than text.
TEXTS = (
  "",
  "x",
  ".",
  "..",
  "../outside",
  "/etc/hostname",
  "a/b",
  "a\x00b",
  "\x1b[2J\x1b[31m",
  "\ud800",
  "\u202e\u2028",
  "{{ 7 * 7 }}",
  "%s%n{0.__class__}",
  "1e999",
  "١٢",
  "__import__('os').getcwd()",
)
NUMBERS: tuple[Any, ...] = (
  *(0, 1, -1, 2, 3, 0.5, -0.0, 255, 256, 265, 266, 2**31, 2**32 - 1, 2**53 + 1),
  *(2**63, 2**64, -(2**63), 10**18, 10**400, -(10**400), 1e308, 5e-324, 3.5e38),
  *(float("nan"), float("inf"), float("-inf")),
)


def value(rng: random.Random, depth: int = 0) -> Any:
  """Returns a value of JSON that a reader may not expect."""
  kind = rng.random()
  if kind < 0.45:
    return rng.choice(NUMBERS)
  if kind < 0.65:
    return rng.choice(TEXTS)
  if kind < 0.8:
    return rng.choice([None, True, False])
  if kind < 0.83:
    return "long " * rng.choice([1000, 200_000])
  if kind < 0.86:
    return [rng.choice(NUMBERS)] * rng.choice([1000, 100_000])
  if depth > 3:
    return []
  if kind < 0.93:
    return [value(rng, depth + 1) for _ in range(rng.randint(0, 3))]
  return {
    rng.choice(TEXTS): value(rng, depth + 1) for _ in range(rng.randint(0, 3))
  }


def _places(tree: Any) -> list[tuple[Any, Any]]:
  """Returns (container, key) of everything in a tree of JSON."""
  found: list[tuple[Any, Any]] = []
  left = [tree]
  while left:
    one = left.pop()
    keys: Any = ()
    if isinstance(one, dict):
      keys = [*one]
    elif isinstance(one, list):
      keys = range(len(one))
    for key in keys:
      found.append((one, key))
      left.append(one[key])
  return found


def _place(rng: random.Random, tree: Any) -> tuple[Any, Any] | None:
  # The top half of the time: below it may stand a vocabulary.
  top = [(tree, key) for key in tree] if isinstance(tree, dict) else []
  every = _places(tree)
  if not every:
    return None
  return rng.choice(top if top and rng.random() < 0.5 else every)


def json_text(rng: random.Random, text: str) -> str:
  """Returns a JSON text with something else in it, or no JSON at all."""
  kind = rng.random()
  if kind < 0.08:
    return bytes_of(rng, text.encode()).decode("utf-8", "replace")
  if kind < 0.16:  # a key twice
    keys = [*re.finditer(r'"[^"\\]*"\s*:', text)]
    if keys:
      match = rng.choice(keys)
      other = json.dumps(value(rng))
      return (
        f"{text[: match.start()]}{match[0]} {other}, {text[match.start() :]}"
      )
  if kind < 0.2:
    depth = rng.choice([200, 5000, 200_000])
    start, end = rng.choice([("[", "]"), ('{"a":', "}")])
    return start * depth + "1" * (start == '{"a":') + end * depth
  if kind < 0.22:
    return f'{{"a": {"9" * rng.choice([4000, 100_000])}}}'
  try:
    tree = json.loads(text)
  except ValueError:
    return text[: rng.randrange(1 + len(text))]
  for _ in range(rng.choice([1, 1, 1, 2, 4])):
    if (place := _place(rng, tree)) is None:
      break
    container, key = place
    kind = rng.random()
    if kind < 0.65:
      container[key] = value(rng)
    elif kind < 0.8:
      del container[key]
    elif isinstance(container, dict):
      container[rng.choice([*TEXTS, "extra"])] = container[key]
      if kind < 0.9:
        del container[key]
    else:
      container.insert(rng.randrange(1 + len(container)), container[key])
  if rng.random() < 0.02:
    tree = value(rng)
  return json.dumps(tree, ensure_ascii=rng.random() < 0.8)


def bytes_of(rng: random.Random, content: bytes) -> bytes:
  """Returns bytes that are damaged as by a disk, or a person with a pen."""
  kind = rng.randrange(7)
  at = rng.randrange(1 + len(content))
  end = min(len(content), at + rng.choice([1, 2, 8, 64, 1000]))
  if kind == 0:
    return content[:at]
  if kind == 1:
    return content + rng.randbytes(rng.choice([1, 8, 1000]))
  if kind == 2:
    return content[:at] + rng.randbytes(end - at) + content[end:]
  if kind == 3:
    return content[:at] + bytes(end - at) + content[end:]
  if kind == 4:
    return content[:at] + content[end:]
  if kind == 5:
    return content[:end] + content[at:]
  changed = bytearray(content)
  for _ in range(rng.choice([1, 1, 4, 32])):
    if changed:
      changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
  return bytes(changed)


def _is_tensor(entry: Any) -> bool:
  """False for the metadata, and for what a change before has left of one."""
  if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
    return False
  offsets = entry.get("data_offsets")
  return isinstance(offsets, list) and [*map(type, offsets)] == [int, int]


def _header(rng: random.Random, header: dict[str, Any]) -> None:
  """Changes what the header of a safetensors file says of a tensor."""
  name = rng.choice([*header])
  entry = header[name]
  if not _is_tensor(entry):
    header[name] = value(rng)
    return
  begin, end = entry["data_offsets"]
  other = rng.choice([*header.values()])
  kind = rng.randrange(8)
  if kind == 0:
    entry["dtype"] = rng.choice(
      ["F16", "BF16", "F64", "I8", "U64", "BOOL", "F8_E4M3", "F4", "f32", "Q4"]
      + [*TEXTS]
    )
  elif kind == 1:
    size = rng.choice([1, 2, 4, 2**31, 2**62, 2**63, 2**64 - 1, 0, -1])
    entry["shape"] = rng.choice(
      [[size], [size, 4], [2**32, 2**32], [], [0, size], [1] * 1000, [2.0]]
    )
  elif kind == 2:
    entry["shape"] = [*reversed(entry["shape"])]
  elif kind == 3:
    entry["data_offsets"] = rng.choice(
      [
        [end, begin],
        [begin - 4, end - 4],
        [begin + 4, end + 4],
        [begin, end + 2**40],
        [2**63, 2**63 + end - begin],
        [-end, -begin],
        [begin],
        [0, 0],
      ]
    )
  elif kind == 4 and _is_tensor(other):
    entry["data_offsets"] = other["data_offsets"]
  elif kind == 5:
    header[rng.choice([*header, *TEXTS])] = entry
  elif kind == 6:
    del header[name]
  else:
    entry[rng.choice(["dtype", "shape", "data_offsets", "more"])] = value(rng)


def safetensors(rng: random.Random, content: bytes) -> bytes:
  """Returns a file of tensors, damaged where it hurts."""
  kind = rng.random()
  if kind < 0.15:
    return bytes_of(rng, content)
  (size,) = struct.unpack("<Q", content[:8])
  text, body = content[8 : 8 + size], content[8 + size :]
  if kind < 0.25:  # numbers that are none
    at = rng.randrange(max(1, len(body) // 4)) * 4
    bad = rng.choice([b"\xff\xff\xff\xff", b"\x00\x00\x80\x7f", b"\x80\x7f"])
    return content[: 8 + size] + body[:at] + bad + body[at + len(bad) :]
  if kind < 0.4:
    said = rng.choice(
      [0, 1, 2, size - 1, size + 1, size + 8, len(content), 10**8, 10**8 + 1]
      + [2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
    )
    return struct.pack("<Q", said) + content[8:]
  if kind < 0.5:
    text = json_text(rng, text.decode()).encode("utf-8", "surrogatepass")
  else:
    header = json.loads(text)
    for _ in range(rng.choice([1, 1, 2])):
      if header:
        _header(rng, header)
    text = json.dumps(header).encode()
  text += b" " * rng.choice([0, 0, 0, 7, 100])
  return struct.pack("<Q", len(text)) + text + body


# Of a template: each reaches for something, or for ever.
_SNIPPETS = (
  "{{ ''.__class__.__mro__ }}",
  "{{ messages.__class__.__base__.__subclasses__() }}",
  "{{ (messages|attr('__cla' + 'ss__')).__init__.__globals__ }}",
  "{{ messages[0]|attr('pop')('content') }}",
  "{{ messages.append(messages) }}",
  "{{ '{0.__class__}'.format(messages) }}",
  "{{ '{0.__init__.__globals__}'|format(raise_exception) }}",
  "{{ '%s' % messages.__doc__ }}",
  "{{ self.__init__.__globals__ }}",
  "{{ self._TemplateReference__context }}",
  "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
  "{{ lipsum.__globals__['os'].system('id') }}",
  "{{ raise_exception.__globals__ }}",
  "{{ strftime_now.__globals__.sys.modules }}",
  "{{ strftime_now('%' + 's' * 100000) }}",
  "{{ tojson.__globals__ }}",
  "{{ get_flashed_messages.__globals__ }}",
  "{{ url_for.__globals__ }}",
  "{{ namespace.__init__.__globals__ }}",
  "{{ [].__class__.__init__ }}",
  "{{ messages|map(attribute='__class__')|list }}",
  "{{ messages|map('attr', '__class__')|list }}",
  "{{ messages|groupby('__class__')|list }}",
  "{{ messages|sort(attribute='__class__')|list }}",
  "{{ dict.fromkeys(range(99999)) }}",
  "{% include 'OUTSIDE' %}",
  "{% import 'OUTSIDE' as x %}{{ x }}",
  "{% extends 'OUTSIDE' %}",
  "{{ 'x' * 10**9 }}",
  "{{ 9 ** 9 ** 9 }}",
  "{{ 10 ** 100000 }}",
  "{{ '%0999999999d' % 1 }}",
  "{{ ('x' * 1000000)|replace('x', 'y' * 1000000) }}",
  "{{ ('x' * 100000)|indent(100000) }}",
  "{{ ('ab' * 100000)|center(10**9) }}",
  "{{ ('x ' * 100000)|wordwrap(1) }}",
  "{{ ('<' * 100000)|urlize }}",
  "{{ ('x' * 100000)|batch(10**8, 0)|list }}",
  "{{ range(10**9)|list }}",
  "{{ range(99999)|map('string')|join('x' * 1000) }}",
  "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
  "{% for x in messages recursive %}{{ loop(messages) }}{% endfor %}",
  "{% set ns = namespace(x='x') %}"
  "{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
  "{% filter upper %}{{ bos_token }}{% endfilter %}",
  "{% call(x) messages() %}{% endcall %}",
  "{% generation %}{{ 1 }}{% endgeneration %}",
  "{{ 1 / 0 }}",
  "{{ undefined.a.b }}",
  "{{ raise_exception('\\x1b[2J no') }}",
  "{{ messages | tojson }}",
  "{% raw %}{{ }}{% endraw %}",
  "{# " * 1000,
  "{{ " * 1000,
  "{% if 1 %}" * 300,
  "{{" + "(" * 2000 + "1" + ")" * 2000 + "}}",
  "{{" + "not " * 5000 + "1 }}",
  "{{ 1" + " + 1" * 5000 + " }}",
  "{{ x" + "|upper" * 3000 + " }}",
  "{{ bos_token }}",
  "{{ messages[0].content }}",
  # As what stands for the names of special tokens while they are hidden.
  "\ue0000\ue000{{ messages[0].content }}\ue00077\ue000",
  "\ue000" + "9" * 5000 + "\ue000",
)
_ENDLESS = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3


def template(rng: random.Random, text: str, outside: pathlib.Path) -> str:
  """Returns a chat template that wants more than to write a chat."""
  if rng.random() < 0.002:
    return _ENDLESS
  pieces = [text, *re.findall(r"\{.*?\}|[^{]+", text)]
  found = [
    rng.choice(_SNIPPETS if rng.random() < 0.7 else pieces)
    for _ in range(rng.randint(1, 4))
  ]
  made = "".join(found)
  made = made.replace("OUTSIDE", str(outside / "chat_template.jinja"))
  if rng.random() < 0.3:
    broken = bytes_of(rng, made.encode("utf-8", "replace"))
    made = broken.decode("utf-8", "replace")
  return made


def entry(
  rng: random.Random, path: pathlib.Path, outside: pathlib.Path
) -> None:
  """Puts something else in the place of a file.

  Args:
    rng: what to draw from.
    path: of the file.
    outside: a folder with files of the same names that must not be read.
  """

  def link(to: str | os.PathLike[str]) -> Callable[[], None]:
    return lambda: path.symlink_to(to)

  def write(content: bytes, size: int) -> Callable[[], None]:
    def act() -> None:
      path.write_bytes(content)
      os.truncate(path, size)

    return act

  content = path.read_bytes()
  moved = path.with_name("moved")
  makers: Sequence[Callable[[], None]] = (
    link(outside / path.name),
    link(outside / path.name),
    link(pathlib.Path("..") / outside.name / path.name),
    link(outside),
    link("/dev/zero"),
    link("/proc/self/environ"),
    link("nowhere"),
    link(path.name),
    link(moved.name),
    path.mkdir,
    lambda: os.mkfifo(path),
    write(content, 2**36),
    write(b"", 0),
    write(_POINTER.encode(), len(_POINTER)),
    lambda: None,
  )
  make = rng.choice(makers)
  path.rename(moved)
  make()
  if make is not makers[8]:
    moved.unlink()
