"""Markup and style of the pages that klrl writes.

Text becomes markup in `element` alone, which escapes it; only what is `Html` already passes as it
is. A page needs no script and forbids all of them, fetches nothing, and follows the reader's choice
of light or dark and the width of the screen.
"""

import html

STYLE = """
:root { color-scheme: light dark; --paper: #fdfdfc; --ink: #1d2126; --quiet: #5c646e;
  --rule: #e2e3e1; --shade: #f4f4f1; --first: #2563a8; --second: #b4540a; --third: #2f7d4f;
  --fourth: #8b4a9c; --heat: 226 110 20; --warn: #8a4b00; --warn-shade: #fdf3e1; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181b; --ink: #dfe1e4; --quiet: #989fa8;
  --rule: #2f3338; --shade: #1e2125; --first: #74aeea; --second: #f0a15c; --third: #6fc491;
  --fourth: #cf9be0; --heat: 205 95 15; --warn: #f2c27e; --warn-shade: #2c2417; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 68rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", sans-serif;
  font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%; }
h1 { margin: 0; font-size: 1.15rem; font-weight: 600; color: var(--quiet); }
h2 { margin: 3rem 0 .75rem; font-size: 1.15rem; font-weight: 600; }
h3 { margin: 1.75rem 0 .5rem; font-size: .95rem; font-weight: 600; }
p { margin: .5rem 0; max-width: 46rem; }
.verdict { margin: .35rem 0 .5rem; font-size: 1.45rem; line-height: 1.35; text-wrap: pretty; }
.note, .unit, figcaption span, th span { color: var(--quiet); font-size: .85rem; }
.warnings { margin: 1.5rem 0; padding: .75rem 1.1rem; border-left: 3px solid var(--warn);
  background: var(--warn-shade); color: var(--warn); }
.warnings ul, .missing ul { margin: .25rem 0; padding-left: 1.1rem; }
.missing { margin: 1.25rem 0; color: var(--quiet); font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; min-width: min(100%, 40rem); margin-top: .75rem; }
th, td { padding: .3rem 0 .3rem 1.4rem; border-bottom: 1px solid var(--rule);
  text-align: right; vertical-align: baseline; font-weight: 400; }
td { white-space: nowrap; }
.words { text-align: left; white-space: normal; overflow-wrap: break-word; }
td:first-child, th:first-child { padding-left: 0; }
th span { margin-left: .35rem; }
thead th span { display: block; margin: 0; }
caption { text-align: left; color: var(--quiet); font-size: .85rem; padding-bottom: .35rem; }
thead th { color: var(--quiet); font-size: .85rem; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr));
  gap: 1.75rem 2rem; margin-top: 1.25rem; }
figure { margin: 0; min-width: 0; }
main > figure { max-width: 38rem; margin: 1.25rem 0; }
figcaption { font-size: .9rem; line-height: 1.35; overflow-wrap: anywhere; }
figcaption b { font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: 0 1rem; min-height: 1.25rem; color: var(--quiet);
  font-size: .85rem; }
.legend b { font-weight: 400; color: var(--ink); }
.legend i { display: inline-block; width: 1.1rem; margin-right: .35rem; vertical-align: .25em;
  border-top: 2px solid var(--first); }
.legend i.second { border-top: 2px dashed var(--second); }
.legend i.third { border-top-color: var(--third); }
.legend i.fourth { border-top-color: var(--fourth); }
.legend i.dots { width: .4rem; height: .4rem; border: 0; border-radius: 50%; vertical-align: .08em;
  background: currentColor; }
svg { display: block; width: 100%; height: auto; overflow: visible; margin-top: .25rem; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { paint-order: stroke; stroke: var(--paper); stroke-width: 2.5; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .25rem 2rem; margin: 1.25rem 0 0;
  padding-top: 1rem; border-top: 1px solid var(--rule); }
.pair > * { min-width: 0; }
.prompt { grid-column: 1 / -1; margin: 0; color: var(--quiet); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: .15rem 0; max-width: none; }
.t { background: rgb(var(--heat) / var(--k)); border-radius: 2px; }
.scale { display: flex; align-items: center; gap: .6rem; flex-wrap: wrap; }
.scale i { width: 9rem; height: .8rem; border-radius: 2px; border: 1px solid var(--rule);
  background: linear-gradient(90deg, rgb(var(--heat) / 0), rgb(var(--heat) / .75)); }
pre { padding: .75rem 1rem; background: var(--shade); white-space: pre-wrap;
  overflow-wrap: anywhere; }
pre, code { font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.settings { columns: 20rem 3; column-gap: 2rem; margin: .5rem 0; font-size: .9rem; }
.settings div { break-inside: avoid; display: flex; justify-content: space-between; gap: 1rem;
  padding: .18rem 0; border-bottom: 1px solid var(--rule); }
.settings dt { color: var(--quiet); flex: none; max-width: 60%; overflow-wrap: anywhere; }
.settings dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--quiet); margin: 1.25rem 0 .25rem; }
@media (max-width: 40rem) { body { padding: 1.5rem 1rem 3rem; } .verdict { font-size: 1.2rem; }
  .pair { grid-template-columns: 1fr; } th, td { padding-left: .75rem; }
  th[scope=row] { overflow-wrap: normal; }
  table { font-size: .92rem; } th span { display: block; margin: 0; line-height: 1.2; } }
@media print { body { max-width: none; padding: 0; } figure, .pair { break-inside: avoid; } }
"""


class Html(str):
  """Text that is markup already."""


def _escaped(child: object) -> str:
  return child if isinstance(child, Html) else html.escape(str(child), quote=False)


def element(name: str, *children: object, **attributes: object) -> Html:
  """Returns the element; children and attributes are escaped unless a child is `Html`.

  A trailing underscore is dropped from an attribute's name, others become hyphens.
  """
  inside = "".join(map(_escaped, children))
  written = "".join(
    f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
    for key, value in attributes.items()
  )
  return Html(f"<{name}{written}>{inside}</{name}>")


def duration(seconds: float) -> str:
  """Returns a time as text, in its two largest units."""
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours} h {minutes} min"
  return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def paragraph(text: str) -> Html:
  """Returns a paragraph."""
  return element("p", text)


def note(text: str) -> Html:
  """Returns a paragraph in small quiet type."""
  return element("p", text, class_="note")


def table(columns, rows, *, caption: str = "", words: int = 1) -> Html:
  """Returns a table of which the first `words` columns are words and the others figures.

  The name of a column or of a row may have a unit behind a line break.
  """

  def cell(name: str, column: int, content: object, **attributes: object) -> Html:
    left = {"class_": "words"} if column < words else {}
    return element(name, content, **left, **attributes)

  def heading(column: int, text: object, scope: str) -> Html:
    name, _, unit = str(text).partition("\n")
    content = Html(f"{_escaped(name)}{element('span', unit)}") if unit else text
    return cell("th", column, content, scope=scope)

  head = [heading(i, text, "col") for i, text in enumerate(columns)]
  body = [
    element("tr", heading(0, first, "row"), *(cell("td", i, x) for i, x in enumerate(rest, 1)))
    for first, *rest in rows
  ]
  about = [element("caption", caption)] if caption else []
  parts = *about, element("thead", element("tr", *head)), element("tbody", *body)
  return element("div", element("table", *parts), class_="wide")


def figure(title: str, about: str, svg: str, legend=(), *, below: str = "") -> Html:
  """Returns a picture of `plots` and its caption; `legend` is markup, or names `SERIES` in turn."""
  if not isinstance(legend, Html):
    places = zip(("first", "second", "third", "fourth"), legend, strict=False)
    names = [element("span", element("i", class_=place), name) for place, name in places]
    legend = element("div", *names, class_="legend") if names else ""
  caption = element("figcaption", element("b", title), " ", element("span", about), legend)
  return element("figure", caption, Html(svg), *([note(below)] if below else []))


def fold(title: str, *content: Html) -> Html:
  """Returns what a reader sees only who opens it."""
  return element("details", element("summary", title), *content)


def grid(*figures: Html, least: int = 19) -> Html:
  """Returns pictures side by side, each at least so many letters wide."""
  style = f"grid-template-columns: repeat(auto-fill, minmax(min(100%, {least}rem), 1fr))"
  return element("div", *figures, class_="curves", style=style)


def page(title: str, *body: Html) -> str:
  """Returns the whole document."""
  # The policy lets nothing run and nothing load, should an escape ever fail.
  head = Html(
    '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
  )
  head = element("head", head, element("title", title), element("style", Html(STYLE)))
  whole = element("html", head, element("body", element("main", *body)), lang="en")
  return f"<!doctype html>\n{whole}\n"
