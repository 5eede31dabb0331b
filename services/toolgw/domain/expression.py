"""Arithmetic: a recursive-descent parser that computes while it reads.

    sum     := product (('+' | '-') product)*
    product := sign (('*' | '/' | '//' | '%') sign)*
    sign    := ('+' | '-') sign | power
    power   := atom ('**' sign)?                 right-associative, binds tighter than a sign on its left: -2**2 = -4
    atom    := number | '(' sum ')'

Numbers are decimal and exact up to 100 digits; `//` and `%` round down as in Python, so -7 // 2 = -4 and -7 % 2 = 1.
Every operation works on at most 100 digits and exponents of at most 9999, an expression has at most 1000 characters,
and parentheses, signs and powers nest at most 50 deep: the costliest expression takes milliseconds, whatever numbers
it names.
"""

from __future__ import annotations

import re
from decimal import (
    Context,
    Decimal,
    DivisionByZero,
    Inexact,
    InvalidOperation,
    Overflow,
    Subnormal,
    Underflow,
)
from typing import Final, NamedTuple

MAX_CHARACTERS: Final = 1000
MAX_DEPTH: Final = 50
DIGITS: Final = 100
MAX_EXPONENT: Final = 9999
SHOWN_DIGITS: Final = 30
"""Digits of a result that is not exact."""

_TOKEN: Final = re.compile(
    r"\s*(?:(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,5})?)|(?P<operator>\*\*|//|[-+*/%()]))", re.ASCII
)
_TRAPS: Final = [DivisionByZero, InvalidOperation, Overflow, Underflow, Subnormal]


class ExpressionError(ValueError):
    """The expression cannot be computed; the text says why and where (positions count from 1)."""


class Computed(NamedTuple):
    """A result."""

    text: str
    """The number, without an exponent where it has at most 100 digits."""
    exact: bool
    """False: rounded to 30 digits."""


class _Token(NamedTuple):
    text: str
    position: int
    is_number: bool


def compute(expression: str) -> Computed:
    """The value of `expression`.

    Raises:
        ExpressionError: it has a mistake, divides by zero, or leaves the bounds.
    """
    if len(expression) > MAX_CHARACTERS:
        raise ExpressionError(f"the expression has {len(expression)} characters, more than {MAX_CHARACTERS}")
    context = Context(prec=DIGITS, Emax=MAX_EXPONENT, Emin=-MAX_EXPONENT, traps=_TRAPS)
    parser = _Parser(_tokens(expression), context)
    try:
        value = parser.whole()
    except DivisionByZero:
        raise ExpressionError("division by zero") from None
    except (Overflow, Underflow, Subnormal):
        raise ExpressionError(f"a number outside of 10**-{MAX_EXPONENT} to 10**{MAX_EXPONENT}") from None
    except InvalidOperation:
        raise ExpressionError(
            f"an operation without a result in {DIGITS} digits, such as 0/0 or a root of a negative number"
        ) from None
    return _shown(value, exact=not context.flags[Inexact])


def _tokens(expression: str) -> list[_Token]:
    tokens: list[_Token] = []
    position = 0
    end = len(expression.rstrip())
    while position < end:
        match = _TOKEN.match(expression, position)
        if match is None:
            at = position + len(expression[position:]) - len(expression[position:].lstrip())
            raise ExpressionError(_unreadable(expression[at], at + 1))
        kind = match.lastgroup or ""
        tokens.append(_Token(match[kind], match.start(kind) + 1, kind == "number"))
        position = match.end()
    if not tokens:
        raise ExpressionError("the expression is empty")
    return tokens


def _unreadable(character: str, position: int) -> str:
    hints = {"^": "write ** for powers", ",": "write numbers without separators and with a decimal point"}
    hint = hints.get(character, "only numbers, parentheses and + - * / // % ** are known")
    return f"{character!r} at position {position} is not understood: {hint}"


class _Parser:
    """Reads tokens from left to right and computes."""

    def __init__(self, tokens: list[_Token], context: Context) -> None:
        self._tokens = tokens
        self._context = context
        self._next = 0
        self._depth = 0

    def whole(self) -> Decimal:
        """The value of all tokens."""
        value = self._sum()
        if self._next < len(self._tokens):
            token = self._tokens[self._next]
            raise ExpressionError(f"{token.text!r} at position {token.position} does not belong there")
        return value

    def _sum(self) -> Decimal:
        value = self._product()
        while operator := self._take("+", "-"):
            right = self._product()
            value = self._context.add(value, right) if operator == "+" else self._context.subtract(value, right)
        return value

    def _product(self) -> Decimal:
        value = self._sign()
        while operator := self._take("*", "/", "//", "%"):
            value = self._apply(operator, value, self._sign())
        return value

    def _sign(self) -> Decimal:
        operator = self._take("+", "-")
        if not operator:
            return self._power()
        self._enter()
        value = self._sign()
        self._depth -= 1
        return self._context.minus(value) if operator == "-" else value

    def _power(self) -> Decimal:
        base = self._atom()
        if not self._take("**"):
            return base
        self._enter()
        exponent = self._sign()
        self._depth -= 1
        if base == 0 and exponent <= 0:
            # As in Python. The decimal module calls the one undefined and the other infinity.
            if exponent == 0:
                return Decimal(1)
            raise ExpressionError("division by zero: a negative power of 0")
        return self._context.power(base, exponent)

    def _atom(self) -> Decimal:
        if self._next == len(self._tokens):
            raise ExpressionError("the expression ends where a number is expected")
        token = self._tokens[self._next]
        self._next += 1
        if token.is_number:
            return self._context.create_decimal(token.text)
        if token.text != "(":
            raise ExpressionError(f"{token.text!r} at position {token.position} stands where a number is expected")
        self._enter()
        value = self._sum()
        self._depth -= 1
        if not self._take(")"):
            raise ExpressionError(f"the parenthesis at position {token.position} is not closed")
        return value

    def _apply(self, operator: str, left: Decimal, right: Decimal) -> Decimal:
        context = self._context
        if operator == "*":
            return context.multiply(left, right)
        if operator == "/":
            return context.divide(left, right)
        if right == 0:
            raise ExpressionError("division by zero")
        # The decimal module rounds towards zero; one step down where the signs differ and something is left over.
        quotient, rest = context.divmod(left, right)
        if rest != 0 and (rest < 0) != (right < 0):
            quotient, rest = context.subtract(quotient, Decimal(1)), context.add(rest, right)
        return quotient if operator == "//" else rest

    def _take(self, *operators: str) -> str:
        """The next token if it is one of `operators`; else nothing."""
        if self._next < len(self._tokens) and self._tokens[self._next].text in operators:
            self._next += 1
            return self._tokens[self._next - 1].text
        return ""

    def _enter(self) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ExpressionError(f"nested deeper than {MAX_DEPTH}")


def _shown(value: Decimal, *, exact: bool) -> Computed:
    if not exact:
        value = Context(prec=SHOWN_DIGITS, Emax=MAX_EXPONENT, Emin=-MAX_EXPONENT, traps=[]).plus(value)
    if value == 0:
        return Computed("0", exact)
    plain = Context(prec=DIGITS, Emax=MAX_EXPONENT, Emin=-MAX_EXPONENT, traps=[]).normalize(value)
    is_short = -DIGITS <= plain.adjusted() <= DIGITS
    return Computed(format(plain, "f") if is_short else str(plain), exact)
