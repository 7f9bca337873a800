"""Training runs from the embedded domains: propose, solve, accept, write. The mean length of the runs is chosen, in tokens.

``steps`` sets the length: a few runs are measured, the two nearest numbers of steps are mixed so that the mean hits. A family with a
field ``tokens`` is set by that. Instruction following longer than its constraints reach turns to long-context questions.
Some runs may be a careless solver's, so that failures are learnt from too: status FAILED, metadata "careless" says what went wrong.
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import statistics
from collections.abc import Callable, Iterator, Sequence

from ..config import ConfigError, check, override
from ..data import chat, chat_builtin, tokenizer, trajectories
from ..domains import DOMAINS, LongContext, Store
from ..domains.acceptance import NO_ANSWERS, accept, play, turns_of
from ..domains.base import Domain, Split, Task, Turn, solve
from ..domains.long_context import four_characters
from ..domains.science_words import WordProblems
from ..domains.search_corpus import CorpusSearch
from ..types import FINISHED, Trajectory

FAMILIES: dict[str, Domain] = {**DOMAINS, "long_context": LongContext(), "store": Store(), "science_words": WordProblems()}
FAMILIES["search_corpus"] = CorpusSearch()  # needs --set corpus=PATH
CARELESS = ("wrong value", "skipped step", "early stop")
TOLERANCE = 0.15  # of the target, by which the shortest or longest runs of a family may miss it
MOST_STEPS = 1 << 14
MEASURED = 3  # runs per number of steps
REFUSALS = 20  # per wanted task, before a family is given up

Counter = Callable[[Trajectory], int]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Tasks of ``domain``: a share ``long_share`` has ``long`` steps, the others ``short``."""

    domain: Domain
    short: int
    long: int
    long_share: float

    def steps(self, i: int) -> int:
        """Steps of the i-th task: the long ones come evenly."""
        return self.long if int((i + 1) * self.long_share + 0.5) > int(i * self.long_share + 0.5) else self.short


def generate(
    name: str, tasks: int, horizon: int, out: str | pathlib.Path, seed: int = 0, split: Split = "train",
    tokenizer_path: str | None = None, failures: float = 0.0, assignments: Sequence[str] = (),
) -> str:  # fmt: skip
    """Write ``tasks`` runs whose finished ones have ``horizon`` tokens on average; returns statistics, as text."""
    if name not in FAMILIES:
        raise ConfigError(f"--domain {name}: no such family; there are {', '.join(FAMILIES)}")
    for option, value, good in (
        ("tasks", tasks, tasks >= 1),
        ("horizon", horizon, horizon >= 1),
        ("failures", failures, 0 <= failures <= 1),
    ):
        if not good:
            raise ConfigError(f"--{option} is {value}; it must be {'between 0 and 1' if option == 'failures' else 'at least 1'}")
    if not str(out).endswith((".jsonl", ".jsonl.gz")):
        raise ConfigError(f"--out {out}: the name must end in .jsonl or .jsonl.gz")
    domain = override(FAMILIES[name], assignments)
    check(domain)
    count = counter(tokenizer_path)
    made = plan(domain, horizon, count, seed, split)
    refused: collections.Counter[str] = collections.Counter()
    sizes: list[tuple[Trajectory, int]] = []

    def kept() -> Iterator[Trajectory]:
        for run in runs(made, tasks, seed, split, failures, refused):
            sizes.append((dataclasses.replace(run, messages=(), tools=()), count(run)))
            turns = sum(m["role"] == "assistant" for m in run.messages)
            counts[0] += turns
            counts[1] += sum(len(m.get("tool_calls") or ()) for m in run.messages)
            yield run

    counts = [0, 0]
    try:
        trajectories.write(out, kept())
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror}): choose another --out") from None
    finally:
        pathlib.Path(out).with_name(f".{pathlib.Path(out).name}.part").unlink(missing_ok=True)
    return report(made, horizon, sizes, counts, refused)


def counter(path: str | None) -> Counter:
    """Tokens of a run as the model sees it, tools included."""
    if path:
        own = tokenizer.load(path)
        return lambda run: len(chat.tokenize(own, run.messages, run.tools)[0])
    return lambda run: four_characters("".join(p.text for p in chat_builtin.render(run.messages, run.tools, "<|im_end|>", False)))


def plan(domain: Domain, horizon: int, count: Counter, seed: int, split: Split) -> Plan:
    """The numbers of steps whose mixture has ``horizon`` tokens on average. Raises ConfigError where the family has none."""

    def length(steps: int) -> float:
        return statistics.mean(count(solve(domain.propose(seed + i, steps, split))) for i in range(MEASURED))

    if isinstance(domain, LongContext):
        domain = dataclasses.replace(domain, tokens=max(horizon, 1024))
        rest = length(1) - domain.tokens
        domain = dataclasses.replace(domain, tokens=max(int(horizon - rest), 1))
        return Plan(domain, 1, 1, 0.0)
    low, below = 1, length(1)
    if below >= horizon:
        if below > horizon * (1 + TOLERANCE):
            raise ConfigError(f"--horizon {horizon}: the shortest runs of {domain.name} have {below:.0f} tokens; ask for that or more")
        return Plan(domain, 1, 1, 0.0)
    high = above = None
    guess = 2
    while high is None or (high - low > 1 and above - below > 0.1 * horizon):
        try:
            found = length(guess)
        except ConfigError as error:
            if guess > low + 1:
                guess = (low + guess) // 2
                continue
            if domain == DOMAINS["instruction_following"]:
                distractors = min(6, max(0, (horizon - 150) // 100))  # a short question has no room for them
                return plan(LongContext(distractors=distractors), horizon, count, seed, split)
            if below >= horizon * (1 - TOLERANCE):
                return Plan(domain, low, low, 0.0)
            raise ConfigError(f"--horizon {horizon}: the longest runs of {domain.name} have {below:.0f} tokens ({error})") from None
        if found >= horizon:
            high, above = guess, found
        else:
            low, below = guess, found
        if low >= MOST_STEPS:
            raise ConfigError(f"--horizon {horizon}: {low} steps of {domain.name} give {below:.0f} tokens only; ask for less")
        ahead = max(low + 1, min(int(low * 1.05 * horizon / below), 8 * low))
        guess = ahead if high is None else min(max(low + int((high - low) * (horizon - below) / (above - below)), low + 1), high - 1)
    return Plan(domain, low, high, (horizon - below) / (above - below))


def runs(made: Plan, tasks: int, seed: int, split: Split, failures: float, refused: collections.Counter[str]) -> Iterator[Trajectory]:
    """Judged runs of accepted tasks, a share of them careless; ``refused`` counts the other tasks by the rule they broke."""
    done, tried = 0, 0
    while done < tasks:
        if tried >= tasks + REFUSALS * (done + 1):
            raise ConfigError(f"{made.domain.name}: {sum(refused.values())} of {tried} tasks were refused: {dict(refused)}")
        task = made.domain.propose(seed + tried, made.steps(done), split)
        tried += 1
        found = accept(task)
        if not found.accepted:
            refused[found.rule] += 1
            continue
        run = found.trajectory
        if int((done + 1) * failures + 1e-9) > int(done * failures + 1e-9):
            run = careless(task, run, seed + tried) or run
        yield dataclasses.replace(run, metadata={**run.metadata, "seed": seed + tried - 1, "split": split})
        done += 1


def careless(task: Task, run: Trajectory, seed: int) -> Trajectory | None:
    """The expert's run gone wrong in one of the ways of CARELESS, really played; None where the verifier accepts all of them."""
    *turns, answer = turns_of(task, run)
    middle = len(turns) // 2
    ways = {
        "wrong value": [*turns, Turn(answer.thought, answer=NO_ANSWERS[1])],
        "skipped step": [*turns[:middle], *turns[middle + 1 :], answer],
        "early stop": [*turns[:middle], Turn("", answer=answer.answer if turns else answer.answer[: len(answer.answer) // 2])],
    }
    for i in range(len(CARELESS)):
        kind = CARELESS[(seed + i) % len(CARELESS)]
        failed = play(task, ways[kind])
        if failed.status != FINISHED:
            return dataclasses.replace(failed, metadata={**failed.metadata, "careless": kind})
    return None


def report(made: Plan, horizon: int, sizes: Sequence[tuple[Trajectory, int]], counts: Sequence[int], refused: collections.Counter) -> str:
    every = sorted(size for _, size in sizes)
    finished = [size for run, size in sizes if run.status == FINISHED]
    failed = collections.Counter(run.records[-1].outcome for run, _ in sizes if run.status != FINISHED)
    p90 = every[min(int(0.9 * len(every)), len(every) - 1)]

    def listed(found: collections.Counter) -> str:
        return "; ".join(f"{n} x {why}" for why, n in found.most_common()) or "none"

    mean = f"{statistics.mean(finished):.0f}" if finished else "none"
    return "\n".join((
        f"{type(made.domain).__name__}: {len(every)} runs, {len(finished)} finished; {made.short} or {made.long} steps",
        f"tokens: finished mean {mean} (asked {horizon}); all: mean {statistics.mean(every):.0f}, median {statistics.median(every):.0f},"
        f" p10 {every[int(0.1 * len(every))]}, p90 {p90}, max {every[-1]}",
        f"turns per run {counts[0] / len(every):.1f}, tool calls per run {counts[1] / len(every):.1f}",
        f"refused tasks: {listed(refused)}",
        f"failed runs: {listed(failed)}",
    ))  # fmt: skip
