"""Training runs from the embedded domains: propose, solve, accept, write. The mean length of the runs is chosen, in tokens.

``horizon`` finds numbers of steps around it; of these each task takes the one that keeps the mean on its target.
Some runs may be a careless solver's, so that failures are learnt from too: status FAILED, metadata "careless" says what went wrong.
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import statistics
import zlib
from collections.abc import Iterator, Sequence

from ..config import ConfigError, check, override
from ..data import tokenizer, trajectories
from ..domains import DOMAINS, LongContext, Store
from ..domains.acceptance import NO_ANSWERS, accept, play, turns_of
from ..domains.base import Call, Domain, Split, Task, Turn
from ..domains.science_words import WordProblems
from ..domains.search_corpus import CorpusSearch
from ..types import FINISHED, Trajectory
from .horizon import LONGEST, Counter, Plan, plan

FAMILIES: dict[str, Domain] = {
    **DOMAINS,
    "long_context": LongContext(),
    "store": Store(),
    "science_words": WordProblems(),
    "search_corpus": CorpusSearch(),
}
NEEDS = {"science_words": "path=FILE", "search_corpus": "corpus=FILE"}  # family -> what only the user has
CARELESS = ("wrong value", "skipped step", "early stop")
REFUSALS = 20  # per wanted task, before a family is given up


def generate(
    name: str, tasks: int, horizon: int, out: str | pathlib.Path, seed: int = 0, split: Split = "train",
    tokenizer_path: str | None = None, failures: float = 0.0, assignments: Sequence[str] = (), tools: bool = False,
) -> str:  # fmt: skip
    """Write ``tasks`` runs whose finished ones have ``horizon`` tokens on average; returns statistics, as text.

    tools: tool schemas and system messages count as tokens of a run. Raises ConfigError, and then leaves no file.
    """
    if name not in FAMILIES:
        raise ConfigError(f"--domain {name}: no such family; there are {', '.join(FAMILIES)}")
    for option, value, good, wanted in (
        ("tasks", tasks, tasks >= 1, "at least 1"),
        ("horizon", horizon, 1 <= horizon <= LONGEST, f"between 1 and {LONGEST}"),
        ("seed", seed, seed >= 0, "at least 0"),
        ("failures", failures, 0 <= failures <= 1, "between 0 and 1"),
    ):
        if not good:
            raise ConfigError(f"--{option} is {value}; it must be {wanted}")
    if not str(out).endswith((".jsonl", ".jsonl.gz")):
        raise ConfigError(f"--out {out}: the name must end in .jsonl or .jsonl.gz")
    domain = override(FAMILIES[name], assignments)
    check(domain)
    count = Counter(tokenizer.load(tokenizer_path) if tokenizer_path else None, tools)
    made = plan(domain, horizon, count, seed, split)
    refused: collections.Counter[str] = collections.Counter()
    written: list[Written] = []

    def kept() -> Iterator[Trajectory]:
        for run, size in runs(made, tasks, count, seed, split, failures, refused):
            said = [m for m in run.messages if m["role"] == "assistant"]
            calls = sum(len(m.get("tool_calls") or ()) for m in said)
            written.append(Written(size, len(said), calls, None if run.status == FINISHED else run.records[-1].outcome))
            yield run

    try:
        trajectories.write(out, kept())
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror}): choose another --out") from None
    return report(made, written, refused)


@dataclasses.dataclass(frozen=True)
class Written:
    """What the statistics need of a run. failure: why it failed, None when it finished."""

    tokens: int
    turns: int
    calls: int
    failure: str | None


def runs(
    made: Plan, tasks: int, count: Counter, seed: int, split: Split, failures: float, refused: collections.Counter[str]
) -> Iterator[tuple[Trajectory, int]]:
    """Judged runs of accepted tasks and their tokens, a share of them careless; ``refused`` counts the other tasks by reason.

    The share is exact: where every careless run would be accepted after all, the task is refused.
    """
    done, tried, finished, tokens = 0, 0, 0, 0
    seen: set[int] = set()
    while done < tasks:
        if tried >= tasks + REFUSALS * (done + 1):
            name = type(made.domain).__name__
            raise ConfigError(f"{name}: {refused.total()} of {tried} tasks were refused ({listed(refused)}); ask for fewer or other ones")
        task = made.domain.propose(seed + tried, made.steps(finished, tokens), split)
        tried += 1
        found = accept(task)
        run, why = found.trajectory, found.rule
        key, size = zlib.crc32(repr(run.messages).encode("utf-8", "replace")), count(run)
        if why is None and key in seen:
            why = "repeated"
        elif why is None and not made.least <= size <= made.most:
            why = "length"
        elif why is None and int((done + 1) * failures + 1e-9) > int(done * failures + 1e-9):
            run = careless(task, run, seed + tried)
            size, why = (count(run), None) if run else (0, "never failed")
        if why is not None:
            refused[why] += 1
            continue
        if run.status == FINISHED:
            finished, tokens = finished + 1, tokens + size
        seen.add(key)
        yield dataclasses.replace(run, metadata={**run.metadata, "seed": seed + tried - 1, "split": split}), size
        done += 1


def careless(task: Task, run: Trajectory, seed: int) -> Trajectory | None:
    """The expert's run gone wrong in one of the ways of CARELESS, really played; None where the verifier accepts all of them."""
    *turns, answer = turns_of(task, run)
    middle, wrong = len(turns) // 2, [*turns, Turn(answer.thought, answer=NO_ANSWERS[1])]
    ways = {
        "wrong value": _wrong_value(turns, answer) or wrong,
        "skipped step": [*turns[:middle], *turns[middle + 1 :], answer],
        "early stop": [*turns[:middle], Turn("", answer=answer.answer if turns else answer.answer[: len(answer.answer) // 2])],
    }
    order = [CARELESS[(seed + i) % len(CARELESS)] for i in range(len(CARELESS))]
    tries = [*((kind, ways[kind]) for kind in order), ("wrong value", wrong)]  # some verifiers judge the answer alone
    for kind, tried in tries:
        failed = play(task, tried)
        if failed.status != FINISHED:
            return dataclasses.replace(failed, metadata={**failed.metadata, "careless": kind})
    return None


def _wrong_value(turns: Sequence[Turn], answer: Turn) -> list[Turn] | None:
    """One call, as near to the middle as can be, takes the value of another one to the same tool; None where there are no two."""
    calls = [(i, turn.call, list(turn.call.arguments)[-1]) for i, turn in enumerate(turns) if turn.call and turn.call.arguments]
    for i, call, last in sorted(calls, key=lambda each: abs(each[0] - len(turns) // 2)):
        others = (other.arguments[last] for _, other, _ in calls if other.name == call.name)
        wrong = next((value for value in others if value != call.arguments[last]), None)
        if wrong is not None:
            slip = dataclasses.replace(turns[i], call=Call(call.name, {**call.arguments, last: wrong}))
            return [*turns[:i], slip, *turns[i + 1 :], answer]
    return None


def listed(found: collections.Counter[str]) -> str:
    return "; ".join(f"{n} x {why}" for why, n in found.most_common()) or "none"


def report(made: Plan, written: Sequence[Written], refused: collections.Counter[str]) -> str:
    """Lengths and reasons as lines of text. Reasons of failure are grouped by what stands before the colon."""
    every = sorted(each.tokens for each in written)
    finished = [each.tokens for each in written if each.failure is None]
    failed = collections.Counter(each.failure.split(":")[0] for each in written if each.failure is not None)
    p10, p90 = (every[min(int(share * len(every)), len(every) - 1)] for share in (0.1, 0.9))
    mean = f"{statistics.mean(finished):.0f}" if finished else "none"
    steps = f"{made.short} to {made.long}" if made.long > made.short else str(made.short)
    turns, calls = statistics.mean(each.turns for each in written), statistics.mean(each.calls for each in written)
    name = type(made.domain).__name__
    short_of = [f"the mean cannot be {made.horizon}: the {made.end} runs of {name} have {mean} tokens"] if made.end and finished else []
    return "\n".join((
        f"{name}: {len(every)} runs, {len(finished)} finished; steps {steps}",
        f"tokens: finished mean {mean} (asked {made.horizon}); all: mean {statistics.mean(every):.0f},"
        f" median {statistics.median(every):.0f}, p10 {p10}, p90 {p90}, max {every[-1]}",
        *short_of,
        f"turns per run {turns:.1f}, tool calls per run {calls:.1f}",
        f"refused tasks: {listed(refused)}",
        f"failed runs: {listed(failed)}",
    ))  # fmt: skip
