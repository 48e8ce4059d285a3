"""Log-probabilities of tokens from hidden states, by TRL's function; see `jax_log_probs.py`."""

import torch
import trl
import workload
from trl.trainer.utils import selective_log_softmax

args = workload.arguments()
batch_size, num_tokens, vocab_size, width = workload.LOG_PROBS[args.size]
with_gradient = args.algorithm == "log_probs_gradient"
torch.manual_seed(0)
hidden = torch.randn(batch_size, num_tokens, width).requires_grad_(with_gradient)
projection = (0.02 * torch.randn(vocab_size, width)).requires_grad_(with_gradient)
targets = torch.randint(vocab_size, (batch_size, num_tokens))


def call():
  hidden.grad = projection.grad = None
  with torch.set_grad_enabled(with_gradient):
    found = selective_log_softmax(hidden @ projection.T, targets)
    if with_gradient:
      found.mean().backward()


clock = workload.Clock(args.warm, args.timed)
workload.time_calls(clock, call)
clock.report(versions={"trl": trl.__version__, "torch": torch.__version__})
