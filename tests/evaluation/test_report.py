"""The report holds the numbers of results.json and needs no other file."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from rich.console import Console

from fundusfm.evaluation.report import gain_rows, number, percent, render
from fundusfm.evaluation.summary import summary_table
from tests.evaluation.conftest import Evaluated, run_evaluation
from tests.evaluation.fakes import make_source


class Page(HTMLParser):
    """Text, addresses of assets, and whether every tag is closed."""

    void = ("meta", "img", "br")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.assets, self._open = "", [], []  # type: ignore[var-annotated]
        self.feed(html)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.assets += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in self.void:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def html(evaluated: Evaluated) -> str:
    return render(evaluated.results, evaluated.exhibits)


def test_render__numbers_of_results_json_appear(evaluated: Evaluated, html: str) -> None:
    text = Page(html).text
    record = json.loads(evaluated.results.to_json())
    probes = [m for m in record["methods"] if m["method"] in ("linear probe", "zero-shot")]
    shown = [m["scores"]["macro_auroc"] for m in record["methods"] if m["tower"] != "source alone"]
    pretrained = [m for m in probes if m["tower"] == "pretrained"]
    shown += [label["auroc"] for m in pretrained for label in m["scores"]["labels"]]
    shown += [label["average_precision"] for m in pretrained for label in m["scores"]["labels"]]
    shown += [source["macro_auroc"] for m in pretrained for source in m["sources"]]
    shown += [scale["kappa"] for scale in record["scales"]]
    told = ("accuracy", "sensitivity", "specificity", "precision", "f1", "mcc")
    shown += [scale["rates"][name] for scale in record["scales"] for name in told]
    values = [value for e in shown for value in e.values() if value is not None]
    assert len(values) > 60
    assert not [value for value in values if number(value) not in text]
    for found in record["retrieval"]:
        assert all(percent(e["value"]) in text for e in found["retrieval"]["recall"].values())
    assert all(note in text for note in record["notes"])


def test_gain_rows__each_tower_in_its_column(evaluated: Evaluated) -> None:
    results = evaluated.results
    rows = {row.name: row for row in gain_rows(results)}
    assert list(rows) == ["zero-shot", "linear probe", "k-NN"]
    probe = rows["linear probe"]
    shown = {
        "pretrained": probe.pretrained,
        "untrained": probe.untrained,
        "colour histogram": probe.histogram,
    }
    for tower, estimate in shown.items():
        assert estimate == results.find(tower, "linear probe").scores.macro_auroc  # type: ignore[union-attr]
    assert probe.gain.value == pytest.approx(probe.pretrained.value - probe.untrained.value)
    assert not rows["zero-shot"].histogram.defined


def test_render__stands_alone(html: str) -> None:
    page = Page(html)
    assert len(page.assets) > 10
    assert all(asset.startswith("data:image/") for asset in page.assets)
    assert not re.search(r"https?://|@import|url\(|<script|<link", html)


def test_render__escapes_what_comes_from_data() -> None:
    source = make_source()
    for exam in source.exams["test"]:
        exam.report = "<script>alert(1)</script>"
        exam.source = "a<b>" if exam.source == "a" else "b"
    evaluated = run_evaluation(source)
    html = render(evaluated.results, evaluated.exhibits)
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "a&lt;b&gt;" in html


def test_render__a_bare_set() -> None:
    """One source, no prompts, no scale, no reports, no curves: sections that say nothing are left out."""
    source = make_source(("train", "val"), prompts={}, ordered={})
    for exam in [e for exams in source.exams.values() for e in exams]:
        exam.source, exam.report = "", None
    evaluated = run_evaluation(source)
    exhibits = evaluated.exhibits
    html = render(evaluated.results, type(exhibits)(**{**exhibits.__dict__, "metrics": []}))
    headings = re.findall(r"<h2>(.*?)</h2>", html)
    assert headings == [
        "What pretraining brought",
        "Label by label",
        "A look at the images",
        "What was measured",
    ]


def test_to_json__undefined_is_null(evaluated: Evaluated) -> None:
    record = json.loads(evaluated.results.to_json())
    fluid = next(x for x in record["methods"][0]["scores"]["labels"] if x["label"] == "fluid")
    assert fluid["auroc"] == {"value": None, "low": None, "high": None}
    assert "score_NL" not in record["methods"][0]
    assert "draws_R" not in record["methods"][0]["scores"]


def test_summary_table__fits_a_terminal_and_says_the_same(evaluated: Evaluated) -> None:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(summary_table(evaluated.results))
    text = console.export_text()
    for method in evaluated.results.methods:
        assert number(method.scores.macro_auroc.value) in text
    assert "…" not in text


def test_number() -> None:
    assert [number(0.12345), number(-0.5, signed=True), number(0.5, signed=True)] == [
        "0.123",
        "−0.500",
        "+0.500",
    ]
    assert number(float("nan")) == percent(float("nan")) == "–"
    assert percent(0.1234) == "12.3"


def test_summary_table__brackets_in_the_name_of_a_set(evaluated: Evaluated) -> None:
    """Read as markup, the first would end in a traceback after all the work, the second would vanish."""
    facts = {**evaluated.results.facts, "measured on": "clinic [/a] [b]"}
    with (console := Console(width=200)).capture() as capture:
        console.print(summary_table(replace(evaluated.results, facts=facts)))
    assert "on clinic [/a] [b]" in capture.get()
