"""Tests of the reward by a sentiment lexicon."""

import pathlib

import pytest

from experiments import grpo
from klrl.tasks.rewards import load_rewards, weighted_scores

FILE = pathlib.Path(grpo.__file__).parent / "rewards" / "sentiment.py"


def test_a_happy_story_scores_above_a_sad_one_and_both_within_one():
  pytest.importorskip("textblob")
  records = [{"prompt": "Once"}] * 3
  texts = ["They were happy and loved it.", "It was an awful, sad day.", "The the the."]
  scores, _ = weighted_scores(load_rewards(f"{FILE}:polarity"), records, texts)
  assert 1 >= scores[0] > scores[2] == 0 > scores[1] >= -1
