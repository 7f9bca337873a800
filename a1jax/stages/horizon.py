"""How long runs of a family are, and which numbers of steps give a chosen mean length in tokens.

The length of a run is that of its conversation from the question on: what the user, the tools and the model say in it. What stands
above every conversation, tool schemas and the system message, is counted on demand only; prompts of small models do without schemas.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys

from ..config import ConfigError
from ..data import chat, chat_builtin
from ..data.tokenizer import Tokenizer
from ..domains import DOMAINS, LongContext
from ..domains.base import Domain, Split, solve
from ..domains.long_context import four_characters
from ..types import Trajectory

TOLERANCE = 0.15  # of the target, by which the shortest or longest runs of a family may miss it
LONGEST = 1 << 18  # tokens that may be asked for
MEASURED, ENOUGH = 8, 12_000  # runs per number of steps; fewer where they have so many tokens, since long runs vary little
APART = 0.1  # by which the two numbers of steps are moved apart: measured on few runs, both could lie on one side of the target
SAMPLED, KEPT = 32, 4  # tasks looked at where a family ends, and the fewest of them that stand for its short or long runs


@dataclasses.dataclass(frozen=True)
class Counter:
    """Tokens of a run. tokenizer: None takes four characters for one token. standing: schemas and system message count too."""

    tokenizer: Tokenizer | None = None
    standing: bool = False

    def text(self, text: str) -> int:
        return len(self.tokenizer.encode(text)) if self.tokenizer else four_characters(text)

    def __call__(self, run: Trajectory) -> int:
        tools, messages = (run.tools, run.messages) if self.standing else ((), [m for m in run.messages if m["role"] != "system"])
        if self.tokenizer:
            return len(chat.tokenize(self.tokenizer, messages, tools)[0])
        return four_characters("".join(piece.text for piece in chat_builtin.render(messages, tools, "<|im_end|>", False)))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Tasks of ``domain`` with ``short`` to ``long`` steps, whose runs have ``below`` to ``above`` tokens on average.

    least, most: tokens that a run must have to be kept, where a family's shortest or longest tasks are chosen from.
    end: "shortest" or "longest", where the family ends before the horizon and those runs are the nearest there are.
    """

    domain: Domain
    horizon: int
    short: int
    long: int
    below: float
    above: float
    least: int = 0
    most: int = sys.maxsize
    end: str = ""

    def steps(self, runs: int, tokens: int) -> int:
        """Steps of the next task, given the number of runs so far and their tokens: what brings the mean nearest to the horizon."""
        wanted = self.horizon * (runs + 1) - tokens
        share = (wanted - self.below) / (self.above - self.below) if self.above > self.below else 0.0
        return self.short + round(min(max(share, 0.0), 1.0) * (self.long - self.short))


def plan(domain: Domain, horizon: int, count: Counter, seed: int, split: Split) -> Plan:
    """Numbers of steps on both sides of the horizon. Raises ConfigError where no runs of the family are so short, or so long.

    A family with a field ``tokens`` is set by that. Where the constraints of instruction following end, long-context questions go on.
    """
    if isinstance(domain, LongContext):
        return _register(domain, horizon, count, seed, split)

    def length(steps: int) -> float:
        sizes: list[int] = []
        while len(sizes) < MEASURED and sum(sizes) < ENOUGH:
            sizes.append(count(solve(domain.propose(seed + len(sizes), steps, split))))
        return statistics.mean(sizes)

    low, below, high, above = 1, length(1), None, None
    if below >= horizon:
        return _end(domain, 1, horizon, count, seed, split)
    guess = 2
    while high is None or (high - low > 1 and above - below > APART * horizon):
        try:
            found = length(guess)
        except ConfigError as error:
            if guess > low + 1:
                guess = (low + guess) // 2
                continue
            try:
                return _end(domain, low, horizon, count, seed, split)
            except ConfigError as end:
                if domain == DOMAINS["instruction_following"]:
                    return _register(LongContext(), horizon, count, seed, split)
                raise ConfigError(f"{end} ({error})") from None
        if found >= horizon:
            high, above = guess, found
        else:
            low, below = guess, found
        ahead = max(low + 1, min(int(low * 1.05 * horizon / below), 8 * low))
        guess = ahead if high is None else min(max(low + int((high - low) * (horizon - below) / (above - below)), low + 1), high - 1)
    short, long = math.ceil(low * (1 - APART)), int(high * (1 + APART))  # few steps stay what they are
    return Plan(domain, horizon, short, long, below * short / low, above * long / high)


def _end(domain: Domain, steps: int, horizon: int, count: Counter, seed: int, split: Split) -> Plan:
    """The shortest tasks of that many steps, or the longest, as many as have the horizon for their mean."""
    sizes = sorted(count(solve(domain.propose(seed + i, steps, split))) for i in range(SAMPLED))
    short = statistics.mean(sizes) >= horizon
    sizes = sizes if short else sizes[::-1]
    fits = [n for n in range(KEPT, SAMPLED + 1) if (statistics.mean(sizes[:n]) <= horizon) == short]
    near = abs(statistics.mean(sizes) - horizon) <= TOLERANCE * horizon
    kept = sizes[: fits[-1] if fits else SAMPLED if near else KEPT]
    mean = statistics.mean(kept)
    end, less = ("shortest", "more") if short else ("longest", "less")
    if abs(mean - horizon) > TOLERANCE * horizon:
        raise ConfigError(f"--horizon {horizon}: the {end} runs of {type(domain).__name__} have {mean:.0f} tokens; ask for that or {less}")
    bounds = {} if len(kept) == SAMPLED else {"most": kept[-1]} if short else {"least": kept[-1]}
    return Plan(domain, horizon, steps, steps, mean, mean, **bounds, end="" if fits else end)


def _register(domain: LongContext, horizon: int, count: Counter, seed: int, split: Split) -> Plan:
    """Long-context questions of the right length; short ones have fewer distractors, since there is no room for them."""
    room = max(0, (horizon - 150) // 100)
    domain = dataclasses.replace(domain, counter=count.text, distractors=min(domain.distractors, room), tokens=max(horizon, 512))
    rest = count(solve(domain.propose(seed, 1, split))) - domain.tokens  # what the model says, and the format
    domain = dataclasses.replace(domain, tokens=max(horizon - rest, 1))
    try:
        size = count(solve(domain.propose(seed, 1, split)))
    except ConfigError as error:
        raise ConfigError(f"--horizon {horizon}: {error}; ask for more") from None
    return Plan(domain, horizon, 1, 1, size, size)
