"""Messages that quote what strangers wrote."""

from agrpo_jax import errors


def test_what_a_terminal_would_obey_is_escaped():
  message = str(errors.UserError("a\x1b[2J\ud800\u202e\x00\nb\té∞🙂"))
  assert message == "a\\x1b[2J\\ud800\\u202e\\x00\nb\té∞🙂"


def test_what_is_printed_is_escaped_and_whole():
  assert errors.readable("\x07" + "x" * 10**5) == "\\x07" + "x" * 10**5


def test_long_messages_keep_beginning_and_end():
  message = str(errors.UserError("first " + "x" * 10**6 + " last"))
  assert message.startswith("first x") and message.endswith("x last")
  assert "[988,011 characters left out]" in message
  assert len(message) < 13_000
