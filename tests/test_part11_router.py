"""Engines that share their experts, behind a router: started together, and again together."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

from common.http.run import ServerConfig
from common.router.config import RouterConfig
from common.router.launchers import JointLauncher, make_launcher
from common.sampling import SamplingParams
from common.testing.parts import engine_of, module_of
from common.testing.server import RunningServer

MODEL = "random:tiny-qwen3-moe"
BODY = {"model": MODEL, "prompt": [5, 6, 7, 8], "max_tokens": 8, "temperature": 0, "logprobs": 0}
EngineConfig = module_of(11, "config").EngineConfig


@pytest.fixture(scope="module")
def router() -> Iterator[RunningServer]:
    flags = ["--model", MODEL, "--dp", "2", "--enable-expert-parallel", "--num-blocks", "64"]
    flags += ["--ep-backend", "all_to_all", "--policy", "round-robin"]
    server = RunningServer(11, *flags, module="part11.router")
    server.wait_until_ready()
    yield server
    server.stop()


def answer(router: RunningServer) -> tuple[str, list[str]]:
    """The engine that answers, and its tokens."""
    response = httpx.post(f"{router.base_url}/v1/completions", json=BODY, timeout=60)
    if response.status_code >= 400:
        raise httpx.HTTPError(f"{response.status_code}: {response.text}; {router.output}")
    return response.headers["x-engine"], response.json()["choices"][0]["logprobs"]["tokens"]


def engines(router: RunningServer) -> list[psutil.Process]:
    children = psutil.Process(router.process.pid).children(recursive=True)
    return [child for child in children if "part11.replicas" in child.cmdline()]


def test_two_engines_answer_as_one_does_and_come_back_together(router: RunningServer) -> None:
    alone = engine_of(11, MODEL, threads=1, num_blocks=64)
    [completion] = alone.generate(
        [BODY["prompt"]], SamplingParams(temperature=0.0, max_tokens=8), progress=False
    )
    answers = dict(answer(router) for _ in range(4))
    assert set(answers) == {"0", "1"}
    expected = [f"token_id:{token_id}" for token_id in completion.token_ids]
    assert all(tokens == expected for tokens in answers.values())

    before = engines(router)
    before[0].kill()
    again: dict[str, list[str]] = {}
    deadline = time.monotonic() + 100
    while set(again) != {"0", "1"} and time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            again |= [answer(router)]
        time.sleep(0.2)
    assert again == answers
    after = engines(router)
    assert len(after) == 2 and not {p.pid for p in before} & {p.pid for p in after}


@pytest.mark.parametrize(
    ("engine", "router", "words"),
    [
        ({"data_parallel_address": "x"}, {}, "data_parallel_address is chosen by the router"),
        ({}, {"max_replicas": 3}, "max_replicas: engines that share their experts"),
        ({}, {"launcher": "ray"}, "launcher is ray: engines that share their experts"),
    ],
)
def test_what_shared_experts_cannot_do_is_refused(
    engine: dict[str, Any], router: dict[str, Any], words: str
) -> None:
    config = EngineConfig(model=MODEL, enable_expert_parallel=True, **engine)
    with pytest.raises(ValueError, match=words):
        make_launcher("part11.replicas", config, RouterConfig(**router), ServerConfig())


def test_each_start_together_has_a_new_place() -> None:
    config = EngineConfig(model=MODEL, enable_expert_parallel=True)
    launcher = make_launcher("m", config, RouterConfig(data_parallel_size=3), ServerConfig())
    assert isinstance(launcher, JointLauncher)

    def job(index: int) -> tuple[int, int, str]:
        engine = launcher.job_of(index)["engine"]
        names = "data_parallel_size", "data_parallel_rank", "data_parallel_address"
        return tuple(engine[name] for name in names)

    first = [job(i) for i in range(3)]
    assert [j[:2] for j in first] == [(3, 0), (3, 1), (3, 2)] and len({j[2] for j in first}) == 1
    second = [job(i) for i in (1, 0, 2)]
    assert [j[1] for j in second] == [1, 0, 2] and len({j[2] for j in second}) == 1
    assert first[0][2] != second[0][2]
    launcher.close()
