"""GRPO and PPO by klrl's own programs, `experiments.grpo` and `experiments.ppo`, and their `main`.

The model is a directory, the prompts are a file and the reward is a function of the user's. Beside
clocks around the two compiled programs nothing is changed. The policy is judged before and after by
two completions, which is in no figure. Compiled programs are kept for the next start, as a command
keeps them, in `FOLDER/compiled`, and memory is in large pages if `benchmarks.peers` starts this.
"""

import json
import pathlib

import jax
import numpy as np
import tokenizers
import workload

import klrl
from experiments import grpo, ppo
from klrl import programs
from klrl.devices import compilation
from klrl.models import DecoderConfig, TokenizerInfo, policy_model, save_policy
from klrl.run import loop

REWARD = """
import sys

sys.path.insert(0, {here!r})
import workload


def score(prompts, completions, **columns):
  return [workload.score(text) for text in completions]
"""
args = workload.arguments()
size, folder = workload.SIZES[args.size], pathlib.Path(args.folder)
clock = workload.Clock(args.warm, args.timed)
compilation.keep(str(folder / "compiled"))


def write_inputs() -> None:
  """Writes the model, the prompts and the reward function."""
  config = DecoderConfig(
    vocab_size=size.vocab_size,
    width=size.width,
    num_layers=size.num_layers,
    num_heads=size.num_heads,
    num_kv_heads=size.num_heads,
    head_dim=size.width // size.num_heads,
    mlp_dim=size.mlp_dim,
    max_len=1024,
    norm_eps=1e-6,
    attention_bias=True,
  )
  rng = np.random.default_rng(0)

  def random(path, leaf):
    if path[-1].key in ("kernel", "embedding"):
      return np.float32(0.02 * rng.standard_normal(leaf.shape))
    return np.full(leaf.shape, path[-1].key == "scale", np.float32)

  shapes = jax.eval_shape(policy_model(config).init, jax.random.key(0))
  params = jax.tree_util.tree_map_with_path(random, shapes)
  assert sum(x.size for x in jax.tree.leaves(params)) == size.num_parameters
  words = tokenizers.models.WordLevel(workload.vocabulary(size), unk_token="<2>")
  tokenizer = tokenizers.Tokenizer(words)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  # Nothing ends a text, so that all have full length.
  save_policy(folder / "model", config, params, TokenizerInfo(tokenizer, None, None, 0))
  # A part of the prompts is held out.
  texts = workload.prompts(size, 2 * size.num_rows * clock.num_iterations)
  lines = "".join(json.dumps({"prompt": text}) + "\n" for text in texts)
  (folder / "prompts.jsonl").write_text(lines)
  here = str(pathlib.Path(__file__).parent)
  (folder / "reward.py").write_text(REWARD.format(here=here))


def config_of(algorithm: str):
  shared = {
    "policy": str(folder / "model"),
    "prompts": str(folder / "prompts.jsonl"),
    "reward": f"{folder}/reward.py:score",
    "workdir": str(folder / "run"),
    "batch_size": size.num_rows,
    "max_completion_len": size.completion_len,
    "num_iterations": clock.num_iterations,
    "num_epochs": 1,
    "num_minibatches": 1,
    "beta": workload.BETA,
    "clip_eps_low": workload.CLIP,
    "clip_eps_high": workload.CLIP,
    "learning_rate": workload.LEARNING_RATE,
    "max_grad_norm": workload.MAX_GRAD_NORM,
    "eval_every": 0,
    "num_eval_rows": 2,
    "num_samples": 0,
    "save_every": clock.num_iterations,
  }
  if algorithm == "ppo":
    return ppo, ppo.Config(**shared)
  k3 = {"kl_placement": "loss", "kl_estimator": "k3", "kl_correction": "none"}
  return grpo, grpo.Config(group_size=size.group_size, kl_credit="token", **k3, **shared)


def put_clocks() -> None:
  """Puts clocks around the compiled programs; an iteration ends with its update.

  The loop reads the figures of an iteration while the next one runs.
  """
  make_programs, iterate = programs.make_programs, loop.iterate

  def make_timed_programs(*arguments, **named):
    made = make_programs(*arguments, **named)
    update = clock.timed("update", made["update"], jax.block_until_ready)

    def update_and_end(*arguments):
      result = update(*arguments)
      clock.end_iteration()
      return result

    sample = clock.timed("generate", made["rollout"], jax.block_until_ready)
    # Both are compiled ahead.
    sample.lower, update_and_end.lower = made["rollout"].lower, made["update"].lower
    return made | {"rollout": sample, "update": update_and_end}

  def checked_iterations(*arguments, **named):
    clock.begin()
    for done, state, figures in iterate(*arguments, **named):
      assert figures["rollout/length"] == size.completion_len
      yield done, state, figures

  programs.make_programs, loop.iterate = make_timed_programs, checked_iterations


if not (folder / "model").exists():
  write_inputs()
put_clocks()
experiment, config = config_of(args.algorithm)
experiment.main(config)
clock.report(versions={"klrl": klrl.__version__, "jax": jax.__version__})
