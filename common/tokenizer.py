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
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any

from common.checkpoint import ModelError, is_random
from common.detokenizer import HALF, IncrementalDetokenizer

TEMPLATE_SECONDS = 2.0
MAX_RENDERED = 1 << 24  # characters a chat template may write


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet (Radford et al., 2019): a printable character for each of the 256 bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return alphabet


BYTES = _byte_alphabet()


class Tokenizer:
    """A checkpoint's tokenizer. Encoding and decoding are safe from several threads."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer`: a transformers tokenizer backed by the tokenizers library."""
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()  # tokenizer.json may ask for either, and nobody would notice
        self._backend.no_padding()
        self._plain_backend: Any = None
        self._names: dict[int, str] = {}
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

    def encode(self, text: str) -> list[int]:
        """A raw prompt's tokens: special tokens in the text count, and BOS is put where the model
        wants one. Raises ValueError for a lone surrogate, which JSON can carry and UTF-8 cannot."""
        _check_unicode("prompt", text)
        return _encode(self._backend, text, add_special_tokens=True)

    def decode(self, token_ids: list[int]) -> str:
        """The text of tokens, special tokens left out, invalid bytes as U+FFFD."""
        return self._backend.decode(token_ids, skip_special_tokens=True)

    def has_text(self, token_id: int) -> bool:
        """Whether `decode` looks at a token: special ones and ids without a token are left out."""
        return token_id not in self.special_ids and self._backend.id_to_token(token_id) is not None

    def detokenizer(self, prompt_token_ids: Sequence[int] = ()) -> IncrementalDetokenizer:
        """For the text of what continues these tokens."""
        return IncrementalDetokenizer(self, prompt_token_ids)

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
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
        text = self._render(messages)
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

    def _render(self, messages: list[dict[str, str]]) -> str:
        from jinja2 import TemplateError

        if not self._tokenizer.chat_template:
            raise ValueError("messages: this model has no chat template; use /v1/completions")
        try:
            with _Deadline(TEMPLATE_SECONDS):
                text = self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True
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
        """One token's text in the middle of a text, where "▁the" is " the"; special tokens are
        shown, and bytes that are no character are U+FFFD."""
        if token_id in self.special_ids:
            return self.special_ids[token_id]
        before, text = self._before
        if before and self.has_text(token_id):
            both = self.decode([*before, token_id])
            if both.startswith(text):
                return both[len(text) :]
        return self.decode([token_id])

    def token_name(self, token_id: int) -> str:
        """A token's text as log probabilities show it: bytes that are no text in OpenAI's form,
        `bytes:\\xf0\\x9f`."""
        name = self._names.get(token_id)
        if name is None:
            data = bytes(self.token_bytes(token_id))
            try:
                name = data.decode()
            except UnicodeDecodeError:
                name = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
            self._names[token_id] = name
        return name

    def token_bytes(self, token_id: int) -> list[int]:
        """One token's bytes in the middle of a text, which may be a part of a character."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return []
        if token_id in self.special_ids:
            return list(token.encode())
        match = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
        if match and '"ByteFallback"' in self._decoder_state:
            return [int(match[1], 16)]
        if '"ByteLevel"' in self._decoder_state and all(c in BYTES for c in token):
            return [BYTES[character] for character in token]
        return list(self.token_text(token_id).encode())

    @cached_property
    def _decoder_state(self) -> str:
        decoder = self._backend.decoder
        return decoder.__getstate__().decode() if decoder is not None else ""

    @cached_property
    def _before(self) -> tuple[list[int], str]:
        """A token to put before another, and its text. None where no letter has a token."""
        for token_id in _encode(self._backend, "a"):
            text = self.decode([token_id])
            if text.strip() and HALF not in text:
                return [token_id], text
        return [], ""


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
