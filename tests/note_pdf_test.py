"""The note as a PDF: what its text becomes, and how long it is."""

import re

import pytest

from benchmarks import note_pdf


def test_text_is_never_markup():
  source = note_pdf.typst_of('# A "title"\n\nIs `#a` \\\\ #panic("x") $ @b?\n')
  assert '#"A \\"title\\"";' in source
  assert '#"Is ";#raw("#a");#" \\\\ #panic(\\"x\\") $ @b?";' in source


def test_signs_and_formulas_are_set():
  note = "# T\n\nbeta or a_b, y_<t\n\n    E_pi[ l^2 ] * KL(pi || ref)      (7)\n"
  source = note_pdf.typst_of(note)
  assert '#"β or a_b, ";#emph[#"y";]#sub[#"<t";];' in source
  formula = '#emph[#"E";]#sub[#"π";];#"[ ";#emph[#"l";]#super[#"2";];#" ] · KL(π ‖ ref)";'
  assert f'#formula([{formula}], "(7)")' in source


def test_what_has_no_rule_is_an_error():
  with pytest.raises(ValueError, match="no rule for ordered_list_open"):
    note_pdf.typst_of("# T\n\n1. one\n")


def test_the_note_has_six_to_eight_pages():
  assert note_pdf.typst_of((note_pdf.DOCS / "note.md").read_text()).count("#wide[") == 4
  pytest.importorskip("typst")
  assert 6 <= len(note_pdf.compiled("svg")) <= 8
  pdf = note_pdf.compiled("pdf")
  assert re.match(rb"%PDF-1\.\d", pdf) and len(pdf) < 1e6
  assert pdf == note_pdf.compiled("pdf")


def test_without_typst_it_says_what_to_install(monkeypatch, tmp_path):
  monkeypatch.setitem(note_pdf.sys.modules, "typst", None)
  with pytest.raises(SystemExit, match=r"pip install -e '.\[note\]'"):
    note_pdf.main(tmp_path / "note.pdf")
