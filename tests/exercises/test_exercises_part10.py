"""Part 10's exercises: these fail until you do them. Run with `pytest -m exercise`."""

import collections
import json
from types import SimpleNamespace
from typing import Any

import pytest

from common.router.config import RouterConfig
from common.router.link import Status
from common.router.request import RoutedRequest
from common.testing.parts import module_of

pytestmark = pytest.mark.exercise


def replicas(count: int) -> list[Any]:
    made = []
    for index in range(count):
        one = module_of(10, "replicas").Replica(SimpleNamespace(index=index), RouterConfig())
        one.is_well, one.status = True, Status("m")
        made.append(one)
    return made


def request(**fields: Any) -> RoutedRequest:
    return RoutedRequest("POST", "/v1/chat/completions", [], json.dumps(fields).encode())


def test_power_of_two_takes_the_less_loaded_of_two() -> None:
    policy = module_of(10, "policies").POLICIES["power-of-two"](RouterConfig())
    some = replicas(4)
    some[0].status = Status(running=9)
    chosen = collections.Counter(policy.choose(request(), some).index for _ in range(3000))
    assert chosen[0] == 0, "the busiest is the less loaded of no two"
    assert all(800 < chosen[index] < 1200 for index in (1, 2, 3)), chosen
    some[1].status, some[2].status = Status(running=3), Status(running=6)
    chosen = collections.Counter(policy.choose(request(), some).index for _ in range(3000))
    assert chosen[3] > chosen[1] > chosen[2] > 0, "not only the least loaded of all"
    assert policy.choose(request(), some[:1]) is some[0]


def test_answers_are_known_too() -> None:
    policy = module_of(10, "policies").CacheAware(RouterConfig())
    some = replicas(2)
    question = {"role": "user", "content": "Tell me of the sea. " * 10}
    first = policy.choose(request(messages=[question]), some)
    answer = "It is wide and it is deep. " * 40
    policy.learn(request(messages=[question]), first, answer)
    turns = [question, {"role": "assistant", "content": answer}, {"role": "user", "content": "?"}]
    before = policy.num_matched
    assert policy.choose(request(messages=turns), some) is first
    assert policy.num_matched - before >= len(answer) // 64


def test_a_replica_of_four_times_the_capacity_gets_four_times_the_requests() -> None:
    least_pending = module_of(10, "policies").least_pending
    config = RouterConfig(replica=("http://big:8000=4", "http://small:8000"))
    assert config.replica[0] == "http://big:8000" and config.weights == (4.0, 1.0)
    some = replicas(2)
    some[0].weight, some[1].weight = config.weights
    for _ in range(50):
        least_pending(some).outstanding += 1
    assert [one.outstanding for one in some] == [40, 10]
