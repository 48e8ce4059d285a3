"""Is SFT mean-seeking and RL mode-seeking? Both directions of the KL, on a line and in a decoder.

    python -m experiments.mode_seeking

SFT minimises KL(p || pi), p the data; RL with reward log p and an entropy bonus minimises
KL(pi || p). First for a Gaussian that has to imitate a mixture of two, by quadrature; then for the
real decoder on a language that knows two words, `emit` and `time`, by sums over every completion.
One decoder reads what it has written; the other is shown the same letters whatever it wrote, so
that it knows the position alone. Under a minute on 2 cores.

Every objective is exact: nothing is sampled. RL maximises E[log p] - beta * KL(pi || ref) and
starts at its reference, which is the SFT policy or, for `uniform`, a fresh decoder. Over uniform,
beta = 1 is the reward plus the entropy, but for a constant. Mixtures and figures are computed in
float64, decoders trained in float32. KLs and entropies are in nats; a decoder's are per completion.

The facts are those of any text on variational inference, for example Christopher Bishop, "Pattern
Recognition and Machine Learning", 2006, section 10.1.2; the optimum under a reference is derived in
Tomasz Korbak et al., "RL with KL penalties is better viewed as Bayesian inference", 2022.
"""

import dataclasses
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from experiments.lab import laboratory
from experiments.lab.mode_seeking_gaussian import gaussian_results, make_descent
from experiments.lab.mode_seeking_page import CLAIMS, FIT_COLUMNS, fit_cells, report, verdict
from experiments.settings import common
from experiments.settings.common import setting
from klrl.exact import oracle
from klrl.models import DecoderConfig, policy_model
from klrl.run import progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(common.LabConfig):
  """Settings of the experiment."""

  seed: int = setting(0, "seed of the fresh decoders", minimum=0)
  num_steps: int = setting(1000, "steps of Adam for each decoder", minimum=1)
  learning_rate: float = setting(0.01, "first learning rate, which falls to 0", minimum=0.0)


def main(config: Config, *, root: str = "runs") -> pathlib.Path:
  """Runs the experiment and returns its folder; a finished one is shown, not run again."""

  def compute(_):
    return {
      "gaussian": gaussian_results(),
      "three_tokens": three_tokens(),
      **language_results(config),
    }

  return laboratory.conduct(
    config, "mode_seeking", "mode_seeking.json", compute, report, show, root=root
  )


def show(results: dict) -> None:
  """Prints the verdict, the claims and the decoders' figures."""
  progress.console.print(verdict(results), soft_wrap=True)
  for claim, judgement, reason in CLAIMS:
    text = f"- {claim} {judgement} {reason(results)}"
    progress.console.print(text, soft_wrap=True)
  table = Table(*FIT_COLUMNS[:-2], box=None)  # what fits into 80 columns
  for fit in results["fits"]:
    table.add_row(*fit_cells(fit)[:-2])
  progress.console.print(table)


def three_tokens() -> dict:
  """Returns the identities behind both directions, on a policy q over three tokens, in nats.

  `sft` is E_p[-log q] with its gradient in the logits of q; `rl` is E_q[log p] plus the entropy of
  q. Beside them their values at q = p and at the likeliest token alone, and that entropy is largest
  at the uniform policy, not at a single token.
  """
  with jax.enable_x64(True):
    tree = oracle.make_tree(3, 1)
    data, policy = (jnp.log(jnp.array([x])) for x in ((0.5, 0.3, 0.2), (0.2, 0.5, 0.3)))
    scores, uniform, one_hot = data[0], jnp.zeros((1, 3)), jnp.array([[0.0, -1e4, -1e4]])

    def cross_entropy(logits):
      return -oracle.expected_score(tree, data, oracle.log_probs(tree, logits))

    def rl(logits):
      return oracle.expected_score(tree, logits, scores) + oracle.entropy(tree, logits)

    figures = {
      "cross_entropy": cross_entropy(policy),
      "data_entropy": oracle.entropy(tree, data),
      "forward_kl": oracle.sequence_kl(tree, data, policy),
      "reverse_kl": oracle.sequence_kl(tree, policy, data),
      "sft_gradient": jax.grad(cross_entropy)(policy)[0],
      "rl": rl(policy),
      "rl_at_data": rl(data),
      "rl_at_one_hot": rl(one_hot),
      "reward_at_data": oracle.expected_score(tree, data, scores),
      "reward_at_one_hot": oracle.expected_score(tree, one_hot, scores),
      "entropy_at_uniform": oracle.entropy(tree, uniform),
      "entropy_at_one_hot": oracle.entropy(tree, one_hot),
    }
    return {name: np.asarray(value).tolist() for name, value in figures.items()}


# The language: a word is chosen, then each letter is wrong with probability TYPO.

WORDS, WEIGHTS = ("emit", "time"), (0.7, 0.3)
LETTERS, TYPO = "aeimot", 0.01
BEGIN = len(LETTERS)  # the prompt, a token that is read and never written
DECODER = DecoderConfig(
  vocab_size=BEGIN + 1, width=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=32,
  max_len=8, tie_embeddings=False,
)  # fmt: skip
BETAS = (4.0, 1.0, 0.25)


class Language(NamedTuple):
  """The data distribution p over all completions of four letters, in float64."""

  tree: oracle.Tree
  logits: np.ndarray  # [S, V] of p
  uniform: np.ndarray  # [S, V] of the policy to which all completions are alike, zeros
  scores: np.ndarray  # [N], log p
  words: list[int]  # rows of `tokens` of WORDS
  blends: list[int]  # rows whose every letter is that of one word or the other
  names: list[str]  # of the blends, from the first word to the second


def make_language() -> Language:
  """Returns the language."""
  tree = oracle.make_tree(len(LETTERS), len(WORDS[0]))
  letters = np.array([[LETTERS.index(letter) for letter in word] for word in WORDS])
  right = tree.tokens == letters[:, None]  # [words, N, T]
  by_letter = np.where(right, np.log1p(-TYPO), np.log(TYPO / (len(LETTERS) - 1)))
  scores = np.logaddexp(*(by_letter.sum(axis=-1) + np.log(WEIGHTS)[:, None]))
  uniform = np.zeros((len(tree.depths), len(LETTERS)))
  with jax.enable_x64(True):
    optimum = jax.jit(lambda scores: oracle.optimal_policy(tree, uniform, scores, beta=1.0))
    logits = np.asarray(optimum(scores).logits)

  blends = np.flatnonzero(right.any(axis=0).all(axis=1))
  blends = sorted(blends.tolist(), key=lambda row: (right[1, row].sum(), row))
  names = ["".join(LETTERS[token] for token in tree.tokens[row]) for row in blends]
  words = [blends[names.index(word)] for word in WORDS]
  return Language(tree, logits, uniform, scores, words, blends, names)


class Fit(NamedTuple):
  """What is trained: a policy that sees its prefix or not, by SFT or by RL (beta not None)."""

  sees_prefix: bool
  beta: float | None
  reference: str  # sft or uniform; of SFT, none


FITS = (
  Fit(True, None, "none"),
  Fit(False, None, "none"),
  *(Fit(True, beta, "uniform") for beta in BETAS),
  *(Fit(False, beta, "uniform") for beta in BETAS),
  *(Fit(True, beta, "sft") for beta in (*BETAS, 0.0)),
)


def make_logits_fn(tree: oracle.Tree, *, sees_prefix: bool):
  """Returns (init(key) -> params, logits(params) -> [S, V]) of the decoder.

  One that does not see the prefix says at every prefix what it says at the first of that length:
  its tokens are independent, a restricted family.
  """
  policy = policy_model(DECODER)
  letters_only = dataclasses.replace(
    policy,
    config=dataclasses.replace(DECODER, vocab_size=BEGIN),
    unembedding=lambda params: policy.unembedding(params)[:, :BEGIN],
  )
  rows = np.arange(len(tree.depths))
  if not sees_prefix:
    rows = np.array([level.start for level in tree.levels])[tree.depths]
  prompt = jnp.array([BEGIN])

  @jax.jit
  def logits(params):
    return oracle.decoder_logits(letters_only, params, tree, prompt)[rows]

  return policy.init, logits


def make_measure_fn(language: Language):
  """Returns measure(fit, logits, ref_logits): the exact figures of a policy `logits` [S, V].

  `gap` is how far the objective is from its best over all policies, in nats of the objective: KL(p
  || pi) for SFT, beta * KL(pi || optimum) for RL. `optimum` has the probabilities under that best.
  """
  tree, data = language.tree, language.logits

  @jax.jit
  def figures(logits, ref_logits, beta):
    # Without a KL the optimum is a single completion, which that of a tiny beta is too.
    best = oracle.optimal_policy(tree, ref_logits, language.scores, beta=jnp.maximum(beta, 1e-9))
    score = oracle.expected_score(tree, logits, language.scores)
    return {
      "kl_from_data": oracle.sequence_kl(tree, data, logits),
      "kl_to_data": oracle.sequence_kl(tree, logits, data),
      "entropy": oracle.entropy(tree, logits),
      "score": score,
      "kl_to_optimum": oracle.sequence_kl(tree, logits, best.logits),
      "gap": best.values[0] - score + beta * oracle.sequence_kl(tree, logits, ref_logits),
      "probs": jnp.exp(oracle.log_probs(tree, logits)),
      "best": jnp.exp(oracle.log_probs(tree, best.logits)),
    }

  def measure(fit: Fit, logits, ref_logits) -> dict:
    # The optimum of SFT is the data, which is that of RL over uniform at beta 1.
    beta = 1.0 if fit.beta is None else fit.beta
    with jax.enable_x64(True):
      exact = figures(np.asarray(logits, np.float64), np.asarray(ref_logits, np.float64), beta)
      probs, best = (np.asarray(exact.pop(name)) for name in ("probs", "best"))
      result = {name: float(value) for name, value in exact.items()}
    if fit.beta is None:
      result["gap"] = result["kl_from_data"]
    elif not fit.beta:
      result["kl_to_optimum"] = None  # infinite
    words, blends = language.words, language.blends
    return result | {
      "words": probs[words].tolist(),
      "between": float(1 - probs[words].sum()),
      "blends": probs[blends].tolist(),
      "optimum": {"words": best[words].tolist(), "blends": best[blends].tolist()},
    }

  return measure


def train(config: Config, language: Language):
  """Yields (fits done, their figures, the last one's) as `progress.watch` takes them."""
  steps = sorted({min(step, config.num_steps) for step in (0, 20, 50, 100, 200, config.num_steps)})
  tree, key, measure = language.tree, jax.random.key(config.seed), make_measure_fn(language)
  data, uniform, scores = (
    jnp.asarray(x, jnp.float32) for x in (language.logits, language.uniform, language.scores)
  )

  def sft_loss(logits):
    return -oracle.expected_score(tree, data, oracle.log_probs(tree, logits))

  def rl_loss(logits, ref_logits, beta):
    kl = oracle.sequence_kl(tree, logits, ref_logits)
    return beta * kl - oracle.expected_score(tree, logits, scores)

  done, descents, sft_params, sft_logits = [], {}, {}, {}
  for fit in FITS:
    init, logits_fn = make_logits_fn(tree, sees_prefix=fit.sees_prefix)
    loss = sft_loss if fit.beta is None else rl_loss
    descent = descents.setdefault(
      (fit.sees_prefix, loss),
      make_descent(lambda params, *rest, f=logits_fn, loss=loss: loss(f(params), *rest)),
    )
    from_sft = fit.reference == "sft"
    params = sft_params[fit.sees_prefix] if from_sft else init(key)
    ref_logits = sft_logits[fit.sees_prefix] if from_sft else uniform
    arguments = () if fit.beta is None else (ref_logits, fit.beta)
    path = descent(params, steps, config.learning_rate, *arguments)
    if fit.beta is None:
      sft_params[fit.sees_prefix], sft_logits[fit.sees_prefix] = path[-1], logits_fn(path[-1])
    figures = [measure(fit, logits_fn(params), ref_logits) for params in path]
    minimised = "kl_from_data" if fit.beta is None else "kl_to_data"
    path = {
      "steps": steps,
      "path": [x["blends"] for x in figures],
      "path_kls": [x[minimised] for x in figures],
    }
    done.append(fit._asdict() | figures[-1] | path)
    yield len(done), done, figures[-1]


def language_results(config: Config) -> dict:
  """Returns the language and the figures of all decoders trained on it."""
  language = make_language()
  fits = progress.watch(
    train(config, language),
    [],
    title="Mode seeking",
    start=0,
    total=len(FITS),
    keys=(("kl_from_data", "KL(p || pi)"), ("kl_to_data", "KL(pi || p)")),
  )
  figures = make_measure_fn(language)(FITS[0], language.logits, language.uniform)
  data = {key: figures[key] for key in ("words", "between", "blends", "entropy", "score")}
  names = {"words": WORDS, "blends": language.names, "completions": len(language.scores)}
  return {"language": names, "data": data, "fits": fits}


if __name__ == "__main__":
  common.launch(main, Config)
