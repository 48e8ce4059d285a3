"""Log-probabilities of tokens from hidden states, by klrl or Tunix, whichever is installed here.

    f(hidden [B, T, D], projection [V, D], targets [B, T]) -> [B, T]

The value alone, or with the gradient of its mean in `hidden` and `projection`.
"""

import importlib.metadata
import importlib.util

import jax
import jax.numpy as jnp
import workload

if importlib.util.find_spec("tunix"):
  from tunix.rl import common

  def log_probs(hidden, projection):
    return common.selective_log_softmax(jnp.dot(hidden, projection.T), targets)

  versions = {"google-tunix": importlib.metadata.version("google-tunix")}
else:
  import klrl
  from klrl import ops

  def log_probs(hidden, projection):
    return ops.token_log_probs_from_hidden(hidden, projection.T, targets)

  versions = {"klrl": klrl.__version__}

args = workload.arguments()
batch_size, num_tokens, vocab_size, width = workload.LOG_PROBS[args.size]
keys = jax.random.split(jax.random.key(0), 3)
hidden = jax.random.normal(keys[0], (batch_size, num_tokens, width))
projection = 0.02 * jax.random.normal(keys[1], (vocab_size, width))
targets = jax.random.randint(keys[2], (batch_size, num_tokens), 0, vocab_size)


def mean(hidden, projection):
  return log_probs(hidden, projection).mean()


f = jax.jit(log_probs if args.algorithm == "log_probs" else jax.grad(mean, (0, 1)))
jax.block_until_ready((hidden, projection, targets))
clock = workload.Clock(args.warm, args.timed)
workload.time_calls(clock, lambda: jax.block_until_ready(f(hidden, projection)))
clock.report(versions=versions | {"jax": jax.__version__})
