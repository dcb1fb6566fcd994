"""Every part's command, given what it cannot do: one line on standard error, and a status.

A traceback tells a user that the program is broken. What is wrong here is the command.
"""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from common.http.run import ServerConfig
from common.testing.parts import PARTS, ROOT, existing_parts, folder_of, http_parts, module_of
from common.testing.server import RunningServer

TINY = ("--model", "random:tiny-llama")


@pytest.fixture(params=http_parts(), ids=lambda part: f"part{part:02d}")
def part(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """`serve` sets a handler of SIGTERM; the test process gets its own back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def run(part: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a part's `main` in this process; returns its status and standard error."""

    def run_main(*args: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["server", "--port", "0", *args])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            module_of(part, "server").main()
        output = capsys.readouterr()
        assert "Ready" not in output.out
        code = ended.value.code
        if isinstance(code, str):  # the interpreter prints it and exits with 1
            return 1, output.err + code + "\n"
        return int(code or 0), output.err

    return run_main


def check_one_line(error: str, *words: str) -> None:
    assert error.endswith("\n") and len(error.splitlines()) == 1, error
    assert "Traceback" not in error
    for word in words:
        assert word in error, f"{word!r} is not in {error!r}"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--nosuchflag"], ["--nosuchflag"]),
        (["nosuchargument"], ["nosuchargument"]),
        (["--mod", "x"], ["--mod"]),  # no abbreviations: a later flag could change their meaning
        (["--model"], ["--model"]),
        (["--port", "x"], ["--port", "'x'"]),
        (["--port", "-1"], ["--port", "-1"]),
        (["--port", "65536"], ["--port", "65536"]),
        (["--port", "9" * 5000], ["--port"]),
        (["--port", "1.5"], ["--port"]),
        (["--dtype", "int8"], ["--dtype", "int8", "float32"]),
        (["--dtype", "fl\nat"], ["--dtype"]),
        (["--max-model-len", "1"], ["--max-model-len", "at least 2"]),
        (["--max-model-len", "-5"], ["--max-model-len"]),
        (["--threads", "0"], ["--threads"]),
        (["--threads", "1000000"], ["--threads"]),
        (["--seed", "x"], ["--seed"]),
        (["--seed", "0.5"], ["--seed"]),
        (["--api-key", ""], ["--api-key", "empty"]),
        (["--api-key", "  "], ["--api-key", "empty"]),
        (["--api-key", "a b"], ["--api-key", "ASCII"]),
        (["--host", ""], ["--host", "empty"]),
        (["--host", "a\nb"], ["--host"]),
        (["--max-waiting", "-1"], ["--max-waiting"]),
        (["--max-body-size", "0"], ["--max-body-size"]),
        (["--shutdown-timeout", "-1"], ["--shutdown-timeout"]),
        (["--kv-cache=yes"], ["--kv-cache"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_wrong_flags(run: Any, args: list[str], words: list[str]) -> None:
    status, error = run(*args)
    assert status == 2
    check_one_line(error, *words)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model", "nosuchmodel"], ["nosuchmodel", "smollm2-135m"]),
        (["--model", ""], ["no folder"]),
        (["--model", "a\nb"], ["no folder"]),
        (["--model", "random:nosuchpreset"], ["no such preset"]),
        (["--model", "/no/such/folder"], ["no folder"]),
        (["--model", "/etc/passwd"], ["is a file"]),
        (["--model", "model.gguf"], ["GGUF"]),
        (["--model", "/etc"], ["config.json"]),
        (["--model", "/" + "x" * 5000], []),
        ([*TINY, "--max-model-len", "1025"], ["max_model_len is 1025", "1024"]),
        ([*TINY, "--device", "tpu"], ["device", "tpu"]),
        ([*TINY, "--device", "cuda"], ["device", "0 GPUs"]),
        ([*TINY, "--device", "cuda:7"], ["device", "0 GPUs"]),
        ([*TINY, "--host", "203.0.113.1"], ["cannot listen on 203.0.113.1"]),
        ([*TINY, "--host", "no.such.host.invalid"], ["cannot listen on no.such.host.invalid"]),
        ([*TINY, "--host", "ä" * 100], ["cannot listen"]),
        ([*TINY, "--host", "::zz"], ["cannot listen"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_what_cannot_be_had(
    run: Any, args: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, error = run(*args)
    assert status == 1
    check_one_line(error, *words)


def test_a_port_in_use(run: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, error = run(*TINY, "--port", str(port))
    assert status == 1
    check_one_line(error, f"port {port}", "in use")


@pytest.mark.parametrize("key", ["", " "])
def test_an_empty_key_in_the_environment(
    run: Any, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deployment whose secret is missing must not come up open."""
    monkeypatch.setenv("ENGINE_API_KEY", key)
    status, error = run(*TINY)
    assert status == 2
    check_one_line(error, "api-key", "empty")


@pytest.mark.parametrize("part", PARTS)
def test_help_lists_every_field(
    part: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["server", "--help"])
    with pytest.raises(SystemExit) as ended:
        module_of(part, "server").main()
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for config_class in (module_of(part, "config").EngineConfig, ServerConfig):
        for field in dataclasses.fields(config_class):
            flag = "--" + field.name.replace("_", "-")
            if "help" not in field.metadata:  # what a proxy tells its workers is no flag
                assert f"{flag} " not in text, flag
                continue
            assert flag in text, flag
            assert " ".join(field.metadata["help"].split())[:30] in " ".join(text.split()), flag


# Each (module, folder) of its standard input is started as `python -m module` starts it in that folder,
# in a fork of one process that has imported what takes seconds.
AS_MODULES = """
import gc, json, os, runpy, sys
import common.http.app, common.http.page, common.kernels, common.http.run, torch

gc.freeze()
sys.path.remove("")
for module, folder in json.load(sys.stdin):
    print(json.dumps([module, folder]), file=sys.stderr, flush=True)
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        sys.path.insert(0, folder)
        sys.argv = [module, "--nosuchflag"]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        raise SystemExit(0)
    _, status = os.waitpid(child, 0)
    print(json.dumps([module, os.waitstatus_to_exitcode(status)]), flush=True)
"""


def test_the_folders_name_and_the_packages(tmp_path: Path) -> None:
    """`part01.server` from anywhere, `part01_simple_server.server` from the root."""
    starts = [(f"part{part:02d}.server", str(tmp_path)) for part in existing_parts()]
    starts += [(f"{folder_of(part).name}.server", str(ROOT)) for part in existing_parts()]
    command = [sys.executable, "-c", AS_MODULES]
    result = subprocess.run(
        command, input=json.dumps(starts), capture_output=True, text=True, cwd=tmp_path
    )
    ends = [json.loads(line) for line in result.stdout.splitlines()]
    assert ends == [[module, 2] for module, _ in starts], result.stderr
    said = result.stderr.splitlines(keepends=True)
    for start, begin, error in zip(starts, said[::2], said[1::2], strict=True):
        assert json.loads(begin) == list(start)
        check_one_line(error, start[0], "--nosuchflag")


def test_the_folders_name_starts_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    part = PARTS[-1]
    server = RunningServer(part, *TINY, "--threads", "1", module=f"{folder_of(part).name}.server")
    server.wait_until_ready()
    try:
        assert httpx.get(server.base_url + "/health").json() == {"status": "ok"}
    finally:
        assert server.stop() == 0
    # Ready in one line, and nothing else in a life without incident.
    assert len(server.output.splitlines()) == 1, server.output


def test_a_key_is_asked_for_beyond_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one the server says who can use it."""
    part = PARTS[-1]
    server = RunningServer(part, *TINY, "--threads", "1", "--host", "0.0.0.0")
    server.wait_until_ready()
    assert server.stop() == 0
    assert "Anyone who can reach this address can use it: see --api-key" in server.output


def test_a_model_by_its_module() -> None:
    """`python -m common.models` is what `make` runs to have the model there."""
    command = [sys.executable, "-m", "common.models", "random:nosuchpreset"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert (result.returncode, result.stdout) == (1, "")
    check_one_line(result.stderr, "no such preset")
