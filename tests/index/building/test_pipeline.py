import threading
from contextlib import closing
from itertools import count, pairwise

import numpy as np
import pytest

from index.building.part_file import RunKey
from index.building.part_set import PartSet, Share
from index.building.pipeline import (
    WINDOW,
    Crew,
    choose_crew,
    embed_batches,
    make_parts,
)
from index.embed import embed
from index.errors import CollectionError, SourceChangedError
from models.encoder import open_encoder
from models.errors import EncoderError, SourceError
from models.images import ImageRecord
from models.providers import GPU_BATCHES

WAIT_S = 30
BATCH, PART = 4, 12


@pytest.fixture
def encoder(bundle):
    """The tiny encoder, as a build opens it."""
    with closing(open_encoder(bundle.path, threads=1)) as opened:
        yield opened


class Watched:
    """An encoder that calls a function before each batch."""

    def __init__(self, encoder, before):
        self.encoder, self.before = encoder, before

    def __getattr__(self, name):
        return getattr(self.encoder, name)

    def encode(self, images_NHWC):
        """Call the function, then encode."""
        self.before(images_NHWC)
        return self.encoder.encode(images_NHWC)


def image(number):
    """Give the nth image, which is like no other."""
    return np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)


def make_records(n, *, read=image, listed=None):
    """Give n records; `listed` gets the numbers of those that were asked for."""
    for number in range(n):
        if listed is not None:
            listed.append(number)
        yield ImageRecord(f"{number:04}", None, lambda number=number: read(number))


def make_set(directory, n, encoder):
    """Give the parts, none so far, of a source of n images."""
    directory.mkdir(exist_ok=True)
    key = RunKey(source="made", source_count=n, fingerprint=encoder.fingerprint, dim=encoder.dim,
                 batch_size=BATCH, part_size=PART)  # fmt: skip
    return PartSet(directory, key)


def run(parts, encoder, n, *, crew=None, share=None, read=image):
    """Make what is missing; give the sizes of the batches."""
    batches = parts.missing(make_records(n, read=read), share)
    return list(make_parts(batches, encoder, parts, crew=crew or Crew(workers=3, encoding=3)))


def files(parts):
    """Give the bytes of every part."""
    return {file.name: file.read_bytes() for file in sorted(parts.directory.glob("part-*"))}


def test_parts_hold_what_their_records_give_whoever_is_at_work(tmp_path, encoder):
    """The number of workers changes no byte, and a vector is the encoder's for its image."""
    one, many = make_set(tmp_path / "one", 40, encoder), make_set(tmp_path / "many", 40, encoder)
    assert run(one, encoder, 40, crew=Crew(workers=1, encoding=1)) == [4] * 10
    assert run(many, encoder, 40, crew=Crew(workers=7, encoding=2)) == [4] * 10
    assert files(one) == files(many)
    assert [part.n_records for part in one.finished] == [12, 12, 12, 4]
    vectors = np.concatenate([block.vectors_ND for block in one.blocks()])
    expected = embed(encoder, np.stack([image(n) for n in range(40)]))
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    assert one.n_seen == one.n_records == 40


def test_a_part_is_written_while_the_next_is_embedded(tmp_path, encoder, monkeypatch):
    """The first part is not done before a batch of the second was with the encoder."""
    parts = make_set(tmp_path, 24, encoder)
    seen, second_begun, add = count(1), threading.Event(), parts.add

    def before(_):
        if next(seen) > PART // BATCH:
            second_begun.set()

    def add_late(batches):
        assert second_begun.wait(WAIT_S)
        add(batches)

    monkeypatch.setattr(parts, "add", add_late)
    run(parts, Watched(encoder, before), 24, crew=Crew(workers=1, encoding=1))
    assert len(parts.finished) == 2


def test_a_batch_is_decoded_while_another_is_encoded(tmp_path, encoder):
    """The encoder is not done with the first batch before an image of the second was read."""
    second_read = threading.Event()

    def read(number):
        if number >= BATCH:
            second_read.set()
        return image(number)

    def before(_):
        assert second_read.wait(WAIT_S)

    parts = make_set(tmp_path, 8, encoder)
    run(parts, Watched(encoder, before), 8, crew=Crew(workers=2, encoding=1), read=read)
    assert parts.n_images == 8


@pytest.mark.parametrize("n", [100, 400])
def test_what_is_at_work_is_bounded_whatever_the_size_of_the_source(tmp_path, encoder, n):
    """Records, pixels, vectors and parts are few at any moment, of 100 images or of 400."""
    crew = Crew(workers=3, encoding=2)
    lock = threading.Lock()
    now = {"listed": 0, "embedded": 0, "encoding": 0, "reading": 0, "adding": 0}
    most = dict.fromkeys(now, 0)

    def note(name, by):
        with lock:
            now[name] += by
            most[name] = max(most[name], now[name])

    def read(number):
        note("reading", 1)
        pixels = image(number)
        note("reading", -1)
        return pixels

    class Counting(Watched):
        def encode(self, images_NHWC):
            """Encode and take note."""
            note("encoding", 1)
            vectors = super().encode(images_NHWC)
            note("encoding", -1)
            note("embedded", len(images_NHWC))
            return vectors

    parts = make_set(tmp_path, n, encoder)
    add = parts.add

    def add_and_note(batches):
        note("adding", 1)
        add(batches)
        note("adding", -1)
        done = sum(map(len, batches))
        note("embedded", -done)
        note("listed", -done)

    parts.add = add_and_note
    listed = []
    batches = parts.missing(make_records(n, read=read, listed=listed))

    def counted():
        for batch in batches:
            note("listed", len(batch.records))
            yield batch

    list(make_parts(counted(), Counting(encoder, lambda _: None), parts, crew=crew))
    assert len(listed) == parts.n_images == n
    window = WINDOW * crew.workers * BATCH
    assert most["reading"] <= crew.workers
    assert most["encoding"] <= crew.encoding
    assert most["adding"] == 1
    assert most["embedded"] <= window + 2 * PART
    assert most["listed"] <= window + 2 * PART + BATCH
    assert now == dict.fromkeys(now, 0)


def test_batches_come_in_order_whichever_is_done_first(encoder):
    """The first batch waits for the second to be encoded, and still comes first."""
    second_done = threading.Event()

    def before(images_NHWC):
        if (images_NHWC[0] == image(0)).all():
            assert second_done.wait(WAIT_S)
        else:
            second_done.set()

    key = RunKey(source="", source_count=8, fingerprint="", dim=encoder.dim,
                 batch_size=BATCH, part_size=PART)  # fmt: skip
    batches = PartSet.__new__(PartSet)
    batches.key, batches._parts = key, {}
    made = list(
        embed_batches(
            batches.missing(make_records(8)),
            Watched(encoder, before),
            crew=Crew(workers=2, encoding=2),
        )
    )
    assert [batch.keys[0] for batch in made] == ["0000", "0004"]


def test_an_encoder_that_fails_leaves_the_parts_before_it(tmp_path, encoder):
    """The error comes through as it is; the whole parts before it are kept and not made again."""
    seen = count(1)

    def before(_):
        if next(seen) > 5:
            raise EncoderError("the encoder", expected="to work", found="that it does not")

    parts = make_set(tmp_path, 24, encoder)
    with pytest.raises(EncoderError, match="found that it does not"):
        run(parts, Watched(encoder, before), 24, crew=Crew(workers=1, encoding=1))
    assert [part.start for part in parts.finished] == [0]
    assert sum(run(parts, encoder, 24)) == 12


def test_a_damaged_source_leaves_every_whole_part_before_it(tmp_path, encoder):
    """Also one that was begun or complete when the damage was met."""

    def records():
        yield from make_records(2 * PART)
        raise SourceError("the shard", expected="a whole one", found="half of it")

    parts = make_set(tmp_path, 40, encoder)
    made = make_parts(parts.missing(records()), encoder, parts, crew=Crew(workers=3, encoding=3))
    with pytest.raises(SourceError, match="found half of it"):
        list(made)
    assert [part.start for part in parts.finished] == [0, PART]


def test_shares_make_every_part_once_and_a_gap_is_filled(tmp_path, encoder):
    """Three that share the parts give the files of one, in whatever order they come."""
    whole, shared = make_set(tmp_path / "w", 64, encoder), make_set(tmp_path / "s", 64, encoder)
    run(whole, encoder, 64)
    made = {n: run(shared, encoder, 64, share=Share(number=n, of=3)) for n in (2, 0, 1)}
    assert {n: sum(sizes) for n, sizes in made.items()} == {2: 16, 0: 24, 1: 24}
    # of six parts the last, the third of share 2, has four records
    assert files(shared) == files(whole)
    (tmp_path / "s" / "part-000000000012.parquet").unlink()
    shared.find()
    assert sum(run(shared, encoder, 64)) == 12
    assert files(shared) == files(whole)


def test_of_one_key_the_first_is_kept_whichever_part_was_made_first(tmp_path, encoder):
    """Parts made backwards hold, and reject, what parts made in order do."""

    def records():
        for number in range(36):  # 3 and 15 have one key, in the first part and the second
            key = "again" if number in (3, 15) else f"{number:04}"
            yield ImageRecord(key, None, lambda number=number: image(number))

    found = []
    for name, shares in (("forth", (0, 1, 2)), ("back", (2, 1, 0))):
        parts = make_set(tmp_path / name, 36, encoder)
        for number in shares:
            batches = parts.missing(records(), Share(number=number, of=3))
            list(make_parts(batches, encoder, parts, crew=Crew(workers=2, encoding=2)))
        parts.settle()
        rows = [row for block in parts.blocks() for row in block.rows["key"].to_pylist()]
        vectors = np.concatenate([block.vectors_ND for block in parts.blocks()])
        found.append((rows, vectors.tobytes(), parts.rejects, parts.n_images))
    assert found[0] == found[1]
    rows, _, (reject,), n_images = found[0]
    assert rows == [f"{n:04}" if n != 3 else "again" for n in range(36) if n != 15]
    assert (reject.key, reject.fault, n_images) == ("again", "duplicate_key", 35)


def test_a_source_that_goes_on_after_its_last_part_is_refused(tmp_path, encoder):
    """A short part was the end: more images than then are another source."""
    parts = make_set(tmp_path, 15, encoder)
    run(parts, encoder, 15)
    with pytest.raises(CollectionError, match="found others, '0015' among what differs"):
        run(parts, encoder, 17)


def test_a_source_that_ends_before_its_last_part_is_refused(tmp_path, encoder):
    """Processes that were killed may have left a gap, behind which the images are others'."""
    parts = make_set(tmp_path, None, encoder)
    run(parts, encoder, 36)
    for start in (0, 12):
        (tmp_path / f"part-{start:012}.parquet").unlink()
    parts.find()
    with pytest.raises(
        SourceChangedError, match=r"that .*24\.parquet was .* found no more than 20"
    ):
        run(parts, encoder, 20)
    with pytest.raises(SourceChangedError, match=r"found no more than 12; .* with --restart"):
        run(parts, encoder, 12, share=Share(number=1, of=2))


def test_a_crew_has_a_worker_a_cpu_and_one_more_for_each_request():
    """Who waits for a server or for a GPU needs no CPU, and gives it whole batches."""
    assert choose_crew(2, "bundle") == Crew(workers=2, encoding=2)
    assert choose_crew(2, "bundle,provider=cpu") == Crew(workers=2, encoding=2)
    remote = choose_crew(8, "horace://host:1/model", requests=4)
    assert remote == Crew(workers=12, encoding=4, slice_bytes=None)
    on_gpu = choose_crew(8, "bundle,provider=cuda", requests=4)
    assert on_gpu == Crew(workers=8 + GPU_BATCHES, encoding=GPU_BATCHES, slice_bytes=None)
    workers = [choose_crew(n, "bundle").workers for n in range(1, 20)]
    assert all(more > less for less, more in pairwise(workers))


@pytest.mark.parametrize("slice_bytes", [1, 12 * 12 * 3, 3 * 12 * 12 * 3, None])
def test_an_encoder_is_given_a_slice_at_a_time(tmp_path, encoder, slice_bytes):
    """What a large network holds does not grow with the batch, and no vector changes much."""
    sizes = []
    parts = make_set(tmp_path, 8, encoder)
    crew = Crew(workers=1, encoding=1, slice_bytes=slice_bytes)
    run(parts, Watched(encoder, lambda images: sizes.append(len(images))), 8, crew=crew)
    expected = {1: [1] * 8, 12 * 12 * 3: [1] * 8, 3 * 12 * 12 * 3: [3, 1] * 2, None: [4, 4]}
    assert sizes == expected[slice_bytes]
    vectors = np.concatenate([block.vectors_ND for block in parts.blocks()])
    np.testing.assert_allclose(
        vectors, embed(encoder, np.stack([image(n) for n in range(8)])), atol=1e-6
    )
