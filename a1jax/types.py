"""What crosses a border between rooms: batches, trajectories, rollouts, the training state.

Shifting is said once, here: ``targets[b, t]`` is the token that position ``t`` predicts and ``mask[b, t] = 1`` means
that the loss looks at that prediction. Only ``data.packing`` shifts; nobody else moves tokens against targets.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import struct

Metrics = dict[str, Any]
"""Name -> scalar (a train step may report arrays too). Names are ``group/name`` in lower case."""

Params = dict[str, Any]
"""Nested dict of arrays, laid out as ``models.transformer.specs`` says."""


@struct.dataclass
class Batch:
    """One packed batch; all fields are [B, T], routes [B, T, L, A].

    tokens: int32 ids. targets: int32, the id position t predicts. mask: float32, 1 where the loss looks.
    positions: int32, 0 at the start of every segment. segment_ids: int32, 0 is padding, 1, 2, ... in a row.
    domains: int32, index of the domain the token's segment belongs to (used by domain-normalised losses and routing).
    routes: int16, the experts each token took while it was sampled, per layer (Rollout.routes), -1 without a record; None: no replay.
    """

    tokens: jax.Array | np.ndarray
    targets: jax.Array | np.ndarray
    mask: jax.Array | np.ndarray
    positions: jax.Array | np.ndarray
    segment_ids: jax.Array | np.ndarray
    domains: jax.Array | np.ndarray
    routes: jax.Array | np.ndarray | None = None


@struct.dataclass
class TrainState:
    """The only state there is. step: int32 scalar; key: a typed PRNG key, folded in with the step, never split in place."""

    step: jax.Array
    params: Params
    opt_state: Any
    key: jax.Array


# Statuses of a run. TRUNCATED: a budget ended it, its prefix is valid. ABORTED: the system interrupted it, to be retried.
# FAILED: it ended by itself and its verifier said no (or it never produced a legal answer).
FINISHED, TRUNCATED, ABORTED, FAILED = "FINISHED", "TRUNCATED", "ABORTED", "FAILED"
STATUSES = (FINISHED, TRUNCATED, ABORTED, FAILED)


@dataclasses.dataclass(frozen=True)
class Record:
    """One linked record (s, a, o, v) of the knowledge-action graph (arXiv 2606.30616, section 2.2).

    state: references to corpus items and earlier observations the action used. action: {"name", "arguments"} or None.
    observation: what came back, as text, or None. outcome: the verifier that fired and what it said, or None ("none fired").
    """

    state: tuple[str, ...] = ()
    action: dict[str, Any] | None = None
    observation: str | None = None
    outcome: str | None = None


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One run of an agent on one task.

    messages: OpenAI-style chat messages: {"role": system|user|assistant|tool, "content": str, and for the assistant
    optionally "reasoning_content": str and "tool_calls": [{"id", "type": "function", "function": {"name", "arguments":
    dict}}]; for tool messages "tool_call_id" and "name"}. tools: OpenAI-style tool schemas. reward: None when unknown.
    status: one of STATUSES or None when unknown.
    """

    domain: str
    task_id: str
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    records: tuple[Record, ...] = ()
    reward: float | None = None
    status: str | None = None
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One sampled run, ids kept as sampled. All arrays are [T] of this run, routes [T, L, A].

    tokens: int32, the whole run: prompt, model turns, observations. sampled: float32, 1 where the model wrote the token.
    logp: float32, log-probability of each sampled token under the sampling policy, 0 elsewhere. turns: model turns taken.
    routes: int16, the experts each token took in each layer, -1 for tokens the model was never fed (the last one); None: not recorded.
    """

    task_id: str
    domain: str
    tokens: np.ndarray
    sampled: np.ndarray
    logp: np.ndarray
    status: str
    reward: float
    turns: int
    trajectory: Trajectory | None = None
    routes: np.ndarray | None = None
