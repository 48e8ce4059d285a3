"""GRPO and PPO by Tunix's learners, with a cache as long as the texts."""

import importlib.metadata
import logging
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import workload
from flax import nnx
from tunix.models.qwen2 import model as qwen2
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.ppo import ppo_learner
from tunix.rl.rollout import base_rollout

args = workload.arguments()
size = workload.SIZES[args.size]
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
clock = workload.Clock(args.warm, args.timed)
lengths = set()


class Words:
  """What Tunix asks of a tokenizer. The end of a text is beyond the vocabulary, so never drawn."""

  def encode(self, text, **_):
    return [int(word[1:]) for word in text.split()]

  def decode(self, ids, **_):
    return " ".join(f"w{i}" for i in ids)

  def bos_id(self):
    return 0

  def eos_id(self):
    return size.vocab_size

  def pad_id(self):
    return 0


def decoder(seed, *, has_critic_head=False):
  """Returns a decoder with matrices of deviation 0.02; Tunix starts some of them at zero."""
  config = qwen2.ModelConfig(
    num_layers=size.num_layers,
    vocab_size=size.vocab_size,
    embed_dim=size.width,
    hidden_dim=size.mlp_dim,
    num_heads=size.num_heads,
    head_dim=size.width // size.num_heads,
    num_kv_heads=size.num_heads,
    rope_theta=10_000,
    norm_eps=1e-6,
    use_tied_embedding=not has_critic_head,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
  )
  model = qwen2.Qwen2(config, rngs=nnx.Rngs(seed))
  if has_critic_head:
    model.lm_head = nnx.Linear(size.width, 1, use_bias=False, rngs=nnx.Rngs(seed))
  leaves, tree = jax.tree.flatten(nnx.state(model, nnx.Param))
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  leaves = [
    0.02 * jax.random.normal(key, x.shape, x.dtype) if x.ndim > 1 else x
    for key, x in zip(keys, leaves, strict=True)
  ]
  nnx.update(model, jax.tree.unflatten(tree, leaves))
  return model


def adam():
  clip = optax.clip_by_global_norm(workload.MAX_GRAD_NORM)
  return optax.chain(clip, optax.adamw(workload.LEARNING_RATE, weight_decay=0.0))


def reward(prompts, completions, **_):
  lengths.update(len(text.split()) for text in completions)
  return [workload.score(text) for text in completions]


is_ppo = args.algorithm == "ppo"
with mesh:
  policy, reference = decoder(0), decoder(0)
  critic = decoder(1, has_critic_head=True) if is_ppo else None
num_parameters = sum(x.size for x in jax.tree.leaves(nnx.state(policy, nnx.Param)))
assert num_parameters == size.num_parameters
cluster = rl_cluster.RLCluster(
  actor=policy,
  reference=reference,
  critic=critic,
  tokenizer=Words(),
  cluster_config=rl_cluster.ClusterConfig(
    role_to_mesh=dict.fromkeys(rl_cluster.Role, mesh),
    rollout_engine="vanilla",
    training_config=rl_cluster.RLTrainingConfig(
      actor_optimizer=adam(),
      critic_optimizer=adam() if is_ppo else None,
      eval_every_n_steps=10**9,
      max_steps=clock.num_iterations,
    ),
    rollout_config=base_rollout.RolloutConfig(
      max_tokens_to_generate=size.completion_len,
      max_prompt_length=size.prompt_len,
      kv_cache_size=size.prompt_len + size.completion_len,
      temperature=1.0,
      top_p=1.0,
      top_k=None,
    ),
  ),
)
cluster.generate = clock.timed("generate", cluster.generate)
# An update waits for its loss, so an iteration ends with its last update.
last = "update_critic" if is_ppo else "update_actor"
update = getattr(cluster, last)


def update_and_end(*arguments, **named):
  update(*arguments, **named)
  clock.end_iteration()


setattr(cluster, last, update_and_end)
if is_ppo:
  config = ppo_learner.PPOConfig(num_iterations=1, beta=workload.BETA)
  learner, num_prompts = ppo_learner.PPOLearner(cluster, config, reward), size.num_rows
else:
  config = grpo_learner.GRPOConfig(
    num_generations=size.group_size,
    num_iterations=1,
    beta=workload.BETA,
    epsilon=workload.CLIP,
    kl_loss_mode="low_var_kl",
  )
  learner, num_prompts = grpo_learner.GRPOLearner(cluster, config, reward), size.num_prompts
prompts = np.array(workload.prompts(size, num_prompts * clock.num_iterations))
with mesh:
  clock.begin()
  learner.train([{"prompts": part} for part in np.split(prompts, clock.num_iterations)])
assert lengths == {size.completion_len}, lengths
versions = {name: importlib.metadata.version(name) for name in ("google-tunix", "jax")}
clock.report(versions=versions)
