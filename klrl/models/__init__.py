"""Decoders, value and reward models, and model directories; the only package that knows Flax."""

from klrl.models.decoder import DecoderConfig as DecoderConfig
from klrl.models.decoder import Policy as Policy
from klrl.models.decoder import ScalarModel as ScalarModel
from klrl.models.decoder import policy_model as policy_model
from klrl.models.decoder import scalar_model as scalar_model
from klrl.models.decoder import scalar_params_from as scalar_params_from
from klrl.models.hf import TokenizerInfo as TokenizerInfo
from klrl.models.hf import check_tokenizer as check_tokenizer
from klrl.models.hf import load_policy as load_policy
from klrl.models.hf import load_scalar as load_scalar
from klrl.models.hf import load_tokenizer as load_tokenizer
from klrl.models.hf import save_policy as save_policy
from klrl.models.hf import save_scalar as save_scalar
