"""The text of a completion is decode(prompt + output) minus decode(prompt), whole and streamed."""

import os
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from common.completions import Completion, OutputProcessor, RequestOutput, TokenLogprobs
from common.http.responses import Job, TextOffsets
from common.models.detokenizer import CONTEXT, HALF, WINDOW, IncrementalDetokenizer
from common.models.tokenizer import Tokenizer
from common.sampling import SamplingParams

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["▁", "▁a", "b", "▁▁", "▁é", "c▁", "A"]


def sentencepiece(steps: list[decoders.Decoder]) -> Tokenizer:
    vocabulary = {text: id for id, text in enumerate(["<unk>", "<s>", "</s>", *BYTES, *PIECES])}
    backend = Backend(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: id for id, text in enumerate(["<s>", *alphabet, "Ġa", "ðŁ", "ĺĢĠ"])}
    backend = Backend(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>"])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


def wordpiece() -> Tokenizer:
    backend = Backend(models.WordPiece({"[UNK]": 0, "[S]": 1, "a": 2, "##b": 3, ",": 4, "é": 5}))
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["[S]"])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


REPLACE = decoders.Replace("▁", " ")
MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "strip": lambda: sentencepiece(
        [REPLACE, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
    "metaspace": lambda: sentencepiece([decoders.ByteFallback(), decoders.Metaspace()]),
    "no strip": lambda: sentencepiece([REPLACE, decoders.ByteFallback(), decoders.Fuse()]),
    "byte level": byte_level,
    "wordpiece": wordpiece,
}
TOKENIZERS = {name: make() for name, make in MAKERS.items()}


def right_text(tokenizer: Tokenizer, prompt: list[int], output: list[int]) -> str:
    """What both begin with is the prompt's."""
    whole, before = tokenizer.decode(prompt + output), tokenizer.decode(prompt)
    return whole[len(os.path.commonprefix([whole, before])) :]  # noqa: RUF071


def right_of_whole_characters(tokenizer: Tokenizer, prompt: list[int], output: list[int]) -> str:
    """Of valid text, cut inside a character or not: the character that the output completes is the
    output's. (A byte-fallback decoder gives no character of a run of bytes with half a one in it,
    so the text of the whole prompt says nothing.)"""
    size = len(prompt)
    while HALF in tokenizer.decode(prompt[:size]):
        size -= 1
    return tokenizer.decode(prompt + output)[len(tokenizer.decode(prompt[:size])) :]


def check(
    tokenizer: Tokenizer, prompt: list[int], output: list[int], right: str | None = None
) -> None:
    """Whole, and never anything that is taken back."""
    right = right_text(tokenizer, prompt, output) if right is None else right
    detokenizer = tokenizer.detokenizer(prompt)
    text = ""
    for token_id in output:
        text += detokenizer.push(token_id)
        assert right.startswith(text), (text, right)
    assert text + detokenizer.flush() == right
    for size in (1, 3):
        processor = OutputProcessor(tokenizer, SamplingParams(), prompt)
        for start in range(0, len(output), size):
            processor.process(RequestOutput("a", output[start : start + size]))
        processor.process(RequestOutput("a", finish_reason="length"))
        assert processor.completion().text == right
        assert processor.completion().num_prompt_tokens == len(prompt)


def ids_of(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    """Pieces of the vocabulary, and characters in their bytes."""
    ids: list[int] = []
    for text in texts:
        is_piece = tokenizer is not TOKENIZERS["byte level"]
        id = tokenizer._backend.token_to_id(text) if is_piece or text == "<s>" else None
        if id is not None:
            ids.append(id)
        elif not is_piece:
            ids += tokenizer.encode(text)
        else:
            ids += [tokenizer._backend.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
    return ids


UNIT = st.sampled_from([*PIECES, "<s>", "</s>", "😀", "你", "é", "<0x41>", "\n"])


@pytest.mark.parametrize("name", ["strip", "metaspace", "no strip", "byte level"])
@settings(max_examples=150)
@given(units=st.lists(UNIT, max_size=30), place=st.floats(0, 1))
def test_valid_text_cut_anywhere(name: str, units: list[str], place: float) -> None:
    """Between any two tokens: inside a character, behind special tokens, before the first."""
    tokenizer = TOKENIZERS[name]
    ids = ids_of(tokenizer, units)
    cut = round(place * len(ids))
    right = right_of_whole_characters(tokenizer, ids[:cut], ids[cut:])
    check(tokenizer, ids[:cut], ids[cut:], right)


@settings(max_examples=100)
@given(ids=st.lists(st.integers(0, 6), max_size=40), place=st.floats(0, 1))
def test_pieces_of_words(ids: list[int], place: float) -> None:
    cut = round(place * len(ids))
    check(TOKENIZERS["wordpiece"], ids[:cut], ids[cut:])


@settings(max_examples=150)
@given(data=st.binary(max_size=50), place=st.floats(0, 1))
def test_any_bytes_of_a_byte_level_vocabulary(data: bytes, place: float) -> None:
    tokenizer = TOKENIZERS["byte level"]
    id_of = {tokenizer.token_bytes(id)[0]: id for id in range(1, 257)}
    ids = [id_of[byte] for byte in data]
    cut = round(place * len(ids))
    check(tokenizer, ids[:cut], ids[cut:])


def test_the_space_before_the_first_word() -> None:
    for name in ("strip", "metaspace"):
        tokenizer = TOKENIZERS[name]
        begin, word, end = ids_of(tokenizer, ["<s>", "▁a", "</s>"])
        for prompt, text in (
            ([word], " a"),
            ([begin, word, end], " a"),
            ([], "a"),
            ([begin], "a"),
            ([word, *[end] * 50], " a"),
        ):
            assert right_text(tokenizer, prompt, [word]) == text
            check(tokenizer, prompt, [word])


def test_the_output_completes_the_prompts_character() -> None:
    for name in ("strip", "byte level"):
        tokenizer = TOKENIZERS[name]
        before = ids_of(tokenizer, ["b", "你"])
        smile = ids_of(tokenizer, ["😀", "b"])
        for cut in range(1, 4):
            detokenizer = tokenizer.detokenizer(before + smile[:cut])
            pieces = [detokenizer.push(id) for id in smile[cut:]]
            if len(smile) == 5:
                assert pieces == [*[""] * (3 - cut), "😀", "b"]
            assert "".join(pieces) == ("😀b" if cut < len(smile) - 1 else "b")
        check(tokenizer, before + smile[:1], ids_of(tokenizer, ["b"]))


def test_the_cost_does_not_depend_on_the_prompt() -> None:
    sizes: list[int] = []
    asked: list[int] = []
    tokenizer = TOKENIZERS["strip"]

    class Counting:
        def decode(self, token_ids: list[int]) -> str:
            sizes.append(len(token_ids))
            return tokenizer.decode(token_ids)

        def has_text(self, token_id: int) -> bool:
            asked.append(token_id)
            return tokenizer.has_text(token_id)

    for units in (["你"], ["▁a"], ["<0xF0>"]):
        sizes.clear()
        asked.clear()
        IncrementalDetokenizer(Counting(), ids_of(tokenizer, units) * 5_000)
        assert max(sizes) <= WINDOW
        assert len(sizes) <= 4 * CONTEXT and len(asked) <= 4 * CONTEXT


def test_offsets_are_those_of_the_text() -> None:
    tokenizer = TOKENIZERS["strip"]
    prompt = ids_of(tokenizer, ["▁a"])
    output = ids_of(tokenizer, ["▁a", "b", "▁a"])
    for context, places in ((prompt, [0, 2, 3]), ([], [0, 1, 2])):
        offsets = TextOffsets(tokenizer, context)
        assert [offsets.push(id) for id in output] == places


def job(tokenizer: Tokenizer, prompt: list[int], chat: bool = False) -> Job:
    params = SamplingParams(logprobs=4)
    return Job(
        chat=chat,
        model="m",
        prompts=[prompt],
        params=params,
        stream=False,
        include_usage=False,
        tokenizer=tokenizer,
    )


class TestNames:
    """What log probabilities call a token."""

    def answer(
        self, tokenizer: Tokenizer, sampled: int, top: list[int], chat: bool = False
    ) -> dict[str, object]:
        pairs = tuple((id, -1.0 - place) for place, id in enumerate(top))
        value = dict(pairs).get(sampled, -9.0)
        item = TokenLogprobs(sampled, value, pairs)
        prompt = ids_of(tokenizer, ["▁a"])
        text = right_text(tokenizer, prompt, [sampled])
        completion = Completion(text, [sampled], "length", 0, 1, logprobs=[item])
        [choice] = job(tokenizer, prompt, chat).response([completion])["choices"]
        return choice["logprobs"]()

    def top_of(self, tokenizer: Tokenizer, sampled: int, top: list[int]) -> dict[str, float]:
        logprobs = self.answer(tokenizer, sampled, top)
        [entries] = [late() for late in logprobs["top_logprobs"]]  # type: ignore[attr-defined]
        [name], [value] = logprobs["tokens"], logprobs["token_logprobs"]  # type: ignore[misc]
        assert entries[name] == value
        return entries

    def test_a_word_has_its_space(self) -> None:
        for name in ("strip", "metaspace", "no strip"):
            tokenizer = TOKENIZERS[name]
            word, accent = ids_of(tokenizer, ["▁a", "▁é"])
            assert tokenizer.token_text(word) == tokenizer.token_name(word) == " a"
            assert tokenizer.token_bytes(word) == [32, 97]
            assert tokenizer.token_bytes(accent) == list(" é".encode())
            content = self.answer(tokenizer, word, [word, accent], chat=True)["content"]
            [entry] = [late() for late in content]  # type: ignore[attr-defined]
            assert (entry["token"], entry["bytes"]) == (" a", [32, 97])
            assert [other["token"] for other in entry["top_logprobs"]] == [" a", " é"]
            assert entry["top_logprobs"][1]["bytes"] == list(" é".encode())

    def test_bytes_that_are_no_text(self) -> None:
        for name, token in (("strip", "<0xF0>"), ("byte level", "ð")):
            tokenizer = TOKENIZERS[name]
            id = tokenizer._backend.token_to_id(token)
            assert tokenizer.token_name(id) == r"bytes:\xf0"
            assert tokenizer.token_bytes(id) == [0xF0]
        tokenizer = TOKENIZERS["byte level"]
        mixed = tokenizer._backend.token_to_id("ĺĢĠ")
        assert tokenizer.token_name(mixed) == r"bytes:\x98\x80\x20"
        replacement = ids_of(TOKENIZERS["strip"], ["\ufffd"])
        assert TOKENIZERS["strip"].decode(replacement) == "\ufffd"

    def test_every_entry_has_a_name_of_its_own(self) -> None:
        tokenizer = TOKENIZERS["strip"]
        letter, byte, high, higher = ids_of(tokenizer, ["A", "<0x41>", "<0xF0>", "<0xF1>"])
        top = [letter, byte, high, higher]
        assert list(self.top_of(tokenizer, letter, top)) == [
            "A",
            f"token_id:{byte}",
            r"bytes:\xf0",
            r"bytes:\xf1",
        ]
        names = self.top_of(tokenizer, byte, top)
        assert names == {
            f"token_id:{letter}": -1.0,
            "A": -2.0,
            r"bytes:\xf0": -3.0,
            r"bytes:\xf1": -4.0,
        }
        assert len(self.top_of(tokenizer, byte, [letter, high])) == 3
        assert len(self.top_of(tokenizer, 1, [letter, high])) == 3

    def test_a_special_token_beside_its_text(self) -> None:
        backend = Backend.from_str(TOKENIZERS["strip"]._backend.to_str())
        backend.add_special_tokens(["A"])
        backend.add_tokens(["b "])
        tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
        special, byte, word = ids_of(tokenizer, ["A", "<0x41>", "b "])
        assert list(self.top_of(tokenizer, byte, [special, byte])) == [f"token_id:{special}", "A"]
        assert list(self.top_of(tokenizer, special, [special, byte])) == ["A", f"token_id:{byte}"]
        assert (tokenizer.token_name(word), tokenizer.token_bytes(word)) == ("b ", [98, 32])

    @settings(max_examples=100)
    @given(st.lists(st.integers(0, 265), min_size=1, max_size=12, unique=True), st.data())
    def test_any_entries(self, top: list[int], data: st.DataObject) -> None:
        tokenizer = TOKENIZERS[data.draw(st.sampled_from(["strip", "metaspace"]))]
        sampled = data.draw(st.one_of(st.sampled_from(top), st.integers(0, 265)))
        entries = self.top_of(tokenizer, sampled, top)
        assert len(entries) == len({*top, sampled})
        values = [-1.0 - place for place in range(len(top))]
        assert sorted(entries.values()) == sorted(values + [-9.0] * (sampled not in top))
