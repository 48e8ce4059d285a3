"""The samples on a page: completions of one prompt side by side, with what is known of each."""

import json
import math

import numpy as np

from klrl.figures import KL, digits, number, shown
from klrl.report.page import Html, element, note

MAX_SAMPLES = 10


def _tokens(sample: dict, most: float) -> Html:
  tokens, kl, log_probs = (sample.get(name) for name in ("tokens", "kl_ref", "log_prob"))
  if not isinstance(tokens, list) or not isinstance(kl, list) or len(tokens) != len(kl):
    return element("p", sample.get("completion", ""), class_="text")
  if not isinstance(log_probs, list) or len(log_probs) != len(tokens):
    log_probs = [None] * len(tokens)
  spans = []
  for token, nats, log_prob in zip(tokens, kl, log_probs, strict=True):
    x = number(nats)
    share = min(max(x / most, 0.0), 1.0) if x is not None and math.isfinite(x) and most else 0.0
    quoted = json.dumps(token, ensure_ascii=False)
    title = f"{quoted}: KL {shown(KL, nats)} nats, log-probability {digits(log_prob)}"
    text = str(token).replace("\n", "\u21b5\n") or "\u25af"
    spans.append(element("span", text, class_="t", style=f"--k:{0.75 * share:.2f}", title=title))
  return element("p", *spans, class_="text")


def _nats(sample: dict) -> list[float]:
  kl = sample.get("kl_ref")
  numbers = [number(x) for x in kl] if isinstance(kl, list) else []
  return [x for x in numbers if x is not None and math.isfinite(x)]


def facts_of(sample: dict) -> str:
  """Returns score, gold score and KL of one completion in words."""
  facts = [f"score {digits(sample['score'])}"] if number(sample.get("score")) is not None else []
  gold = number(sample.get("gold"))
  facts += [] if gold is None else ["right" if gold else "wrong"]
  if kl := _nats(sample):
    facts.append(f"KL {shown(KL, sum(kl))} nats in {len(kl)} tokens")
  return ", ".join(facts)


def column(title: str, sample: dict, text: Html) -> Html:
  """Returns the text of one completion below its title and the figures of `sample`."""
  facts = element("span", facts_of(sample), class_="note")
  return element("div", element("b", title), " ", facts, text)


def side_by_side(prompt: object, *columns: Html, **attributes) -> Html:
  """Returns the completions of one prompt."""
  prompt = element("p", prompt or "(the empty prompt)", class_="prompt text")
  return element("div", prompt, *columns, class_="pair", **attributes)


def samples_part(
  records: list[dict], whens=("before", "after"), of: str = "before and after training"
) -> list[Html]:
  """Returns the first completions of each prompt side by side, one for each of `whens`.

  `of` says whose they are.
  """
  pairs: dict[str, dict[str, dict]] = {}
  for position, record in enumerate(records):
    index = str(record.get("index", f"line {position}"))
    pairs.setdefault(index, {})[str(record.get("when"))] = record
  if not pairs:
    return [note("No samples were kept.")]
  kept = list(pairs.values())[:MAX_SAMPLES]
  nats = [x for pair in kept for sample in pair.values() for x in _nats(sample) if x > 1e-12]
  most = 0.0
  if nats:
    # One outlier would leave everything else pale.
    high = float(np.quantile(nats, 0.98))
    step = 10.0 ** math.floor(math.log10(high)) / 2
    most = max(math.ceil(high / step) * step, 0.01)  # Less is no change to point at.
  count = f"{len(kept)} of {len(pairs)} prompts" if len(kept) < len(pairs) else "The same prompts"
  parts = [
    note(
      f"{count}, {of}. A token's background is the exact KL to the reference at its position; "
      "point at it for the figures."
    )
  ]
  if most:
    scale = "0", element("i"), f"{digits(most)} nats and more"
    parts.append(element("div", *scale, class_="scale note"))
  for pair in kept:
    columns = []
    for when in whens:
      sample = pair.get(when, {})
      heading = (
        element("b", f"{when[:1].upper()}{when[1:]}" if when in ("before", "after") else when),
        " ",
        element("span", facts_of(sample), class_="note"),
      )
      columns.append(
        element("div", *heading, _tokens(sample, most) if sample else note("No sample."))
      )
    parts.append(side_by_side(next(iter(pair.values())).get("prompt"), *columns))
  return parts
