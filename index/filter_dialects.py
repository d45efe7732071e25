"""What a filter becomes: its tests, as expressions of whoever holds the rows.

Rules:
    A test is true or false of every row, never unknown: of a column that is null every test is
    false but `is_null`. What is made of tests by `negate`, `both` and `either` needs no third
    value.

It does not read filters: `index.filters` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import date
from typing import Any, Protocol, TypeAlias, TypeVar, cast

import pyarrow as pa
import pyarrow.compute as pc

Value: TypeAlias = str | int | float | bool | date
Field: TypeAlias = "pa.Field[pa.DataType]"
Expression = TypeVar("Expression")


class Dialect(Protocol[Expression]):
    """Makes the expressions of one kind of store."""

    def compare(self, field: Field, operator: str, value: Value) -> Expression:
        """Make a comparison; `operator` is =, <, <=, > or >=."""

    def is_in(self, field: Field, values: Sequence[Value]) -> Expression:
        """Make a test for any of some values."""

    def text_test(self, field: Field, test: str, text: str) -> Expression:
        """Make a test of a text; `test` is startswith, endswith or contains."""

    def is_null(self, field: Field) -> Expression:
        """Make the test for no value."""

    def negate(self, a: Expression) -> Expression:
        """Make the opposite."""

    def both(self, a: Expression, b: Expression) -> Expression:
        """Join two of which both have to be true."""

    def either(self, a: Expression, b: Expression) -> Expression:
        """Join two of which one has to be true."""


_COMPARISONS: dict[str, Callable[[pc.Expression, pc.Expression], pc.Expression]] = {
    "=": pc.equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}

_TEXT_TESTS: dict[str, Callable[[pc.Expression, str], pc.Expression]] = {
    "startswith": lambda column, text: pc.starts_with(column, text),
    "endswith": lambda column, text: pc.ends_with(column, text),
    "contains": lambda column, text: pc.match_substring(column, text),
}


class ArrowDialect:
    """Makes expressions of pyarrow, over tables that are at hand."""

    def compare(self, field: Field, operator: str, value: Value) -> pc.Expression:
        """See `Dialect`."""
        literal = pc.scalar(cast(Any, pa.scalar(value, field.type)))  # its stubs know no dates
        column = pc.field(field.name)
        return _COMPARISONS[operator](column, literal) & column.is_valid()

    def is_in(self, field: Field, values: Sequence[Value]) -> pc.Expression:
        """See `Dialect`."""
        column = pc.field(field.name)
        return column.isin(pa.array(values, field.type)) & column.is_valid()

    def text_test(self, field: Field, test: str, text: str) -> pc.Expression:
        """See `Dialect`."""
        column = pc.field(field.name)
        return _TEXT_TESTS[test](column, text) & column.is_valid()

    def is_null(self, field: Field) -> pc.Expression:
        """See `Dialect`."""
        return pc.is_null(pc.field(field.name))

    def negate(self, a: pc.Expression) -> pc.Expression:
        """See `Dialect`."""
        return ~a

    def both(self, a: pc.Expression, b: pc.Expression) -> pc.Expression:
        """See `Dialect`."""
        return a & b

    def either(self, a: pc.Expression, b: pc.Expression) -> pc.Expression:
        """See `Dialect`."""
        return a | b
