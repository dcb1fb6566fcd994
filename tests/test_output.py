"""From tokens to text: stop strings wherever they are cut, held text, usage, finish reasons."""

import math
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.completions import (
    NO_DRAFTS,
    NOT_FINITE,
    Delta,
    DraftCounts,
    OutputProcessor,
    RequestOutput,
    TokenLogprobs,
)
from common.models.detokenizer import IncrementalDetokenizer
from common.sampling import NO_TOKEN, SamplingParams


class FakeTokenizer:
    """A vocabulary of chosen bytes: token `i` is `pieces[i]`."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces

    def decode(self, token_ids: list[int]) -> str:
        return b"".join(self.pieces[id] for id in token_ids).decode(errors="replace")

    def has_text(self, token_id: int) -> bool:
        return True

    def detokenizer(self, prompt_token_ids: Any = ()) -> IncrementalDetokenizer:
        return IncrementalDetokenizer(self, prompt_token_ids)


def processor(pieces: list[bytes], **params: Any) -> OutputProcessor:
    return OutputProcessor(FakeTokenizer(pieces), SamplingParams(**params))  # type: ignore[arg-type]


def new(
    token_ids: list[int], finish_reason: str | None = None, logprobs: Any = ()
) -> RequestOutput:
    """What a step adds."""
    return RequestOutput("a", token_ids, list(logprobs), finish_reason)


def run(
    pieces: list[str | bytes], stop: Any = (), finish_reason: str = "length", chunk: int = 1
) -> tuple[OutputProcessor, list[Delta]]:
    """Push the pieces, one token each, `chunk` at a time; the last push carries the reason."""
    encoded = [p.encode() if isinstance(p, str) else p for p in pieces]
    output = processor(encoded, stop=stop)
    deltas = []
    for start in range(0, len(pieces), chunk):
        ids = list(range(start, min(start + chunk, len(pieces))))
        deltas.append(output.process(new(ids, finish_reason if len(pieces) - 1 in ids else None)))
    return output, deltas


def brute_force(text: str, stops: list[str]) -> str | None:
    """The text before the stop that is complete first; of two, the one that began first."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return None


class TestStopStrings:
    @pytest.mark.parametrize(
        ("pieces", "stop", "text", "num_tokens"),
        [
            (["Hello", " wor", "ld", "!"], "world", "Hello ", 3),  # over two tokens
            (["a", "b", "c", "d", "e"], "bcd", "a", 4),  # over three
            (["ab", "cd"], "a", "", 1),  # the very first character
            (["ab", "cd"], "ab", "", 1),  # a whole token
            (["xaby", "z"], "ab", "x", 1),  # inside one
            (["aa", "ab", "c"], "aab", "a", 2),  # after a start that failed
            (["abab", "ac", "x"], "abac", "ab", 2),
            (["x", "ab", "c"], ["abc", "b"], "xa", 2),  # the shorter is complete first
            (["x", "abc"], ["abc", "bc"], "x", 2),  # complete together: what began first
            (["x", "abc"], ["bc", "abc"], "x", 2),
            (["xabcd"], ["abcd", "bc"], "xa", 1),  # in one token: the first complete, not begun
            (["one\n", "\n", "two"], ["\n\n", "three"], "one", 2),
            (["ab", "cabd"], ["abd", "cab"], "ab", 2),  # overlapping ones
            (["é", "😀!", "x"], "😀", "é", 2),
        ],
    )
    def test_cut_at_the_stop(self, pieces: Any, stop: Any, text: str, num_tokens: int) -> None:
        output, deltas = run(pieces, stop)
        completion = output.completion()
        assert completion.text == "".join(delta.text for delta in deltas) == text
        assert completion.finish_reason == "stop"
        assert completion.token_ids == list(range(num_tokens)), "usage ends at the completing token"

    def test_nothing_of_a_stop_is_given_out_before_it_is_decided(self) -> None:
        _, deltas = run(["x", "a", "b", "d", "a", "b"], "abc")
        assert [delta.text for delta in deltas] == ["x", "", "", "abd", "", "ab"]

    def test_held_text_is_released_at_the_end(self) -> None:
        for reason in ("length", "abort"):
            output, _ = run(["x", "ab"], "abc", reason)
            assert (output.completion().text, output.finish_reason) == ("xab", reason)

    def test_held_text_is_released_at_the_end_of_sequence(self) -> None:
        """The last token's own text is left out; what was held back before it is not."""
        output, _ = run(["x", "ab", "c"], "abc", "stop")
        assert (output.completion().text, output.token_ids) == ("xab", [0, 1, 2])

    def test_a_stop_that_half_a_character_completes(self) -> None:
        """Bytes that never become a character come out as U+FFFD at the end, and count."""
        output, _ = run(["ab", b"\xf0"], "b\ufffd")
        assert (output.completion().text, output.finish_reason) == ("a", "stop")

    def test_a_stop_made_of_bytes_of_several_tokens(self) -> None:
        smile = "😀".encode()
        output, _ = run(["a", smile[:1], smile[1:3], smile[3:] + b"b", "c"], "😀b")
        assert (output.completion().text, output.token_ids) == ("a", [0, 1, 2, 3])

    @settings(max_examples=300)
    @given(
        st.text("abcé😀", max_size=24),
        st.lists(st.text("abé😀", min_size=1, max_size=4), max_size=4),
        st.lists(st.integers(1, 5), min_size=1, max_size=40),
        st.integers(1, 4),
    )
    def test_however_text_is_cut(
        self, text: str, stops: list[str], sizes: list[int], chunk: int
    ) -> None:
        """The text does not depend on tokens, even ones that cut characters, nor on how many come
        at once; and it is what looking at the whole text gives."""
        data = text.encode()
        pieces: list[str | bytes] = []
        while data:
            size = sizes[len(pieces) % len(sizes)]
            pieces.append(data[:size])
            data = data[size:]
        if not pieces:
            return
        output, deltas = run(pieces, stops, chunk=chunk)
        completion = output.completion()
        expected = brute_force(text, stops)
        assert completion.text == (text if expected is None else expected)
        assert completion.finish_reason == ("length" if expected is None else "stop")
        assert "".join(delta.text for delta in deltas) == completion.text
        assert [id for delta in deltas for id in delta.token_ids] == completion.token_ids
        # The completing token is the first after which the text so far has a stop in it.
        joined = [b"".join(pieces[: n + 1]) for n in range(len(pieces))]  # type: ignore[arg-type]
        stopped = [brute_force(part.decode(errors="ignore"), stops) is not None for part in joined]
        last = stopped.index(True) + 1 if True in stopped else len(pieces)
        assert completion.token_ids == list(range(last))

    @settings(max_examples=100)
    @given(st.lists(st.binary(min_size=1, max_size=3), min_size=1, max_size=20), st.integers(1, 4))
    def test_any_bytes_without_stops(self, pieces: list[bytes], chunk: int) -> None:
        output, _ = run(list(pieces), chunk=chunk)
        assert output.completion().text == b"".join(pieces).decode(errors="replace")


class TestEnds:
    def test_stop_leaves_the_last_text_out_and_keeps_its_id(self) -> None:
        """EOS and stop_token_ids look the same from here."""
        for chunk in (1, 2, 3):
            output, _ = run(["ab", "cd", "</s>"], finish_reason="stop", chunk=chunk)
            completion = output.completion()
            assert (completion.text, completion.token_ids) == ("abcd", [0, 1, 2])
            assert completion.finish_reason == "stop"
            assert completion.num_completion_tokens == 3

    def test_length_keeps_the_last_text(self) -> None:
        output, _ = run(["ab", "cd"], finish_reason="length")
        assert output.completion().text == "abcd"

    def test_half_a_character_at_the_end(self) -> None:
        for reason, text in (("length", "ab\ufffd"), ("stop", "ab"), ("abort", "ab\ufffd")):
            output, _ = run(["ab", b"\xf0\x9f"], finish_reason=reason)
            assert output.completion().text == text

    def test_an_end_without_tokens(self) -> None:
        for reason in ("stop", "abort", "error"):
            output = processor([b"ab", b"\xf0"], stop="bc")
            deltas = [output.process(new(*x)) for x in (([0],), ([1],), ([], reason))]
            assert [delta.text for delta in deltas] == ["a", "", "b\ufffd"]
            assert [delta.finish_reason for delta in deltas] == [None, None, reason]
            assert output.completion().token_ids == [0, 1]

    def test_a_stop_string_wins_over_the_engines_reason(self) -> None:
        output, deltas = run(["ab", "cd"], "cd", "length")
        assert (output.finish_reason, deltas[-1].finish_reason) == ("stop", "stop")

    def test_what_comes_after_the_end_is_dropped(self) -> None:
        """An engine may run ahead: it learns of a stop string only by the abort."""
        output, deltas = run(["ab", "cd", "ef", "gh"], "d", "length")
        assert deltas[2:] == [Delta("", [])] * 2
        assert output.process(new([3], "abort", [TokenLogprobs(3, -1.0)])) == Delta("", [])
        completion = output.completion()
        assert (completion.text, completion.token_ids) == ("abc", [0, 1])
        assert completion.finish_reason == "stop"

    def test_tokens_of_the_same_push_after_a_stop_are_dropped(self) -> None:
        output, [delta] = run(["ab", "cd", "ef"], "c", "length", chunk=3)
        assert delta == Delta("ab", [0, 1], [], "stop")
        assert output.completion().token_ids == [0, 1]

    def test_no_completion_before_the_end(self) -> None:
        output = processor([b"a"])
        output.process(new([0]))
        with pytest.raises(AssertionError):
            output.completion()


class TestLogprobs:
    ITEMS = tuple(TokenLogprobs(id, -0.5 * id, ((id, -0.5 * id),)) for id in range(4))

    @pytest.mark.parametrize("chunk", [1, 2, 4])
    @pytest.mark.parametrize(("stop", "num_tokens"), [((), 4), ("c", 2), ("de", 3)])
    def test_one_for_each_token_kept(self, chunk: int, stop: Any, num_tokens: int) -> None:
        """Also for tokens whose text is held back, and not for those after a stop."""
        output = processor([b"ab", b"cd", b"ef", b"gh"], stop=stop, logprobs=1)
        deltas = []
        for start in range(0, 4, chunk):
            ids = list(range(start, start + chunk))
            last = "length" if ids[-1] == 3 else None
            deltas.append(output.process(new(ids, last, [self.ITEMS[id] for id in ids])))
        completion = output.completion()
        assert completion.logprobs == list(self.ITEMS[:num_tokens])
        assert completion.token_ids == list(range(num_tokens))
        for delta in deltas:
            assert [item.token_id for item in delta.logprobs] == delta.token_ids

    def test_none_when_none_were_asked_for(self) -> None:
        output = processor([b"ab"])
        delta = output.process(new([0], "length", [None]))
        assert delta.logprobs == []
        assert output.completion().logprobs is None

    def test_an_empty_list_when_there_are_no_tokens(self) -> None:
        output = processor([b"ab"], logprobs=0)
        output.process(new([], "abort"))
        assert output.completion().logprobs == []


class TestDrafts:
    """What became of drafts: the engine counts all it verified, an answer what the client has."""

    STEPS = st.lists(
        st.integers(0, 5).flatmap(lambda most: st.tuples(st.just(most), st.integers(0, most))),
        min_size=1,
        max_size=6,
    )

    @given(STEPS)
    def test_counts_are_sums_over_the_steps(self, steps: list[tuple[int, int]]) -> None:
        counts = NO_DRAFTS
        for num_tokens, num_accepted in steps:
            counts = counts.plus(num_tokens, num_accepted)
        drafts = [num_tokens for num_tokens, _ in steps if num_tokens]
        assert counts == (len(drafts), sum(drafts), sum(accepted for _, accepted in steps))
        assert NO_DRAFTS == (0, 0, 0)

    @given(STEPS, st.integers(0, 40))
    def test_what_a_stop_string_cuts_off_has_not_stayed(
        self, steps: list[tuple[int, int]], stops_after: int
    ) -> None:
        """Of each step's tokens the drafts come first, and one that was drawn is the last."""
        total = sum(accepted + 1 for _, accepted in steps)
        pieces = [b"!" if token == stops_after else b"a" for token in range(total)]
        output = processor(pieces, stop="!")
        counts, place, stayed = NO_DRAFTS, 0, 0
        for num_tokens, num_accepted in steps:
            ids = list(range(place, place + num_accepted + 1))
            counts = counts.plus(num_tokens, num_accepted)
            output.process(RequestOutput("a", ids, draft_counts=counts))
            stayed += sum(token <= stops_after for token in ids[:-1])
            place += len(ids)
            if stops_after < place:
                break
        output.process(RequestOutput("a", finish_reason="length", draft_counts=counts))
        completion = output.completion()
        assert completion.token_ids == list(range(min(stops_after + 1, place)))
        assert completion.finish_reason == ("stop" if stops_after < total else "length")
        assert (completion.num_drafts, completion.num_draft_tokens) == counts[:2]
        assert completion.num_accepted_tokens == stayed <= completion.num_draft_tokens

    def test_drafts_beyond_the_token_that_ends_it_have_not_stayed(self) -> None:
        """The engine drops the tokens behind it, and its counts have them."""
        output = processor([b"a", b"b", b"c"])
        output.process(RequestOutput("a", [0]))
        output.process(RequestOutput("a", [1, 2], [], "stop", draft_counts=DraftCounts(1, 4, 4)))
        assert output.completion().num_accepted_tokens == 2


class TestPromptLogprobs:
    SCORES: ClassVar = [TokenLogprobs(3, -0.5, rank=1), TokenLogprobs(4, -2.0, rank=7)]

    def test_they_come_with_any_output_and_are_kept(self) -> None:
        output = processor([b"a", b"b"], prompt_logprobs=0)
        for token_id, reason in ((0, None), (1, "length")):
            output.process(RequestOutput("a", [token_id], [], reason, self.SCORES))
        assert output.completion().prompt_logprobs == self.SCORES

    @pytest.mark.parametrize("place", [0, 1])
    def test_nan_among_them_is_an_error(self, place: int) -> None:
        """Though a token was drawn: what it was drawn from is not to be trusted."""
        scores = list(self.SCORES)
        scores[place] = TokenLogprobs(4, math.nan, rank=1)
        output = processor([b"a"], prompt_logprobs=0)
        delta = output.process(RequestOutput("a", [0], [], None, scores))
        assert (delta.finish_reason, delta.token_ids, delta.error) == ("error", [], NOT_FINITE)
        assert output.completion().error == NOT_FINITE

    def test_minus_infinity_is_none(self) -> None:
        """A model may rule a token of a prompt out."""
        output = processor([b"a"], prompt_logprobs=0)
        scores = [TokenLogprobs(4, -math.inf, rank=9)]
        assert output.process(RequestOutput("a", [0], [], "length", scores)).error is None

    def test_no_token_is_an_error(self) -> None:
        """What the sampler gives where logits are not finite; tokens before it count."""
        output = processor([b"a"])
        delta = output.process(RequestOutput("a", [0, NO_TOKEN], [], "error"))
        assert (delta.token_ids, delta.error, delta.finish_reason) == ([0], NOT_FINITE, "error")


class TestWithoutTokenizer:
    def test_text_is_empty_and_tokens_count(self) -> None:
        output = OutputProcessor(None, SamplingParams(stop="a", logprobs=0), list(range(7)))
        first = output.process(new([5, 6], None, [TokenLogprobs(5, -1.0), TokenLogprobs(6, -1.0)]))
        last = output.process(new([1], "stop", [TokenLogprobs(1, -2.0)]))
        assert (first.text, first.token_ids, last.text, last.token_ids) == ("", [5, 6], "", [1])
        completion = output.completion(index=3)
        assert (completion.text, completion.token_ids) == ("", [5, 6, 1])
        assert (completion.index, completion.num_prompt_tokens) == (3, 7)
        assert [item.token_id for item in completion.logprobs or []] == [5, 6, 1]
