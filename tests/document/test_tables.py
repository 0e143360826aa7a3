"""Tables and pairs as lines, and tables as Markdown. Oracles: lines written by hand, and positions of columns."""

from __future__ import annotations

import re

from bpfree.document.content import Aside, Noted, Picture, Section, Table, Text
from bpfree.document.markdown import markdown
from bpfree.document.page import html_page
from bpfree.document.tables import markdown_table, text_pairs, text_table


def test_columns_stand_below_each_other() -> None:
    assert text_table(["row", "n"], [["a", 1], ["longer", 234]], right=[1]) == [
        "row       n",
        "------  ---",
        "a         1",
        "longer  234",
    ]
    assert text_table(["row", "words"], [["a", ""]]) == ["row  words", "---  -----", "a"]
    assert text_table(["row", "n"], []) == ["row  n", "---  -"]


def test_pairs_may_be_empty_or_have_several_lines() -> None:
    assert text_pairs([("name", "dfa"), ("gone", ""), ("equation", "a\nb"), ("", "said")]) == [
        "name      dfa",
        "equation  a",
        "          b",
        "          said",
    ]
    assert text_pairs([]) == []


def test_markdown_keeps_cells_on_their_line() -> None:
    assert markdown_table(["a", "b"], [["x|y", 1], ["two\nlines", 2.5]], right=[1]).splitlines() == [
        "| a | b |",
        "| --- | ---: |",
        "| x\\|y | 1 |",
        "| two lines | 2.5 |",
    ]


def test_a_table_of_facts_has_no_head_and_small_print() -> None:
    facts = Table([], [["credit", Noted("local", ["<measured>", "twice"], "good")]], [1])
    page = html_page("t", [Section("", [facts])])
    assert "<thead>" not in page
    assert '<span class="good">local</span><p class="note">&lt;measured&gt;</p><p class="note">twice</p>' in page
    assert "| credit | local<br>\\<measured><br>twice |" in markdown("t", [Section("", [facts])])


def test_markdown_leaves_drawn_columns_out() -> None:
    drawn = Table(["row", Picture("<svg/>"), "n"], [["a", Picture("<svg/>"), "7"]])
    assert markdown("t", [Section("S", [drawn])]).splitlines()[4:] == ["| row | n |", "| --- | ---: |", "| a | 7 |"]


def test_what_stands_beside_the_text_is_a_table_in_markdown_too() -> None:
    parts = [Aside([Table([], [["seeds", "3"]], [1])]), Text("To quote.", "quote")]
    page = html_page("t", [Section("", parts)])
    assert re.search(r"<header><aside>.*>seeds</td>.*</aside>\s*<p class=\"quote\">To quote.</p>", page, re.DOTALL)
    assert markdown("t", [Section("", parts)]).splitlines()[2:] == ["|  |  |", "| --- | --- |", "| seeds | 3 |", "", "> To quote."]
