"""One suite over all parts: what an engine says is what transformers would say, in every part."""

import random
import subprocess
import sys
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from common.completions import Completion
from common.sampling import SamplingParams
from common.testing.oracle import check_greedy, check_seeded
from common.testing.parts import PARTS, distinct_files, engine_of, short_form


def over_parts(*short: int) -> pytest.MarkDecorator:
    """For each part; in the short form for the latest and `short` only, where any are given. All tests of
    a part run in a row: the engines of two parts need not be there at once."""
    return pytest.mark.parametrize("part", short_form(PARTS, short or PARTS), scope="module")


every_part = over_parts()

EMBEDDED = "smollm2-135m"
TINY = ["random:tiny-llama", "random:tiny-qwen3"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)

CHATS = [
    [{"role": "user", "content": "Hi!"}],
    [{"role": "user", "content": "What is the capital of France? Answer in one word."}],
    [
        {"role": "system", "content": "You are a pirate."},
        {"role": "user", "content": "Introduce yourself."},
    ],
    [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Hello Ada!"},
        {"role": "user", "content": "What is my name?"},
    ],
    [{"role": "user", "content": "Translate to French: 'The cat sleeps.'"}],
    [{"role": "user", "content": "写一首关于猫的短诗。"}],
    [{"role": "user", "content": "def fib(n):  # complete this function"}],
]
TEXTS = [
    "The",
    "Once upon a time",
    "def quicksort(array):\n    ",
    "1, 1, 2, 3, 5, 8, 13, 21,",
    "Il était une fois, dans un pays lointain,",
    '{"name": "Ada", "born": 18',
    "😀 👨‍👩‍👧 means",
    "   \n\n\t  indented",
    "The capital of Germany is Berlin. The capital of Spain is",
    "A  1 B  2 C  3",
]
LENGTHS = [1, 300, 700]  # tokens, of repeated prose


def embedded_prompts(tokenizer: Any) -> list[list[int]]:
    """20 prompts: chats, raw texts, and lengths from 1 to 700 tokens."""
    prompts = [tokenizer.encode_chat(messages) for messages in CHATS]
    prompts += [tokenizer.encode(text) for text in TEXTS]
    prose = tokenizer.encode(
        "The quick brown fox jumps over the lazy dog near the river bank. " * 60
    )
    prompts += [prose[:length] for length in LENGTHS]
    assert len(prompts) == 20
    assert {len(prompts[-3]), len(prompts[-1])} == {1, 700}
    return prompts


def random_prompts(count: int, seed: int = 0, longest: int = 60) -> list[list[int]]:
    """Token ids for the tiny models; the first prompt has one token."""
    generator = random.Random(seed)
    lengths = [1, *(generator.randint(2, longest) for _ in range(count - 1))]
    return [[generator.randrange(2, 512) for _ in range(length)] for length in lengths]


def token_ids(completions: list[Completion]) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


def check_embedded(part: int, places: slice) -> None:
    """Hold the embedded model's outputs for some of the 20 prompts against the oracle."""
    engine = engine_of(part, EMBEDDED)
    prompts = embedded_prompts(engine.tokenizer)[places]
    outputs = token_ids(engine.generate(prompts, replace(GREEDY, max_tokens=10), progress=False))
    verdict = check_greedy(EMBEDDED, list(zip(prompts, outputs, strict=True)))
    assert verdict.num_tokens == 10 * len(prompts)
    assert verdict.is_right, verdict


@every_part
def test_greedy_is_transformers(part: int) -> None:
    """The embedded model with three chats, three texts, and a prompt of 300 tokens."""
    check_embedded(part, slice(0, 20, 3))


@over_parts(3)
def test_greedy_is_transformers_for_all_prompts(part: int) -> None:
    """The other 13, of 1 to 700 tokens. In the short form where `model.py` begins, and in the latest."""
    check_embedded(part, slice(1, 20, 3))
    check_embedded(part, slice(2, 20, 3))


@every_part
@pytest.mark.parametrize("model", TINY)
def test_greedy_is_transformers_tiny(part: int, model: str) -> None:
    """Tiny random models, whose tokens vary; with the context damaged, the oracle objects."""
    prompts = random_prompts(8)
    outputs = token_ids(engine_of(part, model).generate(prompts, GREEDY, progress=False))
    pairs = list(zip(prompts, outputs, strict=True))
    verdict = check_greedy(model, pairs)
    assert verdict.num_tokens == 240
    assert verdict.is_right, verdict
    long_pairs = [pair for pair in pairs if len(pair[0]) > 1]
    assert not check_greedy(model, long_pairs, "cut").is_right
    assert not check_greedy(model, long_pairs, "shift").is_right


SAMPLED = [
    SamplingParams(seed=1),
    SamplingParams(seed=2, temperature=0.5, top_p=0.9),
    SamplingParams(seed=3, top_k=5),
    SamplingParams(seed=-4, temperature=1.5, min_p=0.05),
    SamplingParams(seed=2**64 - 1, top_k=50, top_p=0.8, temperature=0.8),
    SamplingParams(seed=6, presence_penalty=0.5, frequency_penalty=0.5),
    SamplingParams(seed=7, temperature=2.0, top_p=0.99),
]


@every_part
@pytest.mark.parametrize("model", TINY)
def test_seeded_is_the_reference_plus_noise(part: int, model: str) -> None:
    """Seeded outputs by the oracle, and the same in every part, alone and among others."""
    check_seeded_outputs(part, model, 24)


@over_parts(*distinct_files("sampler.py"))
def test_seeded_with_a_large_vocabulary(part: int) -> None:
    """The same with the embedded model. In the short form where the sampler is another."""
    check_seeded_outputs(part, EMBEDDED, 8)


def check_seeded_outputs(part: int, model: str, max_tokens: int) -> None:
    prompts = random_prompts(len(SAMPLED), seed=5)
    params = [replace(p, max_tokens=max_tokens, ignore_eos=True) for p in SAMPLED]
    outputs = seeded_outputs(part, model, max_tokens)
    verdict = check_seeded(model, list(zip(prompts, outputs, params, strict=True)))
    assert verdict.num_tokens == max_tokens * len(SAMPLED)
    assert verdict.is_right, verdict
    assert outputs == seeded_outputs(PARTS[0], model, max_tokens)
    alone = engine_of(part, model).generate([prompts[4]], params[4], progress=False)
    assert token_ids(alone) == [outputs[4]]


@cache
def seeded_outputs(part: int, model: str, max_tokens: int) -> list[list[int]]:
    """What a part gives for one request of each kind in SAMPLED. Kept: all are held against part 01."""
    prompts = random_prompts(len(SAMPLED), seed=5)
    params = [replace(p, max_tokens=max_tokens, ignore_eos=True) for p in SAMPLED]
    return token_ids(engine_of(part, model).generate(prompts, params, progress=False))


RESTART = """
import sys, json
from common.sampling import SamplingParams
from part{part:02d}.config import EngineConfig
from part{part:02d}.engine import LLMEngine
engine = LLMEngine(EngineConfig(model="random:tiny-llama", threads=1))
params = SamplingParams(temperature=0.9, seed=11, max_tokens=20, ignore_eos=True)
print(json.dumps(engine.generate([[5, 6, 7]], params, progress=False)[0].token_ids))
"""


@over_parts(PARTS[-1])
def test_seeded_repeats_after_a_restart(part: int) -> None:
    """In the short form in the latest part: seeds agree across the parts."""
    result = subprocess.run(
        [sys.executable, "-c", RESTART.format(part=part)],
        capture_output=True,
        text=True,
        check=True,
    )
    params = SamplingParams(temperature=0.9, seed=11, max_tokens=20, ignore_eos=True)
    here = engine_of(part, TINY[0]).generate([[5, 6, 7]], params, progress=False)
    assert result.stdout.strip() == str(here[0].token_ids)


@every_part
def test_engine_seed_makes_unseeded_requests_repeat(part: int) -> None:
    """Two engines with one `seed` agree on requests that bring none; without it they differ."""
    from common.testing.parts import module_of

    config, engine_class = (
        module_of(part, "config").EngineConfig,
        module_of(part, "engine").LLMEngine,
    )
    params = SamplingParams(temperature=1.5, max_tokens=12, ignore_eos=True)

    def run(**fields: Any) -> list[list[int]]:
        engine = engine_class(config(model=TINY[0], **fields))
        return token_ids(engine.generate([[9, 8, 7]] * 2, params, progress=False))

    first = run(seed=5)
    assert first == run(seed=5)
    assert first[0] != first[1], "two requests of one engine have seeds of their own"
    assert run() != run()


@every_part
def test_finish_reasons(part: int) -> None:
    """EOS, stop tokens, max_tokens and the context's end, each at its token."""
    engine = engine_of(part, TINY[0])
    prompt = [3, 4, 5]

    def run(**fields: Any) -> Completion:
        params = SamplingParams(**{"temperature": 0.0, "ignore_eos": True, **fields})
        return engine.generate([prompt], params, progress=False)[0]

    free = run(max_tokens=20)
    assert (free.finish_reason, len(free.token_ids)) == ("length", 20)
    assert (free.num_prompt_tokens, free.num_completion_tokens) == (3, 20)
    stop = free.token_ids[7]
    stopped = run(max_tokens=20, stop_token_ids=[stop])
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]
    assert run(max_tokens=1).token_ids == free.token_ids[:1]
    prompt = prompt * 330
    to_the_end = run(max_tokens=None)
    assert to_the_end.finish_reason == "length"
    assert len(prompt) + len(to_the_end.token_ids) == engine.max_model_len == 1024


@every_part
def test_eos_ends_unless_ignored(part: int) -> None:
    """The tiny model's EOS is token 1; sampled at a high temperature it comes up soon."""
    engine = engine_of(part, TINY[0])
    params = SamplingParams(temperature=5.0, seed=0, max_tokens=900)
    ended = engine.generate([[3, 4, 5]], params, progress=False)[0]
    assert ended.finish_reason == "stop"
    assert ended.token_ids[-1] == 1 and 1 not in ended.token_ids[:-1]
    going = replace(params, ignore_eos=True, max_tokens=len(ended.token_ids) + 5)
    longer = engine.generate([[3, 4, 5]], going, progress=False)[0]
    assert longer.finish_reason == "length"
    assert longer.token_ids[: len(ended.token_ids)] == ended.token_ids


@every_part
def test_stop_strings_end_the_request(part: int) -> None:
    """The text is cut before the stop string, and usage ends at the token that completed it."""
    engine = engine_of(part, EMBEDDED)
    prompt = "The capital of France is"
    params = SamplingParams(temperature=0.0, max_tokens=12)
    free = engine.generate(prompt, params, progress=False)[0]
    words = free.text
    stop = words[6:11]  # crosses token borders
    cut = engine.generate(prompt, replace(params, stop=(stop,)), progress=False)[0]
    assert cut.text == words[: words.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)]
    assert len(cut.token_ids) < len(free.token_ids)


@every_part
def test_logprobs_are_the_references(part: int) -> None:
    from common.testing.oracle import reference_logits

    engine = engine_of(part, TINY[1])
    params = SamplingParams(temperature=0.7, seed=1, max_tokens=10, logprobs=4, ignore_eos=True)
    completion = engine.generate([[7, 8, 9, 10]], params, progress=False)[0]
    expected = reference_logits(TINY[1], [7, 8, 9, 10], completion.token_ids).log_softmax(-1)
    assert completion.logprobs is not None and len(completion.logprobs) == 10
    for place, item in enumerate(completion.logprobs):
        assert item.token_id == completion.token_ids[place]
        assert item.logprob == pytest.approx(expected[place, item.token_id].item(), abs=1e-3)
        values, _ = expected[place].topk(4)
        assert [v for _, v in item.top] == pytest.approx(values.tolist(), abs=1e-3)


@every_part
@pytest.mark.parametrize(
    ("prompts", "fields", "said"),
    [
        ([[1, 2], []], {}, r"prompts\[1\].*at least one token"),
        ([[1, 512]], {}, "512.*0 to 511"),
        ([[-1]], {}, "-1"),
        ([[2] * 1024], {}, "1024 tokens.*at most 1023"),
        ([[2] * 1000], {"max_tokens": 25}, "max_tokens is 25.*leaves 24"),
        ([[2]], {"stop_token_ids": [512]}, "stop_token_ids has 512"),
        (["text"], {}, "no tokenizer"),
    ],
)
def test_bad_prompts_are_refused_before_any_work(
    part: int, prompts: list, fields: dict[str, Any], said: str
) -> None:
    engine = engine_of(part, TINY[0])
    with pytest.raises(ValueError, match=said):
        engine.generate(prompts, SamplingParams(**fields), progress=False)
    assert len(engine.generate([[2]], GREEDY, progress=False)[0].token_ids) == 30


@every_part
def test_no_prompts_no_completions(part: int) -> None:
    assert engine_of(part, TINY[0]).generate([], GREEDY, progress=False) == []


@every_part
def test_progress_bar_goes_to_standard_error(part: int, capfd: pytest.CaptureFixture) -> None:
    engine_of(part, TINY[0]).generate([[2], [3]], replace(GREEDY, max_tokens=2))
    out, err = capfd.readouterr()
    assert "Completions" in err and "2/2" in err
    assert out == ""
