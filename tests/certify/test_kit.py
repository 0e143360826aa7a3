"""The examination as a whole: statuses, waivers, certificates, test cases, pages. Oracles: rules made so that one thing is known."""

from __future__ import annotations

import dataclasses
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from made_certificates import completed

import bpfree.certify
from bpfree import BpfreeError, Card, Traits, UsageError, always
from bpfree.baselines import DFA, Frozen
from bpfree.certify import (
    CHECKS,
    Certificate,
    Check,
    CheckFailed,
    Measurements,
    NotApplicable,
    Subject,
    Unmeasured,
    cases,
    certify,
    examine,
)
from bpfree.certify.heat import heat_map, text_map
from bpfree.certify.page import write_page
from bpfree.certify.show import render
from bpfree.certify.table import table, write_docs

WHOLE_RUNS = ("whole-run-reading", "whole-run-consistency", "hidden-blocks-needed")
UNWAIVABLE = {
    *WHOLE_RUNS[:2],
    *("trait-dependence", "trait-downstream-weights", "trait-reverse-span", "trait-supervision", "trait-update", "trait-passes"),
    *("labels-unseen", "prediction-per-example", "permuted-labels"),
    *("same-seed", "resume", "two-instances", "global-generators", "caller-state", "state-restored"),
}


@pytest.fixture(scope="module")
def dfa() -> Certificate:
    return certify("dfa", quick=True)


def check(run: Any, *, waivable: bool = True) -> Check:
    return Check("made-up", "holds", run, waivable=waivable)


def failing(m: Measurements) -> None:
    raise CheckFailed("it is wrong", where="here", fix="mend it")


def test_label_isolation_reproducibility_traits_and_restored_state_cannot_be_waived() -> None:
    assert {check.id for check in CHECKS if not check.waivable} == UNWAIVABLE
    assert {check.id for check in CHECKS if not check.quick} == {"learning", "permuted-labels", *WHOLE_RUNS}
    assert len({check.id for check in CHECKS}) == len(CHECKS)


def test_instances_share_no_configuration_though_a_recipe_is_resolved_once() -> None:
    """Oracle: a subject that has resolved nothing yet."""

    @dataclasses.dataclass
    class Options:
        rates: list[float] = dataclasses.field(default_factory=lambda: [0.1])

    class Writes(DFA):
        Config = Options

    subject = Subject(Writes)
    first = subject.resolve({"rule.rates": [0.2]})
    first.options["rule"].rates.append(0.3)
    again = subject.resolve({"rule.rates": [0.2]})
    assert again.options["rule"].rates == Subject(Writes).resolve({"rule.rates": [0.2]}).options["rule"].rates == [0.2]
    assert subject.resolve({}).options["rule"].rates == [0.1]


def test_a_rule_that_takes_no_specimen_cannot_be_certified() -> None:
    """Oracle: the reason that the rule itself gives."""

    class TakesNone(DFA):
        def __init__(self, *arguments: Any) -> None:
            raise UsageError("only on Sundays")

    subject = Subject(TakesNone)
    assert subject.kinds() == []
    with pytest.raises(BpfreeError, match=r"no small instance of 'TakesNone' can be built.*only on Sundays"):
        subject.kind()


def test_what_a_check_raises_becomes_a_finding() -> None:
    m = Measurements(Subject(DFA))

    def unmeasured(m: Measurements) -> None:
        raise Unmeasured("too small")

    def foreign(m: Measurements) -> None:
        raise NotApplicable("nothing to see")

    def broken(m: Measurements) -> None:
        raise ZeroDivisionError("in the rule")

    assert examine(m, check(lambda m: "well")).status == "passed"
    assert examine(m, check(lambda m: "well")).what == "well"
    failed = examine(m, check(failing))
    assert (failed.status, failed.what, failed.where, failed.fix) == ("failed", "it is wrong", "here", "mend it")
    assert examine(m, check(unmeasured)).status == "unmeasured"
    assert examine(m, check(foreign)).status == "not applicable"
    crashed = examine(m, check(broken))
    assert (crashed.status, crashed.what) == ("failed", "ZeroDivisionError: in the rule")
    assert "test_kit.py" in crashed.where


def test_a_waived_check_is_never_shown_as_passed() -> None:
    m = Measurements(Subject(DFA))
    waived = examine(m, check(failing), {"made-up": "known"})
    assert (waived.status, waived.waiver, waived.what) == ("waived", "known", "it is wrong")
    stubborn = examine(m, check(failing, waivable=False), {"made-up": "known"})
    assert stubborn.status == "failed"
    assert "cannot be waived" in stubborn.what
    needless = examine(m, check(lambda m: None), {"made-up": "known"})
    assert needless.status == "passed"
    assert "not needed" in needless.what


class Waiving(DFA):
    card = Card("waives", equation="none")
    waivers = {"config-roundtrip": "its card says nothing on purpose"}


class Mute(Waiving):
    card = Card("")


def test_a_rules_own_waivers_count_and_make_the_certificate_say_so() -> None:
    certificate = certify(Mute, only=["config-roundtrip"])
    assert certificate.counts == {"waived": 1}
    assert certificate.passed
    full = completed(certificate)
    assert full.status == "certified with waivers"
    assert certify(Waiving, only=["config-roundtrip"]).counts == {"passed": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": ["same-sed"]}, "unknown check 'same-sed'"),
        ({"waive": {"learnin": "no"}}, "unknown check 'learnin'"),
        ({"waive": {"learning": " "}}, "gives no reason"),
        ({"settings": ["task=mnist"]}, "only its own settings"),
        ({"settings": ["rule.scal=2"]}, "did you mean rule.scale"),
    ],
)
def test_wrong_requests_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        certify("dfa", **options)
    with pytest.raises(UsageError, match="unknown rule"):
        certify("dfaa")


def test_a_certificate_says_what_was_measured_and_survives_its_file(dfa: Certificate) -> None:
    assert dfa.passed
    assert dfa.status == "passed (quick)"
    assert dfa.properties["credit"] == "local"
    assert dfa.properties["dependence"]["name"] == "all"
    assert dfa.properties["reverse"]["span"] == 1
    assert dfa.config == {"scale": 1.0, "error": "full", "placement": "blocks"}
    assert dfa.sources.keys() == {"bpfree contract", "bpfree examiner", "bpfree"}
    assert Certificate.from_dict(json.loads(dfa.to_json())) == dfa
    with pytest.raises(BpfreeError, match="format 99"):
        Certificate.from_dict({**dfa.to_dict(), "format": 99})
    with pytest.raises(BpfreeError, match="no certificate"):
        Certificate.from_dict({"format": 2, "findings": []})
    with pytest.raises(BpfreeError, match="format 1"):
        Certificate.from_dict({"format": 1, "findings": []})


def test_only_a_full_certificate_is_called_certified(dfa: Certificate) -> None:
    assert dataclasses.replace(dfa, kind="full").status == "incomplete"
    assert completed(dfa).status == "certified"
    assert dataclasses.replace(dfa, kind="partial").status == "passed (partial)"
    broken = [dataclasses.replace(dfa.findings[0], status="failed"), *dfa.findings[1:]]
    assert completed(dataclasses.replace(dfa, findings=broken)).status == "failed"


def test_the_examination_leaves_the_callers_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    certify("dfa", only=["same-seed", "trait-dependence"])
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


# --- as test cases ----------------------------------------------------------------------------------------------------


@bpfree.certify.parametrize_with_checks("dfa")
def test_the_checks_are_test_cases(check: Any) -> None:
    check()


class Boasts(DFA):
    traits_of = always(Traits(dependence="all", downstream_weights=0, reverse_span=1, passes=3))


def test_cases_fail_skip_and_are_expected_to_fail() -> None:
    by_id = {case.check.id: case for case in cases(Mute, full=True)}
    assert set(by_id) == {check.id for check in CHECKS}
    with pytest.raises(pytest.xfail.Exception, match="on purpose"):
        by_id["config-roundtrip"]()
    with pytest.raises(AssertionError, match=r"declares passes=3, but 1 passes"):
        {case.check.id: case for case in cases(Boasts)}["trait-passes"]()
    with pytest.raises(pytest.skip.Exception, match="not applicable"):
        {case.check.id: case for case in cases(Frozen, full=True)}["learning"]()


# --- shown ------------------------------------------------------------------------------------------------------------


def test_a_heat_map_has_a_cell_for_each_pair() -> None:
    """Oracle: an XML parser. Stronger is more; an unmeasured pair is marked, an untouched one is empty."""
    panel = heat_map("dense <network>", "weights", ["b1", "readout"], [[0.5, 0.0], [None, 1e-6]], silent=["b1"])
    tree = ET.fromstring(f"<svg>{panel.body}</svg>")
    cells = tree.findall("g")
    assert [cell.findtext("text") or "" for cell in cells] == ["0.50", "", "?", "1e-6"]
    assert [cell.find("rect").get("class") for cell in cells] == ["cell", "none", "unknown", "cell"]
    strengths = [float(cell.find("rect").get("fill-opacity", 0)) for cell in cells]
    assert strengths[0] > strengths[3] > strengths[1] == strengths[2] == 0
    assert cells[3].findtext("title") == "update of readout when readout changes: 1e-6"
    assert [node.text for node in tree.findall("text") if node.get("class") == "note"][:1] == ["no update"]
    places = [(float(cell.find("rect").get("x")), float(cell.find("rect").get("y"))) for cell in cells]
    assert places[0][1] == places[1][1] < places[2][1]
    assert places[0][0] == places[2][0] < places[1][0] < panel.width
    upper = heat_map("t", "w", ["b1", "readout"], [[0.5, 0.25], [None, 0.5]], above=True)
    assert [cell.findtext("text") for cell in ET.fromstring(f"<svg>{upper.body}</svg>").findall("g")] == ["0.25"]
    assert text_map({"blocks": ["b1", "readout"], "rows": [[1, 0.25], [1, 1]]})[2].split() == ["b1", "0.25"]


def test_the_page_is_self_contained_and_escapes_what_it_shows(dfa: Certificate, tmp_path: Path) -> None:
    hurt = dataclasses.replace(dfa.findings[0], status="failed", what="<b> & co", where="there", fix="so")
    certificate = dataclasses.replace(dfa, findings=[hurt, *dfa.findings[1:]])
    text = write_page(tmp_path / "page.html", certificate).read_text()
    assert "&lt;b&gt; &amp; co" in text
    assert "http" not in text
    assert text.count('<svg class="panel"') == 4
    assert '<span class="bad">failed</span>' in text
    assert '<p class="note">where: there</p><p class="note">fix: so</p>' in text
    assert "bpfree certify dfa" in text


def test_a_terminal_gets_the_failure_with_its_remedy(dfa: Certificate) -> None:
    hurt = dataclasses.replace(dfa.findings[0], status="failed", what="it is wrong", where="there", fix="so")
    lines = list(render(dataclasses.replace(dfa, findings=[hurt, *dfa.findings[1:]])))
    assert lines[-1].startswith("dfa: failed (1 failed, ")
    assert "  fix:   so" in lines
    assert any(line.startswith("credit") and line.endswith("local") for line in lines)


def test_the_table_of_the_docs_is_written_between_its_markers(dfa: Certificate, tmp_path: Path) -> None:
    page = tmp_path / "certificates.md"
    page.write_text("before\n<!-- generated by make certify: begin -->\nold\n<!-- generated by make certify: end -->\nafter\n")
    changed = write_docs(page, {"dfa": dfa})
    text = page.read_text()
    assert {path.name for path in changed} == {"certificates.md", "dfa.svg"}
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert table([dfa]) in text
    assert "| `dfa` | local | all | 1 of 5 |" in text
    assert write_docs(page, {"dfa": dfa}) == []
    drawn = ET.parse(tmp_path / "images" / "certificates" / "dfa.svg").getroot()
    assert len([node for node in drawn.iter() if node.get("class") == "panel"]) == 4


@pytest.mark.parametrize(
    "words", [["rule=backprop"], ["rule.name=backprop"], ["rule="], ["rule.scale="], ["network=null"], ["rule.scale=a"]]
)
def test_settings_that_name_another_rule_or_nothing_are_refused(words: list[str]) -> None:
    with pytest.raises(UsageError):
        Subject("dfa", words)
