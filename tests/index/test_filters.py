import time
from datetime import UTC, date, datetime

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.filters import MAX_CHARACTERS, FilterError, parse_filter

SCHEMA = pa.schema(
    {
        "id": pa.int64(),
        "key": pa.string(),
        "label": pa.string(),
        "sharp": pa.bool_(),
        "score": pa.float32(),
        "taken": pa.timestamp("s"),
        "day": pa.date32(),
        "seen": pa.timestamp("us", "UTC"),
        "shot by": pa.string(),
        "words": pa.list_(pa.string()),
    }
)
ROWS = pa.table(
    {
        "id": [1, 2, 3, 4],
        "key": ["a/1.png", "a/2.png", "b/3.jpg", "b'4"],
        "label": ["coat", None, "bag", "Coat"],
        "sharp": [True, None, False, True],
        "score": [0.5, 1.5, None, -2e3],
        "taken": [0, 1, None, 2],
        "day": [date(2024, 5, 1), date(2023, 12, 31), None, date(1969, 7, 20)],
        "seen": [
            datetime(2024, 5, 1, 12, tzinfo=UTC),
            None,
            None,
            datetime(1999, 1, 1, tzinfo=UTC),
        ],
        "shot by": ["Ann", None, "Bo", "in"],
        "words": [["a"], None, None, None],
    },
    schema=SCHEMA,
)


def chosen(filter):
    """The ids of the rows that a filter leaves."""
    return ROWS.filter(parse_filter(filter, SCHEMA))["id"].to_pylist()


@pytest.mark.parametrize(
    ("filter", "ids"),
    [
        ("label = 'coat'", [1]),
        ('label == "coat"', [1]),
        ("label in ('coat', 'bag')", [1, 3]),
        ("key startswith 'a/'", [1, 2]),
        ("key endswith '.png' and key contains '2'", [2]),
        ("key = 'b''4'", [4]),
        ('key = "b\'4"', [4]),
        ("key >= 'b'", [3, 4]),
        ("id < 2 or id >= 4", [1, 4]),
        ("id in (2, +3, -7)", [2, 3]),
        ("score > .4", [1, 2]),
        ("score <= -2e3", [4]),
        ("sharp = true", [1, 4]),
        ("sharp in (false)", [3]),
        ("taken is not null", [1, 2, 4]),
        ("taken > '1970-01-01'", [2, 4]),
        ("taken in ('1970-01-01T00:00:01', '1970-01-01T01:00:02+01:00')", [2, 4]),
        ("day >= '2023-12-31' and not day = '2024-05-01'", [2]),
        ("day in ('1969-07-20')", [4]),
        ("seen = '2024-05-01T14:00:00+02:00'", [1]),
        ("seen < '2024-05-01 12:00:00.000001Z'", [1, 4]),
        ("seen != '2024-05-01T12:00'", [2, 3, 4]),
        ("`shot by` = 'Ann' or `id` = 4", [1, 4]),
        ("words is null", [2, 3, 4]),
        ("  label\n=\t'coat' ", [1]),
        ("label='coat'or id=2", [1, 2]),
    ],
)
def test_what_a_filter_leaves(filter, ids):
    """Comparisons, lists, parts of texts, numbers, booleans, missing values."""
    assert chosen(filter) == ids


@pytest.mark.parametrize(
    ("filter", "opposite"),
    [
        ("label = 'coat'", "label != 'coat'"),
        ("label in ('coat')", "label not in ('coat')"),
        ("label startswith 'c'", "label not startswith 'c'"),
        ("label endswith 'g'", "LABEL not endswith 'g'".replace("LABEL", "label")),
        ("label contains 'oa'", "label NOT CONTAINS 'oa'"),
        ("score > 0", "not score > 0"),
        ("label is null", "label is not null"),
    ],
)
def test_an_opposite_has_all_the_others(filter, opposite):
    """A test is never unknown: what has no label is not a coat."""
    assert sorted(chosen(filter) + chosen(opposite)) == [1, 2, 3, 4]
    assert chosen(f"not ({filter})") == chosen(opposite)
    assert chosen(f"not not {opposite}") == chosen(opposite)


def test_and_binds_more_than_or_and_parentheses_more_than_both():
    """As everywhere."""
    assert chosen("id = 1 or id = 2 and label = 'coat'") == [1]
    assert chosen("(id = 1 or id = 2) and label is null") == [2]
    assert chosen("not id = 1 and id < 3") == [2]


@pytest.mark.parametrize(
    ("filter", "message"),
    [
        (
            "lable = 'coat'",
            "filter, character 1: expected a column: id, key, label, sharp, score, taken, day, "
            "seen, `shot by`, words, found 'lable'",
        ),
        ("id = 1 and Label = 'x'", "character 12: expected a column: id, key, label, sharp"),
        ("", "character 1: expected a column: id, key, label, sharp, score, taken, day, seen"),
        ("1 = 1", "character 1: expected a column"),
        ("and", "character 1: expected a column"),
        ("label", "character 6: expected a comparison, 'in', 'startswith', 'endswith', 'contains'"),
        ("label like 'x'", "character 7: expected a comparison, 'in', 'startswith'"),
        ("label = coat", "character 9: expected a text between quotes, as label is one, found"),
        ("label = 'coat", "character 9: expected a closing ', found \"'coat\""),
        ("label = 'a' 'b'", "character 13: expected 'and', 'or' or the end"),
        ("(id = 1", "character 8: expected ')', found the end"),
        ("id in (1, 2", "character 12: expected ',' or ')', found the end"),
        ("id in ()", "character 8: expected a whole number, as id is one, found ')'"),
        ("id in 1", "character 7: expected '(', found '1'"),
        ("id = 1.5", "character 6: expected a whole number, as id is one, found '1.5'"),
        ("id = 9223372036854775808", "expected a whole number, as id is one of type int64"),
        ("id = 123456789012345678901", "character 6: expected a whole number, as id is one"),
        ("id contains '1'", "character 4: expected a comparison or 'in' for id, which is no text"),
        ("label contains 1", "character 16: expected a text between quotes, found '1'"),
        ("sharp = 'yes'", "character 9: expected true or false, as sharp is"),
        ("sharp < true", "character 7: expected = or != for sharp, which is true or false"),
        ("score = 'x'", "character 9: expected a number, as score is one"),
        (
            "taken = 3",
            "9: expected a time such as '2024-05-01T18:30:00', as taken is one, found '3'",
        ),
        ("seen > 'noon'", "character 8: expected a time such as '2024-05-01T18:30:00', as seen is"),
        ("day = '1.5.2024'", "character 7: expected a date such as '2024-05-01', as day is one"),
        ("day = '2024-05-01T12:00'", "character 7: expected a date such as '2024-05-01', as day"),
        ("day contains '2024'", "character 5: expected a comparison or 'in' for day, which is no"),
        ("words = 'a'", "'is null' or 'is not null': words is list<"),
        ("`label = 'a'", "character 1: expected a closing `, found"),
        ("`shot` = 'a'", "character 1: expected a column: id, key, label"),
        ("label is 'x'", "character 10: expected 'null'"),
        ("id = 1; drop", "character 7: expected a column, a value or an operator, found ';'"),
        ("__import__('os')", "character 1: expected a column"),
        ("not " * 80 + "id = 1", "expected at most 64 parentheses and nots within one another"),
        ("(" * 80 + "id = 1", "expected at most 64 parentheses and nots within one another"),
        ("label = 'a\ud800'", "character 11: expected text that UTF-8 can hold"),
        ("x" * (MAX_CHARACTERS + 1), "filter: expected at most 65536 characters, found 65537"),
        ("label = " + "z" * 5000, f"found '{'z' * 40}'..."),
    ],
)
def test_an_error_says_where_and_what_there_is(filter, message):
    """The character, what would have been right, and what stands there."""
    with pytest.raises(FilterError) as error:
        parse_filter(filter, SCHEMA)
    assert message in str(error.value)
    assert len(str(error.value)) < 300


def test_a_long_list_is_one_test_and_tests_are_bounded():
    """Thousands of values are looked up at once; thousands of tests would be made one by one."""
    assert chosen(f"id in ({', '.join(map(str, range(3, 9000)))})") == [3, 4]
    assert chosen(" or ".join(["id = 9"] * 255 + ["id = 3"])) == [3]
    with pytest.raises(FilterError, match="at most 256 tests; a list in 'in' is one, found 'id'"):
        chosen(" or ".join(["id = 9"] * 257))


texts = st.text(alphabet="ab'\"\\ %_é\n", max_size=6)


@given(text=texts, double=st.booleans())
def test_any_text_can_be_asked_for(text, double):
    """A quote is written twice, and nothing else means anything."""
    quote = '"' if double else "'"
    schema = pa.schema({"key": pa.string()})
    rows = pa.table({"key": [text, text + "x", "x" + text]}, schema=schema)
    literal = f"{quote}{text.replace(quote, quote * 2)}{quote}"
    keys = rows.filter(parse_filter(f"key = {literal}", schema))["key"].to_pylist()
    assert set(keys) == {text}
    assert len(rows.filter(parse_filter(f"key contains {literal}", schema))) == 3


tests = st.sampled_from(["a = 0", "a != 1", "b = 'x'", "b in ('x', 'y')", "b is null", "a < 2"])
MEANINGS = {
    "a = 0": lambda a, b: a == 0,
    "a != 1": lambda a, b: a != 1,
    "b = 'x'": lambda a, b: b == "x",
    "b in ('x', 'y')": lambda a, b: b in ("x", "y"),
    "b is null": lambda a, b: b is None,
    "a < 2": lambda a, b: a is not None and a < 2,
}


@st.composite
def filters(draw, depth=0):
    """A filter as text, and what it means as a function of a and b."""
    kind = draw(st.sampled_from(["test", "not", "and", "or"])) if depth < 4 else "test"
    if kind == "test":
        text = draw(tests)
        return text, MEANINGS[text]
    left, means_left = draw(filters(depth + 1))
    if kind == "not":
        return f"not ({left})", lambda a, b: not means_left(a, b)
    right, means_right = draw(filters(depth + 1))
    if kind == "and":
        return f"({left}) and ({right})", lambda a, b: means_left(a, b) and means_right(a, b)
    return f"(({left}) or ({right}))", lambda a, b: means_left(a, b) or means_right(a, b)


@settings(max_examples=60)
@given(filters())
def test_filters_mean_what_python_means(pair):
    """Of any rows, missing values included, those are left for which Python says so."""
    text, means = pair
    values = [(a, b) for a in (None, 0, 1, 2) for b in (None, "x", "y", "z")]
    schema = pa.schema({"a": pa.int64(), "b": pa.string(), "row": pa.int64()})
    columns = [*zip(*values, strict=True), range(len(values))]
    rows = pa.table([list(column) for column in columns], schema=schema)
    found = rows.filter(parse_filter(text, schema))["row"].to_numpy()
    assert np.sort(found).tolist() == [n for n, (a, b) in enumerate(values) if means(a, b)]


def test_a_long_number_that_is_none_is_refused_at_once():
    """Each digit is looked at once, in milliseconds; with its square it would be half a minute."""
    started_s = time.process_time()
    with pytest.raises(FilterError, match="character 6: expected a column, a value or an operator"):
        parse_filter("id = " + "1" * (MAX_CHARACTERS - 6) + "a", SCHEMA)
    assert time.process_time() - started_s < 2
