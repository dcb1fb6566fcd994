"""The forms in which models write tool calls, recognised from their chat templates."""

import re
import secrets
import string
from dataclasses import dataclass

CALL_ID_CHARACTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class ToolFormat:
    """One or more objects, `{"name": …, "arguments": {…}}`, between two marks.

    is_marked: calls stand only between the marks, and text may stand around them. Where it is False, an
        output that begins with an object or a list also consists of calls: the model's mark is a
        special token, which leaves no text, or is missing.
    between: characters that may stand between two calls, and around them.
    """

    name: str
    begin: str
    end: str
    between: str
    arguments: str  # the key of a call's arguments
    is_marked: bool
    id_length: int = 24

    def new_id(self) -> str:
        """A new id of a call. Mistral's templates want nine letters or digits."""
        text = "".join(secrets.choice(CALL_ID_CHARACTERS) for _ in range(self.id_length))
        return text if self.id_length == 9 else f"call_{text}"


FORMATS = {
    shape.name: shape
    for shape in (
        ToolFormat("hermes", "<tool_call>", "</tool_call>", "", "arguments", is_marked=True),
        ToolFormat("llama3_json", "<|python_tag|>", "", ";,", "parameters", is_marked=False),
        ToolFormat("mistral", "[TOOL_CALLS]", "", "[],", "arguments", is_marked=False, id_length=9),
    )
}
PARSERS = ("auto", *FORMATS)


def format_of(template: str | None, parser: str) -> tuple[ToolFormat, bool]:
    """(the format of a model's calls, whether its template describes tools to it).

    template: the model's chat template. parser: one of PARSERS; `auto` goes by the template's text.
    A template that knows no tools, or writes calls in another form, is not given any: a system message
    describes the tools instead, and calls have the form of hermes.
    """
    text = template or ""
    knows_tools = re.search(r"\btools\b", text) is not None
    if parser != "auto":
        return FORMATS[parser], knows_tools
    if knows_tools:
        for name, mark in (
            ("mistral", "[TOOL_CALLS]"),
            ("hermes", "<tool_call>"),
            ("llama3_json", '"parameters"'),
        ):
            if mark in text:
                return FORMATS[name], True
    return FORMATS["hermes"], False
