"""Filters as expressions of Milvus.

Rules:
    Every test carries its own `is not null`, so that it is true or false of every row, in
    Milvus as here: `index.filter_dialects`.
    Dates and times are kept as texts of one form, whose order is theirs.
    `like` knows % and _ and no way around them: a text with one of them is refused.
    Sources may go by other names, as a server shows them: a test of theirs is worked out here,
    over the few sources that there are.

Source: https://milvus.io/docs/boolean.md, and what milvus-lite 3.2.2 answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime

import pyarrow as pa
import pyarrow.compute as pc

from index.filter_dialects import ArrowDialect, Field, Value
from index.filters import FilterError
from index.storage.rows import ROW_SCHEMA

_PATTERNS = {"startswith": "{}%", "endswith": "%{}", "contains": "%{}%"}


class MilvusDialect:
    """Makes expressions of Milvus."""

    def __init__(self, source_names: Mapping[str, str] | None = None) -> None:
        """Make expressions.

        Args:
            source_names: name of each source, by its URI; the URIs themselves where None.
        """
        self._source_names = source_names

    def compare(self, field: Field, operator: str, value: Value) -> str:
        """See `Dialect`."""
        if self._has_names(field):
            return self._of_sources(ArrowDialect().compare(field, operator, value))
        sign = "==" if operator == "=" else operator
        return _known(field, f"{column(field.name)} {sign} {literal(value)}")

    def is_in(self, field: Field, values: Sequence[Value]) -> str:
        """See `Dialect`."""
        if self._has_names(field):
            return self._of_sources(ArrowDialect().is_in(field, values))
        name = column(field.name)
        if name == field.name:
            return _known(field, f"{name} in [{', '.join(map(literal, values))}]")
        tests = " or ".join(f"{name} == {literal(value)}" for value in values)
        return _known(field, f"({tests})")  # `in` wants a plain name on its left

    def text_test(self, field: Field, test: str, text: str) -> str:
        """See `Dialect`."""
        if self._has_names(field):
            return self._of_sources(ArrowDialect().text_test(field, test, text))
        if re.search(r"[%_\\]", text):
            raise FilterError(
                f"filter, {test}",
                expected="a text without %, _ and \\ for a collection in Milvus",
                found=repr(text),
                mend="compare the whole text with = or in",
            )
        pattern = json.dumps(_PATTERNS[test].format(text), ensure_ascii=False)
        return _known(field, f"{column(field.name)} like {pattern}")

    def is_null(self, field: Field) -> str:
        """See `Dialect`."""
        return f"{column(field.name)} is null"

    def negate(self, a: str) -> str:
        """See `Dialect`."""
        return f"(not {a})"

    def both(self, a: str, b: str) -> str:
        """See `Dialect`."""
        return f"({a} and {b})"

    def either(self, a: str, b: str) -> str:
        """See `Dialect`."""
        return f"({a} or {b})"

    def _has_names(self, field: Field) -> bool:
        """Tell whether a column is that of the sources, and they have other names."""
        return field.name == "source" and self._source_names is not None

    def _of_sources(self, test: pc.Expression) -> str:
        """Make the test for the sources whose names pass a test."""
        names = self._source_names or {}
        table = pa.table({"source": list(names.values()), "uri": list(names)})
        return f"source in {json.dumps(table.filter(test)['uri'].to_pylist(), ensure_ascii=False)}"


def column(name: str) -> str:
    """Write the name of a column; of metadata as a key of JSON: it may be a word of Milvus."""
    return name if name in ROW_SCHEMA.names else f"$meta[{json.dumps(name, ensure_ascii=False)}]"


def literal(value: object) -> str:
    """Write a value."""
    return json.dumps(stored(value), ensure_ascii=False)


def stored(value: object) -> object:
    """Give a value as Milvus keeps it: dates as texts of one form."""
    if isinstance(value, datetime):
        plain = value if value.tzinfo is None else value.astimezone(UTC).replace(tzinfo=None)
        return plain.isoformat(timespec="microseconds")
    return value.isoformat() if isinstance(value, date) else value


def _known(field: Field, test: str) -> str:
    """Make a test false where there is no value."""
    return f"({column(field.name)} is not null and {test})"
