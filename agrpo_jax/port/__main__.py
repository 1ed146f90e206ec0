r"""Checkpoints in Hugging Face's layout <-> our parameters.

    agrpo port --from=<folder or hub id> --to=<folder> \
      [--dtype=bfloat16] [--merge_adapter=<PEFT folder>]

copies a checkpoint through our parameters: tensors, shards, `config.json`,
tokenizer and code files come out as the original code reads them. Code is
copied, never run. A README.md says what was done, unless there is one.

    agrpo port --checkpoint=WORKDIR[:best|:TRAIN_STEP] \
      --to=<folder> [--dtype=float32 | --adapter]

writes what a run trained: weights with the adapter merged into them, in the
dtype of the base model's files, or with `--adapter` a folder for PEFT; and a
README.md, unless there is one. --push=OWNER/NAME uploads the folder to the
Hugging Face hub besides, into a private repository unless it exists, or
--public is given. Read the README.md before you publish it: it holds the run's
settings and command.
"""

import pathlib
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from agrpo_jax import command
from agrpo_jax import errors
from agrpo_jax.models import lora as lora_lib
from agrpo_jax.port import card
from agrpo_jax.port import export
from agrpo_jax.port import hub
from agrpo_jax.port import model_folder
from agrpo_jax.port import peft
from agrpo_jax.port import write
from agrpo_jax.runs import checkpoint_named


def _define_flags() -> None:
  # Not when this module is imported: other commands have flags of their own.
  flags.DEFINE_string("from", None, "Model: a folder or a hub id.")
  flags.DEFINE_string("checkpoint", None, checkpoint_named.HELP)
  flags.DEFINE_string("to", None, "Folder to write; must hold no weights yet.")
  flags.DEFINE_string(
    "merge_adapter", None, "PEFT adapter folder to add to the weights."
  )
  flags.DEFINE_bool(
    "adapter", False, "Write the run's adapter, not weights it is merged into."
  )
  flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16", "float16"],
    "Of the tensors written; as they, or the base model's, are if not given.",
  )
  flags.DEFINE_string(
    "push", "", "OWNER/NAME on the Hugging Face hub to upload the folder to."
  )
  flags.DEFINE_bool("public", False, "A repository that --push makes is so.")
  flags.DEFINE_integer(
    "max_shard_bytes",
    model_folder.MAX_SHARD_BYTES,
    "A file of tensors is at most this long, unless one tensor is longer.",
    lower_bound=1,
  )


def main(argv: Sequence[str]) -> None:
  del argv
  asked = flags.FLAGS.flag_values_dict()
  _check(asked)
  to = pathlib.Path(asked["to"]).expanduser()
  write.refuse_weights(to)
  if asked["push"]:
    hub.check_push(asked["push"])
  jax.config.update("jax_platforms", "cpu")  # host memory is where this fits
  if not asked["checkpoint"]:
    count = _convert(asked, to)
  elif asked["adapter"]:
    count = export.adapter(asked["checkpoint"], to)
  else:
    count = export.merged(
      asked["checkpoint"], to, asked["dtype"], asked["max_shard_bytes"]
    )
  print(f"Wrote {to}: {count:,} parameters.", flush=True)
  if asked["push"]:
    where = hub.push(to, asked["push"], is_public=asked["public"])
    print(f"Pushed it to {where}")


def _check(asked: Mapping[str, Any]) -> None:
  """Raises UserError naming all flags that do not go together."""
  problems = []
  if bool(asked["from"]) == bool(asked["checkpoint"]):
    problems.append(
      "give either --from=<folder or hub id>, to convert a model, or "
      "--checkpoint=WORKDIR, to write what a run trained"
    )
  if not asked["to"]:
    problems.append("give --to=<folder to write>")
  if asked["checkpoint"] and asked["merge_adapter"]:
    problems.append(
      "--merge_adapter goes with --from: a run's own adapter is merged anyhow"
    )
  if asked["adapter"] and not asked["checkpoint"]:
    problems.append("--adapter goes with --checkpoint")
  if asked["public"] and not asked["push"]:
    problems.append("--public goes with --push=OWNER/NAME")
  if asked["adapter"] and asked["dtype"]:
    problems.append("--adapter is written in float32; leave out --dtype")
  if problems:
    text = "; ".join(problems)
    raise errors.UserError(f"{text[0].upper()}{text[1:]}.")


def _convert(asked: Mapping[str, Any], to: pathlib.Path) -> int:
  """Copies a model through our parameters; returns how many those are."""
  shape, params = model_folder.load(asked["from"], dtype=asked["dtype"])
  if asked["merge_adapter"]:
    adapter, settings = peft.load(
      pathlib.Path(asked["merge_adapter"]).expanduser(), shape
    )
    params = lora_lib.merge(params, adapter, settings.scale)
  model_folder.save(
    to,
    shape,
    params,
    source=asked["from"],
    max_shard_bytes=asked["max_shard_bytes"],
  )
  adapter = asked["merge_adapter"] or ""
  card.write(to, card.of_copy(to, asked["from"], adapter, asked["dtype"]))
  return lora_lib.count(params)


if __name__ == "__main__":
  _define_flags()
  command.main(main)
