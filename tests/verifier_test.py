"""What several completions of one prompt are worth."""

import itertools

import numpy as np
import pytest

from klrl.tasks import arithmetic
from klrl.tasks.verifier import Verifier, majority, pass_at_k, right


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_completion(k):
  is_right = np.array(list(itertools.product([0.0, 1.0], repeat=5)))
  expected = [
    np.mean([max(subset) for subset in itertools.combinations(row, k)]) for row in is_right
  ]
  np.testing.assert_allclose(pass_at_k(is_right, k), expected, rtol=1e-12)


@pytest.mark.parametrize(
  ("answers", "is_right", "expected"),
  [
    (["7", "7", "8", "9"], [1, 1, 0, 0], 1.0),
    (["7", "8", "8", "9"], [1, 0, 0, 0], 0.0),
    (["7", "8", "8", "7"], [1, 0, 0, 1], 0.5),
    (["7", "8", "9"], [1, 0, 0], 1 / 3),
    (["7", None, None, None], [1, 0, 0, 0], 1.0),
    ([None, None, "8", "7", "7"], [0, 0, 0, 1, 1], 1.0),
    ([None, None], [0, 0], 0.0),
    ([None, None], [1, 1], 0.0),
  ],
)
def test_majority_by_hand(answers, is_right, expected):
  assert majority(answers, is_right) == pytest.approx(expected)


def test_right_reads_each_completion_with_its_record():
  verifier = Verifier(lambda text: text, lambda text, record: text == record["answer"])
  records = [{"answer": "1"}, {"answer": "2"}, {"answer": "3"}]
  found = right(verifier, ["1", "3", "3"], records)
  assert found.dtype == np.float32
  np.testing.assert_array_equal(found, [1, 0, 1])
  assert right(arithmetic.VERIFIER, [], []).shape == (0,)
