"""Signals that end training where nothing is lost."""

import contextvars
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from types import FrameType
from typing import TypeVar

import numpy as np

from ekd_jax.common import parallel

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL_SECONDS = 0.05
Result = TypeVar("Result")
_handling: "list[Interrupt]" = []  # of the main thread, the latest last


class Interrupt:
    """Notes SIGINT (Ctrl-C), SIGTERM (preemption) and SIGHUP (a closed terminal), so that training can stop.

    All processes of a run stop together, whichever of them got the signal. A second signal ends the process at
    once. Signals that the process was started to ignore, as with nohup, stay ignored. Python handles signals in the
    main thread only: in another thread, this notes what the main thread's newest `Interrupt` notes, if there is one.
    """

    def __init__(self) -> None:
        self._signal = 0
        self._before = {}
        self._followed: Interrupt | None = None
        if threading.current_thread() is not threading.main_thread():
            self._followed = _handling[-1] if _handling else None
            return
        _handling.append(self)
        self._woken, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        self._fd_before = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        threading.Thread(target=self._end_at_the_second, args=(tuple(self._before),), daemon=True).start()

    @property
    def signal(self) -> int:
        """The number of the signal, 0 if there was none."""
        return self._signal or (self._followed.signal if self._followed else 0)

    @signal.setter
    def signal(self, number: int) -> None:
        self._signal = number

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number

    def _end_at_the_second(self, handled: tuple[int, ...]) -> None:
        """Wait for two signals, in a thread: the main one may be compiling, and would notice them later."""
        came = 0
        while received := self._woken.recv(1):
            came += received[0] in handled
            if came == 2:
                for child in multiprocessing.active_children():
                    child.kill()
                print(
                    "killed by a second signal: run the same command to resume", file=sys.stderr, flush=True
                )
                os._exit(128 + received[0])

    def agreed(self, steps: int = 0) -> tuple[int, int]:
        """Agree on what all processes do next, and wait for all of them.

        Args:
            steps: this process's proposal.

        Returns:
            The number of steps of process 0, and the signal that any of them got, 0 if none did.
        """
        said = parallel.gathered(np.array([steps, self.signal], np.int32))
        stop = int(said[:, 1].max())
        self.signal = self.signal or stop
        return int(said[0, 0]), stop

    def unless_it_comes(self, work: Callable[[], Result]) -> Result | None:
        """Return what `work` returns, or None as soon as a signal has come; the work is abandoned then.

        One of several processes always finishes it, because they stop together.

        Args:
            work: runs in a thread of its own.
        """
        if parallel.several() or not (self._before or self._followed):
            return work()
        done: Future[Result] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True).start()
        while not wait([done], POLL_SECONDS).done:
            if self.signal:
                return None
        return done.result()

    def restore(self) -> None:
        """Handle signals as before."""
        if self in _handling:
            _handling.remove(self)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            signal.set_wakeup_fd(self._fd_before)
            self._wake.close()  # ends the thread
            self._before = {}
