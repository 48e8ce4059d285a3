"""Decoders, value and reward models, adapters, model directories; only this package knows Flax."""

from klrl.models.blocks import DecoderConfig as DecoderConfig
from klrl.models.decoder import REMAT as REMAT
from klrl.models.decoder import Policy as Policy
from klrl.models.decoder import ScalarModel as ScalarModel
from klrl.models.decoder import policy_model as policy_model
from klrl.models.decoder import scalar_model as scalar_model
from klrl.models.decoder import scalar_params_from as scalar_params_from
from klrl.models.hf import file_dtype as file_dtype
from klrl.models.hf import load_config as load_config
from klrl.models.hf import load_policy as load_policy
from klrl.models.hf import load_scalar as load_scalar
from klrl.models.hf import open_policy as open_policy
from klrl.models.hf import open_scalar as open_scalar
from klrl.models.hf import save_policy as save_policy
from klrl.models.hf import save_scalar as save_scalar
from klrl.models.lora import add_lora as add_lora
from klrl.models.lora import join as join
from klrl.models.lora import merge_lora as merge_lora
from klrl.models.product import product_policy as product_policy
from klrl.models.tokenizer import TokenizerInfo as TokenizerInfo
from klrl.models.tokenizer import check_tokenizer as check_tokenizer
from klrl.models.tokenizer import difference as difference
from klrl.models.tokenizer import shared_tokens as shared_tokens
from klrl.models.tokenizer_files import load_tokenizer as load_tokenizer
from klrl.models.uniform import uniform_policy as uniform_policy
