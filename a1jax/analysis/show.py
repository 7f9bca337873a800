"""``a1jax show``: one run turn by turn in the terminal and as a single HTML page, or the list of what can be read."""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..config import ConfigError
from ..data.tokenizer import Tokenizer
from ..stages import kept_runs
from ..types import Record, Trajectory
from . import kept, page, reading
from .kept import Kept
from .reading import CALL, CUT, ERROR, OBSERVATION, TEXT, THINKING, Turn

STATUS = {"FINISHED": "bold green", "FAILED": "bold red", "TRUNCATED": "bold yellow", "ABORTED": "bold magenta"}
STYLES = {THINKING: "italic cyan", TEXT: "", CALL: "yellow", OBSERVATION: "", ERROR: "red", CUT: "italic red"}
FOLDER = "pages"  # of a run's folder: where pages go that nobody named
WIDE, NARROW = 160, 110  # columns of a list and of a run where there is no terminal


def run(path: pathlib.Path, task: str | None, model: str | None, html: pathlib.Path | None, console: Console | None = None) -> None:
    """Lists the runs at ``path``, or with ``task`` prints one and writes its page: to ``html``, else into a run's folder.

    task: an id, or id#2 for the second of several runs of it. Raises ConfigError for what is not there, DataError for damaged files."""
    if task is None:
        if html is not None:
            raise ConfigError("--html needs --task ID: a page shows one run")
        return listing(path, model, console)
    found, number = _find(path, task, model)
    one = found[number]
    console = console or _console(NARROW)
    several = [f"{k.model or path.name}#{i + 1}" for i, k in enumerate(found)]
    if len(found) > 1:
        more = f" and {len(several) - 8} more" if len(several) > 8 else ""
        console.print(Text(f"{len(found)} runs of this task: {', '.join(several[:8])}{more}; here is {several[number]}", "dim"))
    tokenizer = kept.tokenizer_of(path) if path.is_dir() else None
    print_run(one, console, tokenizer)
    if html is None and path.is_dir() and kept.files(path):
        html = path / FOLDER / f"{_safe(one.model)}.{_safe(task)}.html"
    if html is not None:
        try:
            page.put(html, to_html(one, tokenizer))
        except OSError as error:
            raise ConfigError(f"{html} cannot be written ({error.strerror}): choose another --html FILE") from None
        console.print(Text(f"page: {html}", "dim"), soft_wrap=True)


def listing(path: pathlib.Path, model: str | None, console: Console | None = None) -> None:
    """A line for every run: task id, model, status, reward, turns, tokens, and where it stopped."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("task", "model", "status", "reward", "turns", "tokens", "stop"):
        table.add_column(name, justify="right" if name in ("reward", "turns", "tokens") else "left", overflow="fold")
    for one in kept.every(path, model):
        turns, tokens = sizes(one.run)
        status = Text(one.run.status or "?", STATUS.get(one.run.status or "", ""))
        stop = str(one.run.metadata.get("stop", ""))
        cells = (one.run.task_id, one.model, status, number(one.run.reward), str(turns), str(tokens if tokens is not None else "?"), stop)
        table.add_row(*(c if isinstance(c, Text) else Text(reading.visible(c)) for c in cells))
    console = console or _console(WIDE)
    console.print(table)
    console.print(Text(f"{table.row_count} runs; --task ID reads one", "dim"))


def sizes(run: Trajectory) -> tuple[int, int | None]:
    """(turns of the model, tokens) of a run; None tokens where no ids were kept."""
    found = run.metadata.get(kept_runs.KEY)
    if found:
        return found["turns"], len(found["tokens"])
    return sum(m["role"] == "assistant" for m in run.messages), None


def number(value: Any) -> str:
    return "?" if value is None else f"{value:g}" if isinstance(value, (int, float)) else reading.visible(str(value))


def facts(one: Kept) -> list[tuple[str, str]]:
    """What there is to say of a run as a whole, in order."""
    run, (turns, tokens) = one.run, sizes(one.run)
    shown = [("domain", run.domain), ("model", one.model), ("steps", run.metadata.get("steps")), ("turns", turns), ("tokens", tokens)]
    shown += [(k, run.metadata.get(k)) for k in ("stop", "forced", "advantage") if k in run.metadata]
    parts = run.metadata.get("reward_parts") or {}
    shown += [(f"reward: {name}", number(value)) for name, value in parts.items()]
    rubrics = run.metadata.get("rubrics") or []
    if len(rubrics) > 1:
        shown.append(("rubrics met", f"{sum(map(bool, rubrics))} of {len(rubrics)}"))
    return [(name, reading.visible(str(value))) for name, value in shown if value not in (None, "")]


def print_run(one: Kept, console: Console, tokenizer: Tokenizer | None = None) -> None:
    """The run turn by turn; a green bar stands beside what the loss looks at."""
    run = one.run
    console.print(Text.assemble((reading.visible(run.task_id), "bold"), "  ", _outcome(run)))
    console.print(Text("  ".join(f"{name} {value}" for name, value in facts(one)), "dim"))
    console.print(Text.assemble(("┃", "green"), (" the loss looks at it   ", "dim"), ("│", "dim"), (" it does not", "dim")))
    for at, turn in enumerate(reading.turns(run, tokenizer), start=1):
        console.print()
        console.print(_heading(at, turn))
        for kind, text in turn.parts:
            _barred(console, Text(("→ " if kind == CALL else "") + text, STYLES[kind]), turn.looked)
        for r in turn.records:
            _barred(console, Text(f"record: {record(r)}", "dim red" if r.outcome else "dim"), turn.looked)
    console.print()
    console.print(Text.assemble(_outcome(run), "  ", reading.verdict(run) or "no verifier spoke"))


def record(r: Record) -> str:
    """A turn's record in a line: corpus items seen, the verifier that fired."""
    seen = ", ".join(r.state) or "nothing of the corpus"
    return reading.visible(f"saw {seen}" + (f"; {r.outcome}" if r.outcome else ""))


def to_html(one: Kept, tokenizer: Tokenizer | None = None) -> str:
    """The run as one page that needs no network. tokenizer: of its ids, for the shaded text; one that does not fit is left out."""
    turns = reading.turns(one.run, tokenizer)
    return page.template("show.html.jinja").render(
        name=reading.visible(one.run.task_id),
        status=one.run.status or "unknown",
        reward=number(one.run.reward),
        verdict=reading.verdict(one.run),
        facts=facts(one),
        turns=[(turn, [record(r) for r in turn.records]) for turn in turns],
        pieces=[(t, looked, reading.shade(p)) for t, looked, p in (reading.pieces(one.run, tokenizer) or ())] if tokenizer else [],
        tools=reading.visible(json.dumps(list(one.run.tools), indent=1)) if one.run.tools else "",
    )


def _find(path: pathlib.Path, task: str, model: str | None) -> tuple[list[Kept], int]:
    """The runs of a task and which of them is meant: ids may end in #2, and may contain a # of their own."""
    name, _, which = task.rpartition("#")
    if not (name and which.isdigit()):
        return kept.of_task(path, task, model), 0
    try:
        return kept.of_task(path, task, model), 0
    except ConfigError:
        found = kept.of_task(path, name, model)
    if not 1 <= int(which) <= len(found):
        raise ConfigError(f"{path}: task '{name}' has {len(found)} runs; #{which} is none of them")
    return found, int(which) - 1


def _outcome(run: Trajectory) -> Text:
    return Text(f"{run.status or 'no status'}, reward {number(run.reward)}", STATUS.get(run.status or "", "bold"))


def _heading(at: int, turn: Turn) -> Text:
    size = f"{turn.tokens} tokens" if turn.tokens is not None else ""
    logp = f"mean log-probability {turn.logp:.3f}" if turn.logp is not None else ""
    told = "  ".join(filter(None, (f"{turn.role} {turn.name}".strip(), size, logp)))
    return Text(f"{at:>3} {told}", "bold green" if turn.looked else "bold")


def _barred(console: Console, text: Text, looked: bool) -> None:
    """Text, wrapped, behind a bar that says whether the loss looks at it."""
    bar = ("┃ ", "green") if looked else ("│ ", "dim")
    for line in text.wrap(console, max(20, console.width - 4), tab_size=4):
        console.print(Text.assemble("  ", bar, line), soft_wrap=True)


def _console(width: int) -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=width)


def _safe(name: str) -> str:
    """A name that a file may have."""
    return re.sub(r"[^\w.#-]+", "_", name).strip(".") or "run"
