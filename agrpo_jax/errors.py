"""The one exception a user is meant to read."""


class UserError(ValueError):
  """A mistake in the command, the config or the data.

  Its message says what is wrong, with the value, and what to change. The
  commands print it without a traceback and exit with code 2.
  """
