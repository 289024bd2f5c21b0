"""Whatever is saved, deleted and purged in whatever order: a store reads back what a list of parents says."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from store_places import FilePlace, PostgresPlace

from errors import InvalidRequest
from verbs import Conversation, ItemIds, KeptResponse, Listed, NewItem, NewTurn, Page, Window

T = TypeVar("T")

NOW = 1_000_000.0
OWNERS = ("owner", "stranger")
KINDS = ["message", "message", "message", "reasoning", "compaction", "again"]
TABLES = ("turn", "item", "item_id", "thread", "settings", "conversation")

# -- the model ---------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Node:
    """A response or a batch of items, and what it continues."""

    owner: str
    parent: Node | None
    inputs: list[NewItem]
    outputs: list[NewItem]
    saved: NewTurn | None = None
    is_living: bool = True
    ages_from: float = 0.0
    removed: set[int] = field(default_factory=set)
    ahead: bytes | None = None

    @property
    def line(self) -> list[Node]:
        """Oldest first, itself last."""
        return [*(self.parent.line if self.parent else []), self]

    @property
    def items(self) -> list[NewItem]:
        return self.inputs + self.outputs

    @property
    def shown(self) -> list[NewItem]:
        """What was not taken out of its conversation."""
        return [item for place, item in enumerate(self.items) if place not in self.removed]


def window_of(node: Node | None) -> list[NewItem]:
    items = [item for each in (node.line if node else []) for item in each.shown]
    newest = max((place for place, item in enumerate(items) if item.is_compaction), default=0)
    return items[newest:]


def told(node: Node | None) -> Window:
    """The window that ends with a node, and what it tells of the node."""
    if node is None:
        return Window("completed", [], 0)
    window = window_of(node)
    newest = max(0, len(window) - len(node.shown))
    own = (node.saved.body, node.saved.settings) if node.saved else (b"", b"")
    return Window("completed", bodies(window), newest, *own, node.ahead)


def given_to(node: Node) -> list[NewItem]:
    return [item for item in window_of(node.parent) + node.inputs if item.is_listed]


def bodies(items: list[NewItem]) -> list[bytes]:
    return [item.body for item in items]


class StoreMachine(RuleBasedStateMachine):
    Place: type[FilePlace | PostgresPlace] = FilePlace

    @initialize()
    def begin(self) -> None:
        self.numbers = itertools.count(1)
        self.clock = 0
        self.nodes: list[Node] = []
        self.talks: dict[str, tuple[str, list[Node]]] = {}
        self.runner = asyncio.Runner()
        self.place = self.Place()
        self.store = self.run(self.place.open())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    # -- what there is

    @property
    def living(self) -> list[Node]:
        return [node for node in self.nodes if node.saved and node.is_living]

    def held(self, node: Node) -> bool:
        return any(node in nodes for _, nodes in self.talks.values())

    def pick(self, number: int) -> Node:
        """A living response that a child may continue."""
        open_ones = [node for node in self.living if node.saved and not node.saved.is_detached]
        return open_ones[number % len(open_ones)]

    def talk(self, number: int) -> tuple[str, str, list[Node]]:
        name = sorted(self.talks)[number % len(self.talks)]
        return name, *self.talks[name]

    def make_items(self, kinds: list[str], ids: ItemIds | None) -> list[NewItem]:
        """Items of these kinds; `again` has the id of an item that is or was somewhere."""
        old = [item for node in self.nodes for item in node.items]
        made = []
        for place, kind in enumerate(kinds):
            if kind == "again" and old:
                made.append(old[(place * 7 + len(old) // 2) % len(old)])
                continue
            item_id = ids("msg") if ids else f"msg_{next(self.numbers)}"
            body = json.dumps({"type": kind, "id": item_id}).encode()
            made.append(NewItem(item_id, body, kind not in ("reasoning", "compaction"), kind == "compaction"))
        return made

    # -- what is done

    def save(self, owner: str, parent: Node | None, kinds: list[list[str]], **how: Any) -> Node:
        number = next(self.numbers)
        response_id = f"resp_{number:x}"
        ids = ItemIds(response_id) if number % 3 else None
        inputs, outputs = self.make_items(kinds[0], ids), self.make_items(kinds[1], ids)
        turn = NewTurn(
            id=response_id,
            owner=owner,
            status="failed" if how.get("is_detached") else "completed",
            created_at=self.clock,
            completed_at=None if number % 4 else self.clock,
            model=f"m{number % 2}",
            settings=b"settings %d" % (number % 3),
            body=b"body %d" % number,
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            **how,
        )
        self.clock += number % 2
        self.run(self.store.save(turn))
        node = Node(owner, parent, inputs, outputs, turn, ages_from=turn.created_at)
        self.nodes.append(node)
        return node

    two_lists = st.lists(st.lists(st.sampled_from(KINDS), max_size=3), min_size=2, max_size=2)
    number = st.integers(0, 1000)

    @rule(owner=st.sampled_from(OWNERS), kinds=two_lists, is_detached=st.booleans())
    def save_root(self, owner: str, kinds: list[list[str]], is_detached: bool) -> None:
        self.save(owner, None, kinds, is_detached=is_detached)

    @precondition(lambda self: any(not node.saved.is_detached for node in self.living))
    @rule(number=number, kinds=two_lists, is_detached=st.sampled_from([False, False, False, True]))
    def save_child(self, number: int, kinds: list[list[str]], is_detached: bool) -> None:
        parent = self.pick(number)
        assert parent.saved is not None
        self.save(parent.owner, parent, kinds, previous_id=parent.saved.id, is_detached=is_detached)

    @rule(owner=st.sampled_from(OWNERS), kinds=st.lists(st.sampled_from(KINDS), max_size=3))
    def create_conversation(self, owner: str, kinds: list[str]) -> None:
        name = f"conv_{next(self.numbers):04}"
        items = self.make_items(kinds, None)
        self.run(self.store.create_conversation(owner, Conversation(name, self.clock, b"{}"), tuple(items)))
        self.talks[name] = (owner, [Node(owner, None, items, [])] if items else [])
        self.nodes += self.talks[name][1]

    @precondition(lambda self: self.talks)
    @rule(number=number, kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=3))
    def add_items(self, number: int, kinds: list[str]) -> None:
        name, owner, nodes = self.talk(number)
        items = self.make_items(kinds, None)
        adding = self.store.add_items(owner, name, tuple(items), NOW)
        if {item.id for item in items} & {item.id for node in nodes for item in node.shown}:
            with pytest.raises(InvalidRequest):
                self.run(adding)
            return
        assert self.run(adding) is True
        nodes.append(Node(owner, nodes[-1] if nodes else None, items, []))
        self.nodes.append(nodes[-1])

    @precondition(lambda self: self.talks)
    @rule(number=number, kinds=two_lists, is_detached=st.sampled_from([False, False, False, True]))
    def save_in_conversation(self, number: int, kinds: list[list[str]], is_detached: bool) -> None:
        name, owner, nodes = self.talk(number)
        parent = nodes[-1] if nodes else None
        node = self.save(owner, parent, kinds, conversation_id=name, is_detached=is_detached)
        if not is_detached:
            nodes.append(node)

    @precondition(lambda self: self.talks)
    @rule(number=number, which=number)
    def delete_item(self, number: int, which: int) -> None:
        name, owner, nodes = self.talk(number)
        shown = [item.id for node in nodes for item in node.shown]
        once = [item_id for item_id in shown if shown.count(item_id) == 1]
        if not once:
            return
        item_id = once[which % len(once)]
        self.keep_ahead_of(self.nodes)
        assert self.run(self.store.delete_conversation_item(owner, name, item_id, NOW)) is True
        for node in nodes:
            places = {p for p, item in enumerate(node.items) if item.id == item_id and p not in node.removed}
            node.removed |= places
        self.forget_ahead(nodes)

    def forget_ahead(self, nodes: list[Node]) -> None:
        """Whatever began with one of them."""
        for node in self.nodes:
            if any(each in nodes for each in node.line):
                node.ahead = None
        for node in self.living:
            assert node.saved is not None
            window = self.run(self.store.window(node.owner, node.saved.id))
            assert window is not None
            assert window.ahead == node.ahead

    @rule(number=number)
    def keep_ahead(self, number: int) -> None:
        """Of every response, of every second one, …"""
        self.keep_ahead_of(self.nodes[:: 1 + number % 3], 1 + number % 2 * 3000)

    def keep_ahead_of(self, nodes: list[Node], times: int = 1) -> None:
        for node in nodes:
            if node.saved is None:
                continue
            blob = b"ahead %d" % next(self.numbers) * times
            is_open = node.is_living and not node.saved.is_detached
            assert self.run(self.store.keep_ahead(node.owner, node.saved.id, blob)) is is_open
            node.ahead = blob if is_open else None

    @precondition(lambda self: self.living)
    @rule(number=number)
    def delete_response(self, number: int) -> None:
        node = self.living[number % len(self.living)]
        assert node.saved is not None
        assert self.run(self.store.delete_response(node.owner, node.saved.id, NOW)) is True
        self.bury(node)

    def bury(self, node: Node) -> None:
        node.is_living = False
        node.ahead = None

    @precondition(lambda self: self.talks)
    @rule(number=number)
    def delete_conversation(self, number: int) -> None:
        name, owner, nodes = self.talk(number)
        self.keep_ahead_of(self.nodes)
        assert self.run(self.store.delete_conversation(owner, name, NOW)) is True
        for node in nodes:
            node.is_living = node.is_living and node.saved is not None
            node.ages_from = NOW
        self.forget_ahead(nodes)
        del self.talks[name]

    @precondition(lambda self: self.living)
    @rule(number=number)
    def purge(self, number: int) -> None:
        before_at = NOW + 1 if number % 7 == 0 else number % (self.clock + 2)
        old = [n for n in self.living if n.saved and n.ages_from < before_at and not self.held(n)]
        assert self.run(self.store.purge(before_at, NOW)).responses == len(old)
        for node in old:
            self.bury(node)

    # -- what is read

    @precondition(lambda self: self.living)
    @rule(number=number, limit=st.integers(1, 4), order=st.sampled_from(["asc", "desc"]))
    def read_response(self, number: int, limit: int, order: Literal["asc", "desc"]) -> None:
        self.run(self.check_response(self.living[number % len(self.living)], limit, order))

    @precondition(lambda self: self.talks)
    @rule(number=number, limit=st.integers(1, 4), order=st.sampled_from(["asc", "desc"]))
    def read_conversation(self, number: int, limit: int, order: Literal["asc", "desc"]) -> None:
        self.run(self.check_conversation(*self.talk(number), limit, order))

    async def check_response(self, node: Node, limit: int, order: Literal["asc", "desc"]) -> None:
        turn = node.saved
        assert turn is not None
        kept = KeptResponse(
            turn.id,
            turn.status,
            turn.created_at,
            turn.completed_at,
            turn.previous_id,
            turn.settings,
            turn.body,
            bodies(node.outputs),
        )
        assert await self.store.response(node.owner, turn.id) == kept
        if not turn.is_detached:
            assert await self.store.window(node.owner, turn.id) == told(node)
        assert await self.store.window_before(node.owner, turn.id) == told(node.parent)

        async def give(page: Page) -> Listed[bytes] | None:
            return await self.store.input_items(node.owner, turn.id, page)

        await self.check_list(give, given_to(node), limit, order)

    async def check_conversation(
        self, name: str, owner: str, nodes: list[Node], limit: int, order: Literal["asc", "desc"]
    ) -> None:
        assert await self.store.conversation_window(owner, name) == told(nodes[-1] if nodes else None)

        async def give(page: Page) -> Listed[bytes] | None:
            return await self.store.conversation_items(owner, name, page)

        items = [item for node in nodes for item in node.shown]
        await self.check_list(give, items, limit, order)
        for item in items:
            assert await self.store.conversation_item(owner, name, item.id) == item.body

    async def check_list(self, give: Any, items: list[NewItem], limit: int, order: Literal["asc", "desc"]) -> None:
        """The whole list, and the list page after page: an id that stands in it twice is no good cursor."""
        rising = items if order == "asc" else items[::-1]
        assert await give(Page(1000, order)) == Listed(bodies(rising), False)
        ids = [item.id for item in rising]
        if len(set(ids)) < len(ids):
            return
        for start in range(0, len(rising) + 1, limit):
            after = ids[start - 1] if start else None
            expected = Listed(bodies(rising[start : start + limit]), len(rising) > start + limit)
            assert await give(Page(limit, order, after=after)) == expected

    async def check_everything(self) -> None:
        for owner in OWNERS:
            listed = await self.store.responses(owner, Page(1000, "asc"), None)
            mine = [node for node in self.living if node.owner == owner]
            assert [response.id for response in listed.rows] == [node.saved.id for node in mine if node.saved]
            await self.check_items(owner)
        for node in self.nodes:
            if node.is_living and node.saved:
                await self.check_response(node, 2, "asc")
            elif node.saved:
                assert await self.store.response(node.owner, node.saved.id) is None
        for name, (owner, nodes) in self.talks.items():
            await self.check_conversation(name, owner, nodes, 2, "desc")

    async def check_items(self, owner: str) -> None:
        """By id: those of living responses, and those that stand in a batch still.

        Whether the items of a deleted response that its conversation holds are found is left open.
        """
        mine = [node for node in self.nodes if node.owner == owner]
        found = {item.id for node in mine if node.is_living and node.saved for item in node.items}
        found |= {item.id for node in mine if not node.saved and self.held(node) for item in node.shown}
        open_ids = {item.id for node in mine if not node.is_living and self.held(node) for item in node.items} - found
        all_ids = {item.id for node in self.nodes for item in node.items} - open_ids
        assert set(await self.store.items(owner, sorted(all_ids))) == found

    def rows(self) -> dict[str, int]:
        return self.place.counts(TABLES)

    def check_rows(self) -> None:
        """The rows of a turn stay while it or a descendant lives, or its conversation does."""
        needed = {each for node in self.nodes if node.is_living or self.held(node) for each in node.line}
        assert self.rows()["turn"] == len(needed)

    def empty(self) -> None:
        """When everything is deleted, nothing is left."""
        for node in self.living:
            assert node.saved is not None
            self.run(self.store.delete_response(node.owner, node.saved.id, NOW))
        for name, (owner, _) in self.talks.items():
            self.run(self.store.delete_conversation(owner, name, NOW))
        self.run(self.store.purge(0, NOW))
        assert self.rows() == dict.fromkeys(TABLES, 0)

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        try:
            self.run(self.check_everything())
            self.check_rows()
            self.empty()
        finally:
            self.run(self.store.close())
            self.runner.close()
            self.place.close()


# Time enough to shrink what is found.
TestStoreModel = pytest.mark.timeout(360)(StoreMachine.TestCase)
TestStoreModel.settings = settings(
    max_examples=120,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)


class PostgresMachine(StoreMachine):
    Place = PostgresPlace


TestPostgresModel = pytest.mark.timeout(360)(PostgresMachine.TestCase)
TestPostgresModel.settings = settings(TestStoreModel.settings, max_examples=12)
