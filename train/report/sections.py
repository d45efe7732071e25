"""The sections of a report: what is known of a run, as HTML.

Rules:
    Every section is there for every run; where there is nothing to show it says why.
    Nothing is read or computed here but for the pictures.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import cast

from models.bundle import Json
from models.html import Html, join, tag
from train.monitor import KNN_K, KNN_TEMPERATURE
from train.plot import panels
from train.report.facts import RunFacts, duration, number
from train.report.figures import curve_card, matrix_svg, spectrum_svg
from train.report.model import Findings, Sample, Search
from train.report.page import card, data_uri, image_element, table

STATUS_TEXTS = {
    "finished": "finished",
    "running": "training goes on",
    "stopped": "stopped before its end",
}
BASELINES = {
    "knn_pixels": "raw pixels",
    "knn_random": "untrained",
    "knn_start": "weights it starts from",
}
MAX_REJECTS = 50
"""Skipped images that are named; the others are counted."""


def section(name: str, title: str, intro: str, *content: Html) -> Html:
    """Make a section with its heading and a line on how to read it."""
    words = [tag("p", intro)] if intro else []
    heading = tag("h2", title, id=name)
    return tag("section", heading, *words, *content, aria_labelledby=name)


def nothing(why: str) -> Html:
    """Say why there is nothing to show."""
    return tag("p", why)


def header(facts: RunFacts, findings: Findings | None, written: datetime) -> Html:
    """Say what run this is, of what, with what result, on what machine."""
    options, environment = facts.options, facts.config.environment
    network, loss = options.network, options.loss
    versions = cast(Mapping[str, Json], environment["versions"])
    is_own = ":" not in network.layout  # a library's has a width of its own
    width = f" of width {network.width}" if is_own else ""
    what = (
        f"{network.layout}{width}, {loss.objective}, lambda {options.lambd:g}, "
        f"projector {'-'.join(map(str, network.projector_widths))}, {options.image_size_px} px, "
        f"batch {options.batch_size}, {options.optimizer}, seed {options.seed}"
    )
    with_ = ", ".join(f"{name} {v}" for name, v in versions.items() if v is not None)
    return tag(
        "header",
        tag("span", STATUS_TEXTS[facts.status], class_=f"pill {facts.status}"),
        tag("h1", str(facts.path)),
        tag("p", f"{facts.config.data['uri']}: {what}."),
        tag("p", f"{environment['hardware']}; {with_}; {environment['system']}."),
        tag("p", f"Written {written:%Y-%m-%d %H:%M}."),
        tag("dl", *(tile(*texts) for texts in at_a_glance(facts, findings)), class_="tiles"),
    )


def tile(name: str, value: str, more: str) -> Html:
    """Show one figure, with what it should be seen beside."""
    return tag(
        "div",
        tag("dt", name),
        tag("dd", tag("div", value, class_="value"), tag("div", more, class_="more")),
        class_="tile",
    )


def at_a_glance(facts: RunFacts, findings: Findings | None) -> list[tuple[str, str, str]]:
    """Choose the figures that say most: name, value, and what to compare it with."""
    tiles = []
    knn = facts.last("knn_top1")
    if knn is not None:
        known = ((name, facts.last(key)) for key, name in BASELINES.items())
        beside = ", ".join(f"{name} {100 * v:.1f}" for name, v in known if v is not None)
        how = f"k={KNN_K}, T={KNN_TEMPERATURE}, {facts.count('val_images'):,} held-out images"
        more = f"{beside}; {how}" if beside else how
        tiles.append(("kNN top-1", f"{100 * knn:.1f} %", more))
    loss, first = facts.last("loss"), facts.first("loss")
    if loss is not None and first is not None:
        tiles.append(("Loss", number(loss), f"{number(first)} in the first record"))
    epoch = facts.steps / max(facts.steps_per_epoch, 1)
    tiles.append((
        "Epochs", f"{epoch:.3g} of {facts.options.epochs}",
        f"step {facts.steps:,} of {facts.total_steps:,}",
    ))  # fmt: skip
    if findings is not None:
        tiles.append(("Time", duration(findings.elapsed_s), f"up to step {findings.step:,}"))
    rate = facts.last("images_per_s")
    if rate is not None:
        tiles.append(("Speed", f"{rate:,.0f}/s", "images, in the last record"))
    skipped = sum(facts.skipped.values())
    more = f"to learn from; {facts.count('val_images'):,} held out, {skipped:,} skipped"
    tiles.append(("Images", f"{facts.count('train_images'):,}", more))
    return tiles


def warning_section(texts: Sequence[str]) -> Html:
    """Say what looks wrong."""
    body = tag("ul", *(tag("li", text) for text in texts), class_="warnings")
    return section(
        "warnings", "Warnings", "", body if texts else nothing("Nothing to warn of.")
    )  # fmt: skip


def curve_section(facts: RunFacts) -> Html:
    """Draw the log."""
    shown = [
        panel
        for panel in panels(redundancy_floor=facts.redundancy_floor)
        if panel.drawn(facts.records)
    ]
    cards = [curve_card(panel, facts.records) for panel in shown]
    latest = {n: v for r in facts.records for n, v in r.items() if v is not None and n != "step"}
    rows = [(name, number(value)) for name, value in latest.items()]
    body = (
        [
            tag("div", *cards, class_="cards"),
            tag("details", tag("summary", "The last value of each"), table(rows)),
        ]
        if cards
        else [nothing("The run has no record yet.")]
    )
    return section("curves", "Curves", "Dashed lines are what a value is compared with.", *body)


def view_section(picture_png: bytes | None, why_not: str) -> Html:
    """Show what the network was shown."""
    if picture_png is None:
        body = nothing(why_not)
    else:
        alt = "Images, each with random views beside it"
        picture = tag("img", src=data_uri(picture_png, "png"), alt=alt)
        body = card("", tag("div", picture, class_="scroll", tabindex="0", role="group",
                            aria_label="Views"))  # fmt: skip
    intro = "Two random views of an image should be alike to the network, and to you."
    return section("views", "Views", intro, body)


def embedding_section(findings: Findings | None, why_not: str) -> Html:
    """Show C and the spectrum."""
    title = "What the embeddings are like"
    if findings is None:
        return section("embeddings", title, "", nothing(why_not))
    c = findings.correlation
    size = len(c.zoom)
    means = f"Diagonal {c.diagonal_mean:.2f}, the rest {c.off_diagonal_rms:.3f} RMS"
    zoom = card(
        f"C, the first {size} of {c.dims} dimensions" if size < c.dims else "C",
        matrix_svg(c.zoom, size, f"The first {size} dimensions of C. {means}"),
        f"{means}; chance is {c.images**-0.5:.3f}.",
    )
    whole = card(
        f"C, all {c.dims} dimensions",
        matrix_svg(c.whole, c.dims, f"All {c.dims} dimensions of C. {means}"),
        "Each pixel is the largest |C| of its block.",
    )
    spectrum = card(
        "Singular values",
        spectrum_svg(findings.spectra, findings.rankme),
        "Flat is many directions used alike; a cliff is dimensional collapse.",
    )
    cards = [zoom, whole, spectrum] if size < c.dims else [zoom, spectrum]
    intro = (
        f"In eval mode at step {findings.step:,}. C correlates two random views of {c.images:,} "
        "images: one on the diagonal and zero elsewhere is the aim of the loss."
    )
    return section("embeddings", title, intro, tag("div", *cards, class_="cards"))


def search_section(findings: Findings | None, sample: Sample | None, why_not: str) -> Html:
    """Show images and their nearest neighbours."""
    if findings is None or sample is None:
        return section("neighbours", "Nearest neighbours", "", nothing(why_not))
    intro = (
        f"An image at the left, and the nearest of {len(sample.keys) - 1:,} others by "
        "the cosine of the backbone's features."
    )
    if any(label is not None for label in sample.labels):
        intro += " Green has the same label, red another."
    rows = [search_row(one, sample) for one in findings.searches]
    return section("neighbours", "Nearest neighbours", intro, *rows)


def search_row(one: Search, sample: Sample) -> Html:
    """Show one image and its neighbours, which scroll sideways where the page is narrow."""
    label = sample.labels[one.query]
    tiles = [_thumbnail(sample, one.query, "query", "query")]
    for row, cosine in zip(one.neighbours, one.cosines, strict=True):
        kind = "" if label is None else "same" if sample.labels[row] == label else "other"
        tiles.append(_thumbnail(sample, row, f"{cosine:.3f}", kind))
    name = label or sample.keys[one.query]
    return tag("div", *tiles, class_="search", role="group", tabindex="0",
               aria_label=f"Nearest neighbours of {name}")  # fmt: skip


def configuration_section(facts: RunFacts) -> Html:
    """List every option, and what is known of data and machine."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for dotted, value in facts.config.options.items():
        group, _, name = dotted.rpartition(".")
        groups.setdefault(group or "run", []).append((name, plain(value)))
    data = [(name, plain(v)) for name, v in facts.config.data.items() if name != "skipped"]
    data += [
        ("channel mean", plain([round(x, 4) for x in facts.config.channel_mean])),
        ("channel std", plain([round(x, 4) for x in facts.config.channel_std])),
    ]
    made = [(n, plain(v)) for n, v in facts.config.preprocessing.to_json().items()]
    tables = [table(rows, caption=name) for name, rows in groups.items()]
    tables += [table(data, caption="data"), table(made, caption="preprocessing")]
    return section("configuration", "Configuration", "", tag("div", *tables, class_="columns"))


def skipped_section(facts: RunFacts) -> Html:
    """Name the images that could not be used."""
    title = "Skipped images"
    if not facts.skipped:
        return section("skipped", title, "", nothing("None: every image could be used."))
    counts = ", ".join(f"{count} {fault}" for fault, count in facts.skipped.items())
    named = [(r.key, r.fault, r.message) for r in facts.rejects[:MAX_REJECTS]]
    content = [table(named, head=("image", "fault", "message"))] if named else []
    more = len(facts.rejects) - len(named)
    tail = f" The first {MAX_REJECTS} of {len(facts.rejects)} are named." if more > 0 else ""
    return section("skipped", title, f"{counts}.{tail}", *content)


def command_section(facts: RunFacts) -> Html:
    """Give the commands that repeat the run, and go on with what it made."""
    path = shlex.quote(str(facts.path))
    lines = {
        "Repeat it (with another --out)": facts.config.command,
        "Make an encoder of it": f"python -m train.export {path}",
    }
    if facts.status == "stopped":
        lines["Go on with it"] = f"python -m train.pretrain --resume --out {path}"
    parts = [
        join((tag("p", what), tag("pre", tag("code", line), tabindex="0")))
        for what, line in lines.items()
    ]
    return section("commands", "Commands", "", *parts)


def plain(value: Json) -> str:
    """Write a value of a configuration for people."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(plain, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _thumbnail(sample: Sample, row: int, words: str, kind: str) -> Html:
    """Show one image with its label, or else its name, below it."""
    name = sample.labels[row] or sample.keys[row].rpartition("/")[2]
    picture = image_element(sample.images_NHWC[row], f"{name} ({words})")
    return tag("figure", picture, tag("figcaption", name, tag("small", words)), class_=kind)
