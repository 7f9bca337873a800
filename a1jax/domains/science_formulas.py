"""Formulas of school physics, and walks over them in numbers short enough to be read and copied.

Quantities are in SI units (BIPM, SI brochure, 9th edition); that each formula's units agree is a test.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from .science_units import show

UNIT = {
    **{"mass": "kg", "length": "m", "time": "s", "current": "A", "speed": "m/s", "acceleration": "m/s2", "force": "N", "energy": "J"},
    **{"power": "W", "charge": "C", "voltage": "V", "resistance": "ohm", "area": "m2", "volume": "m3", "pressure": "Pa"},
    **{"density": "kg/m3", "momentum": "kg*m/s"},
}
# Properties that may be given in a smaller unit: (it, how many make one).
SMALLER = {
    **{"mass": ("g", 1000), "length": ("cm", 100), "time": ("ms", 1000), "current": ("mA", 1000), "voltage": ("mV", 1000)},
    **{"area": ("cm2", 10000), "volume": ("L", 1000), "force": ("mN", 1000), "charge": ("mC", 1000)},
}
# from, operator, the table's property, result: what school physics has for a constant quantity.
FORMULAS = tuple(
    tuple(line.split())
    for line in """
mass * acceleration force | mass / density volume | mass * speed momentum | force * length energy | force / area pressure
force / acceleration mass | force * time momentum | energy / time power | energy / length force | energy / voltage charge
energy / pressure volume | power * time energy | power / voltage current | power / speed force | current * time charge
current * resistance voltage | current * voltage power | charge * voltage energy | charge / time current
voltage / resistance current | voltage * current power | voltage * charge energy | volume * density mass | volume / length area
volume * pressure energy | area * length volume | area * pressure force | pressure * area force | pressure * volume energy
momentum / time force | momentum / speed mass | momentum / mass speed | speed * time length | speed / time acceleration
speed * force power | speed * mass momentum | length * length area | length / time speed | length / speed time
length * force energy | acceleration * time speed | acceleration * mass force | time * speed length | time * power energy
""".replace("\n", "|").split("|")
    if line.strip()
)
OPERATOR = {(given, wanted, result): operator for given, operator, wanted, result in FORMULAS}


@dataclasses.dataclass(frozen=True)
class Step:
    """given operator property = result, whose SI value is ``value``; the property stands in the table of ``name`` as ``shown``.

    factor: how many of the table's unit make one of SI.
    """

    given: str
    operator: str
    property: str
    result: str
    name: str
    shown: str
    factor: int
    value: Fraction

    def expression(self, before: Fraction) -> str:
        """What an expert asks the calculator: the unit's factor goes the other way in a division."""
        text = f"{show(before)}{self.operator}{self.shown.split(' ')[0]}"
        return text if self.factor == 1 else f"{text}{'/' if self.operator == '*' else '*'}{self.factor}"


Move = tuple[tuple[str, ...], int, Fraction]  # formula, the property's number in SI, the result's value


@functools.lru_cache(maxsize=1 << 15)
def _moves(given: str, value: Fraction) -> list[Move]:
    """Every formula and number from 2 to 9 that leads to a value between 0.05 and 999 with at most two decimals."""
    found = []
    for formula in (f for f in FORMULAS if f[0] == given):
        for number in range(2, 10):
            result = value * number if formula[1] == "*" else value / number
            if Fraction(1, 20) <= result <= 999 and 100 % result.denominator == 0:
                found.append((formula, number, result))
    return found


@functools.lru_cache(maxsize=1 << 15)
def _next(given: str, value: Fraction) -> list[Move]:
    """Moves after which there is another one, whole results only where there are any."""
    onward = [move for move in _moves(given, value) if _moves(move[0][3], move[2])]
    return [move for move in onward if move[2].denominator == 1] or onward


def walk(rng: np.random.Generator, start: str, first: Fraction, names: Sequence[str], conversions: float) -> list[Step]:
    """One step per name; fewer at a dead end. conversions: probability that a property is given in a smaller unit."""
    path: list[Step] = []
    given, value = start, first
    for name in names:
        options = _next(given, value) or _moves(given, value)
        if not options:
            break
        (_, operator, wanted, result), number, value = _pick(rng, options)
        small, factor = SMALLER.get(wanted, ("", 1)) if rng.random() < conversions else ("", 1)
        path.append(Step(given, operator, wanted, result, name, f"{number * factor} {small or UNIT[wanted]}", factor, value))
        given = result
    return path


def _pick(rng: np.random.Generator, moves: list[Move]) -> Move:
    """A formula first, then a number, so that formulas with many possible numbers are not more frequent."""
    formulas = sorted({move[0] for move in moves})
    formula = formulas[int(rng.integers(len(formulas)))]
    fitting = [move for move in moves if move[0] == formula]
    return fitting[int(rng.integers(len(fitting)))]


def row(rng: np.random.Generator, name: str, wanted: str, shown: str) -> str:
    """The wanted property and another one, in either order."""
    others = [q for q in sorted(UNIT) if q != wanted]
    other = others[int(rng.integers(len(others)))]
    cells = [f"{wanted} {shown}", f"{other} {int(rng.integers(2, 10))} {UNIT[other]}"]
    return f"{name}: " + ", ".join(cells if rng.random() < 0.5 else cells[::-1])
