"""The loop around the model: turns, tools, budgets, statuses; many environments in lockstep over two jitted programs.

Sampled ids are kept as sampled and never re-encoded; observations are rendered and appended; nothing is generated after a run
was cut. A run that the system interrupts (its environment raised) is ABORTED and begun anew, alone. What a run samples is fixed by
(seed, its place in the list, attempt): neither its slot, nor its neighbours, nor how long a tool took changes it, but for the rounding
of the sums that other rows of a batch may bring.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from .. import distributed, interruption
from ..config import ConfigError
from ..data import chat
from ..data.errors import DataError
from ..data.tokenizer import Tokenizer
from ..domains.base import Task
from ..models.config import ModelConfig
from ..types import ABORTED, TRUNCATED, Params, Rollout, Trajectory
from . import lockstep, sampler, turns

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Limits:
    """Budgets of a run; reaching one gives the status TRUNCATED, but at max_turns where the run is asked for its answer first."""

    slots: int = 64  # environments decoded in lockstep; memory of the cache grows with it
    max_turns: int = 32  # model turns in one run
    max_turn_tokens: int = 48  # tokens the model may write in one turn
    max_response: int = 0  # tokens the model may write in one run, all turns together; 0: no limit but the others
    max_length: int = 512  # tokens of the whole run: prompt, turns and observations
    stop: tuple[str, ...] = ()  # further tokens that end a turn; control tokens are no part of its text
    final_request: str | None = None  # at max_turns the last turn is taken back and the user asks in these words for the answer
    # None: in the words of the task's own protocol, where it has some; "": nobody is asked, the run is TRUNCATED
    temperature: float = 1.0  # 0 is greedy
    retries: int = 1  # times an ABORTED run is begun anew
    feed_tokens: int = 0  # known tokens (long prompts, pages) fed to a slot in one call where there are as many; below 2: one by one
    workers: int = 4  # threads on which blocking tasks act while the others decode
    show_tools: bool = False  # put the tool schemas into the system turn; tiny models know their tools from training
    record_routes: bool = False  # keep the experts every token took (Rollout.routes): 2 bytes x layers x active experts per token

    def __post_init__(self):
        for name in ("slots", "max_turns", "max_turn_tokens", "max_length", "workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Limits.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("max_response", "temperature", "retries", "feed_tokens"):
            if getattr(self, name) < 0:
                raise ConfigError(f"Limits.{name} is {getattr(self, name)}; it must not be negative")


class Engine:
    """Runs tasks with a model. Compiled once per (model, limits); parameters are an argument of ``run``.

    Under a mesh of several processes every process plays the same tasks with the same numbers against one decode program that all of them
    share: no rollout has to be sent. It costs that every tool runs, and every environment is kept, once per process; blocking tasks
    act in line instead of beside decoding, because who answers first would otherwise decide what is decoded next. An environment must
    answer alike everywhere (no clock, no service that changes its mind); one that does not is noticed when ``run`` ends.

    Raises ConfigError for a stop token that is not one id of the tokenizer.
    """

    def __init__(self, cfg: ModelConfig, tokenizer: Tokenizer, limits: Limits):
        self.cfg, self.tokenizer, self.limits = cfg, tokenizer, limits
        self.advance = sampler.make_advance(cfg, limits.temperature, limits.record_routes)
        self.feed = sampler.make_feed(cfg, limits.temperature, limits.record_routes)
        self.numbers = sampler.run_uniforms
        self.stops = np.zeros(max(tokenizer.vocab_size, cfg.vocab_size), bool)
        self.stops[[tokenizer.eos_id, *(_stop_id(tokenizer, text) for text in limits.stop)]] = True
        self.encoded = functools.lru_cache(maxsize=8192)(self._encode)

    def run(
        self, params: Params, tasks: Sequence[Task], seed: int, on_done: Callable[[int], None] | None = None, first: int = 0
    ) -> tuple[list[Rollout], dict]:
        """One run per task, in the order of the tasks, and counts.

        first: the place of the first task in the list that the seed is for, where ``tasks`` is a part of it: the runs are then those of
        the whole list.

        Same params, tasks, seed and limits: same rollouts. ABORTED runs are retried ``limits.retries`` times, then returned as such.
        Counts: decode_steps (calls of the model, feed_steps of them with known tokens only), slot_steps (tokens of runs that were fed),
        idle_share (of the tokens those calls had room for, what was not fed), sampled_tokens (also of runs that were not returned),
        engine_seconds, tool_seconds (waiting for tools with nothing to decode), tokens_per_second (sampled ones), interruptions (times an
        environment raised), tool_errors.
        """
        runs, counts = _Session(self, params, tasks, seed, on_done, first).run()
        distributed.check_same([(r.tokens, r.sampled, r.logp, np.float32(r.reward)) for r in runs], "a rollout")
        return runs, counts

    def prompt(self, task: Task, messages: Sequence[dict]) -> np.ndarray:
        tools = task.tools if self.limits.show_tools else ()
        return chat.tokenize(self.tokenizer, list(messages), tools=tools, add_generation_prompt=True)[0]

    def following(self, run: turns.Run) -> Sequence[int]:
        """Ids of what follows the model's last turn, whose last id was the turn's end. The built-in format needs the messages after
        that turn only, a template the whole run."""
        if self.tokenizer.chat_template is None:
            return self.encoded(tuple((m["role"], m["content"]) for m in run.messages[run.start :]))
        tools = run.task.tools if self.limits.show_tools else ()
        return chat.continuation(self.tokenizer, run.messages, run.start, tools=tools)

    def _encode(self, messages: tuple[tuple[str, str], ...]) -> Sequence[int]:
        after = [{"role": role, "content": content} for role, content in messages]
        return chat.continuation(self.tokenizer, [{"role": "assistant", "content": ""}, *after], 1)

    def text(self, ids: np.ndarray) -> str:
        """What a turn says, without the token that ended it where that is the turn's end or no text."""
        last = int(ids[-1])
        closed = last == self.tokenizer.eos_id or self.tokenizer.table[last] is None
        return self.tokenizer.decode((ids[:-1] if closed else ids).tolist())


def together(counts: Sequence[dict]) -> dict:
    """The counts of several ``Engine.run`` one after the other, as of one: sums, and the shares and rates that follow from them."""
    total = {name: sum(c[name] for c in counts) for name in counts[0]}
    room = sum(c["slot_steps"] / (1.0 - c["idle_share"]) for c in counts if c["slot_steps"])
    rates = {
        "idle_share": 1.0 - total["slot_steps"] / max(1.0, room),
        "tokens_per_second": total["sampled_tokens"] / total["engine_seconds"],
    }
    return {**total, **rates}


def _stop_id(tokenizer: Tokenizer, text: str) -> int:
    ids = [tokenizer.pieces[text]] if text in tokenizer.pieces else tokenizer.encode(text)
    if len(ids) != 1:
        raise ConfigError(f"Limits.stop has {text!r}, which is {len(ids)} ids of tokenizer {tokenizer.path}: name one token")
    return ids[0]


class _Session:
    """One ``Engine.run``: which run sits in which slot, and what becomes of it."""

    def __init__(self, engine: Engine, params: Params, tasks: Sequence[Task], seed: int, on_done: Callable[[int], None] | None, first: int):
        self.engine, self.tasks, self.seed, self.on_done, self.limits = engine, tasks, seed, on_done, engine.limits
        self.first = first
        params = sampler.make_unstack(engine.cfg)(params)
        self.slots = lockstep.Lockstep(engine.cfg, params, engine.limits, engine.advance, engine.feed, engine.stops)
        self.waiting = deque((i, 0) for i in range(len(tasks)))
        self.runs: list[turns.Run | None] = [None] * engine.limits.slots
        self.empty = list(range(engine.limits.slots))[::-1]
        self.acting: dict[int, concurrent.futures.Future] = {}
        self.done: list[Rollout | None] = [None] * len(tasks)
        self.sampled_tokens = self.interruptions = self.tool_errors = 0
        self.tool_seconds = 0.0

    def run(self) -> tuple[list[Rollout], dict]:
        began, slots = time.perf_counter(), self.slots
        self.pool = concurrent.futures.ThreadPoolExecutor(self.limits.workers, "environment")  # its threads start when there is work
        try:
            self._refill()
            flight = None
            while flight is not None or self.acting or slots.decoding.any():
                following = slots.dispatch()
                if following is not None:
                    interruption.point()
                if flight is not None:
                    for slot in slots.collect(flight):
                        self._turn_over(slot)
                if self.acting:
                    self._acted(wait=flight is None and following is None)
                self._refill()
                flight = following
        finally:
            self.pool.shutdown(wait=False, cancel_futures=True)  # nothing is acting, unless the rollout is abandoned
        return self.done, self._counts(time.perf_counter() - began)

    def _counts(self, seconds: float) -> dict:
        slots = self.slots
        return {
            "decode_steps": slots.calls,
            "feed_steps": slots.feeds,
            "slot_steps": slots.used,
            "idle_share": 1.0 - slots.used / max(1, slots.room),
            "sampled_tokens": self.sampled_tokens,
            "tokens_per_second": self.sampled_tokens / seconds,
            "engine_seconds": seconds,
            "tool_seconds": self.tool_seconds,
            "interruptions": self.interruptions,
            "tool_errors": self.tool_errors,
        }

    def _refill(self):
        """Waiting tasks into empty slots."""
        while self.waiting and self.empty:
            self._begin(self.empty.pop(), *self.waiting.popleft())

    def _begin(self, slot: int, index: int, attempt: int):
        task, room = self.tasks[index], self.limits.max_length
        run = self.runs[slot] = turns.Run(index, attempt, task, None, list(task.messages()), [])
        prompt = self.engine.prompt(task, run.messages)
        self.slots.uniforms[slot] = self.engine.numbers(self.seed, self.first + index, attempt, room)
        self.slots.put(slot, 0, prompt[:room], self._budget(0), anew=True)
        if len(prompt) >= room:  # no room for a single answer token
            return self._finish(slot, run.ended(TRUNCATED))
        try:
            run.state = task.reset()
        except Exception as error:
            self._abort(slot, error)

    def _budget(self, written: int) -> int:
        """Tokens the next turn of a run may have that wrote so many."""
        most = self.limits.max_response
        return min(self.limits.max_turn_tokens, most - written) if most else self.limits.max_turn_tokens

    def _turn_over(self, slot: int):
        """The model ended its turn, or a budget ended it: act, or cut the run."""
        run, end = self.runs[slot], int(self.slots.known[slot])
        run.begin_turn(end)
        turn = self.slots.tokens[slot, self.slots.turn_start[slot] : end]
        if not self.engine.stops[turn[-1]]:
            return self._finish(slot, run.ended(TRUNCATED))
        text = self.engine.text(turn)
        if run.task.blocking and not distributed.several():
            self.acting[slot] = self.pool.submit(turns.act, run, text)
        else:
            self._go_on(slot, functools.partial(turns.act, run, text))

    def _acted(self, wait: bool):
        """Go on with the runs whose environments have answered; wait for one when there is nothing else to do."""
        if wait:
            began = time.perf_counter()
            concurrent.futures.wait(self.acting.values(), return_when=concurrent.futures.FIRST_COMPLETED)
            self.tool_seconds += time.perf_counter() - began
        for slot in [slot for slot, future in self.acting.items() if future.done()]:
            self._go_on(slot, self.acting.pop(slot).result)

    def _go_on(self, slot: int, acted: Callable[[], tuple[Trajectory | None, int]]):
        """After a turn: end the run, ask for its answer, or append what came back and let the model write."""
        run, limits = self.runs[slot], self.limits
        try:
            verdict, wrong = acted()
        except Exception as error:  # the environment broke, not the model: nothing of this run can be trusted
            return self._abort(slot, error)
        self.tool_errors += wrong
        if verdict is not None:
            return self._finish(slot, verdict)
        if run.turns >= limits.max_turns:
            return self._ask(slot)
        written = int(self.slots.sampled[slot, : run.end].sum())
        more, budget = self._after(slot, run), self._budget(written)
        if budget < 1 or run.end + len(more) >= limits.max_length:
            return self._finish(slot, run.ended(TRUNCATED))
        self.slots.put(slot, run.end, more, budget, anew=False)

    def _after(self, slot: int, run: turns.Run) -> Sequence[int]:
        """What the run's last turn is followed by; a turn that another token ended is closed first."""
        closed = self.slots.tokens[slot, run.end - 1] == self.engine.tokenizer.eos_id
        more = self.engine.following(run)
        return more if closed else [self.engine.tokenizer.eos_id, *more]

    def _ask(self, slot: int):
        """At the turn limit: take the last turn back and ask for the answer, where that is the protocol and there is room. A run whose chat
        template lets nobody speak there is cut like one that is not asked."""
        run, room = self.runs[slot], self.limits.max_length
        request = run.task.final_request if self.limits.final_request is None else self.limits.final_request
        if not request:
            return self._finish(slot, run.ended(TRUNCATED))
        asked = run.taken_back(request)
        try:
            more = self._after(slot, asked) if asked.end else self.engine.prompt(asked.task, asked.messages)
        except DataError as error:
            log.warning("%s: cannot be asked for its answer, so it is TRUNCATED: %s", run.task.task_id, error)
            more = None
        if more is None or asked.end + len(more) >= room:
            return self._finish(slot, run.ended(TRUNCATED))
        self.runs[slot] = asked
        self.slots.uniforms[slot] = self.engine.numbers(self.seed, self.first + run.index, run.attempt, 2 * room)[room:]
        written = int(self.slots.sampled[slot, : asked.end].sum())
        self.sampled_tokens += int(self.slots.sampled[slot, asked.end :].sum())
        self.slots.put(slot, asked.end, more, self._budget(written), anew=True)  # a recurrent state cannot be rolled back

    def _abort(self, slot: int, error: Exception):
        run = self.runs[slot]
        log.warning("%s: environment raised %s: %s; run aborted", run.task.task_id, type(error).__name__, error)
        self.interruptions += 1
        if run.attempt >= self.limits.retries:
            return self._finish(slot, run.ended(ABORTED))
        self.waiting.append((run.index, run.attempt + 1))
        self._leave(slot)

    def _finish(self, slot: int, trajectory: Trajectory):
        """Store the run."""
        run, task, slots = self.runs[slot], self.runs[slot].task, self.slots
        end = int(slots.known[slot])
        arrays = (slots.tokens[slot, :end].copy(), slots.sampled[slot, :end].copy(), slots.logp[slot, :end].copy())
        routes = None if slots.routes is None else slots.routes[slot, :end].copy()
        if routes is not None:
            routes[end - 1 :] = -1  # it may have been fed in vain, while a slow tool was waited for
        result = (trajectory.status, trajectory.reward, run.turns, trajectory)
        self.done[run.index] = Rollout(task.task_id, task.domain, *arrays, *result, routes)
        if self.on_done:
            self.on_done(1)
        self._leave(slot)

    def _leave(self, slot: int):
        self.sampled_tokens += int(self.slots.sampled[slot].sum())
        self.slots.close(slot)
        self.empty.append(slot)
