"""The loop around the model: turns, tools, budgets, statuses; many environments in lockstep over one jitted decode step.

Sampled ids are kept as sampled and never re-encoded; observations are rendered and appended; nothing is generated after a run
was cut. A run that the system interrupts (its environment raised) is ABORTED and begun anew, alone.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..config import ConfigError
from ..data import chat
from ..data.tokenizer import Tokenizer
from ..domains.base import Call, Observation, Task, judge, record, said, tool_message, user_message
from ..models import decode
from ..models.config import ModelConfig
from ..types import ABORTED, TRUNCATED, Params, Record, Rollout, Trajectory
from . import sampler

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Limits:
    """Budgets of a run; reaching one gives the status TRUNCATED."""

    slots: int = 64  # environments decoded in lockstep; memory of the cache grows with it
    max_turns: int = 32  # model turns in one run
    max_turn_tokens: int = 48  # tokens the model may write in one turn
    max_length: int = 512  # tokens of the whole run: prompt, turns and observations
    temperature: float = 1.0  # 0 is greedy
    retries: int = 1  # times an ABORTED run is begun anew
    show_tools: bool = False  # put the tool schemas into the system turn; tiny models know their tools from training
    record_routes: bool = False  # keep the experts every token took (Rollout.routes): 2 bytes x layers x active experts per token

    def __post_init__(self):
        for name in ("slots", "max_turns", "max_turn_tokens", "max_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Limits.{name} is {getattr(self, name)}; it must be at least 1")
        if self.temperature < 0 or self.retries < 0:
            raise ConfigError("Limits.temperature and Limits.retries must not be negative")


@dataclasses.dataclass
class _Run:
    """Host side of one slot: the run in progress."""

    index: int
    attempt: int
    task: Task
    state: Any
    messages: list[dict]
    records: list[Record]
    turns: int = 0


class Engine:
    """Runs tasks with a model. Compiled once per (model, limits); parameters are an argument of ``run``."""

    def __init__(self, cfg: ModelConfig, tokenizer: Tokenizer, limits: Limits):
        self.cfg, self.tokenizer, self.limits = cfg, tokenizer, limits
        self.step = sampler.make_step(cfg, limits.temperature, limits.record_routes)
        self.prompts: dict[str, np.ndarray] = {}

    def run(
        self, params: Params, tasks: Sequence[Task], seed: int, on_done: Callable[[int], None] | None = None
    ) -> tuple[list[Rollout], dict]:
        """One run per task, in the order of the tasks, and counts: decode steps, slot steps used, aborted, tool errors.

        Same params, tasks, seed and limits: same rollouts. ABORTED runs are retried ``limits.retries`` times, then returned as such.
        """
        return _Session(self, params, tasks, seed, on_done).run()

    def prompt(self, task: Task) -> np.ndarray:
        tools = task.tools if self.limits.show_tools else ()
        return chat.tokenize(self.tokenizer, list(task.messages()), tools=tools, add_generation_prompt=True)[0]


class _Session:
    def __init__(self, engine: Engine, params: Params, tasks: Sequence[Task], seed: int, on_done):
        self.engine, self.tasks, self.seed, self.on_done = engine, tasks, seed, on_done
        self.params = sampler.make_unstack(engine.cfg)(params)
        self.limits, self.tokenizer = engine.limits, engine.tokenizer
        b, s = self.limits.slots, self.limits.max_length  # one shape, one compilation, whatever the number of tasks
        self.waiting = deque((i, 0) for i in range(len(tasks)))
        self.runs: list[_Run | None] = [None] * b
        self.tokens = np.zeros((b, s), np.int32)
        self.sampled = np.zeros((b, s), np.float32)
        self.logp = np.zeros((b, s), np.float32)
        self.uniforms = np.zeros((b, s), np.float32)
        layers, active = engine.cfg.num_layers, engine.cfg.num_experts_active
        self.routes = np.full((b, s, layers, active), -1, np.int16) if self.limits.record_routes else None
        self.known = np.zeros(b, np.int64)  # tokens of the run that are fixed
        self.fed = np.zeros(b, np.int64)  # tokens the model has seen
        self.turn_start = np.zeros(b, np.int64)
        self.reset = np.zeros(b, bool)
        self.done: list[Rollout | None] = [None] * len(tasks)
        self.counts = {"decode_steps": 0, "slot_steps": 0, "aborted": 0, "tool_errors": 0}

    def run(self) -> tuple[list[Rollout], dict]:
        cache = decode.init_cache(self.engine.cfg, len(self.runs), self.limits.max_length)
        slots = np.arange(len(self.runs))
        for slot in slots:
            self._fill(slot)
        while any(run is not None for run in self.runs):
            active = np.array([run is not None for run in self.runs])
            at = np.minimum(self.fed, self.limits.max_length - 1)
            ids, logp, cache, *routes = self.engine.step(
                self.params, cache, self.tokens[slots, at], self.reset.copy(), active, self.uniforms[slots, at]
            )
            ids, logp = np.asarray(ids), np.asarray(logp)
            if self.routes is not None:
                self.routes[slots[active], at[active]] = np.asarray(routes[0])[active]
            self.reset[:] = False
            self.fed += active
            self.counts["decode_steps"] += 1
            self.counts["slot_steps"] += int(active.sum())
            writes = slots[active & (self.fed == self.known)]
            where = self.known[writes]
            self.tokens[writes, where], self.logp[writes, where], self.sampled[writes, where] = ids[writes], logp[writes], 1.0
            self.known[writes] += 1
            ended = self.tokens[writes, where] == self.tokenizer.eos_id
            long = self.known[writes] - self.turn_start[writes] >= self.limits.max_turn_tokens
            full = self.known[writes] >= self.limits.max_length
            for slot in writes[ended | long | full]:
                self._turn_over(int(slot))
        return self.done, self.counts

    def _fill(self, slot: int):
        """Put the next waiting task into a slot, or leave it empty."""
        self.runs[slot] = None
        while self.waiting:
            index, attempt = self.waiting.popleft()
            task = self.tasks[index]
            prompt = self.engine.prompt(task)
            s = self.limits.max_length
            self.sampled[slot], self.logp[slot] = 0.0, 0.0
            if self.routes is not None:
                self.routes[slot] = -1
            self.runs[slot] = _Run(index, attempt, task, task.reset(), list(task.messages()), [])
            if len(prompt) >= s:  # no room for a single answer token
                self.tokens[slot, :] = prompt[:s]
                self.known[slot] = s
                self._finish(slot, TRUNCATED, refill=False)
                self.runs[slot] = None
                continue
            self.tokens[slot, : len(prompt)] = prompt
            self.uniforms[slot] = sampler.run_uniforms(self.seed, index, attempt, s)
            self.known[slot], self.fed[slot], self.turn_start[slot], self.reset[slot] = len(prompt), 0, len(prompt), True
            return

    def _turn_over(self, slot: int):
        """The model ended its turn, or a budget ended it: act, answer, or cut the run."""
        run = self.runs[slot]
        run.turns += 1
        end = int(self.known[slot])
        if self.tokens[slot, end - 1] != self.tokenizer.eos_id:
            return self._finish(slot, TRUNCATED)
        text = self.tokenizer.decode(self.tokens[slot, self.turn_start[slot] : end - 1].tolist())
        start = len(run.messages) + 1
        try:
            over = self._act(run, text)
        except Exception as error:  # the environment broke, not the model: nothing of this run can be trusted
            log.warning("%s: environment raised %s: %s; run aborted", run.task.task_id, type(error).__name__, error)
            self.counts["aborted"] += 1
            return self._abort(slot)
        if over:
            return self._finish(slot, None)
        if run.turns >= self.limits.max_turns:
            return self._finish(slot, TRUNCATED)
        more = self._continuation(run, start)
        if end + len(more) >= self.limits.max_length:
            return self._finish(slot, TRUNCATED)
        self.tokens[slot, end : end + len(more)] = more
        self.known[slot] = self.turn_start[slot] = end + len(more)

    def _continuation(self, run: _Run, start: int) -> list[int]:
        """Ids of what follows the turn ``messages[start - 1]``. The built-in format needs that turn only, a template the whole run."""
        if self.tokenizer.chat_template is None:
            return chat.continuation(self.tokenizer, run.messages[start - 1 :], 1)
        tools = run.task.tools if self.limits.show_tools else ()
        return chat.continuation(self.tokenizer, run.messages, start, tools=tools)

    def _act(self, run: _Run, text: str) -> bool:
        """Read the turn strictly, run its calls; True when it was the final answer."""
        number = run.turns - 1
        try:
            message = chat.parse_turn(text)
        except chat.ToolCallError as error:
            self.counts["tool_errors"] += 1
            run.messages.append({"role": "assistant", "content": text})
            run.messages.append(tool_message(number, "parser", Observation(f"error: {error}", error=True)))
            return False
        if not message.get("tool_calls"):
            run.messages.append(message)
            run.state, observation = run.task.reply(run.state, message["content"])
            if observation is None:
                return True
            run.messages.append(user_message(observation))
            run.records.append(said(message["content"], observation))
            return False
        calls = [Call(c["function"]["name"], c["function"]["arguments"]) for c in message["tool_calls"]]
        ids = [f"call_{number}" if i == 0 else f"call_{number}_{i}" for i in range(len(calls))]
        named = [{**c, "id": name} for c, name in zip(message["tool_calls"], ids, strict=True)]
        run.messages.append({**message, "tool_calls": named})
        for name, call in zip(ids, calls, strict=True):
            run.state, observation = run.task.step(run.state, call)
            self.counts["tool_errors"] += int(observation.error)
            run.messages.append({**tool_message(number, call.name, observation), "tool_call_id": name})
            run.records.append(record(call, observation))
        return False

    def _abort(self, slot: int):
        run = self.runs[slot]
        if run.attempt < self.limits.retries:
            self.waiting.append((run.index, run.attempt + 1))
            return self._fill(slot)
        return self._finish(slot, ABORTED)

    def _finish(self, slot: int, status: str | None, refill: bool = True):
        """Store the run. status None: it ended by itself and the verifier decides between FINISHED and FAILED."""
        run, end = self.runs[slot], int(self.known[slot])
        task = run.task
        trajectory = Trajectory(task.domain, task.task_id, tuple(run.messages), task.tools, tuple(run.records), 0.0, status)
        if status is None:
            trajectory = judge(task, trajectory)
        arrays = (self.tokens[slot, :end].copy(), self.sampled[slot, :end].copy(), self.logp[slot, :end].copy())
        result = (trajectory.status, trajectory.reward, run.turns, trajectory)
        routes = None if self.routes is None else self.routes[slot, :end].copy()
        self.done[run.index] = Rollout(task.task_id, task.domain, *arrays, *result, routes)
        if self.on_done:
            self.on_done(1)
        if refill:
            self._fill(slot)
