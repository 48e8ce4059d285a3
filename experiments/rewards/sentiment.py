"""A reward by the sentiment lexicon of TextBlob: how positive a text is, from -1 to 1.

    pip install -e '.[sentiment]'
    python -m experiments.grpo --policy=DIR --prompts=FILE.jsonl \
        --reward=experiments/rewards/sentiment.py:polarity

A lexicon is easily fooled: one word repeated is as positive as a happy end. So it shows what beta
is for, and a story's own likelihood under the base model and its distinct words tell what it cost.
"""

from textblob import TextBlob


def polarity(prompts, completions, **columns):
  """Returns the mean polarity of the words of each completion; 0 where the lexicon knows none."""
  del prompts, columns
  return [TextBlob(completion).sentiment.polarity for completion in completions]
