"""The page of a sweep from files made by hand: the answer, what is marked, and what is escaped."""

import json
import re

import pytest

from klrl.report.of_sweep import settings_of, three_of, write_page
from klrl.report.sweep_answer import answer, exact_answer

HOSTILE = '<script>alert("x")</script> & </div>'


def member(beta, seed, *, gold=0.5, score=0.0, kl=1.0, diverged_at=None, pareto=False):
  """Returns a record of frontier.json."""
  return {
    "name": f"beta={beta:g},seed={seed}",
    "values": {"beta": beta, "seed": seed},
    "gold": gold, "gold_stderr": 0.01, "score": score, "score_stderr": 0.1,
    "kl_ref_exact": kl, "kl_ref_exact_stderr": 0.01, "entropy": 0.4, "length": 3.0,
    "diverged_at": diverged_at,
    "pareto": pareto,
  }  # fmt: skip


BEFORE = {
  "gold": 0.5, "gold_stderr": 0.01, "score": 0.0, "score_stderr": 0.1,
  "kl_ref_exact": 0.0, "entropy": 0.6, "length": 3.0,
}  # fmt: skip
SEVERAL = [
  member(beta, seed, gold=gold + 0.002 * seed, score=score, kl=kl)
  for beta, gold, score, kl in ((1.0, 0.6, 0.5, 0.2), (0.0, 0.4, 2.0, 3.0), (0.1, 0.8, 1.0, 1.0))
  for seed in range(3)
]


def answered(members, gain="gold", before=BEFORE):
  found = {"gain": gain, "before": before, "members": members}
  settings = [setting for setting in settings_of(found) if setting.records]
  sentence, notes = answer(settings, gain, before, "kl_ref_exact", "the SFT policy")
  return sentence, " ".join(notes)


@pytest.fixture
def sweep_dir(tmp_path):
  def write(members, gain="gold", before=BEFORE):
    found = {"gain": gain, "before": before, "members": members}
    (tmp_path / "frontier.json").write_text(json.dumps(found))
    (tmp_path / "config.json").write_text(json.dumps({"experiment": "ppo"}))
    for record in members:
      folder = tmp_path / "members" / record["name"]
      folder.mkdir(parents=True, exist_ok=True)
      lines = [
        {"iteration": i, "score/mean": 0.1 * i, "gold/mean": 0.5, "kl/ref_k1": 0.2 * i}
        for i in range(100)
      ]
      if record["diverged_at"]:
        lines[50:] = [dict.fromkeys(lines[0]) | {"iteration": i} for i in range(50, 100)]
      (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
      samples = [
        {
          "when": when, "index": 0, "prompt": "1+1=", "score": 0.5, "gold": 1.0,
          "completion": f"{HOSTILE} {record['name']} {when}", "kl_ref": [0.1, 0.2],
        }
        for when in ("before", "after")
      ]  # fmt: skip
      (folder / "samples.jsonl").write_text("".join(json.dumps(x) + "\n" for x in samples))
    return write_page(tmp_path).read_text()

  return write


def test_which_beta_is_the_best_mean_of_gold():
  sentence, notes = answered(SEVERAL)
  assert sentence.startswith("β = 0.1 has the highest gold accuracy: 80.2% at 1 nats of KL")
  assert "mean of 3 seeds, from 80.0%" in sentence
  assert "the SFT policy has 50.0%" in sentence
  assert "All other settings are more than two standard errors below" in notes
  assert "--seeds" not in notes


def test_one_lucky_seed_does_not_win():
  members = [member(0.1, 0, gold=0.9), member(0.1, 1, gold=0.3), member(0.5, 0, gold=0.7)]
  sentence, _ = answered([*members, member(0.5, 1, gold=0.68)])
  assert sentence.startswith("β = 0.5 ")


def test_what_cannot_be_told_apart_is_said_with_the_cheapest():
  sentence, notes = answered(
    [member(0.1, 0, gold=0.71, kl=2.0), member(0.5, 0, gold=0.7, kl=0.5), member(2.0, 0, gold=0.6)]
  )
  assert sentence.startswith("β = 0.1 ")
  assert notes.startswith("β = 0.5 is as good, as far as two standard errors")
  assert "β = 0.5 stays closest to the reference" in notes
  assert "One seed says little" in notes


def test_no_gain_over_the_untrained_policy_is_said():
  assert "within two standard errors of the SFT policy" in answered([member(0.1, 0, gold=0.51)])[1]
  assert "may be chance" not in answered([member(0.1, 0, gold=0.6)])[1]


def test_over_optimisation_needs_more_score_and_clearly_less_gold():
  assert "Over-optimised: β = 0 (score 2, gold 40.2%)" in answered(SEVERAL)[1]
  none = "No over-optimisation is seen: no setting goes further"

  def of_zero(**figures):
    changed = [r | figures if r["values"]["beta"] == 0 else r for r in SEVERAL]
    return answered(changed)[1]

  assert "Over-optimised: β = 0 (" in of_zero(score=0.9)  # no less score that could be told
  assert none in of_zero(score=0.5)
  assert none in of_zero(gold=0.79)
  assert none in of_zero(kl_ref_exact=0.5)


def test_without_gold_the_score_is_no_proof():
  members = [record | {"gold": None} for record in SEVERAL]
  sentence, notes = answered(members, "score", BEFORE | {"gold": None})
  assert sentence.startswith(
    "Nothing checks completions here, so no setting is the best; β = 0 has the"
  )
  assert "does not say that the completions are good" in notes


def test_diverged_members_decide_nothing():
  members = [*SEVERAL, member(5.0, 0, gold=0.99, diverged_at=3)]
  assert answered(members)[0].startswith("β = 0.1 ")
  assert answered([member(1.0, 0, diverged_at=3)])[0].startswith("Every member diverged")


def test_samples_are_of_both_ends_and_the_best():
  members = [
    member(beta, 0, gold=gold) for beta, gold in zip(range(5), (1, 2, 3, 9, 4), strict=True)
  ]

  def labels(members):
    found = {"gain": "gold", "before": BEFORE, "members": members}
    return [setting.label for setting in three_of(settings_of(found), "gold")]

  assert labels(members) == ["0", "3", "4"]
  members[4]["gold"] = 10
  assert labels(members) == ["0", "2", "4"]


def test_page_marks_members_and_is_made_of_its_files(sweep_dir):
  members = [*SEVERAL, member(5.0, 0, gold=None, diverged_at=51)]
  members[0]["pareto"] = True
  html = sweep_dir(members)
  rows = re.findall(r"<tr>.*?</tr>", html)
  assert sum("Pareto-optimal" in row for row in rows) == 1
  assert [row for row in rows if "diverged at iteration 51" in row and "β = 5" in row]
  assert html.count("<svg") == 4 + 3
  assert sweep_dir(members) == html


def test_page_runs_and_fetches_nothing(sweep_dir):
  html = sweep_dir(SEVERAL)
  assert "<script" not in html
  assert "&lt;script&gt;" in html
  assert not re.search(r'(src|href)="(?!#)', html)
  assert "beta=0.1,seed=0 after" in html
  assert "beta=0.1,seed=0 before" not in html  # the untrained one is shown once
  assert "#0102" not in html
  assert "#0101" not in html


def test_page_without_a_reference_or_seeds_or_a_sweep(sweep_dir):
  unmeasured = [
    record | {"kl_ref_exact": None, "kl_ref_exact_stderr": None, "values": {"seed": i}}
    for i, record in enumerate(SEVERAL[:2])
  ]
  html = sweep_dir(unmeasured, before=BEFORE | {"kl_ref_exact": None})
  assert "there is no frontier to draw" in html
  assert "all flags alike" in html


def test_best_of_n_is_drawn_where_it_belongs(sweep_dir, tmp_path):
  without = sweep_dir(SEVERAL)
  row = {"n": 1, "kl": 0.0, "score": -0.123, "gold": 0.5}
  found = {
    "rows": [row, row | {"n": 8, "kl": 4.0, "score": 1.5}],
    "frontier": {"kl": [0.0, 2.0], "score": [-0.1, 1.6], "gold": [0.5, 0.3]},
    "completions_per_prompt": 16,
  }
  (tmp_path / "best_of_n").mkdir()
  (tmp_path / "best_of_n" / "best_of_n.json").write_text(json.dumps(found))
  assert write_page(tmp_path).read_text() == without
  html = write_page(tmp_path, best_of_n=True).read_text()
  assert "highest score, from 16 draws of the SFT policy for each prompt" in html
  assert "estimated by weights of the same draws" in html
  assert "falls, to 30.0% at 2 nats" in html
  assert len(third_lines(html)) == len(third_lines(without)) + 2 * 4

  # Gold may be a reward's word on completions, which best-of-n has none for.
  found["frontier"]["gold"] = None
  found["rows"] = [row | {"gold": None} for row in found["rows"]]
  (tmp_path / "best_of_n" / "best_of_n.json").write_text(json.dumps(found))
  html = write_page(tmp_path, best_of_n=True).read_text()
  assert len(third_lines(html)) == len(third_lines(without)) + 2 * 2


@pytest.mark.parametrize(("kl", "shown"), [(0.0, "0.000"), (0.75, "0.75")])
def test_the_untrained_policy_may_be_far_from_the_reference(sweep_dir, kl, shown):
  html = sweep_dir(SEVERAL, before=BEFORE | {"kl_ref_exact": kl})
  cells = r">SFT policy</th>(?:<td>[^<]*</td>){3}<td>([^<]*)</td>"
  assert re.findall(cells, html)[0] == shown


def third_lines(html):
  """Returns the lines in the third colour of all pictures."""
  return re.findall(r"<path[^>]*var\(--third\)", html)


def test_without_gold_the_score_is_drawn_against_the_likelihood_too(sweep_dir):
  before = BEFORE | {"gold": None, "nll": 2.125}
  members = [r | {"gold": None, "nll": 1.0 + r["values"]["beta"]} for r in SEVERAL]
  html = sweep_dir(members, "score", before)
  assert "NLL under the reference, nats per token" in html
  assert html.count("<svg") == 3 + 3
  gold = sweep_dir([r | {"nll": 1.0} for r in SEVERAL], before=BEFORE | {"nll": 2.125})
  assert "NLL under" not in gold


def exact_member(beta, seed, *, gap):
  """Returns a member of an enumerated task."""
  return member(beta, seed) | {"gold": None, "objective_gap": gap, "tv_to_optimum": 0.1}


@pytest.mark.parametrize(
  ("gap", "said"),
  [
    (0.004, "Every member reached the best policy for its β: at most 0.40% of what"),
    (0.02, "Not every member reached the best policy for its β: β = 0.5 (2.0% short)."),
    (float("nan"), "Not every member reached"),
  ],
)
def test_where_the_best_policies_are_known_the_gap_answers(gap, said):
  members = [exact_member(0.1, 0, gap=0.001), exact_member(0.5, 0, gap=0.0)]
  members.append(exact_member(0.5, 1, gap=gap))
  settings = settings_of({"gain": "score", "before": BEFORE, "members": members})
  assert exact_answer(settings)[0].startswith(said)


def test_an_enumerated_sweep_shows_exact_figures(sweep_dir, tmp_path):
  own = {"gold": None, "objective_gap": 0.0025, "tv_to_optimum": 0.0321}
  members = [record | own for record in SEVERAL]
  sweep_dir(members, "score", BEFORE | {"gold": None})
  optimum = {"kl": [0.0, 1.0, 5.0], "score": [-0.25, 1.0, 3.0]}
  for record in members:
    (tmp_path / "members" / record["name"] / "optimum.json").write_text(json.dumps(optimum))
  html = write_page(tmp_path).read_text()
  assert "Every member reached the best policy" in html
  assert html.count("<td>0.2%</td><td>0.0321</td>") == len(members) + 3  # and the means
  assert "best policies" in html
  assert "\N{MINUS SIGN}0.25" in html  # the untrained policy, where the frontier begins


def test_the_error_of_a_single_seed_is_drawn_and_said(sweep_dir):
  single = [record for record in SEVERAL if record["values"]["seed"] == 0]
  html = sweep_dir(single)
  assert "There is one seed of each" in html and "A cross is the mean" not in html
  wider = sweep_dir([record | {"gold_stderr": 0.2} for record in single])
  pictures, others = (re.findall(r"<svg.*?</svg>", page, re.DOTALL) for page in (html, wider))
  # Gold against the KL and its root, then the score.
  assert [x == y for x, y in zip(pictures, others, strict=True)] == [False, False, *[True] * 5]
  several = sweep_dir(SEVERAL)
  assert "There is one seed of each" not in several and "A cross is the mean" in several


def test_settings_have_markers_of_their_own_and_the_start_its_name(sweep_dir, tmp_path):
  html = sweep_dir(SEVERAL)
  assert all(f">{sign}</b>" in html for sign in "●■▲")
  assert "The ring is the SFT policy." in html and "ntrained" not in html
  config = {"experiment": "reinforce", "task": "tree"}
  (tmp_path / "config.json").write_text(json.dumps(config))
  assert "The ring is the policy at the start." in write_page(tmp_path).read_text()


def evaluate_members(workdir, members, **changes):
  """Writes what each member was judged by on its way."""
  for record in members:
    kl, gold = record["kl_ref_exact"], record["gold"]
    lines = [
      {"iteration": 10 * i, "kl_ref_exact": kl * i / 4, "gold": 0.5 + (gold - 0.5) * i / 4}
      | changes
      for i in range(5)
    ]
    path = workdir / "members" / record["name"] / "evaluations.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_way_of_each_setting_is_drawn_where_it_was_evaluated(sweep_dir, tmp_path):
  before = sweep_dir(SEVERAL)
  assert "The way there" not in before
  evaluate_members(tmp_path, SEVERAL)
  html = write_page(tmp_path).read_text()
  assert html.count("<svg") == before.count("<svg") + 1  # of gold; there is no score
  start = html.index("The way there")
  assert html.index("The frontier") < start < html.index("<h2>Members")
  assert "The first seed of each, judged on held-out prompts while it trained" in html
  evaluate_members(tmp_path, SEVERAL, gold=None)
  assert "The way there" not in write_page(tmp_path).read_text()
