"""When a backend that fails is left alone, and when it is tried again."""

from __future__ import annotations

import pytest

from circuits import Circuit
from upstream_errors import (
    CircuitOpen,
    UpstreamBroken,
    UpstreamError,
    UpstreamGarbled,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnreachable,
    WindowExceeded,
)

UNREACHABLE, TIMEOUT = UpstreamUnreachable("down"), UpstreamTimeout("late")


class Bench:
    """A circuit that opens at the third failure for 15 s, and its clock."""

    def __init__(self, most_failures: int = 3) -> None:
        self.now = 100.0
        self.circuit = Circuit("one", most_failures, 15.0, lambda: self.now)

    def fail(self, times: int = 3, error: UpstreamError = UNREACHABLE) -> None:
        for _ in range(times):
            self.circuit.failed(error)

    def lets_in(self, *, has_other: bool = True) -> bool:
        try:
            self.circuit.enter(has_other)
        except CircuitOpen:
            return False
        return True


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_it_opens_after_so_many_failures(bench: Bench) -> None:
    bench.fail(2)
    assert bench.lets_in()
    bench.fail(1)
    assert not bench.lets_in()


@pytest.mark.parametrize(
    "error",
    [UNREACHABLE, TIMEOUT, UpstreamBroken("cut"), UpstreamGarbled("<html>"), UpstreamRefused("oh", status=502)],
)
def test_what_is_the_backends_fault_is_a_failure(bench: Bench, error: UpstreamError) -> None:
    bench.fail(3, error)
    assert not bench.lets_in()


@pytest.mark.parametrize(
    "error", [UpstreamRefused("slower", status=429), UpstreamRefused("no", status=400), WindowExceeded("full")]
)
def test_what_is_not_its_fault_shows_that_it_works(bench: Bench, error: UpstreamError) -> None:
    bench.fail(2)
    bench.circuit.failed(error)
    bench.fail(2)
    assert bench.lets_in()


def test_an_answer_makes_it_forget_failures(bench: Bench) -> None:
    bench.fail(2)
    bench.circuit.went_well()
    bench.fail(2)
    assert bench.lets_in()


def test_it_tells_when_to_come_again(bench: Bench) -> None:
    bench.fail()
    bench.now += 5
    with pytest.raises(CircuitOpen) as caught:
        bench.circuit.check(has_other=True)
    assert (caught.value.http_status, caught.value.retry_after_s) == (503, 10.0)


def test_after_a_pause_one_probe_is_let_through(bench: Bench) -> None:
    bench.fail()
    bench.now += 15
    assert [bench.lets_in() for _ in range(3)] == [True, False, False]


def test_a_probe_that_goes_well_closes_it(bench: Bench) -> None:
    bench.fail()
    bench.now += 15
    assert bench.lets_in()
    bench.circuit.went_well()
    assert [bench.lets_in() for _ in range(3)] == [True] * 3


def test_a_probe_that_fails_opens_it_again(bench: Bench) -> None:
    bench.fail()
    bench.now += 15
    assert bench.lets_in()
    bench.fail(1)
    bench.now += 14
    assert not bench.lets_in()


def test_a_probe_of_which_nothing_is_heard_is_followed_by_another_one(bench: Bench) -> None:
    bench.fail()
    bench.now += 15
    assert bench.lets_in()
    bench.now += 15
    assert bench.lets_in()


def test_without_another_backend_a_refused_connection_is_tried_each_time(bench: Bench) -> None:
    bench.fail(9)
    assert [bench.lets_in(has_other=has_other) for has_other in (False, False, True)] == [True, True, False]


def test_without_another_backend_nobody_waits_for_one_timeout_after_the_other(bench: Bench) -> None:
    bench.fail(3, TIMEOUT)
    assert not bench.lets_in(has_other=False)


def test_a_timeout_that_is_followed_by_a_word_holds_up_nobody_without_another_backend(bench: Bench) -> None:
    bench.fail(3, TIMEOUT)
    bench.circuit.heard()
    assert [bench.lets_in(has_other=has_other) for has_other in (False, True)] == [True, False]


def test_zero_failures_are_no_circuit() -> None:
    never = Bench(most_failures=0)
    never.fail(99, TIMEOUT)
    assert never.lets_in()
