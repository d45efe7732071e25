import numpy as np
import pytest
from PIL import Image

from index.curation.map_page import make_legend
from index.curation.map_picture import draw_map
from index.curation.sprites import Sprites
from index.evaluation.plots import Tile, draw_confusion, draw_grid

COUNTS = np.eye(2, dtype=np.int64)


def confusion(path, text):
    """As a class and in the title."""
    draw_confusion(path, COUNTS, [text, "b"], counts_C=COUNTS.sum(axis=1), title=text)


def grid(path, text):
    """As a caption and in the title."""
    draw_grid(path, [(Tile(image=None, caption=text), [])], title=text)


def map_picture(path, text):
    """In the legend and in the title."""
    places = np.eye(2, dtype=np.float32)
    none = Sprites(sheets=[], columns=1, px=1, tiles_N=np.full(2, -1))
    draw_map(path, places, make_legend([text, "b"]), none, title=text)


@pytest.mark.parametrize("draw", [confusion, grid, map_picture])
@pytest.mark.parametrize("text", ["$a^$", r"a\$b$\no$", "$$", "$"])
def test_dollar_signs_begin_no_formula(tmp_path, draw, text):
    """Not in labels, keys or the names of collections; some are no formula at all."""
    draw(tmp_path / "it.png", text)
    with Image.open(tmp_path / "it.png") as picture:
        assert picture.format == "PNG"


def test_characters_that_no_font_has_are_said_once(tmp_path, caplog):
    """However often they stand there: in one line."""
    confusion(tmp_path / "it.png", "\U000f0001\U000f0002\U000f0001")
    assert caplog.messages == ["it.png: 2 characters are in no font here: boxes"]
