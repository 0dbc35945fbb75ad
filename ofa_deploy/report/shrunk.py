"""The page of a network that was shrunk: what stayed of it, and how it was shown."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ofa_deploy.assembly import VerifiedNetwork
from ofa_deploy.report.page import measured_cards, measured_sections, page, plot
from ofa_deploy.report.svg import Plot, padded
from profilers.table import LatencyTable

FORMAT_VERSION = 1
# Of probabilities; the page has a class for each.
CHANCE_SHADES = 6
# Columns of a strip of them: a page of a search of hundreds of epochs stays small.
MOST_COLUMNS = 100
# What a stage's name ends with.
BLOCKS = ", blocks"
# Of plots, in pixels: what is beside the names, and these at least.
BARS_WIDTH, NAMES_WIDTH = 430, 190
NOTHING_SEARCHED = "<p>Nothing was searched: the whole network keeps the budget.</p>"
Log = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShrinkHistory:
    """How a network became what it is.

    Args:
        method: Such as `pas`.
        recipe: As JSON can hold it.
        weights_sha256: Of the network before.
        groups: Names of its groups of channels, in the order of the data; of the
            method that takes single weights, of its layers.
        channels: That each had; or weights.
        search: Of every epoch of the search: loss, accuracy, channels kept, price.
        finetune: Of every epoch afterwards.
        kept: Channels that each group has now; or weights.
        left_whole: Layers whose channels cannot all be removed.
        too_narrow: Layers that have no more channels than go at a time.
        family: Networks that the same ranking leaves at other prices: price, counts,
            and loss before fine-tuning.
    """

    method: str
    recipe: Mapping[str, Any]
    weights_sha256: str
    groups: tuple[str, ...]
    channels: tuple[int, ...]
    search: Log
    finetune: Log
    kept: tuple[int, ...]
    left_whole: tuple[str, ...] = ()
    too_narrow: tuple[str, ...] = ()
    family: Log = ()

    @property
    def unit(self) -> str:
        """What was taken: channels, or weights."""
        return "weights" if self.method == "autoprune-weights" else "channels"

    def to_json(self) -> str:
        """As the bundle keeps it."""
        content = {"format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps(content, indent=1, sort_keys=True) + "\n"


def shrunk_report(
    network: VerifiedNetwork, *, history: ShrinkHistory, table: LatencyTable
) -> str:
    """What became of a network, and how it was shown.

    Args:
        network: Verified; all its constraints are met.
        history: Of its shrinking.
        table: Of its layers.
    """
    sections = [
        plot(
            f"Kept {history.unit}",
            f"Of each {_part(history)}{_told_stages(history)}: the whole bar is what "
            f"it had, the dark part what it kept. {_told_whole(history)}",
            draw_kept(history),
        ),
        _course(history),
        *_family(history),
        *_chances(history),
        plot(
            "Accuracy on held-out images",
            "While weights were trained.",
            draw_accuracy(history),
        ),
        *measured_sections(network, table),
    ]
    return page(
        f"{network.exported.facts.family}, shrunk, on {table.runtime.backend}",
        network.exported.facts.name,
        measured_cards(network),
        sections,
    )


def _course(history: ShrinkHistory) -> str:
    if history.method == "legr":
        return plot(
            "Course of the search",
            "Loss of the best ranking so far, at the lowest budget of interest, after "
            "each candidate that was judged.",
            draw_losses(history),
        )
    of_all = (
        "of all layers together"
        if history.unit == "weights"
        else "the network's price, as a share of the whole network's"
    )
    return plot(
        "Course of the search",
        f"Share of its {history.unit} that each {_part(history)} kept, epoch by epoch; "
        f"the thick line is {of_all}{_told_expected(history)}."
        f"{_told_collapses(history)}",
        draw_course(history),
    )


def _told_collapses(history: ShrinkHistory) -> str:
    collapses = history.search[-1].get("collapses") if history.search else None
    if not isinstance(collapses, list) or not collapses:
        return ""
    told = ", ".join(
        f"{name} ({count} times)" if count > 1 else str(name)
        for name, count in Counter(collapses).items()
    )
    return (
        f" More than half of what may go of {told} went at once, and came back: the "
        "pull was too strong, and was halved each time."
    )


def _told_expected(history: ShrinkHistory) -> str:
    if history.method != "tas":
        return ""
    return " if the likeliest is kept, the dashed one what is expected of all choices"


def _told_whole(history: ShrinkHistory) -> str:
    if history.unit == "weights":
        return ""
    reasons = {
        "Not all channels of these can be removed, because of what is behind them": (
            history.left_whole
        ),
        "These have no more channels than the runtime's kernels take at a time": (
            history.too_narrow
        ),
    }
    told = [f"{why}: {', '.join(names)}." for why, names in reasons.items() if names]
    return " ".join(told)


def _family(history: ShrinkHistory) -> list[str]:
    """What the same ranking leaves for other budgets."""
    if not _judged(history):
        return []
    return [
        plot(
            "Other budgets of the same ranking",
            "Loss on held-out images before fine-tuning, by predicted milliseconds: "
            "each network keeps what the ones left of it keep.",
            draw_family(history),
        )
    ]


def _judged(history: ShrinkHistory) -> Log:
    """Members of the family but those that overflow, which have no loss to draw."""
    return tuple(member for member in history.family if member["loss"] is not None)


def draw_family(history: ShrinkHistory) -> str:
    """Loss by price."""
    family = _judged(history)
    prices = [float(member["price"]) for member in family]
    losses = [float(member["loss"]) for member in family]
    drawn = Plot(
        name="family",
        label="Loss before fine-tuning by predicted milliseconds",
        x_label="predicted ms",
        y_label="cross-entropy",
        x_range=padded(prices),
        y_range=padded(losses),
    )
    drawn.line(prices, losses, kind="course course0", tip="the nested family")
    for member, price, loss in zip(family, prices, losses, strict=True):
        tip = f"{price:.4g} ms, loss {loss:.4f}\n{sum(member['counts'])} channels"
        drawn.point(price, loss, kind="chosen", tip=tip)
    return drawn.render()


def _chances(history: ShrinkHistory) -> list[str]:
    """How the distributions of a search came to their choices."""
    if history.method != "tas" or not history.search:
        return []
    return [
        plot(
            "Distributions",
            "Of each group's width, and of each stage's depth: the narrowest choice "
            "below, the whole one above, the darker the likelier, epoch by epoch.",
            draw_chances(history),
        )
    ]


def draw_chances(history: ShrinkHistory) -> str:
    """A strip a distribution, a column an epoch."""
    epochs, count = len(history.search), len(history.groups)
    row_height = 46
    strips = Plot(
        name="chances",
        label="Probabilities of all choices by epoch",
        x_label="epoch of the search",
        y_label="",
        x_range=(0.0, float(epochs)),
        y_range=(0.0, float(count)),
        height=row_height * count + 70,
        width=BARS_WIDTH + _names_width(history),
        margin_left=_names_width(history),
    )
    every = math.ceil(epochs / MOST_COLUMNS)
    for place, name in enumerate(history.groups):
        bottom = count - place - 0.92
        for epoch in range(0, epochs, every):
            line = history.search[min(epoch + every, epochs) - 1]
            chances = _named_chances(history, line, place)
            step = 0.84 / len(chances)
            for index, (choice, chance) in enumerate(chances):
                shade = min(CHANCE_SHADES, int(chance * CHANCE_SHADES) + 1)
                low = bottom + index * step
                strips.bar(
                    (epoch, min(epoch + every, epochs)),
                    (low, low + step),
                    kind=f"chance{shade}",
                    tip=f"{name}: {choice}, {chance:.0%}",
                )
        strips.text(-0.01 * epochs, bottom + 0.42, name, anchor="end")
    return strips.render(y_ticks=False)


def _named_chances(
    history: ShrinkHistory, line: Mapping[str, Any], place: int
) -> list[tuple[str, float]]:
    """What a group, or a stage, had to choose from in an epoch, and how likely."""
    chances, unit = line["probabilities"][place], _unit(history, history.groups[place])
    if "choices" not in line:  # a search that an earlier version began
        return [(f"choice {i}", chance) for i, chance in enumerate(chances, start=1)]
    named = zip(line["choices"][place], chances, strict=True)
    return [(f"{choice} {unit}", chance) for choice, chance in named]


def _unit(history: ShrinkHistory, name: str) -> str:
    """What there are so many of: a stage's name says that it is of blocks."""
    return "blocks" if name.endswith(BLOCKS) else history.unit


def _names_width(history: ShrinkHistory) -> int:
    """Pixels that the longest name takes, about; neither too little nor all."""
    return max(NAMES_WIDTH, min(360, 7 * max(map(len, history.groups), default=0)))


def _told_stages(history: ShrinkHistory) -> str:
    searched = any(name.endswith(BLOCKS) for name in history.groups)
    return ", and of each stage's blocks" if searched else ""


def _part(history: ShrinkHistory) -> str:
    return "layer" if history.unit == "weights" else "group of channels"


def draw_losses(history: ShrinkHistory) -> str:
    """The best loss by candidates judged."""
    found = [
        (float(place), float(line["best_loss"]))
        for place, line in enumerate(history.search, start=1)
        if line["best_loss"] is not None
    ]
    if not found:
        return NOTHING_SEARCHED
    judged, losses = zip(*found, strict=True)
    lines = Plot(
        name="losses",
        label="Best loss by candidates judged",
        x_label="candidates judged",
        y_label="cross-entropy",
        x_range=(0.0, judged[-1] * 1.02),
        y_range=padded(losses),
    )
    lines.line(judged, losses, kind="price", tip=f"at the end {losses[-1]:.4f}")
    return lines.render()


def draw_kept(history: ShrinkHistory) -> str:
    """A bar a group."""
    row_height = 22
    count = len(history.groups)
    bars = Plot(
        name="kept",
        label=f"{history.unit.capitalize()} kept of each {_part(history)}",
        x_label=history.unit,
        y_label="",
        x_range=(0.0, max(history.channels) * 1.3),
        y_range=(0.0, float(count)),
        height=row_height * count + 70,
        width=BARS_WIDTH + _names_width(history),
        margin_left=_names_width(history),
    )
    for place, (name, had, kept) in enumerate(
        zip(history.groups, history.channels, history.kept, strict=True)
    ):
        top, bottom = count - place - 0.15, count - place - 0.85
        unit = _unit(history, name)
        tip = f"{name}\n{kept:,} of {had:,} {unit}"
        # A handful of blocks would hardly be seen beside channels.
        each = max(history.channels) / had if unit == "blocks" else 1.0
        bars.bar((0.0, each * had), (bottom, top), kind="had", tip=tip)
        bars.bar((0.0, each * kept), (bottom, top), kind="block", tip=tip)
        bars.text(-0.01 * max(history.channels), (top + bottom) / 2, name, anchor="end")
        beside = each * kept + 0.01 * max(history.channels)
        bars.text(beside, (top + bottom) / 2, f"{kept:,} of {had:,}")
    return bars.render(y_ticks=False)


def draw_course(history: ShrinkHistory) -> str:
    """Shares of channels by epoch, one line a group."""
    epochs = [float(line["epoch"]) for line in history.search]
    if not epochs:
        return NOTHING_SEARCHED
    lines = Plot(
        name="course",
        label=f"Share of {history.unit} kept by epoch, of each {_part(history)}",
        x_label="epoch of the search",
        y_label=f"{history.unit} kept, %",
        x_range=(0.0, max(epochs) * 1.02),
        y_range=(0.0, 104.0),
    )
    for place, (name, had) in enumerate(
        zip(history.groups, history.channels, strict=True)
    ):
        shares = [100.0, *(100 * line["kept"][place] / had for line in history.search)]
        lines.line(
            [0.0, *epochs],
            shares,
            kind=f"course course{place % 6}",
            tip=f"{name}\n{shares[-1]:.3g} % of {had:,} {_unit(history, name)}",
        )
    prices = [100.0, *(100 * line["price_share"] for line in history.search)]
    lines.line(
        [0.0, *epochs],
        prices,
        kind="price",
        tip=f"all together: {prices[-1]:.1f} % at the end",
    )
    expected = [
        100 * line["expected_share"]
        for line in history.search
        if "expected_share" in line
    ]
    if expected:
        tip = f"expected: {expected[-1]:.1f} % at the end"
        lines.line(epochs, expected, kind="expected", tip=tip)
    return lines.render()


def draw_accuracy(history: ShrinkHistory) -> str:
    """Validation accuracy by epoch, both trainings one after the other."""
    search = [line for line in history.search if "validation" in line]
    found = [100 * line["validation"] for line in (*search, *history.finetune)]
    if not found:
        return "<p>Nothing was trained.</p>"
    epochs = [float(place) for place in range(1, len(found) + 1)]
    drawn = Plot(
        name="accuracy",
        label="Accuracy on held-out images by epoch",
        x_label="epoch",
        y_label="top-1 accuracy, %",
        x_range=(0.0, epochs[-1] * 1.02),
        y_range=padded(found),
    )
    drawn.line(
        epochs, found, kind="course course0", tip=f"at the end {found[-1]:.2f} %"
    )
    if search and history.finetune:
        drawn.vertical(len(search), kind="budget", text="fine-tuning begins")
    return drawn.render()
