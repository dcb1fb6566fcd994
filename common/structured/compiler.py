"""Turns grammars into matchers: compiles them in a thread, within limits, and keeps some compiled ones.

A grammar comes from a client, so its cost is bounded. The parser counts its steps (its `fuel`). One
thread compiles one grammar after the other, and at most MAX_WAITING of clients wait for it. The kept
grammars are bounded in number and in characters. A grammar that takes longer than COMPILE_SECONDS is
refused; its compilation then ends by the parser's own limits.
"""

import asyncio
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from common.models.tokenizer import Tokenizer
from common.structured.grammar import WHITESPACE, Grammar
from common.structured.matcher import NO_TOKEN_LEFT, Matcher, first_line, num_words

COMPILE_SECONDS = 10.0
MAX_KEPT = 128  # grammars
MAX_KEPT_CHARACTERS = 1 << 19  # of all kept; a compiled grammar takes some 250 bytes a character
MAX_WAITING = 64  # grammars that wait to be compiled

# llguidance's defaults are two to five times as large.
LIMITS = {
    "max_items_in_row": 1000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,  # they would quote the output
}


class GrammarsBusy(Exception):
    """Too many grammars wait to be compiled, or this one waits behind others for too long."""


class GrammarCompiler:
    """Compiles grammars for one tokeniser. Safe to call from several threads."""

    def __init__(
        self, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: Collection[int]
    ) -> None:
        """vocab_size: the model's; its tokeniser may have fewer tokens."""
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.eos_token_ids = sorted(id for id in eos_token_ids if id < vocab_size)
        self._compiled: OrderedDict[Grammar, Future[Any]] = OrderedDict()
        self._num_characters = 0
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._vocabulary: Any = None
        self._begun = 0.0  # when the newest compilation began, in seconds of `time.monotonic`

    def compile(self, grammar: Grammar) -> Future[Any]:
        """A future of the grammar's first state. Its result raises ValueError where the grammar fails.

        Raises ValueError where the model has no tokeniser or no end token.
        """
        if self.tokenizer is None:
            raise ValueError("needs a tokenizer, and this model has none")
        if not self.eos_token_ids:
            raise ValueError("needs a token that ends an output, and this model has none")
        with self._lock:
            found = self._compiled.get(grammar)
            if found is not None:
                self._compiled.move_to_end(grammar)
                return found
            future = self._compiled[grammar] = self._thread.submit(self._compile, grammar)
            self._num_characters += len(grammar.text)
            self._forget()
        return future

    def prepare(self) -> None:
        """Prepare the vocabulary now, so that the first grammar need not wait for it."""
        if self.tokenizer is not None and self.eos_token_ids:
            self._thread.submit(self._vocabulary_of)

    async def check(self, grammar: Grammar) -> None:
        """Wait until a client's grammar is compiled. Raises ValueError with the reason where it cannot
        be, and GrammarsBusy."""
        with self._lock:
            is_new = grammar not in self._compiled
            num_waiting = sum(not future.done() for future in self._compiled.values())
        if is_new and num_waiting >= MAX_WAITING:
            raise GrammarsBusy(f"{num_waiting} grammars are being compiled")
        compiling = self.compile(grammar)
        future = asyncio.wrap_future(compiling)
        await asyncio.wait({future}, timeout=COMPILE_SECONDS)
        if future.done():
            return future.result()
        if compiling.running() and time.monotonic() - self._begun >= 0.9 * COMPILE_SECONDS:
            raise ValueError(f"takes longer than {COMPILE_SECONDS:g} s to compile")
        raise GrammarsBusy(f"it waits behind others' for {COMPILE_SECONDS:g} s")

    def matcher(self, state: Any, ignore_eos: bool) -> Matcher:
        """A matcher for one output. state: the result of `compile`."""
        return Matcher(state.deep_copy(), self.eos_token_ids, ignore_eos)

    def _forget(self) -> None:
        """Drop the least recently used grammars above the limits; those being compiled stay."""
        for grammar, future in list(self._compiled.items()):
            is_room = self._num_characters <= MAX_KEPT_CHARACTERS
            if len(self._compiled) <= MAX_KEPT and is_room:
                return
            if future.done():
                del self._compiled[grammar]
                self._num_characters -= len(grammar.text)

    def _compile(self, grammar: Grammar) -> Any:
        from llguidance import LLMatcher, LLParserLimits

        self._begun = time.monotonic()
        limits = LLParserLimits(**LIMITS)
        text = to_llguidance(grammar)
        state = LLMatcher(self._vocabulary_of(), text, log_level=0, limits=limits)
        mask = np.zeros(num_words(self.vocab_size), np.int32)
        if not state.is_error():  # make the first mask here: it may take long
            state.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if state.is_error():
            raise ValueError(f"cannot be used: {first_line(state)}")
        if not mask.any():
            raise ValueError(f"cannot be used: {NO_TOKEN_LEFT}")
        return state

    def _vocabulary_of(self) -> Any:
        if self._vocabulary is None:
            self._vocabulary = self._make_vocabulary()
        return self._vocabulary

    def _make_vocabulary(self) -> Any:
        """Each token's bytes, for llguidance."""
        from llguidance import LLTokenizer, TokenizerWrapper

        tokenizer, special = self.tokenizer, self.tokenizer.special_ids
        special_ids = [id for id in special if id < self.vocab_size]
        token_bytes = [bytes(tokenizer.token_bytes(id)) for id in range(self.vocab_size)]

        class Vocabulary:
            eos_token_id, bos_token_id = self.eos_token_ids[0], None
            tokens = token_bytes
            special_token_ids = special_ids

            def __call__(self, text: bytes) -> list[int]:
                """The tokens of a text that the grammar forces, as the model would write it: without
                special tokens, and without the space that some tokenisers put before a text."""
                ids = tokenizer.encode(text.decode(), False)
                is_exact = b"".join(token_bytes[id] for id in ids if id < len(token_bytes)) == text
                if is_exact and not special.keys() & ids:
                    return ids
                return vocabulary.greedy_tokenize(text.decode())

        vocabulary = LLTokenizer(
            TokenizerWrapper(Vocabulary()), n_vocab=self.vocab_size, eos_token=self.eos_token_ids
        )
        return vocabulary


def to_llguidance(grammar: Grammar) -> str:
    """A grammar in llguidance's form. Raises ValueError where it cannot be translated."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if grammar.kind == "json":
        options = {"whitespace_pattern": WHITESPACE}
        try:
            return LLMatcher.grammar_from_json_schema(grammar.text, defaults=options)
        except ValueError as error:
            raise ValueError(f"cannot be used: {error}") from None
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind == "choice":
        texts = " | ".join(lark_string(choice) for choice in json.loads(grammar.text))
        return LLMatcher.grammar_from_lark(f"start: {texts}")
    if grammar.kind == "lark" or "::=" not in grammar.text:
        return LLMatcher.grammar_from_lark(grammar.text)
    try:
        return LLMatcher.grammar_from_lark(gbnf_to_lark(grammar.text))
    except Exception as error:  # RecursionError among others
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ValueError(f"cannot be used: {reason}") from None


def lark_string(text: str) -> str:
    """A text as a string literal of a Lark grammar."""
    plain = (c if " " <= c <= "~" and c not in '"\\' else None for c in text)
    pairs = zip(text, plain, strict=True)
    return '"' + "".join(p or (c if c > "\uffff" else f"\\u{ord(c):04x}") for c, p in pairs) + '"'
