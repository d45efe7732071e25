"""One image read to train on, with patience where it is the storage that fails.

Rules:
    What the file is to blame for (it is gone, may not be read, is damaged) stays an
    `ImageError`: the image is skipped, and would be so another time.
    What the storage is to blame for is tried again for some seconds, and then ends the
    training. An image that was skipped now and read after a resume would make the batches a
    function of the storage, too.
"""

from __future__ import annotations

import logging
import os
import time

from models.errors import ImageError, SourceError
from models.image_source import storage_fault
from models.images import ImageData, ImageRecord
from train.errors import TrainError

WAITS_S = (1.0, 2.0, 4.0, 8.0)
"""Before each further try: a server that is restarted or a path that fails over takes seconds."""

log = logging.getLogger("horace")


def read_image(record: ImageRecord) -> ImageData:
    """Read an image, waiting for storage that fails for a moment; safe from any thread.

    Raises:
        ImageError: the image cannot be used.
        TrainError: the storage goes on failing, or the shard was replaced.
    """
    waits_s = iter(WAITS_S)
    while True:
        try:
            return record.read()
        except ImageError as error:
            fault = storage_fault(error)
            if fault is None:
                raise
            wait_s = next(waits_s, None)
            if wait_s is None:
                raise _storage_failed(record, fault) from error
            log.warning("%s: %s; trying again in %g s", record.key, os.strerror(fault), wait_s)
        except SourceError as error:
            raise TrainError(
                f"reading {record.key}",
                expected="the source as it was when this sitting began",
                found=str(error),
                mend="a run that has begun goes on from its last checkpoint with --resume, if the "
                "source has its images still",
            ) from error
        time.sleep(wait_s)


def _storage_failed(record: ImageRecord, fault: int) -> TrainError:
    """Make the error for storage that was waited for in vain."""
    return TrainError(
        f"reading {record.key}",
        expected="storage that works",
        found=f"{os.strerror(fault)}, {len(WAITS_S) + 1} times in {sum(WAITS_S):g} s",
        mend="see to the storage, and a run that has begun goes on from its last checkpoint with "
        "--resume; if this file alone is lost, put other bytes of its length in its place: a "
        "stream, and a new run, pass over it as damaged",
    )
