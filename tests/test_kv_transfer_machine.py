"""`common.kv_transfer` as a state machine: a sender and two receivers do what hypothesis thinks of, against
a model of what must become of each transfer.

Blocks that the sender has been told are released are overwritten at once, as are blocks of ours when their
transfer has ended: what is read or written too late shows.
"""

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from common.kv_transfer import Fetched, PrefillRequest, Receiver, Sender, allocate_shared
from common.testing.kv_worker import SECRET

LAYERS = 3
SHAPE = (40, LAYERS, 2, 2, 1, 16)
POISON = -1.0


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it has not happened"
        time.sleep(0.0005)


@dataclass
class Model:
    """What one transfer is to be."""

    name: str
    receiver: int
    num_blocks: int
    theirs: list[int]  # the sender's blocks, in the end
    final: list[int]  # per layer: leading blocks that are
    first: int = 0
    ours: list[int] | None = None
    computed: int | None = None
    can_fail: bool = False  # something has happened that may end it
    asked: bool = False  # the engine has heard of it
    cancelled: bool = False
    released: bool = False
    ended: Fetched | None = None

    @property
    def is_live(self) -> bool:
        """For the sender's engine."""
        return self.asked and not self.released


class Transfers(RuleBasedStateMachine):
    @initialize(transport=st.sampled_from(["shm", "tcp"]))
    def start(self, transport: str) -> None:
        shared = transport == "shm"
        self.source = allocate_shared(SHAPE, torch.float32) if shared else torch.zeros(SHAPE)
        self.source.fill_(POISON)
        self.targets = [torch.full(SHAPE, POISON) for _ in range(2)]
        self.models: dict[str, Model] = {}
        self.free = list(range(SHAPE[0]))
        self.free_ours = [list(range(SHAPE[0])) for _ in range(2)]
        known: dict[str, Any] = {"fingerprint": {}, "secret": SECRET}
        told = {"on_prefill": self.on_prefill, "on_cancel": self.on_cancel}
        self.sender = Sender([self.source], transport=transport, lease=100.0, **known, **told)
        self.receivers = [Receiver([t], timeout=100.0, **known) for t in self.targets]

    def on_prefill(self, request: PrefillRequest) -> None:
        model = self.models[request.transfer_id]
        assert not model.asked and request.num_blocks == model.num_blocks
        assert request.token_ids == [model.num_blocks] and request.cache_salt == model.name
        model.asked = True

    def on_cancel(self, name: str) -> None:
        assert not self.models[name].cancelled
        self.models[name].cancelled = True

    def value(self, model: Model, i: int, layer: int) -> float:
        """What the transfer's block i holds in a layer."""
        return float(1000 * int(model.name) + LAYERS * i + layer)

    def pick(self, draw: int, live: Callable[[Model], bool]) -> Model | None:
        found = [model for model in self.models.values() if live(model)]
        return found[draw % len(found)] if found else None

    @rule(receiver=st.integers(0, 1), num_blocks=st.integers(1, 4), waits=st.booleans())
    def request(self, receiver: int, num_blocks: int, waits: bool) -> None:
        # Not a precondition: which transfers have ended is a matter of time.
        if len(self.free) < num_blocks or sum(m.ended is None for m in self.models.values()) >= 5:
            return
        theirs = [self.free.pop() for _ in range(num_blocks)]
        name = str(len(self.models))
        model = Model(name, receiver, num_blocks, theirs, [0] * LAYERS)
        self.models[name] = model
        place = self.sender.address, name, [num_blocks], name, num_blocks
        self.receivers[receiver].request(*place)
        if waits:
            until(lambda: model.asked)

    @rule(draw=st.integers(0, 9), layer=st.integers(0, LAYERS - 1), more=st.integers(1, 4))
    def ready(self, draw: int, layer: int, more: int) -> None:
        model = self.pick(draw, lambda m: m.is_live and m.computed is None)
        if model is None:
            return
        count = min(model.num_blocks, model.final[layer] + more)
        for i in range(model.final[layer], count):
            self.source[model.theirs[i], layer] = self.value(model, i, layer)
        model.final[layer] = max(count, model.final[layer])
        known = max(model.final)
        self.sender.ready(model.name, model.theirs[:known], layer, count)

    @rule(draw=st.integers(0, 9), short=st.integers(0, 3))
    def finish(self, draw: int, short: int) -> None:
        """All layers become final up to some block, and the prompt is done."""
        model = self.pick(draw, lambda m: m.is_live and m.computed is None)
        if model is None:
            return
        count = max(max(model.final), model.num_blocks - short)
        for layer in range(LAYERS):
            for i in range(model.final[layer], count):
                self.source[model.theirs[i], layer] = self.value(model, i, layer)
            model.final[layer] = count
            self.sender.ready(model.name, model.theirs[:count], layer, count)
        model.computed = count
        self.sender.finish(model.name, count)

    @rule(draw=st.integers(0, 9), first=st.integers(0, 3), count=st.integers(0, 4))
    def fetch(self, draw: int, first: int, count: int) -> None:
        model = self.pick(draw, lambda m: m.ended is None and m.ours is None)
        if model is None:
            return
        model.first = first % model.num_blocks
        count = min(count, model.num_blocks - model.first)
        free = self.free_ours[model.receiver]
        if len(free) >= count:
            model.ours = [free.pop() for _ in range(count)]
            self.receivers[model.receiver].fetch(model.name, model.first, model.ours)

    @rule(kind=st.sampled_from(["cancel", "fail", "move", "expire", "cut"]), draw=st.integers(0, 9))
    def trouble(self, kind: str, draw: int) -> None:
        if kind in ("fail", "move"):
            self.fail(draw, kind == "move")
        else:
            getattr(self, kind)(draw)

    def cancel(self, draw: int) -> None:
        model = self.pick(draw, lambda m: m.ended is None)
        if model is not None:
            model.can_fail = True
            self.receivers[model.receiver].cancel(model.name)

    def fail(self, draw: int, moved: bool) -> None:
        model = self.pick(draw, lambda m: m.is_live)
        if model is not None:
            model.can_fail = True
            if moved and model.computed is None and max(model.final) > 0:
                self.sender.ready(model.name, [39 - model.theirs[0]] * 4, 0, 1)
            else:
                self.sender.fail(model.name, "as told")

    def expire(self, draw: int) -> None:
        model = self.pick(draw, lambda m: m.is_live and m.computed is not None)
        transfer = self.sender._ledger._transfers.get(model.name) if model else None
        if model is not None and transfer is not None:
            model.can_fail = True
            transfer.deadline = 0.0
            self.sender._loop.wake()

    def cut(self, draw: int) -> None:
        """A connection is lost, with whatever is on it."""
        connections = sorted(self.sender._connections, key=id)
        if connections and draw < 4:
            for model in self.models.values():
                model.can_fail = model.can_fail or model.ended is None
            connections[draw % len(connections)].socket.shutdown(socket.SHUT_RDWR)

    @rule(draw=st.integers(0, 9), first=st.integers(0, 3), count=st.integers(1, 4))
    def go_on(self, draw: int, first: int, count: int) -> None:
        """Steps of what each transfer does in the end."""
        if sum(m.ended is None for m in self.models.values()) < 3:
            self.request(draw % 2, 1 + first, True)
        self.fetch(draw, first, count)
        self.ready(draw, draw % LAYERS, count)
        self.finish(draw, first // 2)

    @rule()
    def settle(self) -> None:
        """All that can end does."""
        for model in self.models.values():
            if not model.can_fail and model.computed is not None and model.ours is not None:
                until(lambda m=model: self.look() or m.ended is not None)

    @invariant()
    def look(self) -> None:
        """Take what has ended, and give its blocks away."""
        if not hasattr(self, "sender"):
            return
        for name in self.sender.released():
            model = self.models[name]
            assert model.is_live
            model.released = True
            self.source[model.theirs] = POISON
            self.free += model.theirs
        for number, receiver in enumerate(self.receivers):
            for fetched in receiver.finished():
                assert self.models[fetched.transfer_id].receiver == number
                self.end(self.models[fetched.transfer_id], fetched)
            assert bool((self.targets[number][self.free_ours[number]] == POISON).all())

    def end(self, model: Model, fetched: Fetched) -> None:
        assert model.ended is None
        model.ended = fetched
        if fetched.error is not None:
            assert model.can_fail, fetched.error
            assert fetched.num_blocks == 0
        else:
            assert model.computed is not None and model.ours is not None
            assert fetched.num_blocks == max(0, min(model.computed - model.first, len(model.ours)))
            for i, block in enumerate(model.ours[: fetched.num_blocks]):
                for layer in range(LAYERS):
                    expected = self.value(model, model.first + i, layer)
                    assert bool((self.targets[model.receiver][block, layer] == expected).all())
        if model.ours is not None:
            self.targets[model.receiver][model.ours] = POISON
            self.free_ours[model.receiver] += model.ours

    def teardown(self) -> None:
        if not hasattr(self, "sender"):
            return
        self.settle()
        for model in self.models.values():
            if model.ended is None:
                model.can_fail = True
                self.receivers[model.receiver].cancel(model.name)
        until(lambda: self.look() or all(m.ended for m in self.models.values()))
        until(lambda: self.look() or not any(m.is_live for m in self.models.values()))
        for model in self.models.values():
            assert model.can_fail or not model.cancelled
        assert sorted(self.free) == list(range(SHAPE[0])) or any(
            not m.asked for m in self.models.values()
        )
        assert self.sender.stats()["transfers"] == 0
        for end in (*self.receivers, self.sender):
            end.close()


Transfers.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestTransfers = Transfers.TestCase


@pytest.mark.long
class TestTransfersLong(Transfers.TestCase):
    settings = settings(Transfers.TestCase.settings, max_examples=300, stateful_step_count=60)
