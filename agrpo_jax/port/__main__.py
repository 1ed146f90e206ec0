r"""Checkpoints in Hugging Face's layout <-> our parameters.

    python -m agrpo_jax.port --from=<folder or hub id> --to=<folder> \
      [--dtype=bfloat16] [--merge_adapter=<PEFT folder>]

copies a checkpoint through our parameters: tensors, shards, `config.json`,
tokenizer and code files come out as the original code reads them. Code is
copied, never run.
"""

import pathlib
from collections.abc import Sequence

import jax
from absl import flags

from agrpo_jax import command
from agrpo_jax import errors
from agrpo_jax.models import lora as lora_lib
from agrpo_jax.port import model_folder
from agrpo_jax.port import peft
from agrpo_jax.port import write


def _define_flags() -> None:
  # Not when this module is imported: other commands have flags of their own.
  flags.DEFINE_string("from", None, "Checkpoint: a folder or a hub id.")
  flags.DEFINE_string("to", None, "Folder to write; must hold no weights yet.")
  flags.DEFINE_string(
    "merge_adapter", None, "PEFT adapter folder to add to the weights."
  )
  flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16", "float16"],
    "Of the tensors written; as they are if not given.",
  )
  flags.DEFINE_integer(
    "max_shard_bytes",
    model_folder.MAX_SHARD_BYTES,
    "A file of tensors is at most this long, unless one tensor is longer.",
    lower_bound=1,
  )


def main(argv: Sequence[str]) -> None:
  del argv
  asked = flags.FLAGS.flag_values_dict()
  if not asked["from"] or not asked["to"]:
    raise errors.UserError(
      "Give --from=<folder or hub id> and --to=<folder to write>."
    )
  write.refuse_weights(pathlib.Path(asked["to"]))
  jax.config.update("jax_platforms", "cpu")  # host memory is where this fits
  config, params = model_folder.load(asked["from"], dtype=asked["dtype"])
  if asked["merge_adapter"]:
    adapter, settings = peft.load(pathlib.Path(asked["merge_adapter"]), config)
    params = lora_lib.merge(params, adapter, settings.scale)
  model_folder.save(
    asked["to"],
    config,
    params,
    source=asked["from"],
    max_shard_bytes=asked["max_shard_bytes"],
  )
  print(f"Wrote {asked['to']}: {lora_lib.count(params):,} parameters.")


if __name__ == "__main__":
  _define_flags()
  command.main(main)
