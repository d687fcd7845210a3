"""Being asked to stop: SIGTERM, Ctrl-C, and the notice that one of several hosts is preempted."""

from __future__ import annotations

import contextlib
import os
import signal

import jax
from jax.experimental import multihost_utils


class StopSignals:
    """Notes the first SIGTERM or Ctrl-C; the second has its usual effect.

    Where several processes run, all must stop at one step: JAX's preemption service hears SIGTERM in
    any of them and agrees with the others on the step, so SIGTERM stays its own, and Ctrl-C is
    handed on to it.
    """

    def __init__(self):
        self.received, self.before, self.polls = 0, {}, 0
        self.several = jax.process_count() > 1

    def __enter__(self):
        for number in (signal.SIGINT,) if self.several else (signal.SIGINT, signal.SIGTERM):
            try:
                self.before[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: someone else handles signals
                pass
        return self

    def asked(self) -> int:
        """The signal's number, or 0. All processes call it equally often."""
        if self.several and not self.received:
            self.polls += 1
            if multihost_utils.reached_preemption_sync_point(self.polls):
                self.received = signal.SIGTERM
                with contextlib.suppress(ValueError):  # not the main thread
                    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the second stops at once
        return self.received

    def _note(self, number, frame):
        self._restore()
        # Not print: the signal may have come in the middle of one, which cannot be entered twice.
        os.write(2, b"\nstopping after the step in flight; once more stops at once\n")
        if self.several:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.received = number

    def _restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def __exit__(self, *error):
        self._restore()
