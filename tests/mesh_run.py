"""Two train steps on the mesh that the command line asks for, for mesh tests.

    python tests/mesh_run.py data=2,fsdp=2,tensor=2 OUTPUT.npz

Writes the completions, how they were unmasked, and the trained parameters.
"""

import pathlib
import sys

import jax
import numpy as np

from agrpo_jax import build
from agrpo_jax import config as config_lib
from agrpo_jax import config_check
from agrpo_jax import distributed

CKPT = pathlib.Path(__file__).parent / "testdata" / "golden" / "ckpt"


def config(mesh: dict[str, int]) -> config_lib.ConfigDict:
  c = config_lib.rl()
  c.workdir = "unused"
  c.model.path = str(CKPT / "tiny_mha")
  c.model.tokenizer = "bytes"
  c.model.dtype = "float32"
  config_lib.use_task(c, "sudoku", protocol="bare")
  c.mesh.update(mesh)
  c.data.max_prompt_length = 64
  c.rollout.update(
    num_prompts=4,
    group_size=4,
    batch_size=16,
    completion_length=8,
    block_length=4,
    num_denoise_steps=4,
    unmask_rule="confidence",
    top_k=40,
  )
  c.objective.update(num_mc_steps=2, microbatch=16, step_rule="entropy")
  c.optimizer.update(learning_rate=1e-3, schedule="constant")
  return c


def main(mesh: str, output: str) -> None:
  distributed.initialize()
  sizes = {k: int(v) for k, v in (pair.split("=") for pair in mesh.split(","))}
  c = config(sizes)
  config_check.check(c)
  policy = build.policy(c)
  learner = build.make_learner(c, policy)
  sampler = build.make_sampler(c, c.rollout, policy)
  state = build.init_state(policy, learner.optimizer)
  learn = jax.jit(learner.train_step, donate_argnames="state")
  prompts = [list(range(40 + row, 50 + 2 * row)) for row in range(16)]
  index = np.arange(16, dtype=np.uint32)
  row_id = np.stack([index // 4, index % 4], axis=1)
  arrays = {}
  for step in range(2):
    key = jax.random.fold_in(jax.random.key(0), step)
    (rollout,) = sampler.sample(state.params, state.lora, prompts, key, row_id)
    reward = np.sin(np.arange(16.0) * (step + 1)).astype(np.float32)
    state, metrics = learn(state, rollout, reward, key, row_id, None)
    host = jax.tree.map(distributed.to_host, (rollout, state.params))
    arrays |= {
      f"{step}/completion": host[0].completion,
      f"{step}/unmask_step": host[0].unmask_step,
      f"{step}/support": host[0].support,
      f"{step}/logprob": host[0].logprob,
    }
    for path, leaf in jax.tree_util.tree_leaves_with_path(host[1]):
      arrays[f"{step}/params{jax.tree_util.keystr(path)}"] = leaf
    arrays[f"{step}/loss"] = np.asarray(metrics["loss"])
  # Rows that end early, at a token which the model draws often: the loop over
  # denoising steps must go on everywhere until the last row of all is done.
  often = np.bincount(arrays["1/completion"].ravel()).argmax()
  policy.tokenizer.eos_id = int(often)
  c.rollout.update(block_length=1, num_denoise_steps=8)
  sampler = build.make_sampler(c, c.rollout, policy)
  (rollout,) = sampler.sample(state.params, state.lora, prompts, key, row_id)
  arrays["early/completion"] = distributed.to_host(rollout.completion)
  arrays["early/num_steps"] = distributed.to_host(rollout.num_steps)
  if jax.process_index() == 0:
    np.savez(output, **arrays)


if __name__ == "__main__":
  main(*sys.argv[1:])
