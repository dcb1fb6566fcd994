"""The oracle itself: it passes transformers' own outputs, and fails every kind of wrong one."""

import pytest
import torch

from common.models.checkpoint import resolve
from common.sampling import SamplingParams
from common.testing.oracle import check_greedy, check_seeded, kept_sets, reference_model

TINY = ["random:tiny-llama", "random:tiny-qwen3"]


@pytest.fixture(params=TINY)
def outputs(request: pytest.FixtureRequest) -> tuple[str, list[tuple[list[int], list[int]]]]:
    """transformers' own greedy outputs for some prompts."""
    model = reference_model(request.param)
    pairs = []
    for length in (2, 9, 40):
        prompt = torch.randint(2, 512, (length,), generator=torch.Generator().manual_seed(length))
        full = model.generate(
            prompt.unsqueeze(0), max_new_tokens=30, do_sample=False, eos_token_id=None
        )
        pairs.append((prompt.tolist(), full[0, length:].tolist()))
    return request.param, pairs


def test_passes_what_transformers_generates(outputs) -> None:
    name, pairs = outputs
    verdict = check_greedy(name, pairs)
    assert verdict.is_right, verdict
    assert verdict.num_tokens == 90


@pytest.mark.parametrize("damage", ["cut", "shift"])
def test_fails_a_damaged_context(outputs, damage: str) -> None:
    name, pairs = outputs
    assert not check_greedy(name, pairs, damage).is_right


def test_fails_one_wrong_token(outputs) -> None:
    name, pairs = outputs
    prompt, output = pairs[1]
    wrong = [*output[:20], (output[20] + 1) % 512, *output[21:]]
    assert not check_greedy(name, [*pairs, (prompt, wrong)]).is_right


def test_tiny_models_do_not_repeat_one_token(outputs) -> None:
    """A model that says the same token whatever came before hides every bug from the oracle."""
    _, pairs = outputs
    for _, output in pairs:
        assert len(set(output)) > 5, output


def test_seeded_oracle_fails_another_seed_position_or_filter() -> None:
    from common.testing.parts import engine_of

    name = TINY[0]
    engine = engine_of(1, name)
    params = SamplingParams(temperature=0.9, top_p=0.9, seed=3, max_tokens=40, ignore_eos=True)
    prompt = [5, 6, 7, 8]
    output = engine.generate([prompt], params, progress=False)[0].token_ids
    assert check_seeded(name, [(prompt, output, params)]).is_right
    other = SamplingParams(temperature=0.9, top_p=0.9, seed=4, max_tokens=40, ignore_eos=True)
    assert not check_seeded(name, [(prompt, output, other)]).is_right
    for damage in ("cut", "shift"):
        assert not check_seeded(name, [(prompt, output, params)], damage).is_right


def test_kept_sets_by_hand() -> None:
    """Probabilities 0.5, 0.3, 0.15, 0.05: the token that crosses top_p stays."""
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3], dtype=torch.float64).log()

    def kept(**filters: float) -> list[int]:
        surely, possibly = kept_sets(logits, SamplingParams(**filters), 1e-6)
        assert surely.sum() <= possibly.sum()
        return possibly.nonzero().flatten().tolist()

    assert kept() == [0, 1, 2, 3]
    assert kept(top_p=0.6) == [1, 3]
    assert kept(top_p=0.4) == [1]
    assert kept(top_k=3) == [0, 1, 3]
    assert kept(top_k=2, top_p=0.6) == [1]  # 0.5 / 0.8 = 0.625 is reached by the first
    assert kept(min_p=0.31) == [1, 3]
    assert kept(min_p=0.05) == [0, 1, 2, 3]


def test_random_folder_is_the_reference() -> None:
    """Both tiny models load, and their weights do not depend on the order they are drawn in."""
    for name in TINY:
        assert (resolve(name) / "config.json").is_file()
        assert reference_model(name).config.vocab_size == 512
