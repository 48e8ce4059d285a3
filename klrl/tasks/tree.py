"""A task so small that everything is known: all completions, their scores, and the best policies.

A completion has at most four tokens out of four letters and the end-of-sequence, so there are 341
completions. The only prompt is the beginning-of-sequence alone. The policy is a real decoder with
random parameters, whose logits are wide enough to prefer some completions, and the reference is the
policy at the start. The score is a table with several modes; a run sees it as a reward model that
looks completions up, so nothing else differs from other tasks.

The result of training is compared with the best policy, `ref * exp(score / beta) / Z`, by
E[score] - beta * KL(pi || ref); with best-of-n where that is what a run imitates.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from klrl.exact import bandits, oracle
from klrl.models import DecoderConfig, Policy, ScalarModel, TokenizerInfo, policy_model, save_policy

LETTERS = "abcd"
HORIZON = 4
TREE = oracle.make_tree(len(LETTERS) + 1, HORIZON, eos_id=0)
NUM_ROWS = 256  # copies of the prompt, so that a judge counts draws and not prompts
# The frontier has these betas; the first is as good as infinite.
_BETAS = np.array([1e9, *np.geomspace(30.0, 0.03, 60)])


def make_tokenizer() -> TokenizerInfo:
  """Returns a tokenizer with one token per letter; one special token is BOS, EOS and padding."""
  vocabulary = {token: i for i, token in enumerate(["</s>", *LETTERS])}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="</s>"))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
  tokenizer.decoder = tokenizers.decoders.Fuse()
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single="</s> $A", special_tokens=[("</s>", 0)]
  )
  tokenizer.add_special_tokens(["</s>"])
  return TokenizerInfo(tokenizer, bos_id=0, eos_id=0, pad_id=0)


def fresh_policy(seed: int) -> tuple[DecoderConfig, dict]:
  """Returns the configuration and random parameters of the policy; its logits have deviation 1."""
  config = DecoderConfig(
    vocab_size=TREE.vocab_size,
    width=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    mlp_dim=64,
    max_len=HORIZON + 2,
    tie_embeddings=False,
  )
  model_key, unembedding_key = jax.random.split(jax.random.key(seed))
  params = policy_model(config).init(model_key)
  # The last norm leaves a hidden state of length sqrt(width).
  params["unembedding"] = jax.random.normal(
    unembedding_key, params["unembedding"].shape
  ) / jnp.sqrt(config.width)
  return config, params


def write_policy(root: pathlib.Path, seed: int) -> pathlib.Path:
  """Returns the model directory of `fresh_policy`, written below `root`."""
  directory = root / f"tree-{seed}"
  save_policy(directory, *fresh_policy(seed), make_tokenizer())
  return directory


def prompt_records(*, held_out: bool) -> list[dict[str, str]]:
  """Returns the one prompt, `NUM_ROWS` times; it is held out as well."""
  del held_out
  return [{"prompt": ""}] * NUM_ROWS


def modes(seed: int = 0) -> np.ndarray:
  """Returns [4], the rows of `TREE.tokens` that are modes of `completion_scores`, highest first."""
  return np.random.default_rng((seed, 4)).choice(len(TREE.tokens), 4, replace=False)


def completion_scores(seed: int = 0) -> np.ndarray:
  """Returns [N], the score of each completion of `TREE`; mean 0 and deviation 1 over all of them.

  Four completions are modes of different heights. The score falls with the number of places in
  which a completion differs from a mode, and the highest of the four counts. Noise breaks ties.
  """
  rng = np.random.default_rng((seed, 4))
  rng.choice(len(TREE.tokens), 4, replace=False)  # those of `modes`; the noise comes after them
  distances = (TREE.tokens[:, None] != TREE.tokens[modes(seed)]).sum(axis=-1)
  scores = (np.array([2.0, 1.75, 1.5, 1.25]) - distances).max(axis=1)
  scores += 0.2 * rng.standard_normal(len(scores))
  return (scores - scores.mean()) / scores.std()


def scorer(config: DecoderConfig) -> tuple[ScalarModel, dict]:
  """Returns (reward model, its params): it looks up the score of a row's completion.

  `config` is that of the policy. The params are {"table": [V ** T] float32}; the tokens of the
  completion are the digits of the index, the first one the highest, and 0 in the padding.
  """
  places = TREE.vocab_size ** np.arange(HORIZON)[::-1]
  table = np.zeros(TREE.vocab_size**HORIZON, np.float32)
  table[TREE.tokens @ places] = completion_scores()

  def scores(params, tokens, mask):
    completion, real = tokens[:, -HORIZON:], mask[:, -HORIZON:]
    return params["table"][jnp.where(real, completion, 0) @ jnp.asarray(places, jnp.int32)]

  def refused(*_):
    raise NotImplementedError("A table of scores of whole completions says nothing of a token.")

  return ScalarModel(config, refused, refused, refused, scores), {"table": jnp.asarray(table)}


class Exact:
  """Says by enumeration, in float64, how far a policy is from the best one.

  `policy` and `reference` are decoders over the letters.
  """

  def __init__(self, policy: Policy, reference: Policy, reference_params):
    self._logits, self._ref_logits = (
      jax.jit(lambda params, model=model: oracle.decoder_logits(model, params, TREE, [0]))
      for model in (policy, reference)
    )
    self._reference_params = reference_params

  def _ref(self, temperature: float) -> np.ndarray:
    return np.asarray(self._ref_logits(self._reference_params), np.float64) / temperature

  def figures(
    self, params, *, beta: float, temperature: float, best_of: float | None = None
  ) -> dict[str, float]:
    """Returns how far the policy with these parameters is from the best one at `beta`.

    The reward is the score. With `best_of`, n above 1, it is the log of best-of-n over the
    reference, by the score, so that best-of-n is the best policy at beta 1.

    * `exact_score`, `exact_kl`: E[score], and KL(pi || ref) in nats per sequence.
    * `objective`, `optimal_objective`: E[reward] - beta * KL, of this policy and of the best one.
    * `objective_gap`: their difference, as a share of what the best policy gains over the
      reference: 0 for the best policy, and 1 for a policy no better than the reference.
    * `tv_to_optimum`: the total variation to the best policy, 0 to 1.
    """
    logits = np.asarray(self._logits(params), np.float64) / temperature
    ref, scores = self._ref(temperature), completion_scores()
    with jax.enable_x64(True):
      rewards = scores if best_of is None else _best_of_n_reward(ref, scores, best_of)
      found = _exact_figures(logits, ref, scores, rewards, beta)
      return {name: float(x) for name, x in found.items()}

  def frontier(self, *, temperature: float) -> dict[str, list[float]]:
    """Returns {"kl", "score"} of the best policies, nats per sequence, from the reference on."""
    with jax.enable_x64(True):
      scores, kls = _frontier(self._ref(temperature), completion_scores())
      return {"kl": [0.0, *np.asarray(kls)[1:].tolist()], "score": np.asarray(scores).tolist()}


@jax.jit
def _best_of_n_reward(ref, scores, n):
  probs = jnp.exp(oracle.log_probs(TREE, ref))
  return bandits.best_of_n_reward(probs, scores, n)


@jax.jit
def _exact_figures(logits, ref, scores, rewards, beta):
  probs, ref_probs = (jnp.exp(oracle.log_probs(TREE, x)) for x in (logits, ref))
  score, kl = probs @ scores, oracle.sequence_kl(TREE, logits, ref)
  optimum = oracle.optimal_policy(TREE, ref, rewards, beta=jnp.where(beta > 0, beta, 1.0))
  # Without a KL the best policy is the best completion.
  best_probs = jnp.where(
    beta > 0,
    jnp.exp(oracle.log_probs(TREE, optimum.logits)),
    jax.nn.one_hot(rewards.argmax(), len(rewards)),
  )
  best = jnp.where(beta > 0, optimum.values[0], rewards.max())
  objective = probs @ rewards - beta * kl
  return {
    "exact_score": score,
    "exact_kl": kl,
    "objective": objective,
    "optimal_objective": best,
    "objective_gap": (best - objective) / (best - ref_probs @ rewards),
    "tv_to_optimum": bandits.total_variation(probs, best_probs),
  }


@jax.jit
def _frontier(ref, scores):
  return oracle.frontier(TREE, ref, scores, _BETAS)
