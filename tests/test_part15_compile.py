"""torch.compile in part 15: the same tokens, and what it refuses."""

import shutil
import subprocess
import sys

import pytest

from common.sampling import SamplingParams
from common.testing.parts import make_engine

TINY = "random:tiny-qwen3"
PROMPTS = [[5 + i, 7, 9 + 2 * i, 11] * (i + 1) for i in range(4)]
PARAMS = [
    SamplingParams(temperature=0.0 if i % 2 else 0.8, seed=i, max_tokens=12, ignore_eos=True)
    for i in range(4)
]

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")


def outputs(**flags: object) -> list[list[int]]:
    engine = make_engine(15, TINY, **flags)
    completions = engine.generate(PROMPTS, PARAMS, progress=False)
    if flags:
        assert "compile" in engine.runner.graphs.reason, "a recording would miss what is compiled"
    return [completion.token_ids for completion in completions]


@needs_compiler
@pytest.mark.parametrize(
    "flags",
    [
        {"compile": "layers", "kernels": "reference"},
        pytest.param({"compile": "ops"}, marks=pytest.mark.long),
    ],
    ids=lambda flags: flags["compile"],
)
def test_compiled_engines_give_the_same_tokens(flags: dict) -> None:
    assert outputs(**flags) == outputs()


def test_without_a_compiler_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError) as caught:
        make_engine(15, TINY, compile="ops")
    assert str(caught.value) == (
        "compile is ops: it needs a C++ compiler, and none of g++, c++, clang++ is here"
    )


@needs_compiler
@pytest.mark.parametrize(
    ("model", "flags", "why"),
    [
        (TINY, {}, "which kernels cpu and quantization do not keep"),
        (TINY, {"kernels": "reference", "quantization": "int8"}, "plain tensors"),
        ("random:tiny-qwen3-moe", {"kernels": "reference"}, "dense models on one rank"),
    ],
    ids=["panels", "quantised", "experts"],
)
def test_what_cannot_be_compiled_is_refused(model: str, flags: dict, why: str) -> None:
    with pytest.raises(ValueError, match=f"compile is layers: .*{why}"):
        make_engine(15, model, compile="layers", **flags)


def test_torchs_compiler_is_loaded_where_it_is_asked_for() -> None:
    """It takes longer than all else that a start imports, or stops a step that records, for 3 s."""
    code = (
        "import sys\n"
        "import part15.server\n"
        "from common.sampling import SamplingParams\n"
        "from common.testing.parts import make_engine\n"
        f"engine = make_engine(15, {TINY!r})\n"
        "engine.generate([[5, 7]], SamplingParams(max_tokens=9, ignore_eos=True), progress=False)\n"
        "print(engine.stats()['num_graph_replays'], 'torch._dynamo' in sys.modules)\n"
        "import torch._dynamo\n"
        "print('torch._dynamo' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["5", "False", "True"]
