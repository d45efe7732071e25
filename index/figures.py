"""Figures as PNG files, with the labels, keys and names of any user in them.

Rules:
    Text is shown as it is: a dollar sign begins no formula.
    What DejaVu lacks is taken from another font where the system has one; what no font has is a
    box, and said once a picture.

Import this module where a picture is drawn: matplotlib takes half a second to load.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.text import Text

from models.files import atomic_file

FONT = "DejaVu Sans"
MORE_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Source Han Sans SC",
    "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback", "PingFang SC",
    "Hiragino Sans", "Apple SD Gothic Neo", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic",
    "Arial Unicode MS",
)  # fmt: skip

log = logging.getLogger("horace.index")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    FigureCanvasAgg(figure)
    # matplotlib warns of each font in the list that is not there.
    installed = set(fontManager.get_font_names())
    families = [FONT, *(name for name in MORE_FONTS if name in installed)]
    for text in figure.findobj(Text):
        assert isinstance(text, Text), "it was asked for"
        text.set_parse_math(False)
        text.set_fontfamily(families)
    with atomic_file(path) as temporary, warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message="Glyph ")
        figure.savefig(temporary, format="png", facecolor="white")
    missing = {str(one.message) for one in caught if str(one.message).startswith("Glyph ")}
    if missing:
        log.warning("%s: %d characters are in no font here: boxes", path.name, len(missing))
