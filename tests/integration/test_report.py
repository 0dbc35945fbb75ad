"""The pages to look at: what is in them, and that a browser draws them."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from ofa_deploy.assembly import VerifiedNetwork
from ofa_deploy.choosing import Chooser
from ofa_deploy.constraints import Constraints
from ofa_deploy.report.charts import WidthLine, draw_histogram
from ofa_deploy.report.facts import block_shares, front_points, left_out, width_lines
from ofa_deploy.report.page import bundle_report, front_report
from ofa_deploy.report.svg import padded, ticks
from ofa_deploy.space import SubnetConfig
from profilers import LatencyTable, Visit
from tests.support import made_up_bench, tiny
from tests.support.chromium import find_browser, open_page
from tests.support.made_up_bench import MadeUpBench
from tests.support.tiny_session import table_here

BUDGET_MS = 1.25
PLOTS = ("pareto", "predicted", "histogram", "blocks", "staircase")
VOID = {"meta", "br", "img", "link", "hr"}


@lru_cache(maxsize=1)
def chooser() -> Chooser:
    return made_up_bench.chooser()


@lru_cache(maxsize=1)
def table() -> LatencyTable:
    return table_here("onnxruntime-cpu")


def network(*, fixed_visits: int = 40) -> VerifiedNetwork:
    """A network as certified, with runs scattered around its latency."""
    bench = MadeUpBench(
        predictors=chooser().predictors,
        constraints=Constraints(latency_ms=BUDGET_MS, size_bytes=10**7),
        quiet=lambda config: 1.2,
    )
    found = bench.certify(tiny.SPACE.middle())
    rng = np.random.default_rng(0)
    visits = tuple(
        Visit(
            time_ns=place,
            anchor_before_ns=1,
            anchor_after_ns=1,
            inner_loops=1,
            samples_ns=tuple(
                (1.2e6 * np.exp(0.05 * rng.standard_normal(25))).astype(int).tolist()
            ),
        )
        for place in range(fixed_visits)
    )
    measurement = replace(found.measurement, visits=visits)
    return replace(found, measurement=measurement)


@pytest.fixture(scope="module")
def bundle_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    with pytest.MonkeyPatch.context() as patch:
        # The made-up bench writes no file.
        patch.setattr(
            "ofa_deploy.exporting.ExportedNetwork.loaded_bytes",
            property(lambda self: 123_456),
        )
        page = bundle_report(
            network(),
            predictor=chooser().predictors.latency,
            table=table(),
            front=chooser().front,
        )
    path.write_text(page, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def front_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("front") / "frontier.html"
    page = front_report(
        predictor=chooser().predictors.latency, table=table(), front=chooser().front
    )
    path.write_text(page, encoding="utf-8")
    return path


class Elements(HTMLParser):
    """Counts elements by class and id, and checks that all are closed in turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.classes: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.tips: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.classes.update((values.get("class") or "").split())
        self.ids.update([values["id"] or ""] if "id" in values else [])
        if "data-tip" in values:
            self.tips.append(values["data-tip"] or "")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


# -- what is in the pages --------------------------------------------------------------


def test_a_bundles_page_has_every_plot_once(bundle_page: Path) -> None:
    found = Elements(bundle_page.read_text(encoding="utf-8"))
    assert all(found.ids[name] == 1 for name in PLOTS)


def test_a_fronts_page_has_the_plots_that_need_no_bundle(front_page: Path) -> None:
    found = Elements(front_page.read_text(encoding="utf-8"))
    assert {name for name in PLOTS if found.ids[name]} == {
        "pareto",
        "predicted",
        "staircase",
    }


def test_marks_are_as_many_as_what_they_show(bundle_page: Path) -> None:
    found = Elements(bundle_page.read_text(encoding="utf-8"))
    points = front_points(tiny.SPACE, chooser().front)
    blocks = block_shares(chooser().predictors.latency, table(), tiny.SPACE.middle())
    assert found.classes["front"] == len(points)
    assert found.classes["network"] == len(table().networks)
    assert found.classes["block"] == len(blocks)
    assert found.classes["chosen"] == 2  # on the front, and among the predicted
    assert found.classes["budget"] == found.classes["identity"] + 1 == 2


def test_every_network_of_the_front_tells_its_name(front_page: Path) -> None:
    tips = Elements(front_page.read_text(encoding="utf-8")).tips
    for point in front_points(tiny.SPACE, chooser().front):
        assert any(tip.startswith(f"{point.name}\n") for tip in tips)


@pytest.mark.parametrize("name", ["bundle_page", "front_page"])
def test_a_page_fetches_nothing(name: str, request: pytest.FixtureRequest) -> None:
    text = request.getfixturevalue(name).read_text(encoding="utf-8")
    assert re.findall(r"(?:https?:)?//\w|\bsrc=|\burl\(|@import|\bfetch\(", text) == []
    assert "default-src 'none'" in text


def test_names_from_elsewhere_are_text_and_not_markup() -> None:
    hostile = "<span></span><script>alert(1)</script>"
    device = replace(table().device, cpu_model=hostile)
    conditions = replace(table().conditions_after, governor=hostile)
    page = front_report(
        predictor=chooser().predictors.latency,
        table=replace(table(), device=device, conditions_after=conditions),
        front=chooser().front,
    )
    assert hostile not in page
    assert page.count("&lt;script&gt;alert(1)") == 2


@pytest.mark.parametrize("budget_ms", [0.9, 1.0, 1.9])
def test_a_budget_near_the_runs_is_drawn_wherever_it_lies(budget_ms: float) -> None:
    drawn = draw_histogram(
        np.linspace(1.1, 1.3, 500),
        quiet_ms=1.05,
        budget_ms=budget_ms,
        budget_text="the budget",
    )
    assert 'class="budget"' in drawn
    assert 'class="quiet"' in drawn


# -- the facts -------------------------------------------------------------------------


def test_blocks_of_a_network_add_up_to_its_prediction() -> None:
    predictor = chooser().predictors.latency
    for row in tiny.SPACE.sample(10, np.random.default_rng(0)):
        config = tiny.SPACE.decode(row)
        shares = block_shares(predictor, table(), config)
        total = sum(share.price_ms for share in shares)
        assert total == pytest.approx(predictor.estimate(config).ms)
        assert len(shares) == 1 + sum(map(len, config.stages))


def test_the_front_that_is_drawn_rises() -> None:
    points = front_points(tiny.SPACE, chooser().front)
    assert len(points) >= 3
    assert np.all(np.diff([point.latency_ms for point in points]) > 0)
    assert np.all(np.diff([point.accuracy for point in points]) > 0)


def test_networks_left_out_are_those_of_the_table() -> None:
    seen = left_out(tiny.SPACE, table())
    assert seen.names
    for name, measured_ms in zip(seen.names, seen.measured_ms, strict=True):
        assert table().networks[name].quiet_ms == measured_ms
        SubnetConfig.from_id(name)


def test_width_lines_hold_blocks_that_were_timed() -> None:
    lines = width_lines(tiny.SPACE, table(), resolution=tiny.SPACE.resolutions[0])
    known = {entry.quiet_ms for entry in table().blocks.values()}
    assert lines
    for line in lines:
        assert list(line.widths) == sorted(set(line.widths))
        assert set(line.latency_ms) <= known


def test_a_width_is_dominated_if_a_wider_one_costs_no_more() -> None:
    line = WidthLine(name="", widths=(8, 16, 24, 32), latency_ms=(1.0, 3.0, 2.0, 4.0))
    assert line.dominated == (False, True, False, False)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.37, 0.41), (-3, 1e6), (5, 5.001)])
def test_ticks_are_round_few_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 3 <= len(found) <= 10
    assert all(low <= tick <= high + 1e-9 * (high - low) for tick in found)


def test_a_range_of_one_value_still_has_room() -> None:
    for value in (0.0, 3.0, -2.0):
        low, high = padded([value])
        assert low < value < high


# -- in a browser ----------------------------------------------------------------------

needs_browser = pytest.mark.skipif(
    find_browser() is None,
    reason="no Chromium here; `apt install chromium` on Debian brings it",
)


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("name", ["bundle_page", "front_page"])
def test_a_browser_draws_a_page_without_complaint(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    page: Path = request.getfixturevalue(name)
    before = Elements(page.read_text(encoding="utf-8"))
    opened = open_page(page, home=tmp_path)
    assert opened.console == []
    after = Elements(opened.dom)
    assert after.classes == before.classes


@pytest.mark.slow
@needs_browser
def test_pointing_at_a_mark_tells_what_it_is(bundle_page: Path, tmp_path: Path) -> None:
    # A script of the test's own: point at the chosen network, and click it.
    script = """<script>
      const mark = document.querySelector("#pareto .chosen");
      const at = { bubbles: true, clientX: 9, clientY: 9 };
      mark.dispatchEvent(new PointerEvent("pointermove", at));
      mark.dispatchEvent(new MouseEvent("click", at));
    </script></body>"""
    page = tmp_path / "pointed.html"
    text = bundle_page.read_text(encoding="utf-8").replace("</body>", script)
    page.write_text(text, encoding="utf-8")
    opened = open_page(page, home=tmp_path)
    assert opened.console == []
    name = tiny.SPACE.middle().id
    shown = re.search(r'<div id="tip"[^>]*>([^<]*)</div>', opened.dom)
    picked = re.search(r'<p id="picked">([^<]*)</p>', opened.dom)
    assert shown is not None
    assert picked is not None
    assert shown[1].startswith(f"chosen: {name}\n")
    assert picked[1].startswith(f"chosen: {name}: measured ")
    assert "picked" in Elements(opened.dom).classes


@pytest.mark.slow
@needs_browser
def test_a_console_error_would_be_seen(front_page: Path, tmp_path: Path) -> None:
    page = tmp_path / "broken.html"
    broken = "<script>nothing.here()</script></body>"
    text = front_page.read_text(encoding="utf-8").replace("</body>", broken)
    page.write_text(text, encoding="utf-8")
    assert any(
        "nothing is not defined" in line
        for line in open_page(page, home=tmp_path).console
    )
