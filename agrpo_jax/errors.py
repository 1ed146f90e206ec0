"""The exceptions that a person is meant to read."""


class UserError(ValueError):
  """A mistake in the command, the config or the data.

  Its message says what is wrong, with the value, and what to change. The
  commands print it without a traceback and exit with code 2.
  """


class Stopped(Exception):
  """A run that was asked to stop and has saved where it is.

  Attributes:
    code: the exit code, 128 plus the signal's number.
  """

  def __init__(self, message: str, code: int):
    super().__init__(message)
    self.code = code
