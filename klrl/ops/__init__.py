"""Pure functions of arrays: unreduced `[..., T]`, time last, bool masks, at least float32."""

from klrl.ops.advantages import discounted_returns as discounted_returns
from klrl.ops.advantages import gae as gae
from klrl.ops.advantages import group_centred as group_centred
from klrl.ops.advantages import group_relative as group_relative
from klrl.ops.advantages import leave_one_out as leave_one_out
from klrl.ops.advantages import mean_and_std as mean_and_std
from klrl.ops.advantages import vtrace as vtrace
from klrl.ops.advantages import whiten as whiten
from klrl.ops.controllers import ControllerState as ControllerState
from klrl.ops.controllers import cosine_schedule as cosine_schedule
from klrl.ops.controllers import doubling as doubling
from klrl.ops.controllers import dual_ascent as dual_ascent
from klrl.ops.controllers import fixed as fixed
from klrl.ops.controllers import linear_schedule as linear_schedule
from klrl.ops.controllers import proportional as proportional
from klrl.ops.kl import KL_ESTIMATORS as KL_ESTIMATORS
from klrl.ops.kl import exact_kl as exact_kl
from klrl.ops.kl import exact_kl_from_hidden as exact_kl_from_hidden
from klrl.ops.kl import k1 as k1
from klrl.ops.kl import k2 as k2
from klrl.ops.kl import k3 as k3
from klrl.ops.kl import kl_new_old as kl_new_old
from klrl.ops.kl import kl_old_new as kl_old_new
from klrl.ops.log_probs import entropy as entropy
from klrl.ops.log_probs import token_log_probs as token_log_probs
from klrl.ops.log_probs import (
  token_log_probs_and_entropy_from_hidden as token_log_probs_and_entropy_from_hidden,
)
from klrl.ops.log_probs import token_log_probs_from_hidden as token_log_probs_from_hidden
from klrl.ops.log_probs import vocab_log_probs as vocab_log_probs
from klrl.ops.losses import AGGREGATIONS as AGGREGATIONS
from klrl.ops.losses import cispo_loss as cispo_loss
from klrl.ops.losses import clip_fraction as clip_fraction
from klrl.ops.losses import clipped_policy_loss as clipped_policy_loss
from klrl.ops.losses import clipped_value_loss as clipped_value_loss
from klrl.ops.losses import constant as constant
from klrl.ops.losses import dpo_loss as dpo_loss
from klrl.ops.losses import gspo_loss as gspo_loss
from klrl.ops.losses import ipo_loss as ipo_loss
from klrl.ops.losses import kl_penalised_policy_loss as kl_penalised_policy_loss
from klrl.ops.losses import reinforce_loss as reinforce_loss
from klrl.ops.losses import sequence_mean_token_mean as sequence_mean_token_mean
from klrl.ops.losses import sequence_mean_token_sum as sequence_mean_token_sum
from klrl.ops.losses import token_mean as token_mean
from klrl.ops.losses import value_loss as value_loss
from klrl.ops.masking import at_least_float32 as at_least_float32
from klrl.ops.masking import divide as divide
from klrl.ops.masking import first_true_index as first_true_index
from klrl.ops.masking import masked_mean as masked_mean
from klrl.ops.masking import masked_sum_count as masked_sum_count
from klrl.ops.masking import masked_var as masked_var
from klrl.ops.masking import zero_padding as zero_padding
from klrl.ops.rewards import shaped_rewards as shaped_rewards
