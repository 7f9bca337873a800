"""Sequences in slots, as the device sees them: what is fixed, what was fed, and which call is next.

The host is one call behind the device: while that works on a step, what the step before sampled is read and acted on. A slot that
ended its turn in the step before has by then been fed the turn's end, which is right where the run goes on; what it sampled after
that is dropped. Known tokens go in whole pieces of ``feed_tokens``, cut at places that depend on the run
alone, and the rest of them one by one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from . import sampler


@dataclasses.dataclass(frozen=True)
class Flight:
    """A call the device works on. Per row [N]: its slot, the slot's turn and life then, the place of the token it samples (0: none),
    the first place it is fed and how many tokens. routes: [N, (C,) L, A] or None."""

    rows: np.ndarray
    turn: np.ndarray
    life: np.ndarray
    place: np.ndarray
    first: np.ndarray
    lengths: np.ndarray
    ids: jax.Array
    logp: jax.Array
    routes: jax.Array | None


class Lockstep:
    """The arrays of all slots [B, S] or [B], and the calls. advance, feed: see ``sampler``; stops: bool [V], ids that end a turn."""

    def __init__(self, cfg, params, limits, advance, feed, stops: np.ndarray):
        b, s = limits.slots, limits.max_length  # one shape, one compilation, whatever the number of tasks
        self.params, self.advance, self.feed, self.stops = params, advance, feed, stops
        self.device = sampler.open_slots(cfg, b, s)
        self.length, self.feed_tokens = s, limits.feed_tokens if limits.feed_tokens > 1 else 0
        self.tokens = np.zeros((b, s), np.int32)
        self.sampled = np.zeros((b, s), np.float32)
        self.logp = np.zeros((b, s), np.float32)
        self.uniforms = np.zeros((b, s), np.float32)
        self.routes = np.full((b, s, cfg.num_layers, cfg.num_experts_active), -1, np.int16) if limits.record_routes else None
        self.decoding = np.zeros(b, bool)  # the slot has tokens to be fed or to write
        self.known = np.zeros(b, np.int64)  # tokens that are fixed, one of them maybe on the device only
        self.unseen = np.zeros(b, bool)  # so it is
        self.fed = np.zeros(b, np.int64)  # tokens the model has seen
        self.segment = np.zeros(b, np.int64)  # where the known tokens put last begin
        self.turn_start = np.zeros(b, np.int64)
        self.limit = np.zeros(b, np.int64)  # the turn has no token here or behind
        self.reset = np.zeros(b, bool)
        self.turn = np.zeros(b, np.int64)  # counts a slot's turns: what an earlier one samples is dropped
        self.life = np.zeros(b, np.int64)  # counts the sequences fed to a slot
        self.slots = np.arange(b)
        self.feeders, self.next_feeder = max(1, b // 8), 0
        self.waited = self.calls = self.feeds = self.used = self.room = 0

    def put(self, slot: int, at: int, ids: Sequence[int] | np.ndarray, turn_tokens: int, anew: bool):
        """Known tokens at place ``at``, nothing behind them; then the model may write ``turn_tokens``. anew: feed all from the start."""
        end = at + len(ids)
        self.tokens[slot, at:end] = ids
        self.sampled[slot, at:], self.logp[slot, at:] = 0.0, 0.0
        self.known[slot] = self.turn_start[slot] = end
        self.limit[slot] = min(end + turn_tokens, self.length)
        self.segment[slot], self.decoding[slot] = at, True
        if anew:
            self.fed[slot], self.segment[slot], self.reset[slot] = 0, 0, True
            self.life[slot] += 1
            if self.routes is not None:
                self.routes[slot] = -1

    def close(self, slot: int):
        """The sequence is over; a token that it was fed in vain does not count."""
        self.used -= max(0, int(self.fed[slot] - self.known[slot] + 1))
        self.decoding[slot] = False

    def dispatch(self) -> Flight | None:
        """Start a call on the device: one token for every slot, but that slots with a whole piece of known tokens wait until enough of
        them do, or have waited for as many slot steps as such a call costs; then a piece for each of those."""
        ready = self.decoding & (self.known < self.limit)
        if self.feed_tokens:
            many = ready & (self.known - self.fed >= self.feed_tokens) & (self.fed >= self.segment)
            waiting = np.flatnonzero(many)
            if len(waiting):
                few = ready & ~many
                self.waited += len(waiting)
                if len(waiting) >= self.feeders or self.waited >= len(self.slots) or not few.any():
                    self.waited = 0
                    return self._feed(waiting)
                return self._advance(few)
        return self._advance(ready) if ready.any() else None

    def _advance(self, active: np.ndarray) -> Flight:
        at = np.minimum(self.fed, self.length - 1)
        tokens = np.where(self.unseen, np.int32(sampler.LAST), self.tokens[self.slots, at])
        uniforms = self.uniforms[self.slots, at]
        out = self.advance(self.params, self.device, tokens, self.reset & active, active, uniforms)
        self.room += len(active)
        return self._book(self.slots, active.astype(np.int64), out)

    def _feed(self, many: np.ndarray) -> Flight:
        """Slots take turns, so that nobody waits for ever."""
        rows = np.roll(many, -np.searchsorted(many, self.next_feeder))[: self.feeders]
        self.next_feeder = int(rows[-1]) + 1
        n, r, c = len(rows), self.feeders, self.feed_tokens
        lengths = np.zeros(r, np.int32)
        lengths[:n] = np.minimum(self.known[rows] - self.fed[rows], c)
        slots, who = np.full(r, len(self.slots), np.int32), np.resize(rows, r)
        slots[:n] = rows
        at = np.minimum(self.fed[who][:, None] + np.arange(c)[None], self.length - 1)
        uniforms = self.uniforms[who, at[np.arange(r), np.maximum(lengths - 1, 0)]]
        reset = self.reset[who] & (lengths > 0)
        out = self.feed(self.params, self.device, slots, self.tokens[who[:, None], at], lengths, reset, uniforms)
        self.room += r * c
        self.feeds += 1
        return self._book(rows, lengths[:n].astype(np.int64), out)

    def _book(self, rows: np.ndarray, lengths: np.ndarray, out: tuple) -> Flight:
        """Rows are fed; those that now were fed all they have sample one more, which the device knows first."""
        ids, logp, self.device, *routes = out
        first, fed = self.fed[rows], lengths > 0
        self.fed[rows] = first + lengths
        samples = fed & (self.fed[rows] == self.known[rows])
        place = np.where(samples, self.known[rows], 0)
        self.known[rows] += samples
        self.unseen[rows] = np.where(fed, samples, self.unseen[rows])
        self.reset[rows] &= ~fed
        self.calls += 1
        self.used += int(lengths.sum())
        return Flight(rows, self.turn[rows], self.life[rows], place, first, lengths, ids, logp, routes[0] if routes else None)

    def collect(self, flight: Flight) -> list[int]:
        """Wait for the call and write down what it sampled; the slots whose turn ended with it, which then rest."""
        rows, n = flight.rows, len(flight.rows)
        ids, logp = np.asarray(flight.ids)[:n], np.asarray(flight.logp)[:n]
        if self.routes is not None:
            self._record(flight)
        new = (flight.place > 0) & (flight.turn == self.turn[rows])
        slots, place, ids = rows[new], flight.place[new], ids[new]
        self.tokens[slots, place], self.logp[slots, place], self.sampled[slots, place] = ids, logp[new], 1.0
        self.unseen[slots] &= self.known[slots] > place + 1
        ended = self.stops[ids] | (place + 1 >= self.limit[slots])
        over = slots[ended]
        self.known[over] = place[ended] + 1
        self.turn[over] += 1
        self.unseen[over] = self.decoding[over] = False
        return over.tolist()

    def _record(self, flight: Flight):
        routes = np.asarray(flight.routes)
        routes = routes if routes.ndim == 4 else routes[:, None]
        for i in np.flatnonzero((flight.lengths > 0) & (flight.life == self.life[flight.rows])):
            first, count = flight.first[i], flight.lengths[i]
            self.routes[flight.rows[i], first : first + count] = routes[i, :count]
