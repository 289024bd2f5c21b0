"""Which request of a connection is answered next."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import InvalidRequest, QueueFull
from stream_lanes import AT_ONCE, NAMED_LANES, StreamLanes, Waiting, lane_name

LANES = (None, *(f"lane-{number}" for number in range(20)))
# A lane that gets a request, or which of the running requests ends.
STEPS = st.lists(st.one_of(st.sampled_from(LANES), st.integers(0, AT_ONCE - 1)), max_size=200)


def numbered(lane: str | None, number: int) -> Waiting:
    return Waiting(lane, b"%d" % number)


def begun(lanes: StreamLanes) -> list[Waiting]:
    """All that can begin."""
    found = []
    while request := lanes.next():
        found.append(request)
    return found


@given(STEPS)
def test_every_request_begins_once_in_the_order_of_its_lane(steps: list[str | int | None]) -> None:
    lanes, running, order = StreamLanes(1000, 10**6), [], []
    for number, step in enumerate(steps):
        if isinstance(step, int):
            if step < len(running):
                lanes.done(running.pop(step))
        else:
            lanes.add(numbered(step, number))
        order += (started := begun(lanes))
        running += started
        names = [request.stream_id for request in running]
        assert len(set(names)) == len(names) == lanes.running <= AT_ONCE
    while running:
        lanes.done(running.pop(0))
        order += (started := begun(lanes))
        running += started
    given_to = {
        lane: [n for n, step in enumerate(steps) if step == lane and not isinstance(step, int)] for lane in LANES
    }
    assert {lane: [int(r.raw) for r in order if r.stream_id == lane] for lane in LANES} == given_to


@given(STEPS)
def test_nothing_waits_that_could_begin(steps: list[str | int | None]) -> None:
    lanes, running, waiting = StreamLanes(1000, 10**6), [], 0
    for number, step in enumerate(steps):
        if isinstance(step, int):
            if step < len(running):
                lanes.done(running.pop(step))
        else:
            lanes.add(numbered(step, number))
            waiting += 1
        running += (started := begun(lanes))
        waiting -= len(started)
        assert lanes.next() is None
    assert len(lanes.emptied()) == waiting
    assert begun(lanes) == []


def test_lanes_take_turns_when_there_is_no_room_for_all() -> None:
    lanes = StreamLanes(100, 10**6)
    for number in range(AT_ONCE):
        lanes.add(numbered(f"busy-{number}", 0))
    running = begun(lanes)
    for lane in ("busy-0", "new", "busy-0"):
        lanes.add(numbered(lane, 1))
    lanes.done(running[0])
    assert [request.stream_id for request in begun(lanes)] == ["new"]


@pytest.mark.parametrize(("most", "most_bytes"), [(2, 100), (100, 2)])
def test_only_so_much_waits(most: int, most_bytes: int) -> None:
    lanes = StreamLanes(most, most_bytes)
    lanes.add(Waiting(None, b"1"))
    (running,) = begun(lanes)
    for _ in range(2):
        lanes.add(Waiting(None, b"1"))
    with pytest.raises(QueueFull):
        lanes.add(Waiting(None, b"1"))
    lanes.add(Waiting("idle", b"1"))
    assert [request.stream_id for request in begun(lanes)] == ["idle"]
    lanes.done(running)
    assert [request.stream_id for request in begun(lanes)] == [None]
    lanes.add(Waiting(None, b"1"))


def test_a_connection_has_32_lanes_and_the_one_without_a_name() -> None:
    lanes = StreamLanes(100, 10**6)
    for lane in (None, *map(str, range(NAMED_LANES))):
        lanes.add(Waiting(lane, b"1"))
    lanes.add(Waiting("0", b"1"))
    with pytest.raises(InvalidRequest) as refused:
        lanes.add(Waiting("one more", b"1"))
    assert refused.value.error_code == "websocket_stream_limit_reached"


@pytest.mark.parametrize("name", ["a", "A-Z_0.9", "x" * 256])
def test_a_lane_has_a_name(name: str) -> None:
    assert lane_name(name) == name


@pytest.mark.parametrize("name", ["", "x" * 257, "a b", "a/b", "ä", "a\n", 7, ["a"], {}, False])
def test_a_name_that_no_lane_can_have_is_refused(name: object) -> None:
    with pytest.raises(InvalidRequest) as refused:
        lane_name(name)
    assert (refused.value.error_code, refused.value.param) == ("invalid_stream_id", "stream_id")
