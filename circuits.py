"""Whether a backend that has just failed is asked again: closed, open, and a probe now and then.

May not know what a call is. Of one process: another one finds out by itself.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from upstream_errors import CircuitOpen, UpstreamError

log = logging.getLogger("responses_proxy.circuits")

TIMED_OUT = 504


def is_failure(error: UpstreamError) -> bool:
    """Whether the backend is at fault: not so for what a client did wrong, nor for a limit of its rate."""
    return error.http_status >= 500


class Circuit:
    """Opens after so many failures in a row (0: never); then one call in `open_s` is a probe, until one goes well.

    Where there is no other backend to ask, an open circuit refuses only what would have to wait, so nothing unless the
    last failure was a timeout: a refused connection is as fast as a refusal here, and a backend that was just started
    again is used at once.
    """

    def __init__(self, name: str, most_failures: int, open_s: float, clock: Callable[[], float]) -> None:
        self._name = name
        self._most_failures = most_failures or math.inf
        self._open_s = open_s
        self._clock = clock
        self._failures = 0
        self._probe_at = 0.0
        self._is_slow = False

    @property
    def is_open(self) -> bool:
        return self._failures >= self._most_failures

    def check(self, has_other: bool) -> None:
        """`has_other`: there is another backend to ask. Raises: CircuitOpen."""
        if not self.is_open or not (has_other or self._is_slow):
            return
        left_s = self._probe_at - self._clock()
        if left_s > 0:
            error = CircuitOpen(f"Upstream '{self._name}' has failed too often just now, and is not asked again yet.")
            error.retry_after_s = left_s
            raise error

    def enter(self, has_other: bool) -> None:
        """A call is made; the first one after a pause is the probe. Raises: CircuitOpen."""
        self.check(has_other)
        if self.is_open:
            self._probe_at = self._clock() + self._open_s

    def heard(self) -> None:
        """The backend answers, though it is not known yet how well: nobody has to wait for a timeout."""
        self._is_slow = False

    def went_well(self) -> None:
        if self._failures and self.is_open:
            log.info("upstream '%s' answers again", self._name)
        self._failures, self._is_slow = 0, False

    def failed(self, error: UpstreamError) -> None:
        """Notes how a call ended that did not go well."""
        if not is_failure(error):
            self.went_well()
            return
        self._failures += 1
        self._is_slow = error.http_status == TIMED_OUT
        if self.is_open:
            if self._failures == self._most_failures:
                log.warning("upstream '%s' has failed %d times in a row", self._name, self._failures)
            self._probe_at = self._clock() + self._open_s
