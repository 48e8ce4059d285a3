"""docs/note.md as a PDF.

    pip install -e '.[note]'
    python -m benchmarks.note_pdf [FILE.pdf]

It writes build/note.pdf, or FILE. The note is read by markdown-it, which rich needs, and set by
Typst, a wheel without dependencies of its own. Everything that the note says is text, so no markup
of Typst can come from it. Formulas stay as they are written; their numbers move to the margin.
"""

import argparse
import json
import pathlib
import re
import sys

from markdown_it import MarkdownIt

import klrl

DOCS = pathlib.Path(__file__).parents[1] / "docs"
_NUMBERED = re.compile(r"(.*?)\s{2,}\((\d+)\)")
_SIGNS = {"pi": "π", "beta": "β", "lambda": "λ", "||": "‖", " * ": " · ", "<=": "≤"}
_SIGN = re.compile(r"\b(?:pi|beta|lambda)\b|\|\|| \* |<=|   +")
# E_pi, KL_t, y_<t, w_(t-1) and l^2.
_INDEX = re.compile(r"\b(E|KL|D|y|l|w|p|q|old|ref)(?:_(\([^)]*\)|<?\w+)|\^(\([^)]*\)|\w+))")
_STYLE = """
#set document(title: %(title)s, date: none)
#set page(
  paper: "a4", margin: (x: 2.3cm, y: 2.2cm), numbering: "1",
  header: context { if counter(page).get().first() > 1 { text(8pt, fill: luma(90), %(title)s) } },
)
#set text(font: "Libertinus Serif", size: 10.9pt, lang: "en")
#set par(justify: true, leading: 0.62em, spacing: 0.95em)
#set sub(typographic: false, size: 0.72em)
#set super(typographic: false, size: 0.72em)
#set list(indent: 0.6em, spacing: 0.75em)
#set table(stroke: none, inset: (x: 4pt, y: 2.6pt))
#show raw: set text(font: "DejaVu Sans Mono", size: 8pt)
#show heading: set block(above: 1.5em, below: 0.75em)
#show heading.where(level: 1): set text(20pt)
#show heading.where(level: 2): set text(12.5pt)
#show heading.where(level: 3): set text(10.8pt)
#show figure.caption: set text(8.6pt)
#let wide(body) = block(width: 100%%, above: 1em, below: 1em, {
  set text(8.1pt)
  set par(justify: false, leading: 0.5em)
  show raw: set text(size: 7pt)
  body
})
#let formula(body, number) = block(inset: (left: 1.2em), above: 0.8em, below: 0.8em, grid(
  columns: (1fr, auto), align: (left + horizon, right + horizon), body, number,
))
"""


def typst_of(markdown: str) -> str:
  """Returns the source of a document in Typst that shows a page in Markdown.

  Raises:
    ValueError: the page holds something for which there is no rule here.
  """
  tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
  title = tokens[1].content
  version = f"#text(9.5pt, fill: luma(70), {_text(f'A note of klrl {klrl.__version__}')})"
  heading, *rest = _blocks(tokens)
  return "\n".join([_STYLE % {"title": _text(title)}, heading, version, *rest, ""])


def _text(text: str) -> str:
  """Returns a string of Typst."""
  return json.dumps(text, ensure_ascii=False)


def _inline(tokens) -> str:
  """Returns content for the tokens of a line."""
  parts = []
  for token in tokens:
    match token.type:
      case "text":
        parts.append(_symbols(token.content))
      case "softbreak":
        parts.append('#" ";')
      case "code_inline":
        parts.append(f"#raw({_text(token.content)});")
      case "strong_open":
        parts.append("#strong[")
      case "em_open":
        parts.append("#emph[")
      case "link_open":  # Of other pages only the name is of use on paper.
        url = token.attrs["href"]
        parts.append(f"#link({_text(url)})[" if url.startswith("http") else "#box[")
      case "strong_close" | "em_close" | "link_close":
        parts.append("];")
      case "image":
        parts.append(_picture(token))
      case _:
        raise ValueError(f"There is no rule for {token.type}.")
  return "".join(parts)


def _symbols(text: str) -> str:
  """Returns content for text with the signs of the note: Greek letters, indices and powers."""
  parts, place = [], 0

  def plain(text):
    signs = _SIGN.sub(lambda found: _SIGNS.get(found[0], "\N{EM SPACE}\N{EM SPACE}"), text)
    return f"#{_text(signs)};" if signs else ""

  for found in _INDEX.finditer(text):
    base, below, above = found.groups()
    kind, index = ("sub", below) if below else ("super", above)
    inner = index[1:-1] if index.startswith("(") else index
    parts += [
      plain(text[place : found.start()]),
      f"#emph[{plain(base)}]" if len(base) == 1 else plain(base),
    ]
    parts.append(f"#{kind}[{plain(inner)}];")
    place = found.end()
  return "".join((*parts, plain(text[place:])))


def _picture(token) -> str:
  caption = f"[#{_text(token.content)};]"
  return (
    f"#figure(image({_text(token.attrs['src'])}, width: 88%), caption: {caption}, numbering: none);"
  )


def _blocks(tokens) -> list[str]:
  """Returns the content of each block; a table, a list and its items are one."""
  found, rows = [], []
  for token in tokens:
    match token.type:
      case "heading_open":
        found.append("=" * int(token.tag[1:]) + " ")
      case "inline":
        found[-1] += _inline(token.children)
      case "paragraph_open":
        if not (found and found[-1].endswith("- ")):
          found.append("\n")
      case "bullet_list_open" | "list_item_close" | "bullet_list_close" | "paragraph_close":
        pass
      case "heading_close" | "thead_open" | "thead_close" | "tbody_open" | "tbody_close":
        pass
      case "list_item_open":
        found.append("- ")
      case "code_block" | "fence":
        found += [_formula(line) for line in token.content.rstrip("\n").split("\n")]
      case "table_open":
        rows = []
      case "tr_open":
        rows.append([])
      case "th_open" | "td_open":
        found.append("")
      case "th_close" | "td_close":
        rows[-1].append(found.pop())
      case "tr_close":
        pass
      case "table_close":
        found.append(_table(rows))
      case _:
        raise ValueError(f"There is no rule for {token.type}.")
  return found


def _formula(line: str) -> str:
  numbered = _NUMBERED.fullmatch(line)
  body, number = numbered.groups() if numbered else (line, "")
  return f"#formula([{_symbols(body)}], {_text(f'({number})' if number else '')})"


def _plain(content: str) -> str:
  """Returns about the letters that a reader sees of content."""
  return re.sub(r'#\w*\(?"|"\)?;', "", content)


def _table(rows: list[list[str]]) -> str:
  """Returns a table whose columns are as wide as what they hold, up to a bound."""
  widths = []
  for name, *cells in zip(*rows, strict=True):
    texts = [max(_plain(name).split(), key=len), *map(_plain, cells)]
    widths.append(min(40, max(5, *map(len, texts))))
  head, *body = [", ".join(f"[{cell}]" for cell in row) for row in rows]
  columns = ", ".join(f"{width}fr" for width in widths)
  return (
    f"#wide[#table(columns: ({columns}), table.hline(stroke: 0.7pt), table.header({head}), "
    f"table.hline(stroke: 0.4pt), {', '.join(body)}, table.hline(stroke: 0.7pt))]"
  )


def compiled(kind: str) -> bytes | list[bytes]:
  """Returns the note as a "pdf", or as an "svg" for each page. Typst must be installed."""
  import typst

  source = typst_of((DOCS / "note.md").read_text())
  # The root is where pictures are, which the note names as they lie beside it.
  return typst.compile(source.encode(), root=str(DOCS), format=kind)


def main(path: pathlib.Path) -> None:
  """Writes the PDF."""
  try:
    pdf = compiled("pdf")
  except ModuleNotFoundError as error:
    sys.exit(f"{error}: pip install -e '.[note]'")
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(pdf)
  print(f"{path}: {len(pdf) / 1000:.0f} kB")


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description="Sets docs/note.md as a PDF.")
  parser.add_argument("file", nargs="?", default="build/note.pdf", type=pathlib.Path)
  main(parser.parse_args().file)
