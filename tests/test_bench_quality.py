"""`bench quality`: its numbers against independent ones, its questions, its flags."""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from common.bench.__main__ import main
from common.bench.core.results import load_result
from common.bench.quality import run as quality
from common.bench.quality.probe import Probe, groups
from common.bench.quality.questions import Question, answers, load_questions
from common.bench.quality.score import Scores, first_difference, kl_divergence
from common.bench.quality.variants import known_variants, own_variant
from common.models.checkpoint import load_transformers_model
from common.testing.parts import make_engine

TINY = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
ENGINE = {"num_blocks": 64, "prefix_cache": "off", "max_num_seqs": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_json: str) -> Path:
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**TINY))
    path = tmp_path_factory.mktemp("models") / "tiny"
    network.save_pretrained(path)
    (path / "tokenizer.json").write_text(tokenizer_json)
    return path


def drawn(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(300, (length,), generator=generator).tolist() for length in lengths]


def test_logits_and_perplexity_are_those_of_transformers(folder: Path) -> None:
    network = load_transformers_model(folder, torch.float32)
    sequences = drawn(40, 17, 33, 1)
    engine = make_engine(14, str(folder), **ENGINE)
    try:
        probe, scores, loss, count = Probe(engine), Scores(), 0.0, 0
        lasts = list(probe.logits(sequences, last=True))
        for ids, ours, last in zip(sequences, probe.logits(sequences), lasts, strict=True):
            with torch.inference_mode():
                output = network(torch.tensor([ids]), labels=torch.tensor([ids]))
            theirs = output.logits[0]
            torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
            torch.testing.assert_close(last, theirs[-1:], atol=1e-3, rtol=0)
            scores.add(ours, ours.log_softmax(-1), torch.tensor(ids))
            if len(ids) > 1:
                loss, count = loss + output.loss.item() * (len(ids) - 1), count + len(ids) - 1
        assert scores.perplexity == pytest.approx(math.exp(loss / count), rel=1e-4)
        assert scores.mean_kl == 0 and scores.agreement == 100  # of a model with itself
        with pytest.raises(ValueError, match="num_blocks is 64"):
            probe.hidden(drawn(*[100] * 10))
    finally:
        engine.shutdown()


def test_divergence_and_differences() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    expected = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert kl_divergence(p.log(), q.log()).item() == pytest.approx(expected)
    scores = Scores()
    scores.add(q.log().repeat(2, 1) + 7, p.log().repeat(2, 1), torch.tensor([0, 1]))
    assert scores.mean_kl == pytest.approx(expected) and scores.agreement == 0
    assert scores.perplexity == pytest.approx(2)
    assert first_difference([1, 2, 3], [1, 2, 4]) == 2
    assert first_difference([1, 2, 3], [1, 2, 3]) == 3 and first_difference([9], [1, 2]) == 0
    assert list(groups([[1] * 3, [2] * 3, [3] * 9], 6)) == [[[1] * 3, [2] * 3], [[3] * 9]]


def test_answers_have_the_largest_likelihood(folder: Path) -> None:
    network = load_transformers_model(folder, torch.float32)

    def loglikelihood(prompt: list[int], choice: list[int]) -> float:
        ids = torch.tensor([prompt + choice])
        with torch.inference_mode():
            logprobs = network(ids).logits[0].log_softmax(-1)
        places = range(len(prompt) - 1, ids.shape[1] - 1)
        return sum(logprobs[i, ids[0, i + 1]].item() for i in places)

    def logits(sequences: list[list[int]]) -> Iterator[torch.Tensor]:
        assert len({tuple(one) for one in sequences}) == len(sequences)  # each is run once
        for one in sequences:
            with torch.inference_mode():
                yield network(torch.tensor([one])).logits[0, -1:]

    prompts = drawn(*[6] * 12)
    choices = [drawn(2, 2, 2, 2, seed=i) for i in range(12)]
    choices[0] = [[5, 6], [5, 7], [8, 9], [8]]  # some begin alike
    questions = [Question("choice", p, c, 0) for p, c in zip(prompts, choices, strict=True)]
    expected = []
    for question in questions:
        totals = [loglikelihood(question.prompt, choice) for choice in question.choices]
        expected.append(totals.index(max(totals)))
    assert answers(questions, logits) == expected and len(set(expected)) > 1
    assert quality.percent_right(questions, expected, "choice") == pytest.approx(
        100 * expected.count(0) / 12
    )
    assert quality.percent_right(questions, expected, "sum") is None


def test_the_shipped_questions() -> None:
    questions = load_questions(lambda text: list(text.encode()))
    assert len({bytes(q.prompt) for q in questions}) == len(questions) >= 100
    for kind in ("choice", "sum"):
        rights = [q.answer for q in questions if q.kind == kind]
        assert len(rights) >= 40 and all(rights.count(i) > len(rights) / 10 for i in range(4))
    for question in questions:
        if question.kind == "sum":
            first, sign, second, _ = bytes(question.prompt).decode().split()
            x, y = int(first), int(second)
            value = {"+": x + y, "-": x - y, "*": x * y}[sign]
            assert [int(bytes(c)) == value for c in question.choices].index(True) == question.answer


def test_broken_questions_are_named(tmp_path: Path) -> None:
    path = tmp_path / "questions.json"
    item: dict[str, Any] = {"kind": "choice", "prompt": "a", "choices": ["b", "b"], "answer": 0}
    path.write_text(json.dumps({"questions": [item]}))
    with pytest.raises(ValueError, match="item 0 has"):
        load_questions(lambda text: [1], path)


def test_one_run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("=== a\n" + "some words, and more of them. " * 20 + "\n=== b\nshort\n")
    out = tmp_path / "quality.json"
    flags = ["--model", str(folder), "--text", str(text), "--window", "64", "--json", str(out)]
    flags += ["--quick", "--tokens", "300", "--greedy", "12", "--set", "kernels=reference"]
    flags += ["--variants", "int8", "int4", "--add", "again:quantization=off"]
    assert main(["quality", *flags]) == 0
    rows = {row["variant"]: row for row in load_result(out)["rows"]}
    assert list(rows) == ["reference", "int8", "int4", "again"]
    for name in ("reference", "again"):
        assert rows[name]["kl"] == 0 and rows[name]["same"] == 100
        assert rows[name]["divergence"] == 4 and rows[name]["bits"] == 32
    assert 0 < rows["int8"]["kl"] < 0.2 * rows["int4"]["kl"]
    assert rows["int4"]["same"] < rows["int8"]["same"] < 100 or rows["int8"]["same"] == 100
    assert rows["int4"]["bits"] < rows["int8"]["bits"] < 32
    assert "| int4 |" in capsys.readouterr().out


def test_a_variant_that_fails_is_a_note(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "quality.json"
    text.write_text("some words, and more of them. " * 20)
    flags = ["--model", str(folder), "--text", str(text), "--window", "64", "--json", str(out)]
    flags += ["--quick", "--tokens", "64", "--greedy", "3", "--set", "kernels=reference"]
    assert main(["quality", *flags, "--variants", "int4-g64"]) == 1  # 96 inputs
    result = load_result(out)
    assert result["rows"][1]["kl"] is None and "int4-g64 failed" in result["notes"][1]


FLAGS = {
    "an unknown variant": (["--variants", "int3"], "variants: 'int3' is none of"),
    "an unknown setting": (["--add", "x:colour=red"], "variant x: 'colour' is no setting"),
    "a wrong value": (["--add", "x:quantization=int3"], "variant x: quantization"),
    "a part without formats": (["--part", "13"], "part 13 has no number formats"),
    "no text": (["--text", "nothing.txt"], "nothing.txt: No such file"),
    "a random model": (["--model", "random:tiny-llama"], "has no tokenizer"),
    "a window": (["--window", "999999"], "window is 999999"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_errors_are_one_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags, expected = FLAGS[case]
    assert main(["quality", *flags]) == 2
    captured = capsys.readouterr()
    assert expected in captured.err.splitlines()[-1] and captured.out == ""


def test_variants() -> None:
    known = known_variants(14)
    assert {"int8", "int4", "nf4", "kv-int8", "int8+int8"} <= known.keys()
    assert own_variant("a b:model=x/y,threads=2") == ("a b", {"model": "x/y", "threads": 2})
    with pytest.raises(argparse.ArgumentTypeError):
        own_variant("nothing")
