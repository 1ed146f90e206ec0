"""GSM8K's questions under a reward that a tiny random network can vary."""

import zlib

from agrpo_jax.tasks import gsm8k


def examples(split, *, path=None, options=None):
  del options
  return gsm8k.examples(split, path=path, options={"protocol": "llada"})


def reward_weights(options):
  del options
  return {"checksum": 1.0}


def reward(completion, fields, options):
  del fields, options
  return {"checksum": zlib.crc32(completion.encode()) % 3 / 2}


def grade(completion, fields, options):
  del completion, fields, options
  return {"accuracy": 0.0}
