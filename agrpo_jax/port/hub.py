"""Folders of models, on this machine and on the Hugging Face hub."""

import os
import pathlib
import re
from collections.abc import Sequence

import huggingface_hub

import agrpo_jax
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

# Models that come with the package, by name where no folder has it.
BUNDLED = ("tiny-sudoku", "tiny-reasoning")
_ASSETS = pathlib.Path(agrpo_jax.__file__).parent / "assets"

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def is_id(path: str) -> bool:
  """Returns whether `path` is one on the hub, and no folder here."""
  return not os.path.exists(_local(path)) and bool(_HUB_ID.fullmatch(path))


def _local(path: str) -> pathlib.Path:
  # Here and below not a path's own methods, which raise for a long name.
  local = pathlib.Path(os.path.expanduser(path))
  is_bundled = path in BUNDLED and not os.path.exists(local)
  return _ASSETS / path if is_bundled else local


def folder(
  path: str, patterns: Sequence[str], revision: str | None = None
) -> pathlib.Path:
  """The local folder of `path`, downloaded first if it is a hub id.

  Args:
    path: a folder, a hub id "owner/name", or one of `BUNDLED`.
    patterns: the files to download, as shell patterns.
    revision: branch, tag or commit on the hub; the default branch if None.

  Raises:
    UserError: if there is no such folder, or it cannot be downloaded.
  """
  local = _local(path)
  if os.path.isdir(local):
    return local
  if os.path.exists(local):
    raise errors.UserError(
      f"{path!r} is a file; give the folder that holds config.json"
    )
  if not _HUB_ID.fullmatch(path):
    raise errors.UserError(
      f"There is no folder {path!r} (looked for {local.absolute()}). Give a "
      "folder that holds config.json, a hub id such as "
      f"GSAI-ML/LLaDA-8B-Instruct, or one of {', '.join(BUNDLED)}."
    )
  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(
        path, revision=revision, allow_patterns=list(patterns)
      )
    )
  except (OSError, ValueError, RuntimeError) as error:
    at = f" at revision {revision!r}" if revision else ""
    raise errors.UserError(
      f"There is no folder {path!r} here, and it could not be downloaded from "
      f"the Hugging Face hub{at}: {_first_line(error)} If this "
      "machine is offline, download the repository elsewhere, copy its folder "
      "here, and give the path of the folder."
    ) from error


def check_push(repository: str) -> None:
  """Raises UserError where nothing can be pushed: a wrong id, or no login."""
  if not _HUB_ID.fullmatch(repository):
    raise errors.UserError(
      f"--push={repository!r} is no repository of the hub; give OWNER/NAME."
    )
  try:
    huggingface_hub.HfApi().whoami()
  except (OSError, ValueError, RuntimeError) as error:
    raise errors.UserError(
      f"--push={repository!r}: nobody is logged in to the Hugging Face hub "
      f"here ({_first_line(error)}). Run `hf auth login`, or set HF_TOKEN to a "
      "token that may write."
    ) from error


def push(local: pathlib.Path, repository: str, *, is_public: bool) -> str:
  """Uploads a folder, into a repository that is made if there is none.

  Args:
    local: the folder.
    repository: OWNER/NAME; what it holds of the same names is replaced.
    is_public: of a new repository; else it is private.

  Returns:
    Its address.

  Raises:
    UserError: it could not be uploaded.
  """
  api = huggingface_hub.HfApi()
  try:
    made = api.create_repo(repository, private=not is_public, exist_ok=True)
    api.upload_folder(
      repo_id=repository,
      folder_path=str(local),
      commit_message="Written by agrpo_jax",
    )
  except (OSError, ValueError, RuntimeError) as error:
    raise errors.UserError(
      f"{local} is written, but was not pushed to {repository!r}: "
      f"{_first_line(error)} To try that again: hf upload {repository} {local}"
    ) from error
  return str(made)


def _first_line(error: Exception) -> str:
  text = str(error).strip().partition("\n")[0]
  return f"{type(error).__name__}: {text}"
