"""What a run is worth: pure functions of counts and of a trajectory; the search teacher's reward is their sum.

    reward = correctness - efficiency penalty - repetition penalty + format reward            (arXiv 2606.30616, section 4.2)

The paper gives the form of each part and none of its numbers: the defaults here are ours. With them a right answer beats any wrong
one as long as the run stays below ``free_rounds + (1 - repeat_cap - format_bonus) / round_price`` = 81 rounds.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from ..config import ConfigError
from ..data import chat
from ..types import Trajectory


class Reward(NamedTuple):
    """What a run got: the sum, and its parts with their signs, for the curves over time."""

    total: float
    parts: dict[str, float]


def correctness(trajectory: Trajectory) -> float:
    """The verdict its verifier or judge wrote into the run, a number in [0, 1].

    Raises ConfigError for a run that nobody judged, or one whose reward is outside [0, 1].
    """
    if trajectory.reward is None:
        raise ConfigError(f"{trajectory.task_id}: the run has no reward; let its task or a judge verify it first")
    if not 0 <= trajectory.reward <= 1:
        raise ConfigError(f"{trajectory.task_id}: the run's reward is {trajectory.reward}; correctness is a number from 0 to 1")
    return float(trajectory.reward)


def efficiency_penalty(rounds: int, free_rounds: int, price: float) -> float:
    """price * max(0, rounds - free_rounds): nothing for the first ``free_rounds``, then linear without an end."""
    _check(rounds=rounds, free_rounds=free_rounds, price=price)
    return price * max(0, rounds - free_rounds)


def repetition_penalty(keys: Sequence[Hashable], window: int, price: float, cap: float) -> float:
    """min(cap, price * number of keys that stand among the ``window`` keys before them).

    keys: what was asked for, in order, see ``lookups``. Asking again after the window has passed costs nothing: in a run of hundreds
    of turns the page may have left the context. window 0 never finds a repetition.
    """
    _check(window=window, price=price, cap=cap)
    repeats = sum(key in keys[max(0, at - window) : at] for at, key in enumerate(keys))
    return min(cap, price * repeats)


def format_reward(trajectory: Trajectory) -> float:
    """1.0 if every turn of the model is well formed and the last is an answer with text, else 0.0.

    Well formed: the strict reader of turns (``chat.parse_turn``) finds exactly one reading. One bad turn is enough to lose it.
    """
    return float(answered(trajectory) and all(well_formed(message) for message in model_turns(trajectory)))


def rubric_fraction(met: Sequence[bool]) -> float:
    """The share of rubrics met: the process reward of tool calling (arXiv 2606.30616, section 4.2). Raises ConfigError without rubrics."""
    if not len(met):
        raise ConfigError("no rubrics: the share of none is no number; leave the process reward out of such tasks")
    return sum(bool(one) for one in met) / len(met)


def search_reward(
    trajectory: Trajectory,
    *,
    free_rounds: int = 16,
    round_price: float = 0.01,
    tools: tuple[str, ...] = (),
    window: int = 8,
    repeat_price: float = 0.05,
    repeat_cap: float = 0.25,
    format_bonus: float = 0.1,
) -> Reward:
    """The search teacher's reward of one run.

    tools: whose calls can be repetitions, () for all. The other parameters are the parts' own; ``bind`` sets them.
    Raises ConfigError for numbers below 0 and for a run that nobody judged.
    """
    _check(format_bonus=format_bonus)
    parts = {
        "correctness": correctness(trajectory),
        "efficiency": -efficiency_penalty(rounds(trajectory), free_rounds, round_price),
        "repetition": -repetition_penalty(lookups(trajectory, tools), window, repeat_price, repeat_cap),
        "format": format_bonus * format_reward(trajectory),
    }
    return Reward(sum(parts.values()), parts)


def outcome_reward(trajectory: Trajectory, *, format_bonus: float = 0.0) -> Reward:
    """Correctness, and for a run that is well formed ``format_bonus`` more: the plain reward of a domain with a verifier."""
    _check(format_bonus=format_bonus)
    parts = {"correctness": correctness(trajectory)}
    if format_bonus:
        parts["format"] = format_bonus * format_reward(trajectory)
    return Reward(sum(parts.values()), parts)


def rubric_reward(trajectory: Trajectory, *, coefficient: float = 0.5) -> Reward:
    """Correctness, and ``coefficient`` times the share of rubrics met (``Trajectory.metadata``): where few runs are right at first, runs
    that come nearer are worth more. Raises ConfigError for a run that nobody judged."""
    _check(coefficient=coefficient)
    if "rubrics" not in trajectory.metadata:
        raise ConfigError(f"{trajectory.task_id}: the run has no rubrics; let its task judge it first")
    share = rubric_fraction(trajectory.metadata["rubrics"])
    parts = {"correctness": correctness(trajectory), "rubrics": coefficient * share}
    return Reward(sum(parts.values()), parts)


def model_turns(trajectory: Trajectory) -> list[dict[str, Any]]:
    """The messages the model wrote."""
    return [message for message in trajectory.messages if message.get("role") == "assistant"]


def answered(trajectory: Trajectory) -> bool:
    """Whether the run ends with a turn of the model that calls nothing and has text."""
    last = trajectory.messages[-1] if trajectory.messages else {}
    return last.get("role") == "assistant" and not last.get("tool_calls") and bool((last.get("content") or "").strip())


def rounds(trajectory: Trajectory) -> int:
    """Turns the model took before its answer; turns that could not be read count too."""
    return len(model_turns(trajectory)) - int(answered(trajectory))


def well_formed(message: dict[str, Any]) -> bool:
    """Whether an assistant's message, written out, has exactly one reading. A turn that had none stands in its run as raw content."""
    try:
        chat.parse_turn(chat.turn_text(message))
    except chat.ToolCallError:
        return False
    return True


def lookups(trajectory: Trajectory, tools: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """(tool, arguments) of every call in order, of the named tools only where any are named.

    Texts are compared without regard to case, spacing and Unicode form, and arguments without regard to their order: "Red  Tower" and
    "red tower" are one query.
    """
    found = []
    for message in model_turns(trajectory):
        for call in message.get("tool_calls") or ():
            function = call.get("function", call)
            arguments = function.get("arguments", {})
            if isinstance(arguments, str):  # OpenAI's own form: JSON in a string
                try:
                    arguments = json.loads(arguments)
                except ValueError:
                    pass  # compared as the text it is
            if not tools or function["name"] in tools:
                found.append((function["name"], json.dumps(_plain(arguments), sort_keys=True, default=str)))
    return found


def _plain(value: Any) -> Any:
    """A JSON value with every text in its plainest form."""
    if isinstance(value, str):
        return " ".join(unicodedata.normalize("NFKC", value).casefold().split())
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _check(**numbers: float) -> None:
    for name, value in numbers.items():
        if not value >= 0:
            raise ConfigError(f"reward: {name} is {value}; it must not be negative")
