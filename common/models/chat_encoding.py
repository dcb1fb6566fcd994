"""The tokens of a rendered chat: the template's special tokens count, those in messages are text.

Which are the template's is known by the marks of `TracedText`. Where a template did something to its
texts that lost the marks, it is rendered once more with neutral contents of the same length: what
stands at the same place in both is the template's. What remains in doubt is text.

The tokens around are to be what they are with a harmless word in the place of a message's special
text. They depend on what stands before them (a prefix space for the first piece only, special tokens
that take the white space beside them), so the text is not cut up. It goes to the library in one
piece, and to one that knows the special tokens by secret names: the template's are written by these
names, and `</s>` in a message is four characters like any others, also for a model that has it in
its vocabulary.
"""

import json
import re
import secrets
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from common.models.traced_text import GIVEN, UNKNOWN, marks_of

LETTERS = range(0xA000, 0xA400)  # Yi: letters that have no case and that no normalizer changes


class Place(NamedTuple):
    """A special token in a text, from `start` to before `end`."""

    start: int
    end: int
    token_id: int


class ChatEncoder:
    """For several threads at once."""

    def __init__(self, backend: Any, special_ids: dict[int, str]) -> None:
        """backend: the library's tokenizer. special_ids: the texts of its special tokens."""
        self._backend = backend
        self._special_ids = special_ids
        self._ids = {text: id for id, text in special_ids.items()}
        self._sizes: dict[str, list[int]] = {}  # by first character, longest first
        for text in sorted(self._ids, key=len, reverse=True):
            sizes = self._sizes.setdefault(text[0], [])
            if len(text) not in sizes:
                sizes.append(len(text))
        starts = "".join(map(re.escape, self._sizes))
        self._start = re.compile(f"[{starts}]" if starts else r"(?!)")
        texts = "".join(self._ids)
        self._mask = next(chr(n) for n in range(len(texts) + 1) if chr(n) not in texts)
        self._secret: tuple[Any, dict[int, str]] | None = None
        self._lock = threading.Lock()

    def encode(self, text: str, render_neutral: Callable[[], str]) -> list[int]:
        """text: a rendered chat, traced. render_neutral: the same chat with neutral contents of the
        same lengths; called only where marks are lost."""
        marks, text = marks_of(text), str.__str__(text)
        places = self._own_places(text, marks, render_neutral)
        ids = encode(self._backend, text)
        if self._specials(ids) == [place.token_id for place in places]:
            return ids  # no text of a message became a special token
        return self._encode_by_secret_names(text, places)

    def prepare(self) -> None:
        """Make what the first special text in a message would wait for: it takes the interpreter for
        half a second with 49,000 tokens."""
        self._secret_backend()

    def _specials(self, ids: list[int]) -> list[int]:
        return [id for id in ids if id in self._special_ids]

    def _own_places(self, text: str, marks: str, render_neutral: Callable[[], str]) -> list[Place]:
        """The template's special tokens; of two that begin at one place the longer."""
        runs = [run.span() for run in re.finditer(f"{GIVEN}+|[^{GIVEN}]+", marks)]
        masked = "".join(
            self._mask * (end - start) if marks[start] == GIVEN else text[start:end]
            for start, end in runs
        )
        neutral: str | None = None
        places: list[Place] = []
        end = 0
        for match in self._start.finditer(masked):
            if match.start() < end:
                continue
            place = self._place_at(masked, match.start())
            if place is None:
                continue
            if UNKNOWN in marks[place.start : place.end]:
                neutral = render_neutral() if neutral is None else neutral
                if not _agree(neutral, text, place):
                    continue
            places.append(place)
            end = place.end
        return places

    def _place_at(self, text: str, start: int) -> Place | None:
        for size in self._sizes[text[start]]:
            token_id = self._ids.get(text[start : start + size])
            if token_id is not None:
                return Place(start, start + size, token_id)
        return None

    def _encode_by_secret_names(self, text: str, places: list[Place]) -> list[int]:
        """A name that the library does not take as a token (it may want a space before it) is put
        back: the text of the token stands there."""
        backend, names = self._secret_backend()
        while True:
            pieces: list[str] = []
            named: list[Place] = []
            start = length = 0
            for place in places:
                name = names[place.token_id]
                length += place.start - start
                named.append(Place(length, length + len(name), place.token_id))
                length += len(name)
                pieces += [text[start : place.start], name]
                start = place.end
            renamed = "".join([*pieces, text[start:]])
            ids = encode(backend, renamed)
            if self._specials(ids) == [place.token_id for place in places]:
                return ids
            taken = self._taken(backend, renamed, named)
            if all(taken):
                return ids  # what else is special stands for characters without a token
            places = [place for place, is_taken in zip(places, taken, strict=True) if is_taken]

    def _taken(self, backend: Any, text: str, named: list[Place]) -> list[bool]:
        """Which of the names in a text become their tokens."""
        [encoding] = backend.encode_batch([text], add_special_tokens=False)
        spans = [  # a token that takes the white space beside it covers it
            (*span, id)
            for span, id in zip(encoding.offsets, encoding.ids, strict=True)
            if id in self._special_ids
        ]
        taken, i = [], 0
        for name in named:
            while i < len(spans) and spans[i][1] < name.end:
                i += 1
            taken.append(
                i < len(spans) and spans[i][0] <= name.start and spans[i][2] == name.token_id
            )
        return taken

    def _secret_backend(self) -> tuple[Any, dict[int, str]]:
        """A copy of the library's tokenizer, made on first use, and each special token's name in
        it; the ids are the same."""
        with self._lock:
            if self._secret is None:
                nonce = "".join(chr(secrets.choice(LETTERS)) for _ in range(12))
                # The first and the last character stay: other tokens may look at their neighbours.
                names = {
                    text: f"{text[0]}{nonce}{chr(LETTERS[i >> 10])}{chr(LETTERS[i & 1023])}{text[-1]}"
                    for i, text in enumerate(self._ids)
                }
                state = json.loads(self._backend.to_str())
                _rename(state, names)
                backend = type(self._backend).from_str(json.dumps(state))
                by_id = {self._ids[text]: name for text, name in names.items()}
                assert all(backend.token_to_id(name) == id for id, name in by_id.items())
                self._secret = backend, by_id
            return self._secret


def _agree(neutral: str, text: str, place: Place) -> bool:
    """Whether two renderings have the same text at a place."""
    piece = slice(place.start, place.end)
    return len(neutral) == len(text) and neutral[piece] == text[piece]


def _rename(state: dict[str, Any], names: dict[str, str]) -> None:
    """Give tokens other names, in the state that `tokenizer.json` is."""
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    state["post_processor"] = None  # it names special tokens, and a chat needs none
    model = state["model"]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(token, token): id for token, id in vocab.items()}
    else:  # Unigram's, with scores
        model["vocab"] = [[names.get(token, token), score] for token, score in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"])
        model["merges"] = [
            [left, right] for left, right in pairs if not {left, right, left + right} & names.keys()
        ]


def encode(backend: Any, text: str, add_special_tokens: bool = False) -> list[int]:
    """As a batch of one: the library's `encode` would hold the interpreter, and with it the server,
    for as long as it takes (half a second for 1 MB)."""
    [encoding] = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    return encoding.ids
