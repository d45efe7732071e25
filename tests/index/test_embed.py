import errno
import os
from contextlib import closing
from functools import partial
from itertools import islice

import numpy as np
import pytest

from index.embed import BATCHES_AHEAD, decode_batches, embed
from models.encoder import open_encoder
from models.errors import ImageError, ImageFault, SourceError
from models.images import ImageRecord, open_source


@pytest.fixture
def encoder(bundle):
    """The tiny encoder, open."""
    with closing(open_encoder(bundle.path, threads=1)) as opened:
        yield opened


def make_records(n, *, broken=(), fail_at=None, asked=None):
    """Give n records of one grey level each; some cannot be read, one may break the source."""

    def read(number):
        if number in broken:
            raise ImageError(ImageFault.CORRUPT, f"image {number}")
        return np.full((12, 12, 3), number, np.uint8)

    for number in range(n):
        if number == fail_at:
            raise SourceError("shard", expected="a tar file", found="its first half")
        if asked is not None:
            asked.append(number)
        yield ImageRecord(str(number), None, lambda number=number: read(number))


@pytest.mark.parametrize("threads", [1, 4])
def test_batches_keep_the_order_of_the_source(encoder, threads):
    """However many threads decode, record n is the nth."""
    batches = list(decode_batches(make_records(70), encoder, batch_size=32, threads=threads))
    assert [len(batch) for batch in batches] == [32, 32, 6]
    assert [key for batch in batches for key in batch.keys] == [str(n) for n in range(70)]
    levels = np.concatenate([batch.images_NHWC for batch in batches])[:, 0, 0, 0]
    assert levels.tolist() == list(range(70))


def test_a_bad_image_is_a_reject_and_its_batchmates_go_on(encoder):
    """Batches are cut by records, so that rejects do not move what follows."""
    records = make_records(9, broken={0, 3, 4, 5, 6, 7, 8})
    first, second, third = decode_batches(records, encoder, batch_size=3)
    assert first.keys == ["1", "2"]
    assert [(one.key, one.fault, one.message) for one in first.rejects] == [
        ("0", "corrupt", "image 0")
    ]
    assert second.keys == third.keys == []
    assert second.images_NHWC.shape == (0, 12, 12, 3)
    assert embed(encoder, second.images_NHWC).shape == (0, 16)
    assert len(first) == len(second) == len(third) == 3


def test_an_image_that_its_storage_keeps_back_ends_the_stream(encoder):
    """It may be good another time; one that is gone is a reject."""

    def read(number):
        fault = OSError(number, os.strerror(number))
        raise ImageError(ImageFault.UNREADABLE, "image", found=fault.strerror) from fault

    records = [
        ImageRecord(os.strerror(n), None, partial(read, n)) for n in (errno.ENOENT, errno.EIO)
    ]
    gone, away = decode_batches(records[:1], encoder, batch_size=1), records[1:]
    assert [reject.fault for batch in gone for reject in batch.rejects] == ["unreadable"]
    with pytest.raises(SourceError) as caught:
        list(decode_batches(away, encoder, batch_size=1))
    assert str(caught.value).startswith(
        "reading Input/output error: expected storage that works, found Input/output error; see to "
        "it and run the same command again; if this file alone is lost, put an empty one"
    )


def test_reading_ahead_is_bounded(encoder):
    """Memory does not grow with the source: at most a few batches are asked for."""
    asked = []
    batches = decode_batches(make_records(1000, asked=asked), encoder, batch_size=10)
    for n, _ in zip(range(5), batches, strict=False):
        assert len(asked) <= 10 * (n + 1 + BATCHES_AHEAD)
    batches.close()
    assert len(asked) <= 10 * (5 + BATCHES_AHEAD)


def test_a_damaged_source_ends_the_stream(encoder):
    """The batches before it are good, and the error says what is damaged."""
    batches = decode_batches(make_records(60, fail_at=45), encoder, batch_size=10)
    good = [key for batch in islice(batches, 2) for key in batch.keys]
    assert good == [str(n) for n in range(20)]
    with pytest.raises(SourceError, match="shard: expected a tar file"):
        list(batches)


def test_vectors_have_unit_length_and_do_not_depend_on_the_batch(encoder, train_folder):
    """The same image gives the same vector, alone or among others."""
    records = open_source(str(train_folder)).records()
    (batch,) = decode_batches(records, encoder, batch_size=100)
    together = embed(encoder, batch.images_NHWC)
    assert together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    alone = np.concatenate([embed(encoder, image[None]) for image in batch.images_NHWC])
    np.testing.assert_allclose(alone, together, atol=1e-6)
