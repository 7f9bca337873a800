"""Being told to stop: SIGTERM or Ctrl-C ends a run in order. A step in hand is finished and saved, a rollout in hand is abandoned.

``listening`` takes both signals in the main thread. By default they are thrown there as ``Interrupted``; within ``holding`` they only
count, and whoever trains looks with ``asked`` after every step. A second signal, a second or more after the first, ends the process at
once (launchers that signal a process and its group send the first one twice). In several processes nothing is thrown: all of them stop
at one point, see ``Agreement``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

from . import coordination

SIGNALS = (signal.SIGTERM, signal.SIGINT)
TWICE = 1.0  # seconds within which a signal that comes again is the same one
POLL = 0.5  # seconds between looks at whether another process was told to stop


class Interrupted(SystemExit):
    """The run was told to stop by signal ``number`` and has stopped; ``code`` is 128 + number: 143 for SIGTERM, 130 for Ctrl-C.

    No Exception: who forgives a broken task must not forgive this. saved: what is on disk, to be completed by "; the same command ..."."""

    def __init__(self, number: int, saved: str = ""):
        super().__init__(128 + number)
        self.number, self.saved = number, saved

    def __str__(self) -> str:
        rest = f"{self.saved}; the same command goes on from there" if self.saved else "the same command goes on from the last checkpoint"
        return f"interrupted by {signal.Signals(self.number).name}: {rest}"


class Agreement:
    """At which point all processes stop, when any of them is told to.

    Points (``passed``) come in the same order in all processes, which are a few apart: one dispatches ahead of the other. Who is told, or
    sees that another was, holds its main thread at the next point, says how many it has passed and waits for what the others say. All
    stop at the one after the largest number: whoever is behind needs nothing of the others that they have not dispatched.
    """

    def __init__(self, store: coordination.Store):
        self.store, self.lock, self.told = store, threading.Lock(), threading.Event()
        self.number, self.points, self.last = 0, 0, None
        threading.Thread(target=self._watch, name="stop", daemon=True).start()

    def ask(self, number: int) -> None:
        self.number = self.number or number
        self.told.set()

    def passed(self) -> int:
        """The signal to stop for at this point, or 0."""
        with self.lock:
            self.points += 1
            return self.number if self.last is not None and self.points >= self.last else 0

    def _watch(self) -> None:
        store = self.store
        try:
            while not self.told.wait(POLL):
                for number in store.entries("stop").values():
                    self.ask(int(number))
            store.put(f"stop/{store.process}", str(self.number))
            with self.lock:
                store.put(f"passed/{store.process}", str(self.points))
                self.last = 1 + max(int(store.get(f"passed/{other}", 60)) for other in range(store.processes))
        except Exception:  # the coordinator or another process is gone, which lost_process tells
            return


@dataclasses.dataclass
class _Told:
    """number: the first signal, 0 before it. since: when. thrown: it was. holding: it must not be thrown now. listening: signals are
    taken. agreement: of several processes."""

    number: int = 0
    since: float = 0.0
    thrown: bool = False
    holding: bool = False
    listening: bool = False
    agreement: Agreement | None = None


_told = _Told()  # of the process, as signals are


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Takes the signals within; afterwards they are taken as before. In other threads than the main one it does nothing, nor to a signal
    that is ignored, as Ctrl-C is by a shell's background jobs. May be nested: that takes back what native code has taken meanwhile."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    if _told.listening:
        _take(before)
        yield
        return
    near, far = socket.socketpair()
    for end in (near, far):
        end.setblocking(end is near)
    woken = signal.set_wakeup_fd(far.fileno(), warn_on_full_buffer=False)
    hearing = threading.Thread(target=_hear, args=(near,), name="signals", daemon=True)
    hearing.start()
    _take(before)
    _told.listening = True
    store = coordination.store()
    if store is not None and _told.agreement is None:  # once for the process: it also tells those who come to their end that all stop
        _told.agreement = Agreement(store)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not Python's, and not to be had back
        signal.set_wakeup_fd(woken)
        far.close()  # ends the thread, after what it has not read yet: that is not to be told of the next who listens
        hearing.join()
        _told.number, _told.since, _told.thrown, _told.listening = 0, 0.0, False, False


@contextlib.contextmanager
def holding() -> Iterator[None]:
    """Signals are not thrown within, but where ``abandonable`` says so: what is begun is finished. One that came is thrown at the end."""
    before, _told.holding = _told.holding, True
    try:
        yield
    finally:
        _told.holding = before
    if _told.number and not before and _told.agreement is None:
        raise Interrupted(_told.number)


@contextlib.contextmanager
def abandonable() -> Iterator[None]:
    """Within ``holding``: signals are thrown after all, the one that has come already too."""
    before, _told.holding = _told.holding, False
    try:
        if _told.number and _told.agreement is None:
            raise Interrupted(_told.number)
        yield
    finally:
        _told.holding = before


def asked() -> int:
    """The signal to stop for now, or 0. Counts as a point: in several processes all must come by here equally often."""
    return _told.number if _told.agreement is None else _told.agreement.passed()


def point() -> None:
    """As ``asked``, and raises Interrupted where signals may be thrown: for long loops, because in several processes nothing is thrown."""
    number = asked()
    if number and not _told.holding:
        raise Interrupted(number)


def is_told() -> bool:
    """Whether a signal has come here, or in another process as far as is known."""
    return bool(_told.number) or (_told.agreement is not None and _told.agreement.told.is_set())


def end_within(seconds: float, code: int) -> None:
    """The process ends with that code after so many seconds, if it has not before: for threads that wait for a slow tool."""

    def end() -> None:
        time.sleep(seconds)
        os._exit(code)

    threading.Thread(target=end, name="end", daemon=True).start()


def _take(before: dict) -> None:
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _throw)


def _throw(number: int, frame: object) -> None:
    """The handler, which Python calls in the main thread between two of its own instructions: while a compilation or a long step keeps that
    thread, only ``_hear`` knows."""
    if not _told.holding and _told.agreement is None and not _told.thrown:
        _told.thrown = True
        raise Interrupted(number)


def _hear(near: socket.socket) -> None:
    """Reads the numbers of signals as they come, whatever the main thread does."""
    with near:
        while numbers := near.recv(64):
            for number in numbers:
                if number in SIGNALS:
                    _tell(number)


def _tell(number: int) -> None:
    now = time.monotonic()
    if not _told.number:
        if _told.holding or _told.agreement is not None:
            name = signal.Signals(number).name
            os.write(2, f"a1jax: {name}: the step in hand is finished and saved; a second signal ends the run at once\n".encode())
        _told.number, _told.since = number, now
        if _told.agreement is not None:
            _told.agreement.ask(number)
    elif now - _told.since >= TWICE:
        os._exit(128 + number)
