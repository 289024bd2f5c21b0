"""Whatever is admitted, claimed, stopped and lost in whatever order: the queue is what a list of jobs says."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from store_places import FilePlace, PostgresPlace

from errors import InvalidRequest, NotFound, QueueFull, StillRunning
from run_verbs import Batch, Ending, Held, NewRun, QueueLimits, RunInfo
from verbs import Conversation, NewItem, NewTurn, Page

T = TypeVar("T")

START = 1_000_000.0
LEASE_S, LOG_S, BRIEF_S = 15.0, 20.0, 30.0
OWNERS = ("ann", "bob", "cem")
HOLDERS = ("p0", "p1", "p2")
LIMITS = QueueLimits(per_owner=4, total=9)
UNFINISHED = ("queued", "in_progress")
TABLES = ("turn", "item", "item_id", "thread", "conversation", "run", "log", "event", "queue", "settings")

# -- the model ---------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Job:
    """A background response and its run. `events`: what was logged, by number; None: no log, or not any more."""

    id: str
    owner: str
    created_at: int
    parent: Job | None
    is_brief: bool
    in_talk: bool
    waits_for: Job | None
    events: list[str] | None
    next_number: int | None
    status: str = "queued"
    is_living: bool = True
    is_in_line: bool = True
    holder: str | None = None
    until_at: float = 0.0
    generation: int = 0
    attempts: int = 0
    run: int = 0
    is_held_stopped: bool = False
    log_until_at: float = float("inf")
    lives_until: float = float("inf")
    before: list[Job] = field(default_factory=list)

    @property
    def has_run(self) -> bool:
        return self.is_in_line or (self.holder is not None and not self.is_held_stopped)

    @property
    def is_ready(self) -> bool:
        return self.is_in_line and self.waits_for is None

    @property
    def line(self) -> list[Job]:
        """What its window is made of, itself last."""
        return [*(self.parent.line if self.parent else self.before), self]

    @property
    def window(self) -> list[bytes]:
        return [item(f"{each.id}.{side}").body for each in self.line for side in ("in", "out")]


def item(item_id: str) -> NewItem:
    return NewItem(item_id, b'{"id":"%b"}' % item_id.encode())


def batch_of(first: int, count: int, mark: str = "") -> tuple[Batch, list[str]]:
    events = [f"{number}{mark}" for number in range(first, first + count)]
    return Batch(first, first + count, "".join(f"{event} " for event in events).encode()), events


class RunMachine(RuleBasedStateMachine):
    """Three processes on one store: each holder opens it for itself."""

    Place: type[FilePlace | PostgresPlace] = FilePlace

    @initialize()
    def begin(self) -> None:
        self.numbers = itertools.count(1)
        self.now = START
        self.jobs: list[Job] = []
        self.claims: list[tuple[Job, Held]] = []
        self.line: list[str] = []
        self.talk: list[Job] | None = []
        self.ended: dict[str, str] = {}
        self.runner = asyncio.Runner()
        self.place = self.Place()
        opening = [self.place.open() for _ in HOLDERS]
        self.stores = dict(zip(HOLDERS, [self.run(each) for each in opening], strict=True))
        self.store = self.stores["p0"]
        self.run(self.store.create_conversation("ann", Conversation("talk", 1, b"{}"), ()))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    # -- what there is

    @property
    def living(self) -> list[Job]:
        return [job for job in self.jobs if job.is_living]

    @property
    def waiting(self) -> Counter[str]:
        return Counter(job.owner for job in self.jobs if job.is_in_line)

    def enter(self, *jobs: Job) -> None:
        """Back in line, or new there. Where many enter at once, any order of their owners is right."""
        new = sorted({job.owner for job in jobs} - set(self.line))
        for job in jobs:
            job.is_in_line, job.holder = True, None
        if len(new) > 1:
            new = self.owners_in_round()[-len(new) :]
        self.line += new

    def leave(self, job: Job) -> None:
        if job.is_in_line:
            job.is_in_line = False
            if not self.waiting[job.owner]:
                self.line.remove(job.owner)

    def wake(self, gone: Job) -> None:
        for job in self.jobs:
            if job.waits_for is gone:
                job.waits_for = gone.waits_for

    def stop_run(self, job: Job) -> None:
        if job.has_run:
            self.wake(job)
            job.is_held_stopped = job.holder is not None
            self.leave(job)

    def forget(self, job: Job) -> None:
        self.stop_run(job)
        job.is_living, job.events = False, None

    def is_good(self, job: Job, held: Held) -> bool:
        return job.has_run and job.generation == held.generation

    def pick_claim(self, number: int) -> tuple[Job, Held]:
        """Any claim there ever was, a good one rather."""
        good = [each for each in self.claims if self.is_good(*each)]
        chosen = good if good and number % 3 else self.claims
        return chosen[number % len(chosen)]

    # -- what is done

    number = st.integers(0, 1000)
    holder = st.sampled_from(HOLDERS)

    kinds = st.sampled_from(["", "", "child", "child", "talk", "talk", "brief", "brief child"])

    @rule(owner=st.sampled_from(OWNERS), number=number, kind=kinds, is_streamed=st.booleans())
    def admit(self, owner: str, number: int, kind: str, is_streamed: bool) -> None:
        is_brief = kind.startswith("brief")
        if kind == "talk" and self.talk is not None:
            before = [job for job in self.jobs if job.in_talk and job.has_run]
            self.admit_one("ann", None, is_streamed, in_talk=True, waits_for=before[-1] if before else None)
        elif kind.endswith("child") and (parent := self.pick_parent(number)):
            waits_for = parent if parent.has_run else None
            self.admit_one(parent.owner, parent, is_streamed, is_brief=is_brief, waits_for=waits_for)
        else:
            self.admit_one(owner, None, is_streamed, is_brief=is_brief)

    def pick_parent(self, number: int) -> Job | None:
        """One that a turn would continue, now and then one that has to be refused; an unfinished one rather."""
        open_ones = [job for job in self.living if job.status not in ("failed", "cancelled")]
        rather = [job for job in open_ones if job.status in UNFINISHED and not job.is_brief and not job.in_talk]
        chosen = rather if rather and number % 4 else open_ones
        return chosen[number % len(chosen)] if chosen else None

    def admit_one(self, owner: str, parent: Job | None, is_streamed: bool, **how: Any) -> None:
        in_talk, is_brief, waits_for = how.get("in_talk", False), how.get("is_brief", False), how.get("waits_for")
        name = f"r{next(self.numbers)}"
        events = batch_of(0, 2) if is_streamed else None
        turn = self.turn(name, owner, "queued", is_detached=in_talk or is_brief, is_brief=is_brief)
        new = NewRun(
            turn=turn(previous_id=parent and parent.id, conversation_id="talk" if in_talk else None),
            request=name.encode(),
            admitted_at=self.now,
            batch=events and events[0],
        )
        error = self.refusal(owner, parent)
        if error:
            with pytest.raises(error):
                self.run(self.store.admit(new, LIMITS))
            return
        self.run(self.store.admit(new, LIMITS))
        job = Job(name, owner, int(self.now), parent, is_brief, in_talk, waits_for, None, None)
        if events:
            job.events, job.next_number = list(events[1]), 2
        job.is_in_line = False
        self.jobs.append(job)
        self.enter(job)

    def refusal(self, owner: str, parent: Job | None) -> type[Exception] | None:
        if self.waiting[owner] >= LIMITS.per_owner or self.waiting.total() >= LIMITS.total:
            return QueueFull
        if parent and parent.in_talk and parent.has_run:
            return StillRunning
        return InvalidRequest if parent and parent.is_brief else None

    def turn(self, name: str, owner: str, status: str, **how: Any) -> Any:
        """Builds a turn, of which the rest is told later."""
        has_output = status in ("completed", "incomplete")

        def rest(**more: Any) -> NewTurn:
            return NewTurn(
                id=name,
                owner=owner,
                status=status,
                created_at=int(self.now),
                completed_at=int(self.now) if status == "completed" else None,
                model="m",
                settings=b"{}",
                body=status.encode(),
                inputs=(item(f"{name}.in"),),
                outputs=(item(f"{name}.out"),) if has_output else (),
                **how,
                **more,
            )

        return rest

    @rule(holder=holder, limit=st.integers(1, 3))
    def claim(self, holder: str, limit: int) -> None:
        self.claim_some(holder, limit)

    def claim_some(self, holder: str, limit: int) -> None:
        claimed = self.run(self.stores[holder].claim(holder, self.now + LEASE_S, limit))
        expected = []
        while len(expected) < limit and (job := self.next_job()):
            self.line.remove(job.owner)
            self.line.append(job.owner)
            self.leave(job)
            job.holder, job.until_at, job.status = holder, self.now + LEASE_S, "in_progress"
            job.generation += 1
            job.attempts += 1
            expected.append(job)
        assert [run.response_id for run in claimed] == [job.id for job in expected]
        for run, job in zip(claimed, expected, strict=True):
            job.run = job.run or run.held.run
            assert (run.held, run.attempt) == (Held(job.run, job.generation), job.attempts)
            assert (run.owner, run.request, run.next_number) == (job.owner, job.id.encode(), job.next_number)
            assert run.inputs == [item(f"{job.id}.in").body]
            self.claims.append((job, run.held))

    def next_job(self) -> Job | None:
        """The oldest ready one of the first owner in the round who has such."""
        ready = [next((job for job in self.jobs if job.owner == owner and job.is_ready), None) for owner in self.line]
        return next((job for job in ready if job), None)

    @precondition(lambda self: self.claims)
    @rule(number=number, count=st.integers(1, 3), is_again=st.booleans())
    def log(self, number: int, count: int, is_again: bool) -> None:
        job, held = self.pick_claim(number)
        if job.next_number is None:
            return
        batch, events = batch_of(job.next_number, count, f"g{held.generation}")
        is_good = self.is_good(job, held)
        assert self.run(self.store.log(held, batch)) is is_good
        if is_good and is_again:
            batch, events = batch_of(job.next_number, count + 1, f"g{held.generation}")
            assert self.run(self.store.log(held, batch)) is True
        if is_good:
            assert job.events is not None
            job.events += events
            job.next_number += len(events)

    @precondition(lambda self: self.claims)
    @rule(number=number, status=st.sampled_from(["completed", "completed", "incomplete", "failed"]), more=st.booleans())
    def settle(self, number: int, status: str, more: bool) -> None:
        self.settle_claim(*self.pick_claim(number), status, more=more)

    @rule(holder=holder, status=st.sampled_from(["completed", "completed", "incomplete"]), more=st.booleans())
    def carry_out(self, holder: str, status: str, more: bool) -> None:
        """The next run in line, from its claim to its end."""
        if job := self.next_job():
            self.claim_some(holder, 1)
            self.settle_claim(job, self.claims[-1][1], status, more=more)

    def settle_claim(self, job: Job, held: Held, status: str, *, more: bool) -> None:
        if job.parent and job.parent.status not in ("completed", "incomplete"):
            status = "failed"
        joins = job.in_talk and status != "failed"
        turn = self.turn(job.id, job.owner, status, is_detached=not joins, is_brief=job.is_brief)
        batch, events = batch_of(job.next_number, 1, "end") if more and job.next_number is not None else (None, [])
        ending = Ending(turn(conversation_id="talk" if joins else None), batch, self.now + LOG_S, self.now + BRIEF_S)
        if self.is_good(job, held) and joins and self.talk is None:
            with pytest.raises(NotFound):
                self.run(self.store.settle(held, ending))
            return
        is_good = self.is_good(job, held)
        assert self.run(self.store.settle(held, ending)) is is_good
        if is_good:
            self.end(job, status, events)
            if joins and self.talk is not None:
                job.before = list(self.talk)
                self.talk.append(job)
            self.check_response(job)

    def end(self, job: Job, status: str, events: list[str]) -> None:
        self.wake(job)
        self.leave(job)
        job.holder, job.status = None, status
        job.log_until_at, job.lives_until = self.now + LOG_S, self.now + BRIEF_S
        if job.events is not None:
            job.events += events

    @precondition(lambda self: self.jobs)
    @rule(number=number, holder=holder)
    def stop(self, number: int, holder: str) -> None:
        job = self.jobs[-1 - number % len(self.jobs)]
        stopping = self.stores[holder].stop(job.owner, job.id, self.now + LOG_S, self.now + BRIEF_S)
        stopped = self.run(stopping)
        if not job.is_living:
            assert stopped is None
            return
        assert stopped is not None
        assert stopped.was_running is (job.status in UNFINISHED)
        if stopped.was_running:
            self.stop_run(job)
            job.status = "cancelled"
            job.log_until_at, job.lives_until = self.now + LOG_S, self.now + BRIEF_S
        assert (stopped.response.status, stopped.run) == (job.status, job.run if job.is_held_stopped else None)
        self.check_response(job)

    @precondition(lambda self: self.jobs)
    @rule(number=number, how=st.sampled_from(["one", "one", "one", "old", "talk"]))
    def erase(self, number: int, how: str) -> None:
        if how == "old" and len(self.jobs) > 5:
            self.purge(number % 60)
        elif how == "talk" and self.talk and number % 4 == 0:
            self.delete_conversation()
        else:
            self.delete(number)

    def delete(self, number: int) -> None:
        job = self.jobs[-1 - number % len(self.jobs)]
        assert self.run(self.store.delete_response(job.owner, job.id, self.now)) is job.is_living
        if job.is_living:
            self.forget(job)

    def delete_conversation(self) -> None:
        assert self.run(self.store.delete_conversation("ann", "talk", self.now)) is True
        for job in self.talk or []:
            job.created_at = int(self.now)
        self.talk = None

    @precondition(lambda self: self.claims)
    @rule(number=number, holder=holder, how=st.sampled_from(["renew", "release all", "release", "free", "let go"]))
    def tend(self, number: int, holder: str, how: str) -> None:
        if how == "renew":
            self.renew(holder)
        elif how == "release all":
            self.release_all(holder)
        elif how == "release":
            self.release(number)
        elif how == "free":
            self.free(number)
        else:
            self.let_go(number)

    def renew(self, holder: str) -> None:
        mine = [job for job in self.jobs if job.holder == holder and job.has_run]
        held = self.run(self.stores[holder].renew_runs(holder, self.now + LEASE_S))
        assert sorted(each.run for each in held) == sorted(job.run for job in mine)
        for job in mine:
            job.until_at = self.now + LEASE_S

    def release_all(self, holder: str) -> None:
        self.run(self.stores[holder].release_runs(holder))
        mine = [job for job in self.jobs if job.holder == holder]
        back = [job for job in mine if job.has_run]
        for job in mine:
            job.holder, job.is_held_stopped = None, False
        for job in back:
            job.attempts -= 1
        self.enter(*back)

    def release(self, number: int) -> None:
        job, held = self.pick_claim(number)
        self.run(self.store.release_run(held))
        if job.generation == held.generation and job.holder:
            job.attempts -= job.has_run
            self.give_back(job)

    def free(self, number: int) -> None:
        job, held = self.pick_claim(number)
        before_at = self.now if number % 2 else float("inf")
        self.run(self.store.free(held, before_at))
        if job.generation == held.generation and job.holder and job.until_at < before_at:
            self.give_back(job)

    def give_back(self, job: Job) -> None:
        """To the line, or to nobody when it was stopped."""
        if job.is_held_stopped:
            job.holder, job.is_held_stopped = None, False
        else:
            self.enter(job)

    def let_go(self, number: int) -> None:
        job, held = self.pick_claim(number)
        self.run(self.store.let_go(held))
        if job.generation == held.generation and job.is_held_stopped:
            job.holder, job.is_held_stopped = None, False
        assert self.run(self.store.is_held(held.run)) is (job.has_run or job.is_held_stopped)

    @rule(seconds=st.sampled_from([0, 1, 4, 14, 15, 16, 25]))
    def sweep(self, seconds: int) -> None:
        self.now += seconds
        late = [job for job in self.jobs if job.holder and job.until_at < self.now]
        found = self.run(self.store.expired(self.now))
        assert {held.run: held.generation for held in found} == {job.run: job.generation for job in late}
        for job in late:
            self.run(self.store.free(Held(job.run, job.generation), self.now))
            self.give_back(job)
        self.run(self.store.forget_ended(self.now))
        for job in self.living:
            if job.status not in UNFINISHED and job.log_until_at <= self.now:
                job.events = None
            if job.is_brief and job.status not in UNFINISHED and job.lives_until <= self.now:
                self.forget(job)

    def purge(self, age_s: int) -> None:
        joined = self.talk or []
        old = [job for job in self.living if job.created_at < self.now - age_s and job not in joined]
        assert self.run(self.store.purge(self.now - age_s, self.now)).responses == len(old)
        for job in old:
            self.forget(job)

    # -- what is read

    @precondition(lambda self: self.jobs)
    @rule(number=number, after=st.integers(-1, 12), holder=holder)
    def tail(self, number: int, after: int, holder: str) -> None:
        job = self.jobs[-1 - number % len(self.jobs)]
        tail = self.run(self.stores[holder].tail(job.owner, job.id, after))
        if job.events is None:
            assert tail is None
            return
        assert tail is not None
        given = [(first, frames.decode().split()) for first, frames in tail.batches]
        numbered = [(number, event) for first, events in given for number, event in enumerate(events, first)]
        logged = list(enumerate(job.events))
        assert [each for each in numbered if each[0] > after] == logged[after + 1 :]
        assert numbered == logged[len(logged) - len(numbered) :]
        assert (tail.status, tail.has_more) == (job.status, False)

    def check_response(self, job: Job) -> None:
        """What it has, and what its children begin with."""
        kept = self.run(self.store.response(job.owner, job.id))
        has_output = job.status in ("completed", "incomplete")
        assert kept is not None
        assert kept.outputs == ([item(f"{job.id}.out").body] if has_output else [])
        window = self.run(self.store.window(job.owner, job.id))
        if job.is_brief:
            assert window is None
        else:
            assert window is not None
            assert (window.status, window.items) == (job.status, job.window if has_output else [])

    @invariant()
    def statuses_are_right_and_never_leave_a_terminal_one(self) -> None:
        if not hasattr(self, "store"):
            return
        states = self.run(self.store.states([job.id for job in self.jobs]))
        assert {name: status for name, (status, _) in states.items()} == {job.id: job.status for job in self.living}
        assert {name for name, (_, newest) in states.items() if newest is not None} == {
            job.id for job in self.living if job.events is not None
        }
        for name, (status, _) in states.items():
            if status not in UNFINISHED:
                assert self.ended.setdefault(name, status) == status
            assert status == self.ended.get(name, status)

    @invariant()
    def runs_are_right(self) -> None:
        """At most one holder each, and it is the one who claimed it last."""
        if not hasattr(self, "store"):
            return
        found = self.run(self.store.runs())
        jobs = [job for job in self.jobs if job.has_run]
        assert [info.response_id for info in found] == [job.id for job in jobs]
        for job, info in zip(jobs, found, strict=True):
            told = (job.id, job.owner, info.admitted_at, job.attempts, job.next_number, job.holder)
            assert info == RunInfo(job.waits_for is not None, *told)

    @invariant()
    def the_queue_is_counted_right(self) -> None:
        if not hasattr(self, "store"):
            return
        lengths = dict(self.place.asked(self.place.LENGTHS))
        ((rows,),) = self.place.asked("SELECT count(*) FROM run")
        assert lengths == dict(self.waiting)
        assert self.owners_in_round() == self.line
        assert rows == sum(job.has_run or job.is_held_stopped for job in self.jobs)

    def owners_in_round(self) -> list[str]:
        return [owner for (owner,) in self.place.asked(self.place.ROUND)]

    # -- the end

    def check_everything(self) -> None:
        for job in self.living:
            self.check_response(job)
        for owner in OWNERS:
            listed = self.run(self.store.responses(owner, Page(1000, "asc"), None))
            mine = {job.id for job in self.living if job.owner == owner and not job.is_brief}
            assert {response.id for response in listed.rows} == mine
        if self.talk is not None:
            items = self.run(self.store.conversation_items("ann", "talk", Page(1000, "asc")))
            line = [item(f"{job.id}.{side}").body for job in self.talk for side in ("in", "out")]
            assert items is not None
            assert items.rows == line

    def finish(self) -> None:
        """From any state, every run ends: what is held is lost, and then each is claimed and ended."""
        self.sweep(int(LEASE_S) + 1)
        while job := self.next_job():
            self.claim_some("p2", 1)
            self.settle_newest(job)
        assert [job.id for job in self.living if job.status in UNFINISHED] == []
        assert self.run(self.store.runs()) == []

    def settle_newest(self, job: Job) -> None:
        _, held = self.claims[-1]
        turn = self.turn(job.id, job.owner, "failed", is_detached=True, is_brief=job.is_brief)
        assert self.run(self.store.settle(held, Ending(turn(), None, self.now, self.now))) is True
        self.end(job, "failed", [])

    def empty(self) -> None:
        """When everything is deleted, nothing is left."""
        for job in self.living:
            self.run(self.store.delete_response(job.owner, job.id, self.now))
        self.run(self.store.delete_conversation("ann", "talk", self.now))
        self.run(self.store.purge(0, self.now))
        assert self.place.counts(TABLES) == dict.fromkeys(TABLES, 0)

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        try:
            self.check_everything()
            self.finish()
            self.empty()
        finally:
            for store in self.stores.values():
                self.run(store.close())
            self.runner.close()
            self.place.close()


# Time enough to shrink what is found.
TestRunModel = pytest.mark.timeout(360)(RunMachine.TestCase)
TestRunModel.settings = settings(
    max_examples=110,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)


class PostgresMachine(RunMachine):
    Place = PostgresPlace


TestPostgresModel = pytest.mark.timeout(360)(PostgresMachine.TestCase)
TestPostgresModel.settings = settings(TestRunModel.settings, max_examples=12)
