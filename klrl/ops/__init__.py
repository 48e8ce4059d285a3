"""Pure functions of arrays: unreduced `[..., T]`, time last, bool masks, at least float32.

Divergences of a policy from another, per token (`klrl.ops.kl`):

    k1, k2, k3              estimates from the tokens taken; KL_ESTIMATORS by name
    kl_old_new, kl_new_old  estimates from the tokens of the older of two policies
    weighted_estimate       an estimate times an importance weight
    exact_kl, exact_jsd     sums over the vocabulary
    exact_kl_from_hidden, exact_jsd_from_hidden   the same without holding the logits
    kl_of, jsd_of           the same of log-probs over the vocabulary
    alpha_divergence_of     between and beyond the two KLs (`klrl.ops.divergences`)
    alpha_slope, jsd_slope  f' of the ratio, what a divergence costs in a reward

Log-probs and entropies (`klrl.ops.log_probs`):

    vocab_log_probs, token_log_probs, entropy     from logits
    token_log_probs_from_hidden                   without holding the logits
    token_log_probs_and_entropy_from_hidden       both at once
    taken, entropy_of, certainty_of, mean_under   of log-probs over the vocabulary

Hidden states (`klrl.ops.logits`, `klrl.ops.vocabulary`):

    over_vocabulary         any functions of distributions, without holding the logits
    logits_of               logits
    CappedUnembedding, Unembedding   a table with softly bounded logits; it or an array

Rewards, advantages and returns (`klrl.ops.shaping`, `klrl.ops.advantages`):

    shaped_rewards          the score at the last token, less beta times each token's KL
    gae                     advantages and returns from a value model
    vtrace                  the same, corrected from an old policy to the current one
    discounted_returns      sums of the rewards that follow
    group_relative          (score - mean) / deviation of the completions of a prompt
    group_centred           score - mean
    leave_one_out           score - mean of the others
    best_of_n_reward        log of the ratio of best-of-n to the reference
    whiten, mean_and_std    mean 0 and variance 1 over all real tokens

Losses per token (`klrl.ops.losses`):

    reinforce_loss          the score function times the advantage
    centred_policy_loss     the same less what the sampler expects of the score
    exponential_weights     exp(A / temperature) of a likelihood, bounded
    clipped_policy_loss     PPO; clip_fraction is 1 where it clips
    kl_penalised_policy_loss   PPO with a KL penalty in place of the clip
    gspo_loss               PPO with the ratio of the sequence
    cispo_loss              REINFORCE with a bounded importance weight
    value_loss, clipped_value_loss   squared errors of the value model
    dpo_loss, ipo_loss      of pairs of completions

Trust regions by the probability of the token taken (`klrl.ops.trust_regions`):

    divergence_masked_policy_loss   no gradient outwards beyond the edge; is_leaving says where
    smooth_policy_loss      a gradient that turns at the edge
    binary_tv, binary_kl    distances of the token taken against all others

Aggregations of a loss to (sum, count), AGGREGATIONS by name:

    token_mean, sequence_mean_token_mean, sequence_mean_token_sum, constant

Importance weights (`klrl.ops.importance`):

    weighted                exp(log_weight) * x, finite wherever the product is
    sampler_weights         for an inexact sampler; SAMPLER_CORRECTIONS, SAMPLER_MASKS of them

Rules for beta, from a ControllerState to the next (`klrl.ops.controllers`):

    fixed                   the same beta
    doubling, proportional, dual_ascent   by the measured KL
    budget                  from a BudgetState to the next: holds the KL at a budget
    budget_state            the first one
    linear_schedule, cosine_schedule      by the iteration
    at_bound                whether beta stands at one of its bounds (BETA_BOUNDS)

Masks (`klrl.ops.masking`):

    zero_padding            x, and 0 in the padding
    at_least_float32        x in its own dtype or float32
    masked_sum_count        a mean as (sum, count); divide ends it
    masked_mean, masked_var of the real tokens
    deviation, mean_and_deviations   exactly 0 for equal numbers
    within_rounding         whether numbers are equal up to rounding
    first_true_index        where a mask begins
    until_last              True up to the last real token
    at_next                 x at the next real token

The examples in the docstrings begin after `import jax`, `import jax.numpy as jnp` and
`from klrl import ops`, and show three digits.
"""

from klrl.ops.advantages import best_of_n_reward as best_of_n_reward
from klrl.ops.advantages import discounted_returns as discounted_returns
from klrl.ops.advantages import gae as gae
from klrl.ops.advantages import group_centred as group_centred
from klrl.ops.advantages import group_relative as group_relative
from klrl.ops.advantages import leave_one_out as leave_one_out
from klrl.ops.advantages import mean_and_std as mean_and_std
from klrl.ops.advantages import vtrace as vtrace
from klrl.ops.advantages import whiten as whiten
from klrl.ops.controllers import BETA_BOUNDS as BETA_BOUNDS
from klrl.ops.controllers import BudgetState as BudgetState
from klrl.ops.controllers import ControllerState as ControllerState
from klrl.ops.controllers import at_bound as at_bound
from klrl.ops.controllers import budget as budget
from klrl.ops.controllers import budget_state as budget_state
from klrl.ops.controllers import cosine_schedule as cosine_schedule
from klrl.ops.controllers import doubling as doubling
from klrl.ops.controllers import dual_ascent as dual_ascent
from klrl.ops.controllers import fixed as fixed
from klrl.ops.controllers import linear_schedule as linear_schedule
from klrl.ops.controllers import proportional as proportional
from klrl.ops.divergences import alpha_divergence_of as alpha_divergence_of
from klrl.ops.divergences import alpha_slope as alpha_slope
from klrl.ops.divergences import jsd_slope as jsd_slope
from klrl.ops.importance import SAMPLER_CORRECTIONS as SAMPLER_CORRECTIONS
from klrl.ops.importance import SAMPLER_MASKS as SAMPLER_MASKS
from klrl.ops.importance import sampler_weights as sampler_weights
from klrl.ops.importance import weighted as weighted
from klrl.ops.kl import KL_ESTIMATORS as KL_ESTIMATORS
from klrl.ops.kl import exact_jsd as exact_jsd
from klrl.ops.kl import exact_jsd_from_hidden as exact_jsd_from_hidden
from klrl.ops.kl import exact_kl as exact_kl
from klrl.ops.kl import exact_kl_from_hidden as exact_kl_from_hidden
from klrl.ops.kl import jsd_of as jsd_of
from klrl.ops.kl import k1 as k1
from klrl.ops.kl import k2 as k2
from klrl.ops.kl import k3 as k3
from klrl.ops.kl import kl_new_old as kl_new_old
from klrl.ops.kl import kl_of as kl_of
from klrl.ops.kl import kl_old_new as kl_old_new
from klrl.ops.kl import weighted_estimate as weighted_estimate
from klrl.ops.log_probs import certainty_of as certainty_of
from klrl.ops.log_probs import entropy as entropy
from klrl.ops.log_probs import entropy_of as entropy_of
from klrl.ops.log_probs import mean_under as mean_under
from klrl.ops.log_probs import taken as taken
from klrl.ops.log_probs import token_log_probs as token_log_probs
from klrl.ops.log_probs import (
  token_log_probs_and_entropy_from_hidden as token_log_probs_and_entropy_from_hidden,
)
from klrl.ops.log_probs import token_log_probs_from_hidden as token_log_probs_from_hidden
from klrl.ops.log_probs import vocab_log_probs as vocab_log_probs
from klrl.ops.logits import CappedUnembedding as CappedUnembedding
from klrl.ops.logits import Unembedding as Unembedding
from klrl.ops.logits import logits_of as logits_of
from klrl.ops.losses import AGGREGATIONS as AGGREGATIONS
from klrl.ops.losses import centred_policy_loss as centred_policy_loss
from klrl.ops.losses import cispo_loss as cispo_loss
from klrl.ops.losses import clip_fraction as clip_fraction
from klrl.ops.losses import clipped_policy_loss as clipped_policy_loss
from klrl.ops.losses import clipped_value_loss as clipped_value_loss
from klrl.ops.losses import constant as constant
from klrl.ops.losses import dpo_loss as dpo_loss
from klrl.ops.losses import exponential_weights as exponential_weights
from klrl.ops.losses import gspo_loss as gspo_loss
from klrl.ops.losses import ipo_loss as ipo_loss
from klrl.ops.losses import kl_penalised_policy_loss as kl_penalised_policy_loss
from klrl.ops.losses import reinforce_loss as reinforce_loss
from klrl.ops.losses import sequence_mean_token_mean as sequence_mean_token_mean
from klrl.ops.losses import sequence_mean_token_sum as sequence_mean_token_sum
from klrl.ops.losses import token_mean as token_mean
from klrl.ops.losses import value_loss as value_loss
from klrl.ops.masking import at_least_float32 as at_least_float32
from klrl.ops.masking import at_next as at_next
from klrl.ops.masking import deviation as deviation
from klrl.ops.masking import divide as divide
from klrl.ops.masking import first_true_index as first_true_index
from klrl.ops.masking import masked_mean as masked_mean
from klrl.ops.masking import masked_sum_count as masked_sum_count
from klrl.ops.masking import masked_var as masked_var
from klrl.ops.masking import mean_and_deviations as mean_and_deviations
from klrl.ops.masking import until_last as until_last
from klrl.ops.masking import within_rounding as within_rounding
from klrl.ops.masking import zero_padding as zero_padding
from klrl.ops.shaping import shaped_rewards as shaped_rewards
from klrl.ops.trust_regions import binary_kl as binary_kl
from klrl.ops.trust_regions import binary_tv as binary_tv
from klrl.ops.trust_regions import divergence_masked_policy_loss as divergence_masked_policy_loss
from klrl.ops.trust_regions import is_leaving as is_leaving
from klrl.ops.trust_regions import smooth_policy_loss as smooth_policy_loss
from klrl.ops.vocabulary import over_vocabulary as over_vocabulary
