"""Text from tokens as they come, as it continues the text before them.

A token's text depends on the tokens before it. SentencePiece writes a space as a part of the next
word and its decoder drops the first one of a text, so the first token of an answer has its space
only when the end of the prompt is decoded with it. The text of a completion is therefore

    decode(prompt + output) minus decode(prompt)

where minus takes away what the two have in common at the start. (The second is the start of the
first but for a prompt that ends inside a character: the character that the output completes is the
output's.)
"""

from collections.abc import Sequence
from itertools import islice
from typing import Protocol

WINDOW = 24  # tokens decoded together at most, and one more
CONTEXT = 8  # tokens of the prompt to begin with
MAX_CHARACTER = 4  # bytes of the longest character in UTF-8, and so tokens
HALF = "\ufffd"  # what stands for bytes that are no character, or not yet


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    def decode(self, token_ids: list[int]) -> str: ...

    def has_text(self, token_id: int) -> bool: ...


class IncrementalDetokenizer:
    """Text from tokens as they come, without ever giving out half a character.

    A sliding window of tokens is decoded together. It begins with the end of the prompt. U+FFFD at
    the end of the text may be a part of a character that the next tokens complete: it waits until
    they cannot. What comes out, put together, is what decoding all tokens at once gives; with a
    byte-fallback decoder (SentencePiece) that holds for valid UTF-8 alone, since there one wrong
    byte changes the text of those before it. The cost a token is constant.
    """

    def __init__(self, tokenizer: Decoder, prompt_token_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._given = 0  # characters of the window's text that are out
        self._whole = (0, 0)  # the last two places in the window where a character ended
        self._prompt_rest = ""  # the end of the prompt's text that the next tokens may change
        for token_id in self._context(prompt_token_ids):
            self.push(token_id)
        if self._window:
            self._prompt_rest = tokenizer.decode(self._window)[self._given :]

    def push(self, token_id: int) -> str:
        """Add a token; return the text that is certain now, often empty."""
        if not self._tokenizer.has_text(token_id):
            return ""  # it must not push half a character out of the window
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        is_whole = not text.endswith(HALF)
        if is_whole:
            self._whole = (self._whole[1], len(self._window))
        end = max(self._given, self._certain(text))
        new, self._given = text[self._given : end], end
        if is_whole and self._whole[0] > 0 and len(self._window) > WINDOW // 2:
            self._forget(self._whole[0], waiting=0)
        elif len(self._window) > WINDOW:  # a long run of halves
            self._forget(len(self._window) - WINDOW // 2, waiting=len(text) - end)
        return self._without_prompt(new)

    def flush(self) -> str:
        """The end: what was waiting comes out as it is."""
        text = self._tokenizer.decode(self._window)
        new, self._given = text[self._given :], len(text)
        return self._without_prompt(new)

    def _context(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """The last tokens of a prompt that have text, from the start of a character on.

        There are up to three more than `CONTEXT`, where a character begins before. The prompt may
        end inside one too, and then a byte-fallback decoder shows none of the run of bytes: so the
        start is looked for without the last tokens. The cost does not depend on the length of the
        prompt, but for tokens without text at its end.
        """
        with_text = filter(self._tokenizer.has_text, reversed(prompt_token_ids))
        context = list(islice(with_text, CONTEXT + MAX_CHARACTER - 1))[::-1]
        if len(context) < CONTEXT + MAX_CHARACTER - 1:
            return context  # all there is
        for num_left_out in range(MAX_CHARACTER):
            for start in reversed(range(MAX_CHARACTER)):
                text = self._tokenizer.decode(context[start : len(context) - num_left_out])
                if HALF not in (text[:1], text[-1:]):
                    return context[start:]
        return context

    def _without_prompt(self, new: str) -> str:
        """Take away what is still the prompt's: the half character that it ends in, if it stays."""
        if not (new and self._prompt_rest):
            return new
        pairs = zip(new, self._prompt_rest, strict=False)
        size = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if size is None:
            size = min(len(new), len(self._prompt_rest))
            self._prompt_rest = self._prompt_rest[size:]
        else:
            self._prompt_rest = ""
        return new[size:]

    def _certain(self, text: str) -> int:
        """How many characters of the window's text no later token can change."""
        if not text.endswith(HALF):
            return len(text)
        if len(self._window) - self._whole[1] < MAX_CHARACTER:
            return text.find(HALF, self._given)
        # So many tokens are not one character: all but the last bytes are wrong for good.
        waiting = len(text) - len(text.rstrip(HALF))
        return len(text) - min(waiting, MAX_CHARACTER - 1)

    def _forget(self, start: int, waiting: int) -> None:
        """Drop the window's first `start` tokens.

        waiting: how many characters at the end of the window's text are not out.
        """
        self._window = self._window[start:]
        self._whole = (0, max(self._whole[1] - start, 0))
        self._given = max(len(self._tokenizer.decode(self._window)) - waiting, 0)
