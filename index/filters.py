"""The filter language: which images of a collection may be found, by their metadata.

    label = 'Coat'
    label in ('Coat', 'Shirt') and not key startswith 'train/0'
    (label is null or label != "Bag") and source contains 'fashion'

Grammar:
    filter  = and {"or" and}
    and     = term {"and" term}
    term    = "not" term | "(" filter ")" | test
    test    = COLUMN ("=" | "==" | "!=" | "<" | "<=" | ">" | ">=") VALUE
            | COLUMN ["not"] "in" "(" VALUE {"," VALUE} ")"
            | COLUMN ["not"] ("startswith" | "endswith" | "contains") TEXT
            | COLUMN "is" ["not"] "null"
    VALUE   = TEXT | integer | number | "true" | "false"
    TEXT    = between ' or ", where the same quote twice stands for itself
    COLUMN  = a word, or any name between two `

    label = 'Coat' and price < 9.5 and taken >= '2024-05-01' and `shot by` is not null

Rules:
    A test is true or false, never unknown: of an image without a label `label = 'Coat'` is
    false, and `label != 'Coat'`, its opposite, is true.
    Words are the same in capitals; names of columns and texts are not.
    Dates and times are texts of ISO 8601, `2024-05-01` or `2024-05-01T18:30:00`. A time with an
    offset, such as `Z`, is put at its place in UTC, and so is one without where the column is.
    Nothing is evaluated but what the grammar has: the result is an expression of pyarrow, or
    of whatever other dialect is given (`index.filter_dialects`).
    An error names the character where it stands, and the columns that there are.
    Length and depth are bounded: a filter may come from anybody.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Generic, cast

import pyarrow as pa
import pyarrow.compute as pc

from index.filter_dialects import ArrowDialect, Dialect, Expression, Field, Value
from models.errors import UsageError

MAX_CHARACTERS = 1 << 16
"""Of a filter: room for a list of some thousands of keys."""

MAX_DEPTH = 64
"""Of parentheses and `not`s within one another."""

MAX_TESTS = 256
"""Of one filter, each of which looks at every row; a list in `in` is one."""

SHOWN_CHARACTERS = 40
"""Of what was found, in an error."""

_TOKEN = re.compile(
    r"""\s*(?:
        (?P<text>'(?:[^']|'')*'|"(?:[^"]|"")*")
      | (?P<name>`[^`]+`)
      | (?P<number>[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?(?!\w))
      | (?P<word>[^\W\d]\w*)
      | (?P<sign>==|!=|<=|>=|[=<>(),])
    )""",
    re.VERBOSE,
)

_KEYWORDS = frozenset(
    ("and", "or", "not", "in", "is", "null", "true", "false", "startswith", "endswith", "contains")
)

_COMPARISONS = ("=", "==", "!=", "<", "<=", ">", ">=")
_TEXT_TESTS = ("startswith", "endswith", "contains")


class FilterError(UsageError):
    """A filter that cannot be read, or that asks for a column that is not there."""


def is_nameable(column: str) -> bool:
    """Tell whether a filter can name a column."""
    return bool(column) and "`" not in column


def parse_filter(text: str, schema: pa.Schema) -> pc.Expression:
    """Turn a filter into an expression of pyarrow over the columns of `schema`.

    Raises:
        FilterError: see `parse_filter_as`.
    """
    return parse_filter_as(ArrowDialect(), text, schema)


def parse_filter_as(dialect: Dialect[Expression], text: str, schema: pa.Schema) -> Expression:
    """Turn a filter into an expression of a dialect over the columns of `schema`.

    Raises:
        FilterError: it is not of the grammar, too long or too deep, names no column, or
            compares one with a value of another type; says at which character.
    """
    if len(text) > MAX_CHARACTERS:
        raise FilterError(
            "filter",
            expected=f"at most {MAX_CHARACTERS} characters",
            found=str(len(text)),
            mend="search by parts, or filter by a column that groups the images",
        )
    if not text.isprintable() and (lone := re.search("[\ud800-\udfff]", text)):
        token = _Token("sign", lone[0], lone.start())
        raise token.error("text that UTF-8 can hold")
    parser = _Parser(_tokens(text), schema, dialect)
    expression = parser.filter(0)
    parser.expect_end()
    return expression


@dataclass(frozen=True, slots=True)
class _Token:
    """One word of a filter; `kind` is text, number, word, name, sign or end."""

    kind: str
    text: str
    position: int

    @property
    def keyword(self) -> str:
        """The word or sign in lower case; empty for what is none."""
        return self.text.lower() if self.kind in ("word", "sign") else ""

    @property
    def shown(self) -> str:
        """What an error says was found."""
        if self.kind == "end":
            return "the end"
        cut = self.text if len(self.text) <= SHOWN_CHARACTERS else self.text[:SHOWN_CHARACTERS]
        return repr(cut) + ("..." if cut != self.text else "")

    def error(self, expected: str) -> FilterError:
        """Say what should have stood here."""
        where = f"filter, character {self.position + 1}"
        return FilterError(where, expected=expected, found=self.shown)


def _tokens(text: str) -> list[_Token]:
    """Cut a filter into words; the last token is its end."""
    tokens, position, length = [], 0, len(text.rstrip())
    while position < length:
        match = _TOKEN.match(text, position)
        if match is None:
            start = position + len(text[position:]) - len(text[position:].lstrip())
            if text[start] in "'\"`":
                quote = text[start]
                raise _Token("text", text[start:], start).error(f"a closing {quote}")
            rest = re.match(r"\S+", text[start:])
            assert rest is not None
            raise _Token("sign", rest[0], start).error("a column, a value or an operator")
        kind = match.lastgroup
        assert kind is not None
        tokens.append(_Token(kind, match[kind], match.start(kind)))
        position = match.end()
    return [*tokens, _Token("end", "", length)]


class _Parser(Generic[Expression]):
    """Reads tokens by recursive descent, a method a rule of the grammar."""

    def __init__(
        self, tokens: Sequence[_Token], schema: pa.Schema, dialect: Dialect[Expression]
    ) -> None:
        self._tokens = tokens
        self._make = dialect
        self._schema = schema
        self._next = 0
        self._tests = 0

    def filter(self, depth: int) -> Expression:
        """Read `and {"or" and}`."""
        parts = [self._conjunction(depth)]
        while self._take("or"):
            parts.append(self._conjunction(depth))
        return _fold(parts, self._make.either)

    def expect_end(self) -> None:
        """Refuse what is left over."""
        if self._token.kind != "end":
            raise self._token.error("'and', 'or' or the end")

    def _conjunction(self, depth: int) -> Expression:
        """Read `term {"and" term}`."""
        parts = [self._term(depth)]
        while self._take("and"):
            parts.append(self._term(depth))
        return _fold(parts, self._make.both)

    def _term(self, depth: int) -> Expression:
        """Read a negation, a filter in parentheses, or a test."""
        if depth > MAX_DEPTH:
            raise self._token.error(f"at most {MAX_DEPTH} parentheses and nots within one another")
        if self._take("not"):
            return self._make.negate(self._term(depth + 1))
        if self._take("("):
            inner = self.filter(depth + 1)
            self._expect(")")
            return inner
        return self._test()

    def _test(self) -> Expression:
        """Read one test of one column."""
        self._tests += 1
        if self._tests > MAX_TESTS:
            raise self._token.error(f"at most {MAX_TESTS} tests; a list in 'in' is one")
        field = self._column()
        if self._take("is"):
            is_negated = self._take("not")
            self._expect("null")
            return self._negated(self._make.is_null(field), is_negated)
        if self._token.keyword in _COMPARISONS:
            return self._comparison(field)
        is_negated = self._take("not")
        token = self._token
        if self._take("in"):
            test = self._make.is_in(field, self._values(field))
        elif token.keyword in _TEXT_TESTS:
            test = self._text_test(field)
        else:
            raise token.error("a comparison, 'in', 'startswith', 'endswith', 'contains' or 'is'")
        return self._negated(test, is_negated)

    def _negated(self, test: Expression, is_negated: bool) -> Expression:
        """Give a test or its opposite."""
        return self._make.negate(test) if is_negated else test

    def _comparison(self, field: Field) -> Expression:
        """Read an operator and a value."""
        operator = self._advance()
        value = self._value(field)
        is_equality = operator.text in ("=", "==", "!=")
        if not is_equality and pa.types.is_boolean(field.type):
            raise operator.error(f"= or != for {field.name}, which is true or false")
        test = self._make.compare(field, "=" if is_equality else operator.text, value)
        return self._negated(test, operator.text == "!=")

    def _text_test(self, field: Field) -> Expression:
        """Read an operator that texts alone have, and its text."""
        operator = self._advance()
        if not _is_text(field.type):
            raise operator.error(f"a comparison or 'in' for {field.name}, which is no text")
        token = self._advance()
        if token.kind != "text":
            raise token.error("a text between quotes")
        return self._make.text_test(field, operator.keyword, _unquote(token))

    def _column(self) -> Field:
        """Read the name of a column."""
        token = self._advance()
        name = token.text.strip("`") if token.kind == "name" else token.text
        is_name = token.kind == "name" or (token.kind == "word" and token.keyword not in _KEYWORDS)
        if not is_name or name not in self._schema.names:
            raise token.error(f"a column: {', '.join(map(_shown_name, self._schema.names))}")
        return self._schema.field(name)

    def _values(self, field: Field) -> list[Value]:
        """Read a list of values in parentheses."""
        self._expect("(")
        values = [self._value(field)]
        while self._take(","):
            values.append(self._value(field))
        self._expect(")", or_="','")
        return values

    def _value(self, field: Field) -> Value:
        """Read a value of the column's type."""
        token = self._advance()
        kind = field.type
        if _is_text(kind):
            if token.kind == "text":
                return _unquote(token)
            raise token.error(f"a text between quotes, as {field.name} is one")
        if pa.types.is_boolean(kind):
            if token.keyword in ("true", "false"):
                return token.keyword == "true"
            raise token.error(f"true or false, as {field.name} is")
        if pa.types.is_integer(kind):
            return _integer(token, field)
        if pa.types.is_floating(kind):
            if token.kind == "number":
                return float(token.text)
            raise token.error(f"a number, as {field.name} is one")
        if pa.types.is_date(kind) or pa.types.is_timestamp(kind):
            return _date(token, field)
        raise token.error(f"'is null' or 'is not null': {field.name} is {kind}")

    # Tokens.

    @property
    def _token(self) -> _Token:
        """The token that comes next."""
        return self._tokens[self._next]

    def _advance(self) -> _Token:
        """Take the next token; the end stays where it is."""
        token = self._token
        if token.kind != "end":
            self._next += 1
        return token

    def _take(self, keyword: str) -> bool:
        """Take the next token if it is this word or sign."""
        if self._token.keyword != keyword:
            return False
        self._next += 1
        return True

    def _expect(self, keyword: str, *, or_: str = "") -> None:
        """Take this word or sign.

        Raises:
            FilterError: something else stands here.
        """
        if not self._take(keyword):
            raise self._token.error(f"{or_} or {keyword!r}" if or_ else repr(keyword))


def _integer(token: _Token, field: Field) -> int:
    """Read a whole number that the column's type can hold."""
    expected = f"a whole number, as {field.name} is one"
    if token.kind != "number" or not re.fullmatch(r"[+-]?[0-9]{1,20}", token.text):
        raise token.error(expected)
    value = int(token.text)
    try:
        pa.scalar(value, field.type)
    except (pa.ArrowInvalid, OverflowError):
        raise token.error(f"{expected} of type {field.type}") from None
    return value


def _date(token: _Token, field: Field) -> date:
    """Read a date, or a time where the column has times."""
    is_time = isinstance(field.type, pa.TimestampType)
    kind = "a time such as '2024-05-01T18:30:00'" if is_time else "a date such as '2024-05-01'"
    expected = f"{kind}, as {field.name} is one"
    if token.kind != "text":
        raise token.error(expected)
    try:
        if not is_time:
            return date.fromisoformat(_unquote(token))
        value = datetime.fromisoformat(_unquote(token))
        zone = UTC if cast(pa.TimestampType, field.type).tz else None
        if value.tzinfo is not None:
            value = value.astimezone(UTC)
        return value.replace(tzinfo=zone)
    except (ValueError, OverflowError):
        raise token.error(expected) from None


def _shown_name(name: str) -> str:
    """Write the name of a column as a filter has it."""
    is_word = re.fullmatch(r"[^\W\d]\w*", name) and name.lower() not in _KEYWORDS
    return name if is_word else f"`{name}`"


def _is_text(kind: pa.DataType) -> bool:
    """Tell whether a column holds text."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _unquote(token: _Token) -> str:
    """Give the text between the quotes."""
    quote = token.text[0]
    return token.text[1:-1].replace(quote * 2, quote)


def _fold(
    parts: Sequence[Expression], join: Callable[[Expression, Expression], Expression]
) -> Expression:
    """Join expressions as a balanced tree, which a recursion over it does not mind."""
    while len(parts) > 1:
        pairs = [join(a, b) for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = [*pairs, *parts[len(parts) - len(parts) % 2 :]]
    return parts[0]
