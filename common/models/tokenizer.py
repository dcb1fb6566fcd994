"""Text to tokens and back: chat templates, and a detokenizer that works one token at a time.

Three rules live here. Text that looks like a special token is only text when it comes from a chat
message: a user must not be able to close their own turn and open the system's. A chat template
comes with the checkpoint and is a program, so it runs in jinja's sandbox and under a time limit.
And a character of several bytes is never given out in halves.
"""

import json
import re
import sys
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any

from common.models import traced_text
from common.models.chat_encoding import ChatEncoder, encode
from common.models.checkpoint import is_random
from common.models.detokenizer import HALF, IncrementalDetokenizer
from common.models.tokenizer_files import load_tokenizer, use_own_sandbox

TEMPLATE_SECONDS = 4.0
MAX_RENDERED = 1 << 24  # characters a chat template may write
OWN_FILES = (traced_text.__file__, str(Path(__file__).with_name("chat_sandbox.py")))
CONTINUED = "CONTINUE_FINAL_MESSAGE_TAG "  # transformers' mark


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

    def __init__(self, tokenizer: Any, backend: Any = None) -> None:
        """tokenizer: transformers', for the chat template. backend: the tokenizers library's, which
        encodes and decodes; by default the one inside."""
        use_own_sandbox()
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer if backend is None else backend
        self._backend.no_truncation()  # tokenizer.json may ask for either, and nobody would notice
        self._backend.no_padding()
        self._names: dict[int, str] = {}
        added = self._backend.get_added_tokens_decoder()
        self.special_ids = {id: str(token) for id, token in added.items() if token.special}
        self._chat = ChatEncoder(self._backend, self.special_ids)
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.longest_token = max(map(len, vocabulary))

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer | None":
        """The tokenizer in a model's folder; None for `random:*` models, which have none.

        Raises ModelError.
        """
        if is_random(folder):
            return None
        return cls(*load_tokenizer(folder))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """A raw prompt's tokens: special tokens in the text count, and BOS is put where the model
        wants one. Raises ValueError for a lone surrogate, which JSON can carry and UTF-8 cannot."""
        _check_unicode("prompt", text)
        return encode(self._backend, text, add_special_tokens)

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        """The text of tokens, special tokens left out or shown, invalid bytes as U+FFFD."""
        return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def has_text(self, token_id: int) -> bool:
        """Whether `decode` looks at a token: special ones and ids without a token are left out."""
        return token_id not in self.special_ids and self._backend.id_to_token(token_id) is not None

    def detokenizer(self, prompt_token_ids: Sequence[int] = ()) -> IncrementalDetokenizer:
        """For the text of what continues these tokens."""
        return IncrementalDetokenizer(self, prompt_token_ids)

    def prepare(self) -> None:
        """Make now what is else made with the first chat that needs it."""
        self._chat.prepare()

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
    ) -> list[int]:
        """The tokens of a conversation in the model's own format, up to where it is to answer.

        messages: `{"role": …, "content": …}` each, of a model also `tool_calls`. tools: what the
        template may tell the model of, in OpenAI's form. add_generation_prompt: end with what opens an
        answer. continue_final_message: end right behind the last message's text, which the model is
        to continue. Raises ValueError when both are true, when the model has no chat template, or
        when its template refuses the messages or does not keep the text that is to be continued.

        Inert in a message is the text of the tokens that the checkpoint calls special: they open
        and close turns. Added tokens that it does not call so (Qwen3's `</think>`, Gemma's `<h1>`
        and runs of spaces) are words of the vocabulary: a model writes them into its answers,
        clients send those back, and templates look for them. So they are encoded as what they
        look like, as transformers and vLLM do; a user may write `</think>`, and is still the user.
        """
        if add_generation_prompt and continue_final_message:
            raise ValueError(
                "add_generation_prompt and continue_final_message must not both be true:"
                " one begins an answer, the other continues a message"
            )
        for message in messages:
            _check_unicode("messages", message["content"])
        calls = [message["tool_calls"] for message in messages if "tool_calls" in message]
        _check_unicode("messages", json.dumps(calls, ensure_ascii=False))
        _check_unicode("tools", json.dumps(tools, ensure_ascii=False))

        def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
            if continue_final_message:
                return self._render_continued(messages, tools)
            return self._render(messages, add_generation_prompt, tools)

        def render_neutral() -> str:
            texts = [re.sub(r"\S", "x", message["content"]) for message in messages]
            pairs = zip(self._neutral(messages), texts, strict=True)
            others = [{**message, "content": text} for message, text in pairs]
            try:
                return render(others, self._neutral(tools))
            except ValueError:
                return ""  # a template that looks at the text: what is in doubt stays text

        return self._chat.encode(render(messages, tools), render_neutral)

    def _neutral(self, value: Any) -> Any:
        """Calls and tools, whose texts and keys hold no special token. The others stay: templates
        look for them."""
        if isinstance(value, dict):
            return {self._neutral(key): self._neutral(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._neutral(item) for item in value]
        is_special = isinstance(value, str) and any(s in value for s in self.special_ids.values())
        return re.sub(r"\S", "x", value) if is_special else value

    def _render_continued(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> str:
        """As transformers has it: a mark goes behind the last message's text, and with it all that
        the template puts there."""
        if not messages:
            raise ValueError("continue_final_message: there is no message")
        *others, last = messages
        marked = [*others, {**last, "content": last["content"] + CONTINUED}]
        text = self._render(marked, False, tools)
        end = text.rfind(CONTINUED.strip())
        if end < 0 or last["content"].strip() not in text:
            raise ValueError(
                "continue_final_message: the chat template does not keep the last message's text"
            )
        is_trimmed = not text.startswith(CONTINUED, end)
        return text[:end].rstrip() if is_trimmed else text[:end]

    @property
    def chat_template(self) -> str:
        """The template's text; of several by name all."""
        template = self._tokenizer.chat_template or ""
        return template if isinstance(template, str) else "\n".join(template.values())

    def _render(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        tools: list[dict[str, Any]] | None = None,
    ) -> str:
        from jinja2 import TemplateError

        if not self._tokenizer.chat_template:
            raise ValueError("messages: this model has no chat template; use /v1/completions")
        try:
            with _Deadline(TEMPLATE_SECONDS):
                text = self._tokenizer.apply_chat_template(
                    messages,
                    tools=tools,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
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
        for token_id in encode(self._backend, "a"):
            text = self.decode([token_id])
            if text.strip() and HALF not in text:
                return [token_id], text
        return [], ""


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
        # Below the template's own lines are ours, which end: to trace them would take half the time.
        return None if frame.f_code.co_filename in OWN_FILES else self._trace

    def __enter__(self) -> None:
        self._previous = sys.gettrace()
        sys.settrace(self._trace)

    def __exit__(self, *details: object) -> None:
        sys.settrace(self._previous)
