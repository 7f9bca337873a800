"""Plans of calls, and why a plan is refused: availability of arguments, reachability of tools, preconditions, useless calls, short cuts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .tool_graph_catalogue import Catalogue, Tool
from .tool_graph_world import KINDS, State, World


@dataclasses.dataclass(frozen=True)
class Step:
    """One call of a plan. sources: where each argument comes from: the number of an earlier call, or a name given in the question.
    named: the question asks for it; the others prepare one that it asks for. arguments, result: what they are in the task's world."""

    tool: str
    sources: tuple[int | str, ...]
    named: bool
    arguments: tuple[str, ...]
    result: str = ""


def screen(plan: Sequence[Step], world: World, catalogue: Catalogue) -> str | None:
    """One line saying why a plan makes no task, or None."""
    given = {source for step in plan for source in step.sources if isinstance(source, str)}
    reachable = catalogue.reachable({KINDS[name[0]] for name in given})
    state, looked, known = State(), set(), set(given)
    for i, step in enumerate(plan):
        where = f"call {i} {step.tool}"
        made = catalogue.by_name.get(step.tool)
        if made is None or step.tool not in reachable:
            return f"unreachable: {where}: nothing given leads to this tool"
        problem = _arguments(plan, i, made, catalogue) or _preconditions(step, made, state, looked, known)
        if problem:
            return f"{problem[0]}: {where}: {problem[1]}"
        if made.writes and world.value(state, made.writes, step.arguments[0]) == step.arguments[-1]:
            return f"short cut: {where}: {step.arguments[0]} has that {made.writes} already"
        state = _after(state, step, made)
        looked = {pair for pair in looked if not made.writes or pair != (made.writes, step.arguments[0])}
        if made.reads:
            looked.add((made.reads, step.arguments[0]))
            known.add(step.result)
    return _useless(plan, catalogue)


def _arguments(plan: Sequence[Step], i: int, made: Tool, catalogue: Catalogue) -> tuple[str, str] | None:
    step = plan[i]
    if len(step.sources) != len(made.arguments):
        return "schema", f"takes {len(made.arguments)} arguments, got {len(step.sources)}"
    for source, value, (name, wanted) in zip(step.sources, step.arguments, made.arguments, strict=True):
        if isinstance(source, int) and not (0 <= source < i and plan[source].result):
            return "unavailable", f"argument '{name}' is the result of call {source}, which shows none before"
        kind = catalogue.by_name[plan[source].tool].result if isinstance(source, int) else KINDS[source[0]]
        if kind != wanted:
            return "schema", f"argument '{name}' takes a {wanted}, not a {kind}"
        if value != (plan[source].result if isinstance(source, int) else source):
            return "unavailable", f"argument '{name}' is {value}, which its source does not show"
        relation = dict(made.proofs).get(name)
        if relation and not (isinstance(source, int) and _reads(plan[source], catalogue) == (relation, step.arguments[0])):
            return "unavailable", f"argument '{name}' must be the {relation} of {step.arguments[0]}, looked up before"
    return None


def _reads(step: Step, catalogue: Catalogue) -> tuple[str, str]:
    return catalogue.by_name[step.tool].reads, step.arguments[0]


def _preconditions(step: Step, made: Tool, state: State, looked: set, known: set) -> tuple[str, str] | None:
    subject = step.arguments[0]
    for need in made.needs:
        if (need, subject) not in state.holds:
            return "precondition", f"{subject} is not {need}"
    for effect in made.adds:
        if (effect, subject) in state.holds:
            return "useless", f"{subject} is {effect} already"
    if made.reads and (made.reads, subject) in looked:
        return "useless", f"the {made.reads} of {subject} was looked up before"
    written = (made.reads, subject) in state.values  # a question may ask to look at what an earlier goal left
    if made.result in ("person", "box") and not written and step.result in known:
        return "short cut", f"{step.result} is known before"
    return None


def _after(state: State, step: Step, made: Tool) -> State:
    subject = step.arguments[0]
    if made.writes:
        state.values[made.writes, subject] = step.arguments[-1]  # this function's caller owns the state
    return State(state.values, state.holds - {(p, subject) for p in made.drops} | {(p, subject) for p in made.adds})


def _useless(plan: Sequence[Step], catalogue: Catalogue) -> str | None:
    """Backwards: a call is needed when it is a goal, when a needed call takes its result, or when one needs its effect."""
    wanted_results: set[int] = set()
    wanted_effects: set[tuple[str, str]] = set()
    for i in reversed(range(len(plan))):
        step, made = plan[i], catalogue.by_name[plan[i].tool]
        effects = {(p, step.arguments[0]) for p in made.adds}
        if not (made.writes or i in wanted_results or effects & wanted_effects):
            return f"useless: call {i} {step.tool}: no goal needs it"
        wanted_effects = (wanted_effects - effects) | {(p, step.arguments[0]) for p in made.needs}
        wanted_results |= {source for source in step.sources if isinstance(source, int)}
    return None
