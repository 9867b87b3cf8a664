"""The report's text: all hosts, all labels, nothing a host says is markup, nothing is fetched."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fleet.report import charts, frames, html
from fleet.report.html import number
from fleet.results import dollars
from fleet.results.load import load
from fleet.results.records import SessionResults
from fleet.terms import HostState, Mode, Scenario, UnitState
from tests.unit.report import sample
from tests.unit.results.session_files import ALL_FOUR, ROUGE_TEXT, Host, Unit, build


class Page(HTMLParser):
    """Tags with attributes, and the page's texts outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.blocks: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:  # noqa: ARG002 - the parser's signature
        self._inside = ""

    def handle_data(self, data: str) -> None:
        (self.blocks if self._inside in {"script", "style"} else self.texts).append(data)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> SessionResults:
    return load(sample.sample(tmp_path_factory.mktemp("s")))


@pytest.fixture(scope="module")
def page(results: SessionResults) -> Page:
    return Page(html.render(results))


def test_the_headline_comes_first(page: Page, results: SessionResults) -> None:
    body = [text.strip() for text in page.texts if text.strip()]
    assert body[:2] == [results.headline, results.headline]  # the title and the first line
    assert results.headline == "6 of 8 hosts, 27 of 32 units · 1 INVALID"


def test_every_host_and_every_cause_is_there(page: Page, results: SessionResults) -> None:
    text = " ".join(page.texts)
    for system in results.systems:
        assert system.host in text
        assert system.cause in text
    for unit in results.units:
        assert unit.cause in text
        assert all(reason in text for reason in unit.not_submittable_because if unit.measured)


def test_warnings_and_earlier_starts_stand_beside_the_numbers(page: Page, results: SessionResults) -> None:
    cells = re.findall(r'<td class="n"><b>.*?</td>', html.render(results), flags=re.DOTALL)
    assert [cell.count("on battery for 31 s</span>") for cell in cells].count(1) == 1
    assert [cell.count("throttled by heat for 4 s</span>") for cell in cells].count(1) == 1
    assert [cell.count("3 starts</span>") for cell in cells].count(1) == 1
    text = " ".join(page.texts)
    for name, said in results.warnings:
        assert name.partition(".tiny-bert")[0] in text
        assert said in text
    assert "started 3 times; before: interrupted: the host was rebooted; failed (no-space): " in text


def test_what_is_wrong_is_a_remark_in_the_charts(results: SessionResults) -> None:
    offline = next(c for c in charts.charts(frames.measured(results)) if "Offline" in c.title)
    assert "laptop-anna (on battery for 31 s, throttled by heat for 4 s)" in json.dumps(offline.figure)


def test_a_host_that_is_missing_stands_there_with_state_and_cause(tmp_path: Path) -> None:
    hosts = [
        Host(name="away", state=HostState.UNREACHABLE, cause="no route", units=ALL_FOUR),
        Host(name="out", state=HostState.LEFT_OUT, cause="--limit away"),
        Host(name="key", state=HostState.CHANGED_KEY, cause="another key"),
        Host(
            name="half", units=(*ALL_FOUR[:3], dataclasses.replace(ALL_FOUR[3], state=UnitState.TIMEOUT, cause="late"))
        ),
    ]
    text = html.render(load(build(tmp_path, hosts)))
    table = text.partition('<section id="missing">')[2].partition("</section>")[0]
    said = " ".join(Page(table).texts)
    assert "left-out" in said
    assert "--limit away" in said
    assert "changed-host-key" in said
    assert "incomplete" in said
    assert "3 of 4 units; timeout: late" in said
    assert "no route" not in said
    assert "unreachable when last asked (no route); all its units are home" in text


def test_what_hosts_say_is_never_markup(page: Page, results: SessionResults) -> None:
    assert not [tag for tag, _ in page.tags if tag in {"img", "iframe", "object", "link"}]
    scripts = [attrs for tag, attrs in page.tags if tag == "script"]
    assert scripts
    assert all(attrs.get("nonce") for attrs in scripts)
    assert "<script>document" not in html.render(results)


def test_a_label_in_a_chart_cannot_close_its_script(results: SessionResults) -> None:
    first, *others = results.units
    evil = dataclasses.replace(results, units=(dataclasses.replace(first, labels=(sample.EVIL,)), *others))
    text = html.render(evil)
    assert "<script>document" not in text
    blocks = re.findall(r"<script type=.application/json.[^>]*>(.*?)</script>", text, flags=re.DOTALL)
    figures = [json.loads(block) for block in blocks]
    assert len(figures) == 4
    # plotly reads a subset of HTML in texts, so the name is escaped for it as well
    assert any("&lt;/script&gt;" in name for name in figures[0]["data"][0]["y"])


def test_nothing_is_fetched(page: Page) -> None:
    for _, attrs in page.tags:
        assert not {"src", "href", "srcset", "action"} & attrs.keys()
    (policy,) = [attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv")]
    assert policy is not None
    assert "default-src 'none'" in policy


def test_every_number_in_the_table_has_its_labels(results: SessionResults) -> None:
    text = html.render(results)
    cells = re.findall(r'<td class="n"><b>.*?</td>', text, flags=re.DOTALL)
    measured = [unit for unit in results.units if unit.measured]
    priced = [unit for unit in measured if unit.usd_per_million is not None]
    assert len(cells) == len(measured) + len(priced)
    assert all("demo model" in cell for cell in cells)
    assert sum("random weights" in cell for cell in cells) == 4 + 2
    assert sum("simulated" in cell for cell in cells) == 4


def test_summaries_have_their_own_scores_and_labels(tmp_path: Path) -> None:
    units = (
        Unit(benchmark="tiny-gptj", labels=("random weights",)),
        Unit(
            benchmark="tiny-gptj",
            mode=Mode.ACCURACY,
            log="offline-accuracy",
            accuracy=ROUGE_TEXT,
            labels=("random weights",),
        ),
    )
    text = html.render(load(build(tmp_path, [Host(name="a", units=units)])))
    (cell,) = re.findall(r'<td class="n"><b>42\.99</b> ROUGE1<br>.*?</td>', text, flags=re.DOTALL)
    for said in (
        "20.12</b> ROUGE2",
        "29.99</b> ROUGEL",
        "40.10</b> ROUGELSUM",
        "4,016,878</b> GEN_LEN",
        "random weights",
    ):
        assert said in cell
    assert "no result" not in text


def test_every_number_in_a_chart_has_its_labels(results: SessionResults) -> None:
    drawn = charts.charts(frames.measured(results))
    assert [chart.title for chart in drawn] == [
        "tiny-bert Offline: throughput",
        "tiny-bert SingleStream: latency",
        "tiny-bert: throughput and latency",
        "tiny-bert: throughput and cost",
    ]
    for chart in drawn:
        assert chart.remarks == ("demo model",)
        text = json.dumps(chart.figure)
        assert "g5-a (random weights)" in text
        # A host without a price is in no chart of cost.
        assert ("vm-quiet (simulated)" in text) is ("cost" not in chart.title)


def test_invalid_runs_are_in_no_chart(results: SessionResults) -> None:
    offline = next(c for c in charts.charts(frames.measured(results)) if "Offline" in c.title)
    assert "laptop-ben" not in json.dumps(offline.figure)


def test_systems_stand_in_the_sessions_order(results: SessionResults) -> None:
    offline = next(c for c in charts.charts(frames.measured(results)) if "Offline" in c.title)
    names = [name.split(" ")[0] for name in offline.figure["data"][0]["y"]]
    assert names == [s.system_id for s in results.systems if s.system_id in names]


def test_server_and_multistream_have_charts_too(tmp_path: Path) -> None:
    units = (
        Unit(scenario=Scenario.SERVER, log="server-quick"),
        Unit(scenario=Scenario.MULTI_STREAM, log="multistream-quick"),
    )
    results = load(build(tmp_path, [Host(name="a", units=units)], quick=True))
    assert [chart.title for chart in charts.charts(frames.measured(results))] == [
        "tiny-bert MultiStream: latency",
        "tiny-bert Server: throughput",
        "tiny-bert Server: latency",
    ]
    text = html.render(results)
    assert "Queries/s" in text
    assert "not planned" in text  # accuracy


def test_a_latency_that_loadgen_could_not_estimate_is_no_number(tmp_path: Path) -> None:
    results = load(build(tmp_path, [Host(name="a", units=(Unit(),))]))
    (unit,) = results.units
    assert unit.summary is not None
    blank = dataclasses.replace(unit, summary=dataclasses.replace(unit.summary, metric=None, valid=False))
    assert "no estimate" in html.render(dataclasses.replace(results, units=(blank,)))


def test_a_quick_run_has_its_banner(tmp_path: Path) -> None:
    session = sample.quick(tmp_path)
    path = html.write(session, load(session))
    text = path.read_text(encoding="utf-8")
    assert path == session.report / "index.html"
    assert 'id="quick"' in text
    assert text.count("quick run</span>") >= 3
    assert "throughput and latency" not in text  # one system has nothing to be compared with


def test_without_numbers_there_is_no_plotly(tmp_path: Path) -> None:
    text = html.render(load(build(tmp_path, [Host(name="a")])))
    assert "0 of 1 hosts, 0 of 0 units" in text
    assert len(text) < 50_000


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.0, "0"), (0.00123, "0.00123"), (1.23456, "1.235"), (87.4417, "87.44"), (12345.6, "12,346")],
)
def test_numbers_are_for_people(value: float | None, text: str) -> None:
    assert number(value) == text


def test_what_it_cost_stands_in_the_report_with_its_source(page: Page, results: SessionResults) -> None:
    text = " ".join(" ".join(page.texts).split())
    assert ("section", {"id": "cost"}) in page.tags
    assert "$2.48 for the time of the units" in text
    assert "without a price, so not in the sum: laptop-anna, laptop-ben, vm-quiet, vm-lossy" in text
    assert "not in the sum: laptop-anna, laptop-ben, vm-quiet, vm-lossy, laptop-eve" not in text  # it ran nothing
    assert "$0.145 own fleet.yml" in text
    offline = next(unit for unit in results.units if unit.unit == "graviton-a.tiny-bert.Offline.performance")
    assert f"{dollars.dollars(offline.usd_per_million)} / M samples" in text


def test_the_chart_of_cost_has_every_system_with_a_price(results: SessionResults) -> None:
    (worth,) = [
        chart for chart in charts.charts(frames.measured(results)) if chart.title.endswith("throughput and cost")
    ]
    names = [name.partition(" (")[0] for name in worth.figure["data"][0]["text"]]
    assert names == ["epyc01.lab", "graviton-a", "g5-a"]
    assert worth.figure["layout"]["xaxis"]["title"]["text"] == "US dollars per million samples"


def test_without_prices_the_report_has_no_word_of_cost(tmp_path: Path) -> None:
    page = Page(html.render(load(build(tmp_path, [Host(name="a", units=ALL_FOUR), Host(name="b", units=ALL_FOUR)]))))
    assert ("section", {"id": "cost"}) not in page.tags
    assert not [text for text in page.texts if "$" in text or "ost" in text.split()]
