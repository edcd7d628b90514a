"""What both workers share: ``awaitly-postgres resume`` and ``manage.py resume_workflows``."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from attrs import define

ANY = 10**9  # runs: the limit of a pass without --limit


def quiet_the_driver() -> None:
    """Keep warnings about connections that psycopg's pool replaces off stderr.

    They are still logged if logging is configured, for psycopg or for everything.
    """
    if not (logger := logging.getLogger("psycopg")).handlers:
        logger.addHandler(logging.NullHandler())


@define
class Signals:
    """SIGINT and SIGTERM stop a worker after the current workflow, and a second one at once.

    With ``loops`` the exit status is 0 if it could finish the current workflow, because such a
    worker is meant to be stopped. Otherwise it is 128 plus the number of the signal.
    """

    loops: bool
    _stopped_by: int = 0
    _asleep: bool = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals while the block runs; a second one raises `SystemExit` out of it."""

        def stop(signum: int, frame: object) -> None:
            at_once = self._asleep or self._stopped_by
            self._stopped_by = signum
            if at_once:
                raise KeyboardInterrupt
            # os.write, not print: the signal may have interrupted a print, which is not reentrant.
            os.write(2, b"stopping after the current workflow; repeat to stop now\n")

        # Signals reach the main thread only, and only there may their handlers be set.
        is_main = threading.current_thread() is threading.main_thread()
        signums = (signal.SIGINT, signal.SIGTERM) if is_main else ()
        before = {signum: signal.signal(signum, stop) for signum in signums}
        try:
            yield
        except KeyboardInterrupt:
            if not self._stopped_by:
                raise
            raise SystemExit(128 + self._stopped_by) from None
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def exit_if_stopped(self) -> None:
        """Raise `SystemExit` if a signal has arrived: between two workflows."""
        if self._stopped_by:
            raise SystemExit(0 if self.loops else 128 + self._stopped_by)

    def sleep(self, seconds: float) -> None:
        """Sleep between two passes; a signal ends the worker at once."""
        with suppress(KeyboardInterrupt):
            self._asleep = True
            if not self._stopped_by:
                time.sleep(seconds)
            self._asleep = False
        self.exit_if_stopped()
