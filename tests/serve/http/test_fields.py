from __future__ import annotations

from functools import reduce

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from protos import horace_pb2 as pb
from serve.errors import QueueFullError, RequestError
from serve.http.body import Body, BodyMemory
from serve.http.fields import EMBED_FIELDS, SEARCH_FIELDS, read_embed, read_search
from serve.http.openapi import describe
from serve.services import RequestLimits

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
examples = st.dictionaries(st.sampled_from(["image", "vector", "id"]), json_values, max_size=2)
combined = st.lists(
    st.dictionaries(
        st.sampled_from(["positives", "negatives", "negative_weight"]),
        st.lists(examples, max_size=2) | json_values,
    ),
    max_size=2,
)


def fields(names):
    """Bodies with some of the fields that there are, and any value in each."""
    values = st.dictionaries(st.sampled_from(names), json_values | combined)
    files = st.none() | st.lists(st.binary(max_size=4), min_size=1, max_size=3)
    return st.builds(Body, fields=values, images=files, is_form=st.booleans())


@given(fields([*EMBED_FIELDS, "other"]))
@example(Body(fields={"images": [""], "model": "\ud800"}))
@example(Body(fields={"images": [""], "dims": "9" * 99}, is_form=True))
def test_whatever_embed_is_asked_is_read_or_refused(body):
    """With a message that can be sent, or with an error of the caller's."""
    try:
        message, _ = read_embed(body, "")
    except RequestError:
        return
    assert message.SerializeToString()


@given(fields([*SEARCH_FIELDS, "other"]))
@example(Body(fields={"vectors": [[1e300, -1e300]]}))
@example(Body(fields={"ids": ["9" * 99]}))
@example(Body(fields={"combined": [{"negative_weight": 1e300}]}))
@example(Body(fields={"combined": [{"negative_weight": float("nan")}]}))
@example(Body(fields={"vectors": [[10**400]]}))
def test_whatever_search_is_asked_is_read_or_refused(body):
    """With a message that can be sent, or with an error of the caller's."""
    try:
        message, _ = read_search(body, "")
    except RequestError:
        return
    assert message.SerializeToString()


@pytest.mark.parametrize(("path", "names"), [("embed", EMBED_FIELDS), ("search", SEARCH_FIELDS)])
def test_the_description_names_every_field(path, names):
    """And no other."""
    content = describe(RequestLimits())["paths"][f"/v1/{path}"]["post"]["requestBody"]["content"]
    assert set(content["application/json"]["schema"]["properties"]) == set(names)
    form = set(content["multipart/form-data"]["schema"]["properties"])
    assert form <= set(names)


@pytest.mark.parametrize(
    ("message", "names"), [(pb.EmbedRequest, EMBED_FIELDS), (pb.SearchRequest, SEARCH_FIELDS)]
)
def test_whatever_grpc_can_be_asked_http_can(message, names):
    """A field that is new in the contract is not forgotten here."""
    fields_of_grpc = set(message.DESCRIPTOR.fields_by_name)
    assert {"normalize" if name == "skip_normalize" else name for name in fields_of_grpc} <= set(
        names
    )


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("x" * 1000, "'xxxxxxxxxx"),
        (["x" * 1000] * 1000, "['xxxxxxxxxx"),
        (reduce(lambda inner, _: [inner], range(1000), []), "[[[[[[[...]]]]]]]"),
        ({"images": {"data": None}}, "{'images': {'data': None}}"),
    ],
)
def test_of_a_value_that_cannot_be_meant_the_beginning_is_shown(value, found):
    """And looked at: a caller may send megabytes, or a thousand lists in one another."""
    with pytest.raises(RequestError) as error:
        read_search(Body(fields={"k": value}), "")
    assert str(error.value).startswith(f"k: expected an integer, 1 to 4294967295, found {found}")
    assert len(str(error.value)) < 120


@given(st.lists(st.lists(st.integers(0, 50), max_size=4), max_size=6))
def test_memory_of_bodies_is_given_back(sizes):
    """However each of them grew, and whether there was room or not."""
    memory = BodyMemory(100)
    for grown in sizes:
        with memory.holding("a") as held:
            for size in grown:
                held.grow(size)
            assert memory.held_bytes == max([0, *grown])
    assert repr(memory) == "<BodyMemory 0 of 100 bytes>"


def test_the_bodies_of_one_caller_leave_memory_to_others():
    """An eighth of what it holds stays free beside several; one body alone may take it all."""
    memory = BodyMemory(90)
    with memory.holding("bulk") as one, memory.holding("bulk") as two, memory.holding("b") as other:
        one.grow(60)
        two.grow(20)
        two.check(20)
        with pytest.raises(
            QueueFullError,
            match="request bodies: expected at most 90 bytes in memory, found 80 held, 80 of them",
        ):
            two.grow(21)
        other.grow(10)
        assert memory.held_bytes == 90
    with memory.holding("bulk") as alone:
        alone.grow(90)


@pytest.mark.parametrize(("value", "is_form"), [(0.5, False), ("0.5", True), (None, False)])
def test_a_least_score_is_a_number_in_json_and_in_a_form(value, is_form):
    """0 is one, too; where it is not given there is none."""
    body = Body(fields={"ids": [1], "min_score": value, "diversity": 0}, is_form=is_form)
    message, _ = read_search(body, "")
    assert message.HasField("min_score") == (value is not None)
    assert message.min_score == (0 if value is None else 0.5)
    for wrong in ("near", [1], True, float("nan")):
        with pytest.raises(RequestError, match="min_score: expected a number, found"):
            read_search(Body(fields={"ids": [1], "min_score": wrong}, is_form=is_form), "")
