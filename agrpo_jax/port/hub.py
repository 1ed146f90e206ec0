"""A checkpoint's folder, on this machine or on the Hugging Face hub."""

import pathlib
import re
from collections.abc import Sequence

import huggingface_hub

from agrpo_jax import errors

# What a checkpoint consists of, as shell patterns.
TOKENIZER = (
  "tokenizer.json",
  "vocab.json",
  "merges.txt",
  "tokenizer_config.json",
  "chat_template*",
)
ALL_BUT_WEIGHTS = ("*.json", "*.jinja", "*.txt", "*.model", "*.py")
CHECKPOINT = (*ALL_BUT_WEIGHTS, "*.safetensors")

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def is_id(path: str) -> bool:
  """Returns whether `path` is one on the hub, and no folder here."""
  local = pathlib.Path(path).expanduser()
  return not local.exists() and bool(_HUB_ID.fullmatch(path))


def folder(
  path: str, patterns: Sequence[str], revision: str | None = None
) -> pathlib.Path:
  """The local folder of `path`, downloaded first if it is a hub id.

  Args:
    path: a folder, or a hub id "owner/name".
    patterns: the files to download, as shell patterns.
    revision: branch, tag or commit on the hub; the default branch if None.

  Raises:
    UserError: if there is no such folder, or it cannot be downloaded.
  """
  local = pathlib.Path(path).expanduser()
  if local.is_dir():
    return local
  if local.exists():
    raise errors.UserError(
      f"{path!r} is a file; give the folder that holds config.json"
    )
  if not _HUB_ID.fullmatch(path):
    raise errors.UserError(
      f"There is no folder {path!r} (looked for {local.absolute()}). Give a "
      "folder that holds config.json, or a hub id such as "
      "GSAI-ML/LLaDA-8B-Instruct."
    )
  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(
        path, revision=revision, allow_patterns=list(patterns)
      )
    )
  except (OSError, ValueError, RuntimeError) as error:
    reason = str(error).strip().split("\n")[0]
    at = f" at revision {revision!r}" if revision else ""
    raise errors.UserError(
      f"There is no folder {path!r} here, and it could not be downloaded from "
      f"the Hugging Face hub{at}: {type(error).__name__}: {reason} If this "
      "machine is offline, download the repository elsewhere, copy its folder "
      "here, and give the path of the folder."
    ) from error
