"""When one of several processes is lost, the others end with a line that says which, and how to go on, instead of a hang.

jax notices by itself: native threads tell the coordinator that they live, and where one is silent for the
``heartbeat_timeout_seconds`` of ``jax.distributed.initialize`` (at once, where it is the coordinator), every process is aborted with a page
of native text. Its default is 100 s; use SECONDS. ``watch`` adds what that page lacks: the handler of the abort asks who is missing and
says so in a last line, exit code LOST. A second of silence in Python is no proof of death (a long call may hold the interpreter), so beats
from Python only say who, never whether.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

from . import coordination, interruption
from .config import ConfigError
from .data.errors import DataError

LOST = 75  # exit code: a temporary failure, to be tried again (EX_TEMPFAIL of sysexits.h)
SECONDS = 40  # heartbeat timeout to initialize jax.distributed with: the others have ended 45 s after a loss
BEAT = 1.0  # seconds between signs of life, ours
SILENT = 6.0  # seconds after which a process counts as the missing one, once it is known that one is
LINGER = 4.0  # seconds that the coordinator waits with its end, for others to read why


class Watch:
    """One for a process: its own signs of life and those it has seen. silent(): who has given none for how many seconds."""

    def __init__(self, store: coordination.Store):
        self.store = store
        self.going_on: Callable[[], str] = lambda: "it goes on from the last checkpoint"
        self.seen: dict[int, tuple[str, float]] = {}
        self.began, self.ending = time.monotonic(), False
        self.lock, self.said = threading.Lock(), False
        self.blind: float | None = None  # since when the store does not answer any more
        self.handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)  # kept: C has its address only
        libc = ctypes.CDLL(None)
        libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
        libc.signal(signal.SIGABRT, ctypes.cast(self.handler, ctypes.c_void_p))  # Python's own handlers run too late: abort() ends first
        threading.Thread(target=self._beat, name="beats", daemon=True).start()

    def _beat(self) -> None:
        store, number = self.store, 0
        while not self.ending:
            try:
                number += 1
                store.put(f"beat/{store.process}", str(number))
                self._look(store.entries("beat"), time.monotonic())
                lost, reasons = store.entries("lost"), store.entries("ended")
            except Exception:  # the coordinator is gone: whoever asks next sees that for himself
                self.blind = time.monotonic()
                return
            if lost:
                self.end(next(iter(lost.values())))
            others = [(who, text) for who, text in sorted(reasons.items()) if int(who) != store.process]
            if others and not interruption.is_told():
                time.sleep(LINGER / 2)  # all may have met the same error, and say it themselves
                if not self.ending:
                    self.end(f"process {others[0][0]} ended ({others[0][1]})")
            time.sleep(BEAT)

    def _look(self, beats: dict[str, str], now: float) -> None:
        for who, beat in beats.items():
            if self.seen.get(int(who), ("", 0.0))[0] != beat:
                self.seen[int(who)] = (beat, now)

    def silent(self) -> dict[int, float]:
        now, others = self.blind or time.monotonic(), set(range(self.store.processes)) - {self.store.process}
        return {who: now - self.seen.get(who, ("", self.began))[1] for who in sorted(others)}

    def wait_missing(self) -> str:
        """Who is missing, where it is known that one is: it takes a few seconds of silence until that is clear."""
        until = time.monotonic() + SILENT + 3 * BEAT
        while not (why := self.missing()) and not self.blind and time.monotonic() < until:
            time.sleep(BEAT / 4)
        return why

    def missing(self) -> str:
        """Who, as a sentence; "" where nobody is."""
        if self.store.process and not _reachable(self.store.address):
            return f"process 0, the coordinator, was lost ({self.store.address} does not answer)"
        gone = {who: seconds for who, seconds in self.silent().items() if seconds >= SILENT}
        if not gone:
            return ""
        names = "process " + str(next(iter(gone))) if len(gone) == 1 else "processes " + ", ".join(map(str, gone))
        return f"{names} of {self.store.processes} {'was' if len(gone) == 1 else 'were'} lost (silent for {min(gone.values()):.0f} s)"

    def end(self, why: str) -> None:
        """The line, in one write, and the end; the coordinator's a little later, or others would take it for the lost one."""
        with self.lock:
            if self.said:
                time.sleep(2 * LINGER)
            self.said = True
        try:
            on = self.going_on()
        except Exception as error:
            on = f"the last checkpoint could not be looked up ({error})"
        if self.store.process == 0:  # told to those whose collective only hangs; in a thread, as the store may not answer any more
            threading.Thread(target=self.store.put, args=("lost/0", why), daemon=True).start()
            time.sleep(LINGER)
        os.write(2, f"\na1jax: {why}; start the same command again on every host: {on}\n".encode())
        os._exit(LOST)

    def _aborted(self, number: int) -> None:
        """Runs in whichever thread called abort(), before the process dies of it. Returning lets it die as before."""
        why = "" if self.ending else self.wait_missing()
        if why:
            self.end(why)
        elif self.said:  # by another thread, which ends the process
            time.sleep(2 * LINGER)


_watches: list[Watch] = []  # the process's, which ends with it


def watch() -> None:
    """Begins to watch, once; does nothing where there is one process. Call it when jax.distributed is initialised."""
    store = coordination.store()
    if store is not None and not _watches:
        _watches.append(Watch(store))


@contextlib.contextmanager
def going_on(say: Callable[[], str]) -> Iterator[None]:
    """Within, and after an error within, ``say()`` tells in half a sentence where the same command goes on."""
    watch()
    before = [each.going_on for each in _watches]
    for each in _watches:
        each.going_on = say
    yield
    for each, old in zip(_watches, before, strict=False):
        each.going_on = old


def part(error: BaseException) -> None:
    """This process is about to end by ``error``: where a lost process is the reason it ends here, else the others are told why.

    A collective of gloo fails at once where a TPU's hangs: then it takes a few seconds until it is clear who is missing.
    """
    for each in _watches:
        if _may_be_a_loss(error):
            if why := each.wait_missing():
                each.end(why)
        each.ending = True
        with contextlib.suppress(Exception):  # no coordinator, nobody to be told
            each.store.put(f"ended/{each.store.process}", f"{type(error).__name__}: {' '.join(str(error).split())}"[:300])
        if each.store.process == 0 and not isinstance(error, interruption.Interrupted):
            sys.stderr.flush()
            time.sleep(LINGER)


def _may_be_a_loss(error: BaseException | None) -> bool:
    """A collective's error is a RuntimeError or a ValueError; one met while saving is the cause of a ConfigError."""
    if isinstance(error, ConfigError | DataError):
        return _may_be_a_loss(error.__cause__)
    return isinstance(error, RuntimeError | ValueError)


def _reachable(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()
    except OSError:
        return False
    return True
