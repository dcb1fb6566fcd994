"""Requests: prompts and parameters checked before any work, one request for each completion, and the
loop that runs them to their end."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.completions import RequestOutput, run_to_completion
from common.requests import Request, check_prompt, check_request, fan_out, make_requests
from common.sampling import SamplingParams
from common.testing.parts import PARTS, engine_of, wrap_model


class TestPrompts:
    PARAMS = SamplingParams(max_tokens=4, stop_token_ids=(3,))

    @pytest.mark.parametrize(
        ("prompt", "words"),
        [
            ([], ["at least one token"]),
            ([0, 99, 100], ["100", "0 to 99"]),
            ([5, -1], ["-1"]),
            ([True, False], ["True"]),
            ([1.0], ["1.0"]),
            (["1"], ["'1'"]),
            ([10**5000], ["bits"]),
            ([1] * 20, ["20 tokens", "context of 20", "at most 19"]),
            ([1] * 17, ["max_tokens is 4", "17 tokens", "leaves 3", "of 20"]),
        ],
    )
    def test_what_is_wrong_is_said_in_numbers(self, prompt: list[Any], words: list[str]) -> None:
        with pytest.raises(ValueError) as caught:
            check_prompt(prompt, self.PARAMS, limit=20, vocab=100)
        for word in words:
            assert word in str(caught.value)

    def test_the_largest_prompt_that_fits(self) -> None:
        check_prompt([0, 99] * 8, self.PARAMS, limit=20, vocab=100)
        check_prompt([1] * 19, SamplingParams(max_tokens=None), limit=20, vocab=100)

    def test_a_stop_token_outside_the_vocabulary(self) -> None:
        with pytest.raises(ValueError, match="stop_token_ids has 3; ids go from 0 to 2"):
            check_prompt([1], self.PARAMS, limit=20, vocab=3)

    ENGINE = SimpleNamespace(
        tokenizer=SimpleNamespace(encode=lambda text: [ord(c) for c in text]),
        max_model_len=40,
        vocab_size=128,
    )

    @pytest.mark.parametrize(
        ("prompts", "tokens"),
        [
            ("ab", [[97, 98]]),
            ([1, 2], [[1, 2]]),
            ((1, 2), [[1, 2]]),
            (["a", [1, 2]], [[97], [1, 2]]),
            ([[1], (2, 3)], [[1], [2, 3]]),
            ([], []),
        ],
    )
    def test_every_form_of_prompts(self, prompts: Any, tokens: list[list[int]]) -> None:
        requests = make_requests(self.ENGINE, prompts, None)
        assert [request.prompt_token_ids for request in requests] == tokens
        assert [request.params for request in requests] == [SamplingParams()] * len(tokens)

    def test_one_set_of_parameters_each(self) -> None:
        each = [SamplingParams(seed=1), SamplingParams(seed=2)]
        requests = make_requests(self.ENGINE, ["a", "b"], each)
        assert [request.params for request in requests] == each
        with pytest.raises(ValueError, match="1 entries for 2 prompts"):
            make_requests(self.ENGINE, ["a", "b"], each[:1])

    @pytest.mark.parametrize(
        ("prompts", "message"),
        [
            (["a", ""], r"prompts\[1\]: prompt must have at least one token"),
            (["a", "é"], r"prompts\[1\]: .*233.*0 to 127"),
            ([[1], [1, 128]], r"prompts\[1\]: .*128"),
            (["a", "b" * 50], r"prompts\[1\]: .*50 tokens.*40"),
            (["a", 5], r"prompts\[1\] must be text or token ids, not 5"),
            ([None], r"prompts\[0\] must be text or token ids, not None"),
            (np.array([1, 2]), r"prompts\[0\] must be text or token ids"),
        ],
    )
    def test_the_prompt_is_named(self, prompts: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make_requests(self.ENGINE, prompts, None)

    def test_text_without_a_tokenizer(self) -> None:
        engine = SimpleNamespace(tokenizer=None, max_model_len=40, vocab_size=128)
        with pytest.raises(ValueError, match=r"prompts\[1\] is text"):
            make_requests(engine, [[1], "a"], None)
        assert make_requests(engine, [[1]], None)[0].prompt_token_ids == [1]

    def test_n_beyond_what_a_part_can_do(self) -> None:
        with pytest.raises(ValueError, match="n must be at most 1 in this part, not 2"):
            make_requests(self.ENGINE, "a", SamplingParams(n=2))
        assert len(make_requests(self.ENGINE, "a", SamplingParams(n=2), max_n=2)) == 2

    def test_the_engines_own_defaults(self) -> None:
        """Where no parameters are given, and not instead of given ones."""
        engine = SimpleNamespace(**vars(self.ENGINE), sampling_defaults={"top_k": 7})
        assert [r.params.top_k for r in make_requests(engine, ["a", "b"], None)] == [7, 7]
        assert make_requests(engine, "a", SamplingParams())[0].params.top_k == 0

    def test_prompt_logprobs_where_the_engine_has_none(self) -> None:
        params = SamplingParams(prompt_logprobs=0)
        with pytest.raises(ValueError, match="prompt_logprobs is not supported by this part"):
            make_requests(self.ENGINE, "a", params)
        assert make_requests(self.ENGINE, "a", params, prompt_logprobs=True)[0].params == params

    def test_the_callers_prompt_is_copied(self) -> None:
        prompt = [1, 2]
        [request] = make_requests(self.ENGINE, prompt, None)
        prompt.append(3)
        assert request.prompt_token_ids == [1, 2]


class TestFanOut:
    PROMPTS = st.lists(
        st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(1, 4)),
        max_size=5,
    )

    @given(PROMPTS, st.sampled_from([None, "", "mine"]), st.booleans())
    def test_a_request_for_each_choice_prompt_by_prompt(
        self, prompts: list[tuple[list[int], int]], cache_salt: str | None, may_draft: bool
    ) -> None:
        given = [(ids, SamplingParams(n=n, seed=i)) for i, (ids, n) in enumerate(prompts)]
        requests = fan_out(given, cache_salt, may_draft)
        expected = [(ids, i, choice) for i, (ids, n) in enumerate(prompts) for choice in range(n)]
        assert [(r.prompt_token_ids, r.params.seed, r.choice) for r in requests] == expected
        assert {r.params.n for r in requests} <= {1}
        assert {(r.cache_salt, r.may_draft) for r in requests} <= {(cache_salt, may_draft)}
        again = fan_out(given)
        assert len({r.request_id for r in [*requests, *again]}) == 2 * len(expected)

    def test_the_prompt_is_scored_once(self) -> None:
        """For the first of its choices; all else is the same for each."""
        params = SamplingParams(n=3, prompt_logprobs=2, temperature=0.5, stop=("x",))
        requests = fan_out([([1], params), ([2], params)])
        assert [r.params.prompt_logprobs for r in requests] == [2, None, None] * 2
        same = {dataclasses.replace(r.params, prompt_logprobs=None) for r in requests}
        assert same == {dataclasses.replace(params, n=1, prompt_logprobs=None)}

    def test_options_reach_every_request(self) -> None:
        engine = SimpleNamespace(tokenizer=None, max_model_len=40, vocab_size=128)
        options = {"cache_salt": "mine", "may_draft": False}
        requests = make_requests(engine, [[1], [2]], SamplingParams(n=2), max_n=2, **options)
        assert len(requests) == 4
        assert all((r.cache_salt, r.may_draft) == ("mine", False) for r in requests)
        with pytest.raises(TypeError, match="cache_sald"):
            make_requests(engine, [1], None, cache_sald="mine")

    def test_a_request_never_changes(self) -> None:
        [request] = fan_out([([1], SamplingParams())])
        with pytest.raises(dataclasses.FrozenInstanceError):
            request.cache_salt = "theirs"  # type: ignore[misc]


class TestOneRequest:
    @given(st.integers(1, 30), st.none() | st.integers(1, 40), st.integers(2, 40))
    def test_its_limit(self, length: int, max_tokens: int | None, max_model_len: int) -> None:
        """The context bounds it, and max_tokens where it is given."""
        request = Request("a", [1] * length, SamplingParams(max_tokens=max_tokens))
        most = max_model_len if max_tokens is None else length + max_tokens
        assert request.limit(max_model_len) == min(most, max_model_len)

    def test_the_limit_of_any_that_is_taken_leaves_room_for_a_token(self) -> None:
        for length, max_tokens in ((1, 1), (19, 1), (19, None), (1, 19)):
            request = Request("a", [1] * length, SamplingParams(max_tokens=max_tokens))
            check_request(request, 20, vocab_size=2)
            assert length < request.limit(20) <= 20

    @pytest.mark.parametrize(
        ("prompt", "params", "message"),
        [
            ([1], {"n": 2}, "n is 2; a request is for one completion"),
            ([], {}, "prompt must have at least one token"),
            ([1, 7], {}, "token id 7; ids go from 0 to 6"),
            ([1] * 20, {"max_tokens": None}, "20 tokens; with a context of 20"),
            (
                [1] * 5,
                {"max_tokens": 16},
                "max_tokens is 16, but .* leaves 15 of the context of 20",
            ),
            ([1], {"stop_token_ids": [7], "max_tokens": 1}, "stop_token_ids has 7"),
            ([1], {"logit_bias": {7: 1.0}, "max_tokens": 1}, "logit_bias has 7"),
        ],
    )
    def test_what_is_refused(self, prompt: list[int], params: Any, message: str) -> None:
        request = Request("a", prompt, SamplingParams(**params))
        with pytest.raises(ValueError, match=message):
            check_request(request, 20, vocab_size=7)

    def test_prompt_logprobs_only_where_there_are_some(self) -> None:
        request = Request("a", [1], SamplingParams(prompt_logprobs=0))
        check_request(request, 20, vocab_size=7)
        with pytest.raises(ValueError, match="prompt_logprobs is not supported by this part"):
            check_request(request, 20, vocab_size=7, prompt_logprobs=False)


class Scripted:
    """An engine that gives each of its requests a token a step, and one more after the last: it runs
    ahead. Step `fails_at` raises; request number `refuses` is refused."""

    tokenizer = None

    def __init__(self, fails_at: int | None = None, refuses: int | None = None) -> None:
        self.fails_at, self.refuses = fails_at, refuses
        self.left: dict[str, int] = {}  # tokens to come, by request id
        self.outbox: list[RequestOutput] = []
        self.aborted: list[str] = []
        self.ended: list[str] = []  # in the last step
        self.num_steps = 0

    def add_request(self, request: Request) -> None:
        if len(self.left) == self.refuses:
            raise ValueError("no room")
        self.left[request.request_id] = request.params.max_tokens or 1

    def step(self) -> list[RequestOutput]:
        if self.num_steps == self.fails_at:
            raise RuntimeError("a test's")
        self.num_steps += 1
        outputs, self.outbox = self.outbox, []
        for request_id in self.ended:
            outputs.append(RequestOutput(request_id, [99]))
        self.ended = []
        for request_id in reversed(list(self.left)):  # in no order of the prompts
            self.left[request_id] -= 1
            is_last = not self.left[request_id]
            outputs.append(
                RequestOutput(request_id, [self.num_steps], [], "length" if is_last else None)
            )
            if is_last:
                del self.left[request_id]
                self.ended.append(request_id)
        return outputs

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    def has_unfinished(self) -> bool:
        return bool(self.left) or bool(self.outbox)

    def drop_requests(self) -> None:
        self.left.clear()
        self.outbox.clear()


def requests_for(*max_tokens: int) -> list[Request]:
    return fan_out([([1], SamplingParams(max_tokens=count)) for count in max_tokens])


class TestRunToCompletion:
    def test_completions_in_the_order_of_the_requests(self) -> None:
        engine = Scripted()
        requests = requests_for(3, 1, 2)
        completions = run_to_completion(engine, requests, progress=False)
        assert [c.token_ids for c in completions] == [[1, 2, 3], [1], [1, 2]]
        assert [c.index for c in completions] == [0, 1, 2]
        assert engine.num_steps == 3 and not engine.has_unfinished()
        ended = [requests[number].request_id for number in (1, 2, 0)]
        assert engine.aborted == ended, "each is told once that it has ended"

    def test_nothing_asked_for_is_no_step(self) -> None:
        engine = Scripted(fails_at=0)
        assert run_to_completion(engine, [], progress=False) == []

    def test_an_engine_at_work_is_left_alone(self) -> None:
        engine = Scripted()
        [other] = requests_for(5)
        engine.add_request(other)
        with pytest.raises(ValueError, match="no requests of add_request"):
            run_to_completion(engine, requests_for(1), progress=False)
        assert list(engine.left) == [other.request_id]

    @pytest.mark.parametrize("fails_at", [0, 1, 2])
    def test_a_step_that_fails_leaves_nothing_behind(self, fails_at: int) -> None:
        engine = Scripted(fails_at)
        with pytest.raises(RuntimeError, match="a test's"):
            run_to_completion(engine, requests_for(1, 9), progress=False)
        assert not engine.has_unfinished()

    def test_a_request_that_is_refused_takes_the_others_with_it(self) -> None:
        engine = Scripted(refuses=2)
        with pytest.raises(ValueError, match="no room"):
            run_to_completion(engine, requests_for(4, 4, 4), progress=False)
        assert not engine.has_unfinished() and engine.num_steps == 0


@pytest.mark.parametrize("part", [part for part in PARTS if part > 1], scope="module")
class TestParts:
    """`generate` of every part whose engine steps."""

    PROMPTS = ([5, 6, 7], [8, 9], [10, 11, 12, 13])
    PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    @pytest.mark.parametrize("fails_at", [0, 1, 4])
    def test_whatever_happens_nothing_is_left_behind(
        self, part: int, fails_at: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Ctrl-C in a notebook too: the next `generate` has the tokens of a fresh engine."""
        engine = engine_of(part, "random:tiny-llama", threads=1)
        prompts = list(self.PROMPTS)
        expected = [c.token_ids for c in engine.generate(prompts, self.PARAMS, progress=False)]
        num_steps, step = 0, engine.step

        def failing() -> list[RequestOutput]:
            nonlocal num_steps
            if num_steps == fails_at:
                raise error("a test's")
            num_steps += 1
            return step()

        with monkeypatch.context() as patch:
            patch.setattr(engine, "step", failing)
            with pytest.raises(error, match="a test's"):
                engine.generate(prompts, self.PARAMS, progress=False)
        assert num_steps == fails_at
        assert not engine.has_unfinished() and not engine.sequences
        engine.check_integrity()
        stats = engine.stats()
        assert stats["num_running"] == stats["num_waiting"] == stats.get("num_used_blocks", 0) == 0
        again = [c.token_ids for c in engine.generate(prompts, self.PARAMS, progress=False)]
        assert again == expected

    def test_a_forward_that_fails(self, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where it runs in a thread of the device's, the error comes with a later step."""
        engine = engine_of(part, "random:tiny-llama", threads=1)
        prompts = list(self.PROMPTS)
        expected = [c.token_ids for c in engine.generate(prompts, self.PARAMS, progress=False)]
        num_forwards = 0

        def third_fails(token_ids: list[int], num_rows: int, real: Any) -> Any:
            nonlocal num_forwards
            num_forwards += 1
            if num_forwards == 3:
                raise RuntimeError("a test's")
            return real()

        with monkeypatch.context() as patch:
            wrap_model(engine, patch, third_fails)
            with pytest.raises(RuntimeError, match="a test's"):
                engine.generate(prompts, self.PARAMS, progress=False)
        assert not engine.has_unfinished() and not engine.sequences
        engine.check_integrity()
        again = [c.token_ids for c in engine.generate(prompts, self.PARAMS, progress=False)]
        assert again == expected
