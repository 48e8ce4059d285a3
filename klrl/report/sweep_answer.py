"""Which setting of a sweep to take, in words, from the figures of its members."""

import numpy as np

from klrl.figures import digits, shown
from klrl.report.sweep_pictures import Setting

SMALL_GAP = 0.01  # of what the best policy gains: within it a member has reached the optimum


def standing(setting: Setting, name: str) -> tuple[float, float]:
  """Returns (mean over seeds, its standard error) of a figure that was judged.

  Members are judged on the same prompts, so that this error does not fall with their number; that
  of the seeds, where there are several, is added in squares.
  """
  x, errors = setting.each(name), np.nan_to_num(setting.each(f"{name}_stderr"))
  of_seeds = x.std(ddof=1) / np.sqrt(len(x)) if len(x) > 1 else 0.0
  return float(x.mean()), float(np.hypot(errors.mean(), of_seeds))


def apart(one: tuple[float, float], other: tuple[float, float]) -> bool:
  """Returns whether two means differ by more than two standard errors of their difference."""
  return abs(one[0] - other[0]) > 2 * np.hypot(one[1], other[1])


def answer(
  settings, gain: str, before: dict, kl_name: str | None, start: str
) -> tuple[str, list[str]]:
  """Returns which setting to take, in a sentence, and what has to be known beside it.

  `start` is what the policy is called that the members begin with.
  """
  if not settings:
    return "Every member diverged: take a smaller learning rate.", []
  gold = gain == "gold"
  claim = "{} has the highest gold accuracy"
  if not gold:
    claim = "Nothing checks completions here, so no setting is the best; {} has the highest score"
  standings = {setting.name: standing(setting, gain) for setting in settings}
  best = max(settings, key=lambda setting: standings[setting.name][0])
  values, mine = best.each(gain), standings[best.name]
  spread = f", from {shown(gain, values.min())} to {shown(gain, values.max())}"
  seeds = f"mean of {len(values)} seeds{spread}" if len(values) > 1 else "one seed"
  kl = f" at {shown(kl_name, best.each(kl_name).mean())} nats of KL" if kl_name else ""
  sentence = (
    f"{claim.format(best.name)}: {shown(gain, mine[0])}{kl} ({seeds}); {start} has "
    f"{shown(gain, before[gain])}."
  )
  notes = []
  if not apart(mine, (before[gain], before.get(f"{gain}_stderr") or 0.0)):
    notes.append(f"This may be chance: it is within two standard errors of {start}.")
  near = [x for x in settings if x is not best and not apart(standings[x.name], mine)]
  if near:
    names = " and ".join(filter(None, [", ".join(x.name for x in near[:-1]), near[-1].name]))
    verb = "is" if len(near) == 1 else "are"
    text = f"{names} {verb} as good, as far as two standard errors of the difference can tell."
    cheapest = kl_name and min([best, *near], key=lambda x: x.each(kl_name).mean())
    if cheapest and cheapest is not best:
      text += f" Of all these, {cheapest.name} stays closest to the reference."
    notes.append(text)
  elif len(settings) > 1:
    notes.append("All other settings are more than two standard errors below it.")
  if len(values) < 3:
    notes.append(
      f"{'One seed says' if len(values) == 1 else 'Two seeds say'} little of how much the result "
      "varies from run to run. Where the choice matters, raise --seeds; only the new seeds run."
    )
  if gold:
    notes += _over_optimised(settings, best, standings, kl_name)
  else:
    notes.append(
      "The score is what was optimised. A high one does not say that the completions are good, and "
      "a smaller β mostly has a higher one. Compare settings at equal KL, and read the samples."
    )
  return sentence, notes


def exact_answer(settings) -> tuple[str, list[str]]:
  """Returns how near the members came to the best policies, which are known."""
  if not settings:
    return answer(settings, "score", {}, None, "")
  gaps = {setting.name: setting.each("objective_gap").max() for setting in settings}
  far = {name: gap for name, gap in gaps.items() if not gap <= SMALL_GAP}
  worst = max(gaps, key=gaps.get)
  if far:
    listed = ", ".join(f"{name} ({gap:.1%} short)" for name, gap in far.items())
    if len(far) > 3:
      listed = f"{len(far)} of {len(gaps)} did not, the worst is {worst} ({gaps[worst]:.1%} short)"
    sentence = f"Not every member reached the best policy for its β: {listed}."
  else:
    sentence = (
      f"Every member reached the best policy for its β: at most {gaps[worst]:.2%} "
      f"of what can be gained is missing, at {worst}."
    )
  return sentence, [
    "All completions are enumerated: scores, KLs and the best policy ref · exp(score/β)/Z are "
    "exact. The gap is what a member lacks of E[score] \N{MINUS SIGN} β KL, as a share of what the "
    "best policy gains over the reference; of several seeds the largest counts. For a member with "
    "--advantage=best_of_n the log of best-of-n over ref stands for the score in both."
  ]


def _over_optimised(settings, best, gold, kl_name: str | None) -> list[str]:
  scores = {setting.name: standing(setting, "score") for setting in settings}
  mine = scores[best.name]

  def is_worse(setting):
    less_gold = gold[setting.name][0] < gold[best.name][0]
    no_less_score = scores[setting.name][0] >= mine[0] or not apart(scores[setting.name], mine)
    further = not kl_name or setting.each(kl_name).mean() > best.each(kl_name).mean()
    return further and no_less_score and less_gold and apart(gold[setting.name], gold[best.name])

  worse = [setting for setting in settings if is_worse(setting)]
  if not worse:
    return [
      "No over-optimisation is seen: no setting goes further from the reference for at least the "
      "same score and a clearly lower gold accuracy."
    ]
  names = ", ".join(
    f"{x.name} (score {digits(scores[x.name][0])}, gold {shown('gold', gold[x.name][0])})"
    for x in worse
  )
  return [
    f"Over-optimised: {names}, where {best.name} has a score of {digits(mine[0])} and a gold "
    f"accuracy of {shown('gold', gold[best.name][0])}. Further from the reference the score is no "
    "lower, as far as can be told, and fewer completions are right."
  ]
