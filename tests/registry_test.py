"""Tests of the table of embedded tasks: what a row must give, and what a new one costs."""

import jax
import pytest

from klrl import inputs
from klrl.errors import UserError
from klrl.models import DecoderConfig, policy_model, save_policy
from klrl.tasks import tree
from klrl.tasks.registry import TASKS, EmbeddedTask
from klrl.tasks.verifier import Verifier, accuracy


@pytest.mark.parametrize("name", TASKS)
def test_a_task_gives_prompts_that_its_tokenizer_reads_and_answers_that_are_right(name):
  task = TASKS[name]
  training, held_out = (task.prompts(held_out=held_out) for held_out in (False, True))
  for record in (*training[:9], *held_out[:9]):
    ids = task.tokenizer().tokenizer.encode(record["prompt"]).ids
    assert task.tokenizer().tokenizer.decode(ids).replace(" ", "") == record["prompt"]
    if task.verifier and task.has_one_answer:
      assert task.verifier.is_right(record["answer"], record)
  assert task.about and task.max_completion_len > 1


def write_letters(root, seed):
  config = DecoderConfig(
    vocab_size=5, width=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=8,
    max_len=8,
  )  # fmt: skip
  params = policy_model(config).init(jax.random.key(seed))
  save_policy(root / "letters", config, params, tree.make_tokenizer())
  return root / "letters"


def test_a_new_task_is_a_row(tmp_path, monkeypatch):
  """Its policy, its prompts and how it is checked; nothing else knows its name."""
  letters = EmbeddedTask(
    about="repeats a letter",
    prompts=lambda held_out: [{"prompt": x, "answer": x} for x in ("cd" if held_out else "ab")],
    max_completion_len=3,
    tokenizer=tree.make_tokenizer,
    verifier=Verifier(lambda text: text, lambda text, record: text == record["answer"]),
    has_one_answer=True,
    write_policy=write_letters,
  )
  monkeypatch.setitem(TASKS, "letters", letters)
  sources = inputs.Sources(task="letters")
  models = inputs.load_models(sources, policy=str(write_letters(tmp_path, 0)), reward_model="")
  task = inputs.load_task(sources, models)
  assert models.reward_model is None and task.exact is None
  assert task.max_completion_len == 3 and len(task.held_out.tokens) == 2
  eos = models.tokenizer.eos_id
  assert task.training.answers.tolist() == [[1, eos, eos], [2, eos, eos]]
  right = accuracy(
    task.training.answers, task.training.answers >= 0, task.training.answers, pad_id=0
  )
  assert right.tolist() == [1.0, 1.0]
  with pytest.raises(UserError, match="--max_completion_len=1: the embedded task needs 2"):
    inputs.load_task(inputs.Sources(task="letters", max_completion_len=1), models)
