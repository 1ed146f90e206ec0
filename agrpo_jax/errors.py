"""The exceptions that a person is meant to read."""

_MAX_CHARS = 12_000
_MAX_END = 4_000


class UserError(ValueError):
  """A mistake in the command, the config or the data.

  Its message says what is wrong, with the value, and what to change. The
  commands print it without a traceback and exit with code 2.
  """

  def __init__(self, message: str):
    super().__init__(readable(_short(message)))


class Stopped(Exception):
  """A run that was asked to stop and has saved where it is.

  Attributes:
    code: the exit code, 128 plus the signal's number.
  """

  def __init__(self, message: str, code: int):
    super().__init__(message)
    self.code = code


def _short(text: str) -> str:
  """Returns a message's beginning and end: it may quote files of any length."""
  if len(text) <= _MAX_CHARS:
    return text
  start, end = text[: _MAX_CHARS - _MAX_END], text[-_MAX_END:]
  left_out = len(text) - _MAX_CHARS
  return f"{start} [{left_out:,} characters left out] {end}"


def readable(text: str) -> str:
  """Returns what others wrote as a terminal may have it.

  What a terminal would obey, or what cannot be printed at all, is escaped.
  """
  return "".join(
    one
    if one.isprintable() or one in "\n\t"
    else one.encode("unicode_escape").decode()
    for one in text
  )
