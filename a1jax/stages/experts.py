"""Finite expert data from embedded domains, prompts to roll out, held-out tasks to be judged by: all seeded, each use from its own seeds.

Training tasks and judged ones are of two splits, which share no part of a chain; two seeds of training may give the same task. What is
judged is distinct by content (``Task.content``) within a use, and held-out and admission tasks share no content.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Sequence

import numpy as np

from ..config import ConfigError
from ..data import chat
from ..data.packing import Example
from ..data.tokenizer import Tokenizer
from ..domains import Call, Domain, Task, solve
from ..types import Trajectory

log = logging.getLogger(__name__)

# Seeds of tasks start here, one range per use, so that no use ever meets another's seeds.
USES = ("sft", "teacher", "prompts", "heldout", "admission", "tokenizer", "reinforce")  # reinforce: what teachers are rolled out on
STARTS = {use: i * 10_000_000 for i, use in enumerate(USES)}
JUDGED = ("heldout", "admission")
ADMISSION_SHARE = 3  # one content in three may admit a teacher, the others are held out to report
PATIENCE = 300  # seeds in a row without a new task of the use, after which a family is taken to have no more
LANE = 100_000  # tasks of one use and seed; stages of one domain that draw from the same use have a lane each


@dataclasses.dataclass(frozen=True)
class Runs:
    """How many expert runs (or held-out tasks) of each length. Finite on purpose."""

    counts: dict[int, int]  # the length knob in steps -> number of runs
    family: Domain | None = None  # what they are drawn from; None: what the domain's name stands for in the experiment

    def __post_init__(self):
        for steps, count in self.counts.items():
            if steps < 1 or count < 0:
                raise ConfigError(f"Runs.counts has {steps}: {count}; steps are at least 1 and counts not negative")


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Tasks to roll out: their lengths in turn."""

    lengths: tuple[int, ...]  # in steps
    family: Domain | None = None  # as in Runs

    def __post_init__(self):
        if not self.lengths or min(self.lengths) < 1:
            raise ConfigError(f"Prompts.lengths is {self.lengths}; name at least one length, each of at least 1 step")


def tasks(family: Domain, counts: dict[int, int], use: str, seed: int, skip: int = 0) -> list[Task]:
    """The tasks of one use of a domain: ``use`` picks the seed range and, for the uses in JUDGED, the held-out split.

    Training tasks: one of each seed, so that two may be equal. Judged ones are distinct, see ``judged``, and may be fewer than counts.
    skip: seeds of the range that others have taken; each length begins there.
    """
    if use in JUDGED:
        return judged(family, (Runs(counts),), use, seed, skip)
    start = STARTS[use] + seed * LANE + skip
    return [family.propose(start + i, steps, "train") for steps in sorted(counts) for i in range(counts[steps])]


def judged(family: Domain, sources: Sequence[Runs], use: str, seed: int, skip: int = 0) -> list[Task]:
    """The held-out tasks (to report) or admission tasks (to admit a teacher) of a domain, no two of one content; ``family`` is that of a
    source that names none. Seeds are gone through in order; a content is of one use for good, by ``use_of``, whatever is asked for.

    A finite family may have fewer tasks than are asked for: then there are fewer, and a warning says so. The same tasks to all who ask.
    """
    wanted = tuple((source.family or family, steps, source.counts[steps]) for source in sources for steps in sorted(source.counts))
    try:
        return list(_kept(wanted, use, STARTS[use] + seed * LANE + skip, LANE - skip))
    except TypeError:  # a family with a field that cannot be hashed, such as a list
        return list(_judged(wanted, use, STARTS[use] + seed * LANE + skip, LANE - skip))


def use_of(task: Task) -> str:
    """Which of JUDGED a held-out task is of: a function of its content alone, as a hash has it."""
    digest = hashlib.blake2b(task.content.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return "admission" if int.from_bytes(digest, "big") % ADMISSION_SHARE == 0 else "heldout"


def _judged(wanted: tuple[tuple[Domain, int, int], ...], use: str, start: int, most: int) -> tuple[Task, ...]:
    found: dict[str, Task] = {}
    for family, steps, count in wanted:
        before, last = len(found), 0  # last: the number of seeds up to the last new task
        for i in range(most):
            if len(found) - before == count or i - last == PATIENCE:
                break
            task = family.propose(start + i, steps, "heldout")
            if task.content not in found and use_of(task) == use:
                found[task.content], last = task, i + 1
        if len(found) - before < count:
            name, got = type(family).__name__, len(found) - before
            log.warning("%s: %d distinct %s tasks of %d steps were found, not %d; so many are judged", name, got, use, steps, count)
    return tuple(found.values())


_kept = functools.lru_cache(maxsize=64)(_judged)  # every model that is judged asks for the same tasks


def examples(
    family: Domain, index: int, runs: Runs | Sequence[Runs], use: str, seed: int, tokenizer: Tokenizer, show_tools: bool, skip: int = 0
) -> list[tuple[int, Example]]:
    """(steps, example) of every expert run, of several families one after the other; index is the domain's number in the batch. Training
    runs: no seed twice; judged ones: no content twice. skip: as in ``tasks``."""
    return [(steps, example(run, index, tokenizer, show_tools)) for steps, run in expert_runs(family, runs, use, seed, skip)]


def expert_runs(family: Domain, runs: Runs | Sequence[Runs], use: str, seed: int, skip: int = 0) -> list[tuple[int, Trajectory]]:
    """(steps, run) of every expert run, in the order of ``examples``."""
    if use in JUDGED:
        return [(task.steps, solve(task)) for task in judged(family, several(runs), use, seed, skip)]
    out = []
    for part in several(runs):
        out += [(task.steps, solve(task)) for task in tasks(part.family or family, part.counts, use, seed, skip)]
        skip += taken(part)
    return out


def example(run: Trajectory, index: int, tokenizer: Tokenizer, show_tools: bool) -> Example:
    """A run's tokens and mask; index: the domain's number in the batch."""
    tokens, mask = chat.tokenize(tokenizer, list(run.messages), tools=run.tools if show_tools else ())
    return Example(tokens=tokens, mask=mask, domain=index)


def several(runs: Runs | Sequence[Runs]) -> tuple[Runs, ...]:
    return (runs,) if isinstance(runs, Runs) else tuple(runs)


def taken(runs: Runs | Sequence[Runs]) -> int:
    """Seeds that these runs take of their range."""
    return sum(max(part.counts.values(), default=0) for part in several(runs))


def prompts(family: Domain, lengths: Sequence[int], number: int, step: int, seed: int) -> list[Task]:
    """``number`` training tasks for one step of distillation, their lengths in turn; no seed comes twice in a run."""
    return mixed_prompts(family, (Prompts(tuple(lengths)),), number, step, seed)


def mixed_prompts(family: Domain, sources: Sequence[Prompts], number: int, step: int, seed: int) -> list[Task]:
    """The same from several sources in equal shares, the lengths of each in turn from step to step; ``family`` is that of a source that
    names none."""
    first = STARTS["prompts"] + seed * 1_000_000 + step * number
    rng, out = np.random.default_rng([seed, step]), []
    for i, source in enumerate(sources):
        share = number // len(sources) + int(i < number % len(sources))
        turn = (np.arange(step * share, (step + 1) * share) + i * share) % len(source.lengths)  # equal sources take turns too
        for steps in rng.permutation(np.asarray(source.lengths)[turn]):
            out.append((source.family or family).propose(first + len(out), int(steps), "train"))
    return out


def drawn(family: Domain, sources: Sequence[Prompts], places: Sequence[int], seed: int, lane: int = 0) -> list[Task]:
    """The training tasks at some places of an endless row: sources in turn, and of each its lengths, shuffled anew every time round.

    A task is a function of its place, whoever asks and in whatever portions. family: of a source that names none. lane: 0 to 9.
    """
    out, start = [], STARTS["reinforce"] + seed * 10 * LANE + lane * LANE
    for place in places:
        number, which = divmod(int(place), len(sources))
        source = sources[which]
        round_, at = divmod(number, len(source.lengths))
        order = np.random.default_rng([seed, lane, which, round_]).permutation(np.asarray(source.lengths))
        out.append((source.family or family).propose(start + int(place), int(order[at]), "train"))
    return out


def tokenizer_texts(families: Sequence[Domain], seed: int) -> list[str]:
    """What a small tokenizer is trained on: expert runs, tool schemas, and the tools' answers to wrong calls."""
    texts = []
    for family in families:
        for task in tasks(family, {1: 8, 2: 8, 4: 8}, "tokenizer", seed):
            texts += [f"{m.get('reasoning_content', '')}\n{m['content']}" for m in solve(task).messages]
        texts += [json.dumps(t) for t in task.tools]
        wrong = [Call("none", {}), *(Call(t["function"]["name"], {}) for t in task.tools)]
        wrong += [Call(t["function"]["name"], dict.fromkeys(t["function"]["parameters"]["properties"], "nothing")) for t in task.tools]
        texts += [task.step(task.reset(), call)[1].text for call in wrong]
    return texts


SCAFFOLD = (
    "<|im_start|>assistant\n",
    "<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n",
    "\n<|im_start|>user\n<tool_response>\n",
    "\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
    "<think>\n",
    "\n</think>\n\n",
    "<tool_call>\n",
    '"}}\n</tool_call>',
    "step",
    " next",
    " end",
    ".",
    ":",
    "error: ",
    "\n",
)


def symbols(families: Sequence[Domain], counters: int) -> list[str]:
    """Strings that get one id each in the small tokenizer: chat scaffold, counters, and what each domain repeats.

    Large tokenizers have a symbol for every chat tag as well; giving the fixed strings around a call one id shortens runs three times
    and changes nothing in the text.
    """
    out = [*SCAFFOLD, *(f" {i}" for i in range(1, counters + 1))]
    for family in families:
        for text in family.scaffold():
            out.append("<tool_call>\n" + text if text.startswith('{"name"') else text)
    return list(dict.fromkeys(out))
