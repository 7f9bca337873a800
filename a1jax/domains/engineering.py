"""Engineering: grow a tree of programs until one passes every check (the solution tree of arXiv 2606.30616, section 2.2).

Corpus: the checks of the task, of which a program is told one at a time, when it is run and has passed those before. Tools: write
a program (a new root), patch one (a child), run one, look round the tree, prune it, name the answer, keep notes. Programs run in
the sandbox. The verifier runs the answer on tables that no run has seen, so a program that knows the shown ones by heart fails.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import zlib
from collections.abc import Generator

import numpy as np

from ..config import ConfigError
from ..types import Trajectory
from . import sandbox
from .base import Call, Domain, Observation, Outcome, Split, Task, Turn, final_answer, in_split
from .engineering_tasks import DATA, NAMES, OPTIMISATION, PASS, ROWS, Stage, Table, column, marks, told_apart
from .engineering_tree import PLAIN, TOOLS, Tree, WrongCall, grow, patched

SHOWN, HIDDEN = 2, 3  # tables a program is run on by execute_code, and by the verifier
PRINTED_CHARS = 200  # of what a program printed that a run shows


@functools.lru_cache(maxsize=8192)  # a few kilobytes each: groups of runs on one task write the same programs
def executed(code: str, tables: str, limits: sandbox.Limits) -> sandbox.Result:
    """``solve`` of a program on each table (JSON). Kept, so that a verifier may replay a run; a program is a function of its input."""
    return sandbox.run(code, "solve", json.loads(tables), limits=limits)


@dataclasses.dataclass(frozen=True)
class EngineeringTask(Task):
    stages: tuple[Stage, ...] = ()
    shown: str = "[]"  # JSON: the tables of execute_code
    hidden: str = "[]"  # JSON: the tables of the verifier
    limits: sandbox.Limits = sandbox.Limits()

    tools = TOOLS
    blocking = True

    @property
    def content(self) -> str:
        """What the programs have to do, whatever the tables they are tried on: the question tells the first check alone."""
        return repr([stage.wording() for stage in self.stages])

    def reset(self) -> Tree:
        return Tree(self.steps)

    def step(self, state: Tree, call: Call) -> tuple[Tree, Observation]:
        problem = self.check_call(call)
        if problem:
            return state, Observation(problem, error=True)
        try:
            if call.name == "execute_code":
                return self._execute(state)
            state, text = self._change(state, call)
        except WrongCall as error:
            return state, Observation(f"error: {call.name}: {error}", error=True)
        return state, Observation(text)

    def _change(self, state: Tree, call: Call) -> tuple[Tree, str]:
        if call.name == "write_full_code":
            return grow(state, 0, call.arguments["code"], self.limits.code_chars)
        if call.name == "patch_code":
            return grow(state, state.current, patched(state, **call.arguments), self.limits.code_chars)
        return PLAIN[call.name](state, **call.arguments)

    @functools.cached_property
    def _marked(self) -> dict[tuple[str, str], tuple[list[float], sandbox.Result]]:
        return {}  # by code and tables, without what it returned: a verifier replays every run of every program

    def marks(self, code: str, tables: str) -> tuple[list[float], sandbox.Result]:
        """The lowest mark of each stage over the tables, all 0 when the program did not answer for every one; and how it ended."""
        if (code, tables) not in self._marked:
            found, done = self._mark(code, tables)
            self._marked[code, tables] = found, dataclasses.replace(done, values=())
        return self._marked[code, tables]

    def _mark(self, code: str, tables: str) -> tuple[list[float], sandbox.Result]:
        done = executed(code, tables, self.limits)
        if done.status != "ok":
            return [0.0] * len(self.stages), done
        each = [marks(self.stages, table, value) for table, value in zip(json.loads(tables), done.values, strict=False)]
        if len(each) < len(json.loads(tables)):  # the program wrote its own report, and a short one
            return [0.0] * len(self.stages), dataclasses.replace(done, status="error", error="answered for too few tables")
        return [min(column) for column in zip(*each, strict=True)], done

    def _execute(self, state: Tree) -> tuple[Tree, Observation]:
        number = state.current
        found, done = self.marks(state.current_node().code, self.shown)
        good = [mark >= PASS for mark in found]
        passed = sum(good) if done.status == "ok" else -1
        lines = [f"node {number} score {max(0, passed)}/{len(good)}"]
        if done.error:
            lines.append(done.error)
        if all(good):
            lines.append("all pass")
        else:
            i = good.index(False)
            lines.append(f"next {i + 1} {self.stages[i].wording()}" + (f" (mark {found[i]:.2f})" if 0 < found[i] else ""))
        if done.output.strip():
            lines.append("printed: " + done.output.strip()[:PRINTED_CHARS])
        refs = tuple(name for name, passes in zip(self.evidence, good, strict=True) if passes)
        return state.changed(number, passed=passed, run=True), Observation("\n".join(lines), refs=refs)

    def expert(self) -> Generator[Turn, Observation, None]:
        """Write for the first check, run, patch for the next one that the run names; a wrong guess is pruned and its parent taken up."""
        nodes, parent = 0, 0
        for number, stage in enumerate(self.stages, 1):
            tries = stage.options or (stage.n,)
            for n in tries[: tries.index(stage.n) + 1]:
                thought, body = f"check {number} {stage.target} from {stage.source}", f"{stage.code(n)}\n    return t"
                write = Call("write_full_code", {"code": f"def solve(t):\n    {body}"})
                yield Turn(thought, Call("patch_code", {"find": "return t", "replace": body}) if parent else write)
                nodes += 1
                seen = yield Turn(f"run node {nodes}", Call("execute_code", {}))
                if n == stage.n:
                    break
                yield Turn(f"check {number} not with {n}", Call("invalidate_node", {"node": nodes}))
                if parent:
                    yield Turn(f"back to node {parent}", Call("select_node", {"node": parent}))
            parent = nodes
        ended = seen.text.split()[-2:] == ["all", "pass"]
        yield Turn("all pass" if ended else "best so far", Call("update_answer", {"node": nodes}))
        yield Turn("end", answer=self.answer)

    def verify(self, trajectory: Trajectory) -> Outcome:
        answer = final_answer(trajectory)
        if answer != self.answer:
            return Outcome(False, 0.0, "answer: none given" if answer is None else "answer: wrong")
        state, shown = self._replay(trajectory)
        if not state.answer:
            return Outcome(False, 0.0, "answer: no node was made the answer")
        found, done = self.marks(state.nodes[state.answer - 1].code, self.hidden)
        good = [mark >= PASS for mark in found]
        if not all(good):
            why = done.error or f"{self.evidence[good.index(False)]} fails"
            return Outcome(False, 0.0, f"hidden tables: {sum(good)} of {len(good)} checks pass: {why}"[:300])
        missing = [name for name in self.evidence if name not in shown]
        if missing:
            return Outcome(False, 0.0, f"evidence: no run ever passed {missing[0]}")
        return Outcome(True, 1.0, "hidden tables and evidence: accepted")

    def rubrics(self, trajectory: Trajectory) -> tuple[bool, ...]:
        """One verdict per check: the answer passes it on the hidden tables; without an answer, the node that passed most when it ran."""
        tree, _ = self._replay(trajectory)
        ran = [i for i, node in enumerate(tree.nodes, 1) if node.passed > 0]
        number = tree.answer or max(ran, key=lambda i: tree.node(i).passed, default=0)
        if not number:
            return (False,) * len(self.stages)
        return tuple(mark >= PASS for mark in self.marks(tree.node(number).code, self.hidden)[0])

    def _replay(self, trajectory: Trajectory) -> tuple[Tree, set[str]]:
        """The tree after the run's calls, done anew, and the checks that some program passed when it was run."""
        tree, shown = self.reset(), set()
        for r in trajectory.records:
            if r.action is not None:
                tree, seen = self.step(tree, Call(r.action["name"], r.action["arguments"]))
                shown |= set(seen.refs)
        return tree, shown


@dataclasses.dataclass(frozen=True)
class Engineering(Domain):
    name: str = "engineering"
    optimisation: float = 0.25  # probability that a check is an optimisation problem: longer programs, marks between 0 and 1
    detours: float = 0.0  # probability that a check leaves a number open, so that a run has to try: dead ends, four calls more
    reuse: float = 0.5  # probability that a check reads a column an earlier one filled
    limits: sandbox.Limits = sandbox.Limits()

    def __post_init__(self):
        for name in ("optimisation", "detours", "reuse"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"engineering.{name} is {getattr(self, name)}; it is a probability")

    def propose(self, seed: int, steps: int, split: Split = "train") -> EngineeringTask:
        """``steps`` checks, each of which the shown and the hidden tables tell from every other one.

        Raises ConfigError when steps is less than 1, or where this machine cannot run programs safely.
        """
        if steps < 1:
            raise ConfigError(f"engineering: a task needs at least 1 step, got {steps}")
        sandbox.check()
        rng = np.random.default_rng([seed, steps, zlib.crc32(f"{self.name}/{split}".encode())])
        stages: list[Stage] = []
        while len(stages) < steps:
            stages, tables = self._stages(rng, steps, split)
        read = sorted({stage.source for stage in stages} - {stage.target for stage in stages})
        given = [{name: table[name] for name in read} for table in tables]
        return EngineeringTask(
            domain=self.name,
            task_id=f"engineering-{split}-{steps}-{seed}",
            steps=steps,
            question=f"Write solve(t): take a dict of columns, add columns, return it. Checks: {steps}. next 1 {stages[0].wording()}",
            answer="done",
            evidence=tuple(f"check {i + 1}" for i in range(steps)),
            chain=tuple((stage.source, stage.target) for stage in stages),
            stages=tuple(stages),
            shown=json.dumps(given[:SHOWN]),
            hidden=json.dumps(given[SHOWN:]),
            limits=self.limits,
        )

    def _stages(self, rng: np.random.Generator, steps: int, split: Split) -> tuple[list[Stage], list[Table]]:
        """Stages and the tables they end in; fewer than ``steps`` at a dead end, the caller then begins anew."""
        names = [column(i) for i in range(len(NAMES) * max(1, -(-4 * steps // len(NAMES))))]
        tables = [{name: [int(v) for v in rng.integers(0, 100, ROWS)] for name in names} for _ in range(SHOWN + HIDDEN)]
        stages: list[Stage] = []
        filled: dict[str, bool] = {}  # targets, and whether a later stage may read them
        read: set[str] = set()
        while len(stages) < steps:
            optimise = rng.random() < self.optimisation
            fresh = [name for name in names if name not in read and name not in filled]
            again = [name for name, may in filled.items() if may and name not in read]
            source = _one(rng, again if again and not optimise and rng.random() < self.reuse else fresh)
            target = _one(rng, [name for name in fresh if name != source and source and in_split(source, name, split)])
            if target is None:
                break
            stage = self._optimise(rng, source, target) if optimise else self._compute(rng, source, target, tables)
            read.add(source)
            if stage is None:
                filled[source] = False  # its values tell too little apart: take another
                continue
            stages.append(stage)
            filled[target] = not optimise
        return stages, tables

    def _optimise(self, rng: np.random.Generator, source: str, target: str) -> Stage:
        operation = OPTIMISATION[int(rng.integers(len(OPTIMISATION)))]
        return Stage(operation, source, target, operation.numbers[int(rng.integers(len(operation.numbers)))])

    def _compute(self, rng: np.random.Generator, source: str, target: str, tables: list[Table]) -> Stage | None:
        shown, hidden = (told_apart([table[source] for table in part]) for part in (tables[:SHOWN], tables[SHOWN:]))
        both = [found for found in shown if found in hidden]
        kinds = [operation for operation in DATA if any(found[0] is operation for found in both)]
        if not kinds:
            return None
        operation = kinds[int(rng.integers(len(kinds)))]
        numbers = [n for found, n in both if found is operation]
        n = numbers[int(rng.integers(len(numbers)))]
        options: tuple[int, ...] = ()
        if len(numbers) > 1 and rng.random() < self.detours:
            other = [m for m in numbers if m != n][int(rng.integers(len(numbers) - 1))]
            options = (n, other) if rng.random() < 0.5 else (other, n)
        for table in tables:
            table[target] = operation.apply(table[source], n)
        return Stage(operation, source, target, n, options)

    def scaffold(self) -> tuple[str, ...]:
        words = [f" {w}" for w in NAMES]
        quoted = [f"t['{w}']" for w in NAMES]
        expressions = [part for operation in DATA for part in operation.code.split("] = ", 1)[1].split("{n}") if len(part) > 1]
        return (
            "Write solve(t): take a dict of columns, add columns, return it. Checks:",
            '{"name": "write_full_code", "arguments": {"code": "def solve(t):\\n    s = ',
            '{"name": "patch_code", "arguments": {"find": "return t", "replace": "s = ',
            '{"name": "execute_code", "arguments": {}}',
            '{"name": "update_answer", "arguments": {"node": ',
            "\\n    return t",
            "run node",
            "node",
            " score",
            " next",
            "check",
            " from",
            "all pass",
            "end",
            "done",
            *words,
            *quoted,
            *expressions,
        )


def _one(rng: np.random.Generator, names: list[str]) -> str | None:
    return names[int(rng.integers(len(names)))] if names else None
