"""The distribution of the embedded demonstrations, exactly, and the forward KL from it.

    KL(data || pi) = CE - H,   CE = -sum_y p(y) log pi(y),   H = -sum_y p(y) log p(y)

Data alone give an estimate of CE. Here the sum runs over every completion that
`klrl.tasks.arithmetic.demonstrations` can write, so only the prompts are a sample.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from klrl import ops
from klrl.models import Policy, TokenizerInfo
from klrl.tasks import arithmetic, data


def completion_probs(prompt: str, *, quality: float) -> dict[str, float]:
  """Returns {completion: probability} of the demonstrations of a prompt, of all that are possible.

  Args:
    prompt: a prompt of the embedded task.
    quality: share of right demonstrations.
  """
  a, b = (int(number) for number in prompt.removesuffix("=").split("+"))
  right, text = a + b, arithmetic.answer(a, b)
  # The three kinds of slips are equally likely; one that is no wrong answer is drawn again.
  slips = dict.fromkeys(range(100), 0.0)
  carry = right - 10 if a % 10 + b % 10 >= 10 else right + 10
  drawn = [(carry, 1.0), (right - 1, 0.5), (right + 1, 0.5)]
  drawn += [(int(f"{digit}{text[1]}"), 1 / 20) for digit in range(10)]
  drawn += [(int(f"{text[0]}{digit}"), 1 / 20) for digit in range(10)]
  for wrong, weight in drawn:
    if wrong != right and 0 <= wrong < 100:
      slips[wrong] += weight
  total = sum(slips.values())
  probs = {f"{wrong:02d}": (1 - quality) * slips[wrong] / total for wrong in slips}
  probs[text] = quality
  return {completion: p for completion, p in probs.items() if p > 0}


def make_forward_kl_fn(
  policy: Policy,
  tokenizer: TokenizerInfo,
  prompts: Sequence[str],
  *,
  quality: float,
  with_prompt: bool,
):
  """Returns f(params) -> {"held_out_entropy", "held_out_forward_kl"}, nats per token.

  They are means over `prompts`, and exact sums over completions with their end-of-sequence.

  Args:
    policy: the model.
    tokenizer: of the model.
    prompts: of embedded demonstrations.
    quality: share of right demonstrations.
    with_prompt: whether the prompt's own tokens count too: all problems are equally likely.
  """
  texts, probs = [], []
  for prompt in prompts:
    for completion, prob in completion_probs(prompt, quality=quality).items():
      texts.append(("", prompt + completion) if with_prompt else (prompt, completion))
      probs.append(prob)
  examples = data.encode_examples(texts, tokenizer, max_len=policy.config.max_len)
  weights = np.array(probs) / len(prompts)
  log_p = np.log(probs)
  if with_prompt:
    log_p -= np.log(len(arithmetic.problems(held_out=False)))
  num_tokens = weights @ examples.completion_mask.sum(axis=1)

  @jax.jit
  def log_pi(params, examples: data.Examples):
    hidden = policy.hidden(params, examples.tokens, examples.mask)[:, :-1]
    log_probs = ops.token_log_probs_from_hidden(
      hidden, policy.unembedding(params), jnp.asarray(examples.tokens)[:, 1:]
    )
    return ops.zero_padding(log_probs, jnp.asarray(examples.completion_mask)[:, 1:]).sum(axis=1)

  def figures(params) -> dict[str, float]:
    log_ratio = log_p - np.asarray(log_pi(params, examples), np.float64)
    return {
      "held_out_entropy": float(-(weights @ log_p) / num_tokens),
      "held_out_forward_kl": float(weights @ log_ratio / num_tokens),
    }

  return figures
