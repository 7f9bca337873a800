"""Word problems out of a file: GSM8K's form (K. Cobbe et al., arXiv 2110.14168), one JSON object {"question", "answer"} a line.

The answer's lines hold calculations marked ``<<48/2=24>>`` and end in ``#### 72``. Each mark is a step: an expert thinks its line
and asks the calculator. Problems whose marks do not calculate to what they say are left out.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import pathlib
import re
import zlib
from collections.abc import Generator
from fractions import Fraction

import numpy as np

from ..config import ConfigError
from ..types import Trajectory
from .base import Call, Domain, Observation, Outcome, Split, Task, Turn, final_answer, in_split
from .science import TOOLS, answer_calculator
from .science_units import Unreadable, calculate, near, show

_MARK = re.compile(r"<<([^<>=]*)=([^<>=]*)>>")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+", re.ASCII)
ROUNDING = Fraction(1, 200)  # relative: the file writes 1/3 as .33


@dataclasses.dataclass(frozen=True)
class Problem:
    """calculations: (thought, expression, value) in order; answer: the number behind ####."""

    question: str
    calculations: tuple[tuple[str, str, Fraction], ...]
    answer: Fraction

    @property
    def key(self) -> str:
        return f"{zlib.crc32(self.question.encode()):08x}"


def number(text: str) -> Fraction | None:
    """The one number a final answer is, as in "72", "$1,200", "#### 72" or "72 clips"; None when it is none or several."""
    text = text.rpartition("####")[2][:1000]
    found = _NUMBER.findall(text)
    rest = _NUMBER.sub("", text, count=1)
    if len(found) != 1 or re.search(r"\d", rest) or not re.fullmatch(r"\s*-?\s*[$€£]?\s*[^\W\d]*[\w\s%/.,!]*", rest):
        return None
    return Fraction(found[0].replace(",", ""))


def parse(row: dict) -> Problem | None:
    """None for a problem without marks, without a number as its answer, or with a mark that does not calculate to what it says."""
    body, _, last = row["answer"].rpartition("####")
    answer, calculations = number(last), []
    for line in body.splitlines():
        for i, (expression, value) in enumerate(_MARK.findall(line)):
            stated = number(value)
            try:
                right = calculate(expression)
            except Unreadable:
                return None
            if stated is None or not (near(right, stated, ROUNDING) or abs(right - stated) <= ROUNDING):
                return None
            calculations.append((_MARK.sub("", line).strip() if i == 0 else "then", expression, stated))
    return Problem(row["question"].strip(), tuple(calculations), answer) if calculations and answer is not None else None


@functools.lru_cache(maxsize=4)
def read(path: str) -> tuple[Problem, ...]:
    """Every usable problem of a file (plain or .gz). Raises ConfigError with file and line for one that is not of the form."""
    if not pathlib.Path(path).is_file():
        raise ConfigError(f"science word problems: there is no file {path!r}; set path to a .jsonl or .jsonl.gz file of them")
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            text = file.read()
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ConfigError(f"science word problems: {path} cannot be read ({error}): give a .jsonl or .jsonl.gz file") from None
    problems = []
    for i, line in enumerate(text.split("\n")[: -1 if text.endswith("\n") else None], 1):
        try:
            row = json.loads(line)
            good = isinstance(row["question"], str) and isinstance(row["answer"], str)
        except (ValueError, KeyError, TypeError):
            good = False
        if not good:
            raise ConfigError(f'{path}:{i}: not a JSON object with the texts "question" and "answer"')
        problems.append(parse(row))
    return tuple(problem for problem in problems if problem)


@dataclasses.dataclass(frozen=True)
class WordTask(Task):
    problem: Problem = None

    tools = TOOLS[1:]
    self_contained = True

    @property
    def premises(self) -> tuple[str, ...]:
        """The problem whole: of somebody else's words nobody knows which part the answer rests on."""
        return (self.question,)

    def reset(self):
        return ()

    def step(self, state, call: Call):
        problem = self.check_call(call)
        return state, Observation(problem, error=True) if problem else answer_calculator(call.arguments["expression"])

    def expert(self) -> Generator[Turn, Observation, None]:
        for thought, expression, _ in self.problem.calculations:
            yield Turn(thought, Call("calculator", {"expression": expression}))
        yield Turn("That is all.", answer=self.answer)

    def rubrics(self, trajectory: Trajectory) -> tuple[bool, ...]:
        """For every marked value whether the run has it, said or calculated, after those before it."""
        found: list[Fraction] = []
        for message in trajectory.messages:
            if message.get("role") != "user":
                text = " ".join(str(message.get(key) or "") for key in ("reasoning_content", "content"))
                found += [Fraction(value.replace(",", "")) for value in _NUMBER.findall(text)]
        met, at = [], 0
        for _, _, value in self.problem.calculations:
            where = next((i for i in range(at, len(found)) if near(found[i], value, ROUNDING)), None)
            met.append(where is not None)
            at = at if where is None else where + 1
        return tuple(met)

    def verify(self, trajectory: Trajectory) -> Outcome:
        text = final_answer(trajectory)
        if text is None:
            return Outcome(False, 0.0, "answer: none given")
        got = number(text)
        if got is None:
            return Outcome(False, 0.0, "answer: not one number")
        right = near(got, self.problem.answer)
        return Outcome(right, float(right), "answer: accepted" if right else "answer: wrong")


@dataclasses.dataclass(frozen=True)
class PlainWordTask(WordTask):
    """The same without tools: the expert's thoughts are the file's own lines, in one turn."""

    tools = ()

    def expert(self) -> Generator[Turn, Observation, None]:
        yield Turn("\n".join(thought for thought, _, _ in self.problem.calculations if thought != "then"), answer=self.answer)


@dataclasses.dataclass(frozen=True)
class WordProblems(Domain):
    """Not among DOMAINS: it needs a file. The split goes by question and answer, whatever the seed."""

    name: str = "science"
    path: str = ""
    tools: bool = True

    def propose(self, seed: int, steps: int, split: Split = "train") -> WordTask:
        """One of the file's problems with ``steps`` calculations. Raises ConfigError when there is none."""
        pools = _pools(self.path, split)
        if steps not in pools:
            raise ConfigError(f"{self.path}: no {split} problem with {steps} calculations; there are {', '.join(map(str, sorted(pools)))}")
        rng = np.random.default_rng([seed, steps, zlib.crc32(f"words/{split}".encode())])
        problem = pools[steps][int(rng.integers(len(pools[steps])))]
        return (WordTask if self.tools else PlainWordTask)(
            domain=self.name,
            task_id=f"words-{split}-{steps}-{problem.key}",
            steps=steps,
            question=problem.question,
            answer=show(problem.answer),
            evidence=(),
            chain=((problem.key, show(problem.answer)),),
            problem=problem,
        )


@functools.lru_cache(maxsize=8)
def _pools(path: str, split: Split) -> dict[int, tuple[Problem, ...]]:
    pools: dict[int, list[Problem]] = {}
    for problem in read(path):
        if in_split(problem.key, show(problem.answer), split):
            pools.setdefault(len(problem.calculations), []).append(problem)
    return {steps: tuple(found) for steps, found in pools.items()}
