"""The process in which chat templates run, see `chat_template`.

    python -m agrpo_jax.models.chat_template_worker FD SECONDS

Lines of JSON on the socket FD: {"template", "names", "chats"} -> {"texts"}, one
per chat, or {"error"}. The system ends the process when a line takes longer
than SECONDS; it ends itself when the other side closes the socket.
"""

import functools
import json
import pathlib
import resource
import signal
import socket
import sys
from typing import Any

import tokenizers
import transformers
from tokenizers import models

MAX_BYTES = 1 << 30  # of memory, besides what this process starts with
MAX_CHARS = 10_000_000  # of the texts of a line


def _bound_memory() -> None:
  try:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
  except OSError:  # only Linux tells
    pages = 0
  limit = pages * resource.getpagesize() + MAX_BYTES
  _, hard = resource.getrlimit(resource.RLIMIT_AS)
  if hard != resource.RLIM_INFINITY:
    limit = min(limit, hard)
  resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


@functools.lru_cache(maxsize=8)
def _renderer(template: str, names: tuple[tuple[str, str], ...]) -> Any:
  """A tokenizer without tokens: only its template is used."""
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer(models.BPE()),
    chat_template=template,
    **dict(names),
  )


def _reply(request: dict[str, Any]) -> dict[str, Any]:
  texts: list[str] = []
  left = MAX_CHARS
  try:
    names = tuple(sorted(request["names"].items()))
    for messages in request["chats"]:
      text = str(
        _renderer(request["template"], names).apply_chat_template(
          messages,
          tokenize=False,
          add_generation_prompt=True,
          # Qwen3's templates know it: an answer without thoughts before it.
          enable_thinking=False,
        )
      )
      left -= len(text)
      if left < 0:
        return {"error": f"it writes more than {MAX_CHARS:,} characters"}
      texts.append(text)
    return {"texts": texts}
  except MemoryError:
    return {"error": f"it needs more than {MAX_BYTES >> 20} MiB of memory"}
  # A template can raise what it likes: jinja's errors, Python's, recursion.
  except Exception as error:
    lines = str(error).splitlines() or [""]
    return {"error": f"{type(error).__name__}: {lines[0][:300]}"}


def main(descriptor: int, seconds: int) -> None:
  _bound_memory()
  signal.signal(signal.SIGALRM, signal.SIG_DFL)  # whatever was inherited
  with socket.socket(fileno=descriptor) as other, other.makefile("rwb") as file:
    for line in file:
      # Not caught anywhere, so it ends the process wherever that is.
      signal.alarm(seconds)
      reply = json.dumps(_reply(json.loads(line))).encode() + b"\n"
      signal.alarm(0)
      file.write(reply)
      file.flush()


if __name__ == "__main__":
  main(*map(int, sys.argv[1:]))
