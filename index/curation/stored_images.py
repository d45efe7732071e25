"""Images of a collection, read from the sources that they came from.

Rules:
    A source is opened once. One that cannot be opened now is said once, and has no images.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from index.collection import Row
from models.command import shown
from models.errors import ImageError, SourceError
from models.image_source import ImageData, ImageSource
from models.images import open_source

log = logging.getLogger("horace.index")


class StoredImages:
    """Reads images, one at a time."""

    def __init__(self) -> None:
        """Begin with no source open."""
        self._sources: dict[str, ImageSource | None] = {}

    def load(self, row: Row) -> ImageData | None:
        """Read an image; None where its source cannot be opened.

        Raises:
            ImageError: it cannot be read now.
            SourceError: what holds it is damaged, or was replaced meanwhile.
        """
        if row.source not in self._sources:
            try:
                self._sources[row.source] = open_source(row.source)
            except SourceError as error:
                log.warning("%s", shown(str(error)))
                self._sources[row.source] = None
        source = self._sources[row.source]
        return None if source is None else source.load(row.key)


def load_images(rows: Sequence[Row], stored: StoredImages) -> list[ImageData | None]:
    """Read images; None for what cannot be read now, which the log says."""
    images: list[ImageData | None] = []
    for row in rows:
        try:
            images.append(stored.load(row))
        except (ImageError, SourceError) as error:
            log.warning("%s", shown(str(error)))
            images.append(None)
    return images
