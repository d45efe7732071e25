"""`python -m train.report RUN`: one HTML page that shows how a training went, or goes.

The page holds everything in itself and needs no network: curves, views, what the embeddings
are like, nearest neighbours, warnings, the configuration and the command that repeats the run.

Rules:
    It works for a run at any moment: at work, stopped, killed before its first record.
    What cannot be shown (the images are gone, there is no checkpoint yet) is said in its
    place; the rest is there all the same.
    Nothing in the run is changed but its `report.html`.

torch is imported after parsing, since it takes seconds to load and `--help` should not.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import tyro

from models.command import run_command
from models.cpu import cpu_budget
from models.errors import HoraceError, UsageError
from models.files import atomic_file
from models.images import ImageSource, open_source
from train.errors import or_else, training_packages, writing
from train.run import RunDirectory

if TYPE_CHECKING:
    from train.report.facts import RunFacts
    from train.report.model import Findings, Sample

LEAST_IMAGES = 16
VIEW_IMAGES = 6
OTHER_IMAGES = (
    "The images are not those of the run any more: views, embeddings and neighbours show others."
)

log = logging.getLogger("horace")


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Show how a training went, or goes, as one HTML page."""

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """Run directory of `train.pretrain`."""

    out: Path | None = None
    """HTML file to write; report.html in the run where not given."""

    source: str | None = None
    """Where the run's images are now, if they have moved."""

    images: int = 2048
    """Images of the run's source to embed: more have better neighbours and take longer; 0 for
    a page of the log and the configuration alone."""

    json: bool = False
    """Print where the page is, and its warnings, as JSON."""

    def __post_init__(self) -> None:
        if self.images and self.images < LEAST_IMAGES:
            raise UsageError(
                "--images", expected=f"0, or at least {LEAST_IMAGES}", found=str(self.images)
            )

    @property
    def page_path(self) -> Path:
        """The file to write."""
        return self.out or self.run / "report.html"


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """What a page shows beyond the log; what is None has its reason in `why_not`."""

    sample: Sample | None = None
    views_png: bytes | None = None
    findings: Findings | None = None
    why_not: str = "Left out, as asked by --images 0."
    are_others: bool = False
    """Whether the images are not those of the run."""

    @property
    def warnings(self) -> list[str]:
        """What a reader of the pictures has to know."""
        return [OTHER_IMAGES] if self.are_others else []


def main(options: ReportOptions) -> None:
    """Read the run, look at its network, and write the page."""
    with training_packages():
        from train.device import HIDE_GPU, gpu_faults, prepare_device, resolve_compute
        from train.report.facts import read_facts

        with gpu_faults(mend=HIDE_GPU):
            prepare_device(resolve_compute("auto", "fp32"), threads=cpu_budget())
        run = RunDirectory(path=options.run)
        facts = read_facts(run)
        with writing(options.page_path, mend="make room or choose another --out"):
            pictures = make_pictures(run, facts, options) if options.images else Pictures()
            text = compose(facts, pictures)
            with atomic_file(options.page_path) as temporary:
                temporary.write_text(text)
    if options.json:
        warnings = facts.warnings() + pictures.warnings
        summary = {"report": str(options.page_path), "warnings": warnings}
        print(json.dumps(summary, indent=2))
    else:
        print(options.page_path)


def make_pictures(run: RunDirectory, facts: RunFacts, options: ReportOptions) -> Pictures:
    """Read some of the images, make views of them, and embed them with the last checkpoint."""
    from train.device import HIDE_GPU, gpu_faults
    from train.report.model import are_others, draw_sample, find_out

    limit = cast(int | None, facts.config.options["limit_images"])
    try:
        with or_else("name their new place with --source"):
            source = open_source(options.source or cast(str, facts.config.data["uri"]))
            sample = draw_sample(source, facts.config.preprocessing, options.images, limit=limit)
        views_png = draw_views(facts, sample, source)
        pictures = Pictures(
            sample=sample, views_png=views_png, are_others=are_others(source, facts, options.images)
        )
    except HoraceError as error:
        why_not = f"The run's images cannot be read now: {error}."
        log.warning("%s", why_not)
        return Pictures(why_not=why_not)
    for text in pictures.warnings:
        log.warning("%s", text)
    try:
        with gpu_faults(mend=HIDE_GPU):
            return replace(pictures, findings=find_out(run, facts, sample, source))
    except HoraceError as error:
        why_not = f"There is no network to look with: {error}."
        log.warning("%s", why_not)
        return replace(pictures, why_not=why_not)


def draw_views(facts: RunFacts, sample: Sample, source: ImageSource) -> bytes:
    """Draw the random views of a few images, as PNG."""
    from train.report.model import choose_queries, stream_views
    from train.trainer import view_recipes
    from train.views.picture import VIEWS_EACH, write_views_picture

    rows, seed = choose_queries(sample)[:VIEW_IMAGES], facts.options.seed
    keys = [sample.keys[row] for row in rows]
    views = stream_views(facts.options, source, keys, seed=seed, each=VIEWS_EACH)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "views.png"
        recipes = view_recipes(facts.options.views)
        write_views_picture(sample.images_NHWC[rows], recipes, path, seed, views)
        return path.read_bytes()


def compose(facts: RunFacts, pictures: Pictures) -> str:
    """Put the page together."""
    from train.report import sections
    from train.report.page import page

    findings, why_not = pictures.findings, pictures.why_not
    return page(
        f"Training {facts.path}",
        sections.header(facts, findings, datetime.now()),
        sections.warning_section(facts.warnings() + pictures.warnings),
        sections.curve_section(facts),
        sections.view_section(pictures.views_png, why_not),
        sections.embedding_section(findings, why_not),
        sections.search_section(findings, pictures.sample, why_not),
        sections.configuration_section(facts),
        sections.skipped_section(facts),
        sections.command_section(facts),
    )


if __name__ == "__main__":
    sys.exit(run_command(ReportOptions, main, prog="python -m train.report"))
