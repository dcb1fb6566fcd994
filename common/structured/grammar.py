"""The grammar of an output as plain data, which travels between processes with its request."""

import json
import re
from dataclasses import dataclass
from typing import Any

MAX_GRAMMAR = 1 << 17  # characters; OpenAI's limit for a schema is about the same
MAX_EBNF = 1 << 13  # characters; the time to translate them grows with their square
MAX_DEPTH = 64  # levels of a schema, far below the limit of the parser's own recursion
MAX_REPEATS = 10_000  # the largest count in a regular expression, as in `a{3,10}`
KINDS = ("json", "regex", "choice", "grammar", "lark")

# White space that JSON may have between two pieces: none, one space, or a new line with its
# indentation. Without a bound a model may write white space without end.
WHITESPACE = r"[ ]?|\n[ \t]{0,32}"


@dataclass(frozen=True)
class Grammar:
    """kind: `json` (text: a JSON schema), `regex` (a regular expression), `choice` (a JSON list of
    strings), `lark` (a grammar in Lark's form) or `grammar` (in that form, or EBNF with `::=`).

    Raises ValueError for a text that is refused before it is parsed: too long, no valid Unicode, or a
    regular expression with too large a count.
    """

    kind: str
    text: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {self.kind!r}")
        is_ebnf = self.kind == "grammar" and "::=" in self.text
        limit = MAX_EBNF if is_ebnf else MAX_GRAMMAR
        if not 0 < len(self.text) <= limit:
            what = "characters in EBNF" if is_ebnf else "characters"
            raise ValueError(f"has {len(self.text)} {what}; it may have 1 to {limit}")
        try:
            self.text.encode()
        except UnicodeEncodeError:
            raise ValueError("has half of a character (a surrogate)") from None

        counts = re.findall(r"\d+", " ".join(re.findall(r"\{[\d,]{1,32}\}", self.text)))
        if self.kind == "regex" and max(map(int, counts), default=0) > MAX_REPEATS:
            raise ValueError(f"repeats something more than {MAX_REPEATS} times")

    @classmethod
    def of_schema(cls, schema: dict[str, Any] | bool) -> "Grammar":
        """The grammar of JSON that a schema admits. Raises ValueError for a schema nested too deep."""
        check_depth(schema)
        return cls("json", json.dumps(schema, separators=(",", ":")))

    @classmethod
    def of_choices(cls, choices: list[str]) -> "Grammar":
        """The grammar of one of these texts. Raises ValueError where they are too long."""
        return cls("choice", json.dumps(choices, separators=(",", ":")))


def check_depth(value: Any) -> None:
    """Raises ValueError where lists and objects are nested deeper than MAX_DEPTH."""
    level, depth = [value], 0
    while level:
        containers = [item for item in level if isinstance(item, dict | list)]
        items = (item.values() if isinstance(item, dict) else item for item in containers)
        level = [inner for values in items for inner in values]
        depth += bool(containers)
        if depth > MAX_DEPTH:
            raise ValueError(f"is nested deeper than {MAX_DEPTH} levels")
