"""The page of samplers of lower precision, from figures at hand."""

import functools
import json

import numpy as np
import pytest

from experiments import mismatch
from experiments.lab import papers

scores_of_samplers = functools.cache(mismatch.scores_of_samplers)


@pytest.fixture
def results():
  rows = [
    {"sampler_dtype": dtype, "sampler_correction": correction, "kl": [kl, 3 * kl]}
    | {"score": 1.0, "gold": 0.5 + kl, "kl_ref_exact": 0.25}
    | dict.fromkeys(("score_stderr", "gold_stderr", "kl_ref_exact_stderr"), 0.01)
    for dtype, kl in zip(mismatch.DTYPES, (0.0, 0.04, 0.001), strict=True)
    for correction in mismatch.CORRECTIONS
  ]
  return {"num_iterations": 2, "seeds": 2, "rows": rows, "scores": scores_of_samplers()}


def test_the_verdict_and_the_page_have_the_figures(results):
  assert mismatch.verdict(results) == (
    "KL(sampler \u2016 policy) is 0.08 nats per sequence with bfloat16 and 0.002 with float16, 40 "
    "times less. Gold accuracy without weights ends at 50.0% with float32, 54.0% with bfloat16, "
    "50.1% with float16."
  )
  page = mismatch.report(results)
  assert mismatch.verdict(results) in page and page.count("<svg") == 4
  assert page.count("<tr>") == 7


def test_figures_are_means_over_seeds_with_their_error(tmp_path):
  folders = [tmp_path / name for name in "ab"]
  for folder, kl, gold in zip(folders, (0.1, 0.3), (0.5, 0.7), strict=True):
    folder.mkdir()
    lines = [{"iteration": i, "kl/sampler_k3": kl * i} for i in (1, 2)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    judged = {f"{name}_after": gold for name in ("score", "gold", "kl_ref_exact")}
    judged |= {f"{name}_after_stderr": 0.03 for name in ("score", "gold", "kl_ref_exact")}
    (folder / "summary.json").write_text(json.dumps({"num_iterations": 2, **judged}))
  row = mismatch.of_members(folders, {"sampler_dtype": "float16"})
  assert row["sampler_dtype"] == "float16"
  np.testing.assert_allclose(row["kl"], [0.2, 0.4])
  np.testing.assert_allclose([row["gold"], row["gold_stderr"]], [0.6, 0.03 / np.sqrt(2)])


def test_no_baseline_moves_a_centred_score_and_no_ratio_adds_to_its_variance():
  scores = scores_of_samplers()
  for name in mismatch.SCORES:  # On-policy the three are one.
    np.testing.assert_allclose(scores[name]["variance"][0], scores["plain"]["variance"][0])
    np.testing.assert_allclose([scores[name][x][0] for x in ("drift", "error")], 0.0, atol=1e-9)
  np.testing.assert_allclose(scores["centred"]["error"], 0.0, atol=1e-9)
  assert min(scores["ratio"]["error"][1:]) > 0.05
  agrees, figure = papers.PAPERS["score_centring_2026"].found({"scores": scores})
  assert agrees and "0% of its norm with the centred score" in figure
  swapped = scores | {"centred": scores["plain"]}
  assert not papers.PAPERS["score_centring_2026"].found({"scores": swapped}).agrees
