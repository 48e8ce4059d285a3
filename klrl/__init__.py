"""KL-regularised reinforcement learning of language models.

Axis letters in all docstrings: B rows (completions), P prompt tokens, T completion tokens, S tokens
of a whole text, V vocabulary, D width, L layers, N examples, G completions of one prompt.
"""

from klrl import ops as ops
from klrl.errors import UserError as UserError
from klrl.learner import Hypers as Hypers
from klrl.learner import TrainState as TrainState
from klrl.learner import make_iteration_fn as make_iteration_fn
from klrl.learner import make_update_fn as make_update_fn
from klrl.models import DecoderConfig as DecoderConfig
from klrl.models import load_policy as load_policy
from klrl.models import load_scalar as load_scalar
from klrl.models import load_tokenizer as load_tokenizer
from klrl.models import policy_model as policy_model
from klrl.models import save_policy as save_policy
from klrl.models import save_scalar as save_scalar
from klrl.models import scalar_model as scalar_model
from klrl.sampling import Rollout as Rollout
from klrl.sampling import make_greedy_fn as make_greedy_fn
from klrl.sampling import make_sample_fn as make_sample_fn
