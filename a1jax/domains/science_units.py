"""Quantities with units, and the calculator: exact fractions, no evaluation of anybody's code.

A unit is a factor to SI and six exponents (kg, m, s, A, K, mol). Factors and dimensions after the SI brochure (BIPM, 9th edition).
"""

from __future__ import annotations

import dataclasses
import re
from fractions import Fraction

BASE = ("kg", "m", "s", "A", "K", "mol")
Dimension = tuple[int, ...]
_NUMBER = r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?"
_ALLOWED = re.compile(r"\d+(?:\.\d*)?|\.\d+|\*\*|[-+*/()^]", re.ASCII)
_ORDER = {"+": 1, "-": 1, "*": 2, "/": 2, "neg": 3, "^": 4}
MAX_CHARS, MAX_BITS, MAX_POWER = 200, 512, 64


@dataclasses.dataclass(frozen=True)
class Quantity:
    """value in SI units of its dimension."""

    value: Fraction
    dimension: Dimension


class Unreadable(ValueError):
    """An expression the calculator cannot read or will not finish; the message is one line for the model to read."""


def _named() -> dict[str, Quantity]:
    units = {name: Quantity(Fraction(1), tuple(int(i == j) for j in range(len(BASE)))) for i, name in enumerate(BASE)}
    units["g"] = Quantity(Fraction(1, 1000), units["kg"].dimension)
    derived = {
        **{"Hz": "/s", "N": "kg*m/s2", "J": "N*m", "W": "J/s", "Pa": "N/m2", "C": "A*s", "V": "W/A", "ohm": "V/A", "F": "C/V"},
        **{"L": "m3", "min": "s", "h": "s"},
    }
    factors = {"L": Fraction(1, 1000), "min": Fraction(60), "h": Fraction(3600)}
    for name, text in derived.items():
        unit = _compose(text, units)
        units[name] = Quantity(factors.get(name, Fraction(1)), unit.dimension)
    return units


PREFIXES = {"G": 10**9, "M": 10**6, "k": 1000, "d": Fraction(1, 10), "c": Fraction(1, 100), "m": Fraction(1, 1000), "u": Fraction(1, 10**6)}
_UNPREFIXED = {"kg", "min", "h", "K"}


def _compose(text: str, units: dict[str, Quantity]) -> Quantity | None:
    value, dimension = Fraction(1), (0,) * len(BASE)
    text = text.replace(" ", "*")
    for sign, name, power in re.findall(r"([*/]?)([A-Za-z]+)\^?(-?[1-9])?", text):
        unit = units.get(name)
        if unit is None and name[0] in PREFIXES and name[1:] in units and name[1:] not in _UNPREFIXED:
            unit = Quantity(PREFIXES[name[0]] * units[name[1:]].value, units[name[1:]].dimension)
        if unit is None:
            return None
        n = int(power or 1) * (-1 if sign == "/" else 1)
        value *= unit.value**n
        dimension = tuple(a + n * b for a, b in zip(dimension, unit.dimension, strict=True))
    return Quantity(value, dimension)


UNITS = _named()


def unit(text: str) -> Quantity | None:
    """The unit that a text such as "m/s2", "kg*m^2", "kPa" or "J/kg/K" means, None when it means none; "" has no dimension.

    Every factor after a "/" of its own is below the line; brackets are not read.
    """
    text = text.strip()
    if not re.fullmatch(r"(?:/?[A-Za-z]+(?:\^?-?[1-9])?(?:[*/ ][A-Za-z]+(?:\^?-?[1-9])?){0,7})?", text):
        return None
    return _compose(text, UNITS)


def quantity(text: str) -> Quantity | None:
    """The quantity that a text such as "48 N", "4e2 cm" or "1,000 kg" is, as a whole and nothing besides; None when it is none."""
    match = re.fullmatch(rf"\s*({_NUMBER})\s*([A-Za-z/*^ \d-]*?)\s*\.?\s*", text[:MAX_CHARS], flags=re.ASCII)
    found = unit(match[2]) if match else None
    return Quantity(Fraction(match[1].replace(",", "")) * found.value, found.dimension) if found else None


def near(a: Fraction, b: Fraction, tolerance: Fraction = Fraction(1, 10**4)) -> bool:
    """Whether a is b up to a relative tolerance."""
    return abs(a - b) <= tolerance * abs(b)


def show(value: Fraction) -> str:
    """Whole numbers in full, others with up to ten significant digits."""
    if value.denominator == 1 and abs(value) < 10**15:
        return str(value.numerator)
    return f"{float(value):.10g}"


def calculate(text: str) -> Fraction:
    """Value of an expression of numbers, + - * / ^ (or **) and brackets, exact. Raises Unreadable, and nothing else.

    Shunting-yard (E. W. Dijkstra, 1961): no recursion, so no nesting is too deep. Powers are whole numbers up to 64.
    """
    if len(text) > MAX_CHARS:
        raise Unreadable(f"the expression has {len(text)} characters; at most {MAX_CHARS}")
    compact = re.sub(r"\s+", " ", text).strip()
    tokens = _ALLOWED.findall(compact)
    if not tokens or "".join(tokens) != compact.replace(" ", "") or re.search(r"[\d.] [\d.]", compact):
        raise Unreadable("only numbers, + - * / ^ and brackets can be read")
    values: list[Fraction] = []
    waiting: list[str] = []
    operand_next = True  # a number, a bracket or a sign must come now
    for token in (t.replace("**", "^") for t in tokens):
        if token[0].isdigit() or token[0] == ".":
            if not operand_next:
                raise Unreadable(f"an operator is missing before {token}")
            values.append(Fraction(token))
            operand_next = False
        elif token == "(":
            if not operand_next:
                raise Unreadable("an operator is missing before (")
            waiting.append(token)
        elif token == ")":
            while not operand_next and waiting and waiting[-1] != "(":
                _apply(values, waiting.pop())
            if operand_next or not waiting:
                raise Unreadable("a bracket is closed where none may be")
            waiting.pop()
        elif operand_next:
            if token not in "+-":
                raise Unreadable(f"a number is missing before {token}")
            waiting += ["neg"] if token == "-" else []
        else:
            while waiting and waiting[-1] != "(" and _ORDER[waiting[-1]] >= _ORDER[token] and token != "^":
                _apply(values, waiting.pop())
            waiting.append(token)
            operand_next = True
    if operand_next:
        raise Unreadable("a number is missing at the end")
    while waiting:
        if waiting[-1] == "(":
            raise Unreadable("a bracket is not closed")
        _apply(values, waiting.pop())
    return values[0]


def _apply(values: list[Fraction], operator: str) -> None:
    b = values.pop()
    if operator == "neg":
        values.append(-b)
        return
    a = values.pop()
    if operator in "/^" and (b == 0 if operator == "/" else a == 0 and b < 0):
        raise Unreadable("division by zero")
    if operator == "^":
        if b.denominator != 1 or abs(b) > MAX_POWER:
            raise Unreadable(f"powers must be whole numbers from -{MAX_POWER} to {MAX_POWER}")
        result = a**b.numerator if _bits(a) * abs(b.numerator) <= MAX_BITS else None
    else:
        result = a + b if operator == "+" else a - b if operator == "-" else a * b if operator == "*" else a / b
    if result is None or _bits(result) > MAX_BITS:
        raise Unreadable("the numbers are too large")
    values.append(result)


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())
