"""The embedded tasks: what each gives to a run. A task is a module beside this one, and a row here.

A task whose `write_policy` is None starts with the policy of the embedded stages, and is scored by
their reward model unless a reward is given.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from klrl.models import TokenizerInfo
from klrl.tasks import arithmetic, tree
from klrl.tasks.verifier import Verifier


class EmbeddedTask(NamedTuple):
  """What a task gives to a run.

  about: what --help says of it.
  prompts: prompts(held_out=...) -> records {"prompt": ..., ...} to train on, or to judge by.
  max_completion_len: in tokens, where no flag says otherwise.
  tokenizer: () -> that of its policies.
  verifier: how completions are checked, from their text.
  has_one_answer: whether the column `answer` is the one right completion, so that a device can
    check completions while training goes on.
  write_policy: write_policy(folder, seed) -> the directory of the policy that a run starts with;
    all processes call it.
  scorer: scorer(config of the policy) -> (what scores completions in place of a reward model, its
    params); the limit of tokens is then the task's own.
  exact: exact(policy, reference, reference_params) -> what enumerates all completions, see
    `tree.Exact`.
  """

  about: str
  prompts: Callable[..., list[dict[str, Any]]]
  max_completion_len: int
  tokenizer: Callable[[], TokenizerInfo]
  verifier: Verifier | None = None
  has_one_answer: bool = False
  write_policy: Callable | None = None
  scorer: Callable | None = None
  exact: Callable | None = None


TASKS = {
  "arithmetic": EmbeddedTask(
    about="adds two numbers",
    prompts=arithmetic.prompt_records,
    max_completion_len=arithmetic.MAX_COMPLETION_LEN,
    tokenizer=arithmetic.make_tokenizer,
    verifier=arithmetic.VERIFIER,
    has_one_answer=True,
  ),
  "tree": EmbeddedTask(
    about="is so small that every completion and the best policy are known",
    prompts=tree.prompt_records,
    max_completion_len=tree.HORIZON,
    tokenizer=tree.make_tokenizer,
    write_policy=tree.write_policy,
    scorer=tree.scorer,
    exact=tree.Exact,
  ),
}
