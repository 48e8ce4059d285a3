"""RLHF with PPO: policy, reference, reward and value model, and a KL penalty to the reference.

    python -m experiments.ppo
    python -m experiments.ppo --policy=DIR --prompts=FILE.jsonl --reward=FILE.py:FUNCTION

Without flags it runs three stages on an embedded task, addition by characters: supervised
fine-tuning on demonstrations of which half are wrong, a reward model from preferences of which one
in twenty is swapped, and PPO; then it compares the SFT policy with the PPO policy on held-out
problems, with an exact verifier as the gold score that no stage has seen. It takes about two
minutes on 2 cores, and raises gold accuracy from 54% to 89% at a KL of 0.4 nats.

    J = E[r] - beta * KL(pi || pi_ref)     (Ouyang et al., InstructGPT, 2022, eq. 2)

    A = GAE(score at the end - beta * log(pi / pi_ref) of each token)
    L = E[-min(ratio * A, clip(ratio) * A)] + vf_coef * E[(V - returns)^2 / 2] - entropy_coef * E[H]

The functions `advantages` and `make_loss` below are these two lines; the KL may also be a term of
the loss (--kl_placement and its companions, docs/kl.md), and PPO's KL penalty may take the place of
its clip (Schulman et al., 2017, eq. 7 and 8).

As there (appendix C.4), an iteration makes one pass over 512 completions. With 128 completions and
two passes the steps follow the noise of few samples: on held-out problems the likeliest completion
became worse, while sampled ones became better.

Departures from InstructGPT:
1. Policy and value model share one Adam and one gradient norm.
2. Advantages are whitened over the batch, as in Ziegler et al. (2019).
3. The learning rate falls linearly where theirs is constant, for the same reason as above.
"""

import dataclasses
import pathlib
from collections.abc import Callable

from experiments.settings import common, rl, training
from experiments.settings.common import again, setting
from klrl import inputs, ops
from klrl.algorithm import Algorithm, Hypers, kl_terms, policy_losses
from klrl.algorithm.terms import Advantages, Experience, Losses, Terms
from klrl.errors import UserError


def advantages(x: Experience, algorithm: Algorithm, hypers: Hypers) -> Advantages:
  """Returns GAE of the rewards: the score at the last token, less beta times the KL of each.

  The learner whitens it (`--whiten_advantages`) before the loss reads it.
  """
  rewards, charges = kl_terms.penalised_rewards(
    algorithm.penalty, x.scores, x.kl, x.mask, beta=x.beta, gamma=hypers.gamma
  )
  advantages, returns = ops.gae(
    rewards, x.values, x.mask, gamma=hypers.gamma, gae_lambda=hypers.gae_lambda
  )
  return Advantages(advantages - charges, returns)


def make_loss(policy_loss: Callable) -> Callable:
  """Returns loss(terms, hypers) -> (what each token costs, metrics), the sum of actor and critic.

  `policy_loss` is a row of `policy_losses.POLICY_LOSSES`, by default `clip`, which calls
  `ops.clipped_policy_loss`: -min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A).
  """

  def loss(terms: Terms, hypers: Hypers) -> tuple[Losses, dict]:
    actor, metrics = policy_loss(terms, hypers)
    critic = ops.clipped_value_loss(
      terms.values,
      terms.old_values,
      terms.returns,
      terms.mask,
      value_clip_eps=hypers.value_clip_eps,
    )
    return {
      "policy/loss": (1.0, terms.sampler_weights * actor),
      "policy/entropy_bonus": (-hypers.entropy_coef, terms.entropy),
      "value/loss": (hypers.vf_coef, critic),
      "policy/kl_loss": (terms.beta, terms.kl_loss),  # with --kl_placement=loss or both
    }, metrics

  return loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(rl.SurrogateConfig):
  """Settings of PPO; a change of those in `Hypers` compiles nothing anew."""

  num_iterations: int = again(rl.SurrogateConfig, "num_iterations", default=100)
  batch_size: int = again(rl.SurrogateConfig, "batch_size", default=512)
  num_epochs: int = again(rl.SurrogateConfig, "num_epochs", default=1)
  learning_rate_schedule: str = again(
    rl.SurrogateConfig, "learning_rate_schedule", default="linear"
  )
  value_trunk: str = setting(
    "separate",
    "whether the value model is one of its own or a head on the policy",
    choices=("separate", "shared"),
  )
  value_model: str = setting(
    "",
    "model directory to start the value model from; default: --value_init",
    read_when=("value_trunk", ("separate",)),
  )
  value_init: str = setting(
    "reward_model",
    "what the value model starts as; without a reward model the policy with a head of zeros",
    choices=("reward_model", "policy"),
    read_when=("value_model", ("",)),
  )
  gamma: float = setting(1.0, "discount per token", minimum=0.0, maximum=1.0)
  gae_lambda: float = setting(0.95, "lambda of GAE", minimum=0.0, maximum=1.0)
  whiten_advantages: bool = setting(True, "subtract the mean and divide by the deviation")
  value_clip_eps: float = setting(
    0.2, "a value may move this far from the old one, reward units; inf: free", minimum=0.0
  )
  vf_coef: float = setting(0.5, "weight of the value loss", minimum=0.0)
  dual_clip: float = setting(
    float("inf"),
    "bound of the ratio where the advantage is negative",
    minimum=1.0,
    read_when=("trust_region", ("clip",)),
  )

  def __post_init__(self):
    super().__post_init__()
    if self.value_trunk == "shared" and self.value_init != "reward_model":
      raise UserError("--value_init is set, but a --value_trunk=shared starts as the policy.")

  def algorithm(self) -> Algorithm:
    return dataclasses.replace(
      super().algorithm(),
      advantage=advantages,
      whiten_advantages=self.whiten_advantages,
      loss=make_loss(policy_losses.POLICY_LOSSES[self.trust_region]),
      shared_trunk=self.value_trunk == "shared",
    )

  def hypers(self) -> Hypers:
    return (
      super()
      .hypers()
      ._replace(
        gamma=self.gamma,
        gae_lambda=self.gae_lambda,
        dual_clip=self.dual_clip,
        value_clip_eps=self.value_clip_eps,
        vf_coef=self.vf_coef,
      )
    )

  def sources(self) -> inputs.Sources:
    return dataclasses.replace(
      super().sources(),
      has_value_model=True,
      shared_trunk=self.value_trunk == "shared",
      value_model=self.value_model,
      value_init=self.value_init,
    )


def main(config: Config, *, root: str = "runs") -> pathlib.Path:
  """Runs the experiment and returns its folder; a finished one is shown, not run again."""
  return training.run(config, pathlib.Path(__file__).stem, "PPO", root=root)


if __name__ == "__main__":
  common.launch(main, Config)
