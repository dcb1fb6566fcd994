"""Text to tokens and back: chat templates, and a detokenizer that works one token at a time.

Three rules live here. Text that looks like a special token is only text when it comes from a chat
message: a user must not be able to close their own turn and open the system's. A chat template
comes with the checkpoint and is a program, so it runs in jinja's sandbox and under a time limit.
And a character of several bytes is never given out in halves.
"""

import re
import secrets
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from common.checkpoint import ModelError, is_random

TEMPLATE_SECONDS = 2.0
MAX_RENDERED = 1 << 24  # characters a chat template may write
WINDOW = 24  # tokens decoded together at most, and one more
MAX_CHARACTER = 4  # bytes of the longest character in UTF-8, and so tokens
HALF = "\ufffd"  # what stands for bytes that are no character, or not yet


class Tokenizer:
    """A checkpoint's tokenizer. Encoding and decoding are safe from several threads."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer`: a transformers tokenizer backed by the tokenizers library."""
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()  # tokenizer.json may ask for either, and nobody would notice
        self._backend.no_padding()
        self._plain_backend: Any = None
        self._bytes: dict[str, int] = {}
        added = tokenizer.added_tokens_decoder
        self.special_ids = {id: str(token) for id, token in added.items() if token.special}
        texts = sorted(self.special_ids.values(), key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, texts)) if texts else r"(?!)")
        vocabulary = tokenizer.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        self.longest_token = max(map(len, vocabulary))

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer | None":
        """The tokenizer in a model's folder; None for `random:*` models, which have none.

        Raises ModelError.
        """
        from transformers import AutoTokenizer
        from transformers.utils import chat_template_utils

        from common.template_sandbox import BoundedSandbox

        if is_random(folder):
            return None
        # The library compiles templates in the sandbox of this name, and takes no other.
        chat_template_utils.ImmutableSandboxedEnvironment = BoundedSandbox
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            raise ModelError(f"{folder} has no usable tokenizer: {reason}") from error
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise ModelError(f"{folder} has no tokenizer.json, the fast tokenizer's file")
        return cls(tokenizer)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """A raw prompt's tokens: special tokens in the text count, and BOS is put where the model
        wants one. Raises ValueError for a lone surrogate, which JSON can carry and UTF-8 cannot."""
        _check_unicode("prompt", text)
        return _encode(self._backend, text, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        """The text of tokens, special tokens left out or shown, invalid bytes as U+FFFD."""
        return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def has_text(self, token_id: int) -> bool:
        """Whether `decode` looks at a token: special ones and ids without a token are left out."""
        return token_id not in self.special_ids and self._backend.id_to_token(token_id) is not None

    def detokenizer(self) -> "IncrementalDetokenizer":
        return IncrementalDetokenizer(self)

    def encode_chat(
        self,
        messages: list[dict[str, str]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        """The tokens of a conversation in the model's own format, up to where it is to answer.

        messages: `{"role": …, "content": …}` each. Raises ValueError when the model has no chat
        template or its template refuses the messages.

        Inert in a message is the text of the tokens that the checkpoint calls special: they open
        and close turns. Added tokens that it does not call so (Qwen3's `</think>`, Gemma's `<h1>`
        and runs of spaces) are words of the vocabulary: a model writes them into its answers,
        clients send those back, and templates look for them. So they are encoded as what they
        look like, as transformers and vLLM do; a user may write `</think>`, and is still the user.
        """
        contents = "".join(message["content"] for message in messages)
        _check_unicode("messages", contents)
        marks: dict[str, str] = {}
        if self._special_pattern.search(contents):
            # Each special text in a message becomes a mark that no template and no user has, the
            # template's own special tokens are cut out, and the rest is encoded as plain text.
            nonce = secrets.token_hex(8)

            def mark(match: re.Match[str]) -> str:
                key = f"\ue000{nonce}.{len(marks)}\ue001"
                marks[key] = match[0]
                return key

            messages = [
                {**m, "content": self._special_pattern.sub(mark, m["content"])} for m in messages
            ]
        text = self._render(messages, add_generation_prompt, continue_final_message)
        if not marks:
            return _encode(self._backend, text)
        token_ids: list[int] = []
        ids_of = {text: id for id, text in self.special_ids.items()}
        pattern = re.compile("\ue000" + nonce + r"\.\d+\ue001")
        start = 0
        for match in [*self._special_pattern.finditer(text), None]:
            piece = text[start : match.start() if match else len(text)]
            piece = pattern.sub(lambda m: marks[m[0]], piece)
            token_ids += self._encode_plain(piece)
            if match:
                token_ids.append(ids_of[match[0]])
                start = match.end()
        return token_ids

    def _encode_plain(self, text: str) -> list[int]:
        """Tokens of text in which nothing is special."""
        if self._plain_backend is None:
            backend = type(self._backend).from_str(self._backend.to_str())
            backend.encode_special_tokens = True
            self._plain_backend = backend
        return _encode(self._plain_backend, text)

    def _render(
        self,
        messages: list[dict[str, str]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        from jinja2 import TemplateError

        if not self._tokenizer.chat_template:
            raise ValueError("messages: this model has no chat template; use /v1/completions")
        try:
            with _Deadline(TEMPLATE_SECONDS):
                text = self._tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                )
        except TimeoutError:
            limit = f"{TEMPLATE_SECONDS:g} s"
            raise ValueError(f"messages: the chat template took more than {limit}") from None
        except TemplateError as error:
            raise ValueError(f"messages: the chat template refused them: {error}") from error
        except Exception as error:
            # What a template computes with the messages can fail in any way Python code can.
            kind = type(error).__name__
            raise ValueError(f"messages: the chat template failed ({kind})") from error
        if len(text) > MAX_RENDERED:
            raise ValueError(f"messages: the chat template wrote {len(text)} characters")
        return text

    def token_text(self, token_id: int) -> str:
        """One token's text, as logprobs report it; special tokens are shown."""
        return self._backend.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> list[int]:
        """One token's bytes, which may be a part of a character."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return []
        if token_id in self.special_ids:
            return list(token.encode())
        if match := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
            return [int(match[1], 16)]
        if not self._bytes:
            self._bytes = _byte_alphabet()
        if '"ByteLevel"' in self._decoder_kind() and all(c in self._bytes for c in token):
            return [self._bytes[character] for character in token]
        return list(self.token_text(token_id).encode())

    def _decoder_kind(self) -> str:
        if not hasattr(self, "_decoder"):
            state = self._backend.decoder
            self._decoder = state.__getstate__().decode() if state is not None else ""
        return self._decoder


def _encode(backend: Any, text: str, add_special_tokens: bool = False) -> list[int]:
    """As a batch of one: `encode` would hold the interpreter, and with it the server, for as long
    as it takes (half a second for 1 MB)."""
    [encoding] = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    return encoding.ids


def _check_unicode(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        number = ord(text[error.start])
        raise ValueError(f"{name}: U+{number:04X} is half of a character (a surrogate)") from None


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet (Radford et al., 2019): a printable character for each of the 256 bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return alphabet


class IncrementalDetokenizer:
    """Text from tokens as they come, without ever giving out half a character.

    A sliding window of tokens is decoded together, since a token's text depends on the ones before
    it. U+FFFD at the end of the text may be a part of a character that the next tokens complete: it
    waits until they cannot. What comes out, put together, is what decoding all tokens at once
    gives; with a byte-fallback decoder (SentencePiece) that holds for valid UTF-8 alone, since
    there one wrong byte changes the text of those before it. The cost a token is constant.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._given = 0  # characters of the window's text that are out
        self._whole = (0, 0)  # the last two places in the window where a character ended

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
        return new

    def flush(self) -> str:
        """The end: what was waiting comes out as it is."""
        text = self._tokenizer.decode(self._window)
        new, self._given = text[self._given :], len(text)
        return new

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


class _Deadline:
    """Raise TimeoutError in this thread's Python code once the time is up, loops included.

    The time is the thread's own on a processor, so that a busy machine fails nobody. Works by a
    trace function, so it sees every line run; one call into C cannot be interrupted.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.thread_time() + seconds

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if time.thread_time() > self._end:
            raise TimeoutError
        return self._trace

    def __enter__(self) -> None:
        self._previous = sys.gettrace()
        sys.settrace(self._trace)

    def __exit__(self, *details: object) -> None:
        sys.settrace(self._previous)
