"""Clients that others wrote, against the newest part's server: LangChain, LiteLLM, lm-eval, GuideLLM.

The lock has none of them: `pip install langchain-openai litellm lm-eval guidellm`, and the long form
runs these tests. Where a package is absent its tests say so.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.models.checkpoint import resolve
from common.models.tokenizer import Tokenizer
from common.testing.oracle import reference_logits
from common.testing.parts import existing_parts
from common.testing.server import running_server

pytestmark = pytest.mark.long

MODEL = "smollm2-135m"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_server(existing_parts()[-1], "--model", MODEL) as url:
        yield f"{url}/v1"


# LangChain.


@pytest.fixture
def chat(url: str) -> Any:
    module = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    options = {"base_url": url, "api_key": "none", "temperature": 0, "max_tokens": 12}
    return module.ChatOpenAI(model=MODEL, stream_usage=True, **options)


def test_langchain_chat(chat: Any) -> None:
    """One answer, a stream with its usage, several at once, and what the other options give."""
    question = QUESTION[0]["content"]
    whole = chat.invoke(question)
    assert "Paris" in whole.content and whole.usage_metadata["input_tokens"] == 37
    chunks = list(chat.stream(question))
    assert "".join(chunk.content for chunk in chunks) == whole.content
    assert sum((c.usage_metadata or {}).get("input_tokens", 0) for c in chunks) == 37
    assert [m.content for m in chat.batch([question] * 2)] == [whole.content] * 2
    parts = [("system", "Be brief."), ("human", [{"type": "text", "text": question}])]
    assert chat.invoke(parts).content
    logged = chat.bind(logprobs=True, top_logprobs=2).invoke(question)
    assert len(logged.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2
    more = chat.bind(temperature=0.8, seed=3, top_p=0.9, stop=["."], extra_body={"top_k": 20})
    assert more.invoke(question).content == more.invoke(question).content


WEATHER = {
    "title": "get_weather",
    "description": "The weather in a city.",
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("method", ["function_calling", "json_schema"])
def test_langchain_structured_output(chat: Any, method: str) -> None:
    """As a tool that must be called, and as a response_format."""
    model = chat.model_copy(update={"max_tokens": 80})
    structured = model.with_structured_output(WEATHER, method=method)
    answer = structured.invoke("Will it rain in Paris for the next 3 days?")
    assert answer.keys() == {"city", "days"} and isinstance(answer["days"], int)


def test_langchain_tools(chat: Any) -> None:
    """Whole and streamed; the call and its result go back into the conversation."""
    once = {"tool_choice": "any", "parallel_tool_calls": False}
    model = chat.model_copy(update={"max_tokens": 80}).bind_tools([WEATHER], **once)
    asked: list[Any] = [("human", "Will it rain in Paris for the next 3 days?")]
    whole = model.invoke(asked)
    [call] = whole.tool_calls
    assert call["name"] == "get_weather" and call["args"].keys() == {"city", "days"}
    streamed = None
    for chunk in model.stream(asked):
        streamed = chunk if streamed is None else streamed + chunk
    assert [c["args"] for c in streamed.tool_calls] == [call["args"]]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "Rain."}
    assert chat.invoke([*asked, whole, result]).content


def test_langchain_completions(url: str) -> None:
    module = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    model = module.OpenAI(model=MODEL, base_url=url, api_key="none", temperature=0, max_tokens=6)
    whole = model.invoke("The capital of France is")
    assert whole.startswith(" Paris")
    assert "".join(model.stream("The capital of France is")) == whole
    assert model.batch(["The capital of France is", "1, 2, 3,"])[0] == whole


# LiteLLM.


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_litellm(url: str, provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it is not fetched
    litellm = pytest.importorskip("litellm", reason="litellm is not installed")
    kwargs = {"model": f"{provider}/{MODEL}", "api_base": url, "api_key": "none"}
    kwargs |= {"messages": QUESTION, "temperature": 0, "max_tokens": 12}
    whole = litellm.completion(**kwargs)
    assert "Paris" in whole.choices[0].message.content and whole.usage.prompt_tokens == 37
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(litellm.completion(**kwargs, **options))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    several = {"temperature": 0.7, "n": 2, "seed": 2, "top_p": 0.9, "stop": ["."], "user": "ada"}
    assert len(litellm.completion(**kwargs | several).choices) == 2
    with pytest.raises(litellm.BadRequestError, match="temperature must be between"):
        litellm.completion(**kwargs | {"temperature": -1})
    with pytest.raises(litellm.NotFoundError, match="'gpt-4' does not exist"):
        litellm.completion(**kwargs | {"model": f"{provider}/gpt-4"})


def test_litellm_text(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm", reason="litellm is not installed")
    kwargs = {"model": f"text-completion-openai/{MODEL}", "api_base": url, "api_key": "none"}
    kwargs |= {"temperature": 0, "max_tokens": 4}
    text = litellm.text_completion(prompt="The capital of France is", **kwargs).choices[0].text
    assert text.startswith(" Paris")
    ids = litellm.text_completion(prompt=[[504, 3575, 282, 4649, 314]], **kwargs)
    assert ids.choices[0].text == text
    echoed = litellm.text_completion(prompt="The capital", echo=True, logprobs=1, **kwargs)
    assert echoed.choices[0].logprobs.token_logprobs[0] is None


# lm-eval: log-likelihoods by `echo` and token ids.

PAIRS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is", " a banana"),
    ("1, 2, 3,", " 4, 5"),
]


@pytest.fixture
def evaluated(url: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    module = pytest.importorskip(
        "lm_eval.models.openai_completions", reason="lm-eval is not installed"
    )
    options = {"tokenizer": str(resolve(MODEL)), "tokenizer_backend": "huggingface"}
    return module.LocalCompletionsAPI(
        base_url=f"{url}/completions", model=MODEL, batch_size=2, max_length=512, **options
    )


def test_lm_eval_log_likelihoods_are_the_references(evaluated: Any) -> None:
    from lm_eval.api.instance import Instance

    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)]
    tokenizer = Tokenizer.load(resolve(MODEL))
    assert tokenizer is not None
    found = evaluated.loglikelihood(asked)
    for (context, continuation), (value, is_greedy) in zip(PAIRS, found, strict=True):
        prompt = tokenizer.encode(context)
        output = tokenizer.encode(context + continuation)[len(prompt) :]
        expected = reference_logits(MODEL, prompt, output).log_softmax(-1)
        values = [expected[place, token].item() for place, token in enumerate(output)]
        assert value == pytest.approx(sum(values), abs=1e-3)
        assert is_greedy == (expected.argmax(-1).tolist() == output)
    settings = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False, "temperature": 0}
    [text] = evaluated.generate_until([Instance("generate_until", {}, (PAIRS[0][0], settings), 0)])
    assert text == " Paris."


def test_lm_eval_runs_a_task(evaluated: Any, tmp_path: Path) -> None:
    """A task of one's own with two choices, from a local file."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    rows = [
        {"text": "The capital of France is", "choices": [" Paris", " banana"], "label": 0},
        {"text": "1, 2, 3,", "choices": [" apple", " 4"], "label": 1},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"task": "capitals", "dataset_path": "json", "output_type": "multiple_choice"}
    task |= {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}}
    task |= {"test_split": "test", "doc_to_text": "{{text}}", "doc_to_target": "label"}
    task |= {"doc_to_choice": "choices", "target_delimiter": "", "metric_list": [{"metric": "acc"}]}
    (tmp_path / "capitals.yaml").write_text(json.dumps(task))  # JSON is YAML
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    result = lm_eval.simple_evaluate(model=evaluated, tasks=["capitals"], task_manager=manager)
    assert result["results"]["capitals"]["acc,none"] == 1.0


# GuideLLM: a load generator.


def test_guidellm_measures_the_server(url: str, tmp_path: Path) -> None:
    """Three requests, one after the other; none fails, and each token is counted."""
    pytest.importorskip("guidellm", reason="guidellm is not installed")
    out = tmp_path / "out.json"
    options = {
        "backend": f"openai_http,target={url.removesuffix('/v1')}",
        "profile": "synchronous",
        "constraint": "max_requests,count=3",
        "data": "synthetic_text,prompt_tokens=24,output_tokens=8",
        "tokenizer": f"hf_auto,model={resolve(MODEL)}",
        "output": f"json,path={out}",
    }
    command = [sys.executable, "-m", "guidellm", "run", "--disable-progress"]
    command += [word for name, value in options.items() for word in (f"--{name}", f"kind={value}")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    [benchmark] = json.loads(out.read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert not requests["errored"] and len(requests["successful"]) == 3
