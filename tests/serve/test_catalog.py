from __future__ import annotations

from dataclasses import dataclass

import pytest

from models.errors import FingerprintMismatchError, UsageError
from serve.catalog import Catalog, refuse_taken_name
from serve.errors import UnknownNameError


@dataclass(eq=False)
class Thing:
    """Stands for an encoder, its engine, or a collection: only its fingerprint is looked at."""

    fingerprint: str = "a" * 64
    encoder: str = "bundle"
    alive: bool = True
    closed: bool = False

    def close(self) -> None:
        """Note it."""
        self.closed = True


def put_model(catalog: Catalog, name: str, version: str, fingerprint: str = "a") -> Thing:
    """Offer a model of that fingerprint; what is given back says whether it was closed."""
    thing = Thing(fingerprint * 64)
    catalog.put_model(name, thing, thing, version=version, close=thing.close)
    return thing


def put_collection(catalog: Catalog, name: str, fingerprint: str = "a") -> Thing:
    """Offer a collection of that fingerprint."""
    thing = Thing(fingerprint * 64)
    catalog.put_collection(name, thing, close=thing.close)
    return thing


def test_a_version_that_is_leased_outlives_its_place():
    """Whoever has leased version 1 uses it to the end; the next one gets version 2."""
    catalog = Catalog()
    one = put_model(catalog, "m", "1")
    with catalog.lease_model("m") as leased:
        two = put_model(catalog, "m", "2")
        catalog.withdraw_model("m", "1")
        assert (leased.version, leased.encoder, one.closed) == ("1", one, False)
        with catalog.lease_model() as next_leased:
            assert next_leased.encoder is two
    assert one.closed
    assert not two.closed


def test_versions_are_ordered_by_number():
    """The newest is served where none is named, an older one by its number."""
    catalog = Catalog()
    for version in ("9", "10", "2"):
        put_model(catalog, "m", version)
    assert list(catalog.versions["m"]) == ["10", "9", "2"]
    assert catalog.model("m").version == "10"
    assert catalog.model("m", "2").version == "2"
    with pytest.raises(
        UnknownNameError,
        match=r"^version of model 'm': expected '10' or '9' or '2', found '3'; name one that is ",
    ):
        catalog.lease_model("m", "3")
    catalog.withdraw_model("m", "10")
    assert catalog.model("m").version == "9"


def test_the_default_stays_the_default():
    """A request without a name does not land elsewhere because the default was unloaded."""
    catalog = Catalog()
    put_model(catalog, "first", "1")
    put_model(catalog, "second", "1")
    assert catalog.model().name == "first"
    catalog.withdraw_model("first", "1")
    with pytest.raises(UnknownNameError, match=r"^model: expected 'second', found 'first';"):
        catalog.lease_model()
    put_model(catalog, "first", "2")
    assert catalog.model().version == "2"


def test_of_an_unknown_name_the_beginning_is_repeated():
    """A caller may send megabytes of it."""
    catalog, long = Catalog(), "x" * 100_000
    put_model(catalog, "m", "1")
    for find in (
        lambda: catalog.model(long),
        lambda: catalog.model("m", long),
        lambda: catalog.collection(long),
    ):
        with pytest.raises(UnknownNameError, match=r"found 'x{80}';"):
            find()


def test_a_taken_name_is_refused():
    """Two bundles of one name are a mistake, and the line says how to mend it."""
    catalog = Catalog()
    put_model(catalog, "m", "1")
    refuse_taken_name("--bundle", "other", catalog.models)
    with pytest.raises(UsageError, match="--bundle m: expected a name of its own"):
        refuse_taken_name("--bundle", "m", catalog.models)


def test_a_collection_keeps_the_model_that_made_it():
    """The model changes; the collection's queries go to the old version until it goes, too."""
    catalog = Catalog()
    one = put_model(catalog, "m", "1", "a")
    old = put_collection(catalog, "c", "a")
    put_model(catalog, "m", "2", "b")
    catalog.withdraw_model("m", "1")
    assert catalog.collection("c").model.encoder is one
    assert not one.closed
    with catalog.lease_collection("c"):
        put_collection(catalog, "c", "b")
        assert not old.closed
        assert not one.closed
    assert old.closed
    assert one.closed
    assert catalog.collection("c").model.version == "2"


def test_a_collection_moves_to_a_newer_version_that_fits():
    """The same encoder, loaded again: the old version is freed, the collection stays open."""
    catalog = Catalog()
    one = put_model(catalog, "m", "1", "a")
    collection = put_collection(catalog, "c", "a")
    with catalog.lease_collection() as leased:
        two = put_model(catalog, "m", "2", "a")
        catalog.withdraw_model("m", "1")
        assert (leased.model.encoder, one.closed) == (one, False)
        assert catalog.collection().model.encoder is two
    assert one.closed
    assert not collection.closed
    put_collection(catalog, "c", "a")
    assert collection.closed
    assert not two.closed


def test_a_version_of_the_same_number_takes_its_place():
    """A bundle replaced under the number it had: whoever has the old one keeps it."""
    catalog = Catalog()
    one = put_model(catalog, "m", "7")
    with catalog.lease_model():
        two = put_model(catalog, "m", "7")
        assert not one.closed
        assert catalog.model().encoder is two
    assert one.closed
    assert list(catalog.versions["m"]) == ["7"]


def test_a_collection_rebuilt_by_the_old_encoder_stays_with_it():
    """A version that only its collection keeps still fits a newer build of that collection."""
    catalog = Catalog()
    one = put_model(catalog, "m", "1", "a")
    put_collection(catalog, "c", "a")
    put_model(catalog, "m", "2", "b")
    catalog.withdraw_model("m", "1")
    put_collection(catalog, "c", "a")
    assert catalog.collection("c").model.encoder is one
    assert not one.closed
    put_collection(catalog, "c", "b")
    assert one.closed


def test_a_collection_that_fits_no_model_changes_nothing():
    """The one that was offered goes on, and the line names both fingerprints."""
    catalog = Catalog()
    put_model(catalog, "m", "1", "a")
    old = put_collection(catalog, "c", "a")
    with pytest.raises(FingerprintMismatchError) as error:
        put_collection(catalog, "c", "b")
    assert "a" * 64 in str(error.value)
    assert "b" * 64 in str(error.value)
    assert catalog.collection("c").collection is old
    assert not old.closed


def test_a_collection_beside_no_model_is_told_that_there_is_none():
    """As where every model of a repository was refused."""
    with pytest.raises(FingerprintMismatchError) as error:
        put_collection(Catalog(), "c")
    expected = "expected encoder of a model that is served, of which there is none, found encoder a"
    assert expected in str(error.value)


def test_whatever_computes_for_callers_has_to_be_alive():
    """The newest version, one that is kept, and one that only its collection keeps."""
    catalog = Catalog()
    things = {"1": put_model(catalog, "m", "1", "a")}
    put_collection(catalog, "c", "a")
    for version in ("2", "3"):
        things[version] = put_model(catalog, "m", version, "b")
    catalog.withdraw_model("m", "1")
    assert [(model.name, model.version) for model in catalog.running] == [
        ("m", "3"),
        ("m", "2"),
        ("m", "1"),
    ]
    assert catalog.alive
    for thing in things.values():
        thing.alive = False
        assert not catalog.alive
        thing.alive = True
    put_collection(catalog, "c", "b")
    assert [model.version for model in catalog.running] == ["3", "2"]


def test_closing_closes_what_was_swapped_out_and_is_still_used():
    """An owner that ends waits for nobody."""
    catalog = Catalog()
    one = put_model(catalog, "m", "1")
    collection = put_collection(catalog, "c")
    with catalog.lease_model():
        two = put_model(catalog, "m", "2")
        catalog.withdraw_model("m", "1")
        catalog.close()
        assert one.closed
        assert two.closed
        assert collection.closed
