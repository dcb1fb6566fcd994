"""The tools of one chat: the text that describes them, the grammar that forces a call, the parser."""

import json
from dataclasses import dataclass
from typing import Any

from common.http.errors import ApiError
from common.http.tools.formats import ToolFormat
from common.http.tools.parser import ToolParser
from common.http.tools.schemas import NamedTool, ToolChatRequest
from common.structured.compiler import lark_string
from common.structured.grammar import WHITESPACE, Grammar

MOST_FORCED = 16  # calls in one output; a model that is forced to call may not stop by itself
INTRODUCTION = (
    "You can call functions. Each line here describes one, with its parameters as a JSON schema:"
)
INSTRUCTION = (
    'To call one, write a JSON object with its name and arguments, {"name": …, "arguments": …},'
    " between <tool_call> and </tool_call>, and nothing after it. You are then told what it gave."
)


@dataclass(frozen=True)
class ToolUse:
    """format, is_told: as `format_of` returns them. may_call: the functions that may be called.
    is_forced: one of them must be called."""

    tools: list[dict[str, Any]]
    format: ToolFormat
    is_told: bool
    may_call: list[str]
    is_forced: bool
    is_parallel: bool

    @classmethod
    def of(cls, request: ToolChatRequest, form: ToolFormat, is_told: bool) -> "ToolUse | None":
        """The tools of a request; None where no function may be called."""
        choice = request.tool_choice or "auto"
        if not request.tools or choice == "none":
            return None
        names = [tool.function.name for tool in request.tools]
        is_named = isinstance(choice, NamedTool)
        return cls(
            [tool.as_dict() for tool in request.tools],
            form,
            is_told,
            [choice.function.name] if isinstance(choice, NamedTool) else names,
            is_forced=choice != "auto",
            is_parallel=request.parallel_tool_calls is not False and not is_named,
        )

    def parser(self) -> ToolParser:
        """A parser for one output."""
        names = [tool["function"]["name"] for tool in self.tools]
        return ToolParser(self.format, names, self.is_parallel)

    def grammar(self) -> tuple[str, Grammar]:
        """(the field that a refusal names, a grammar of outputs that consist of calls in the model's own
        form). Raises ApiError where the grammar would be too large."""
        rules, starts, number = [], [], 0
        for tool in self.tools:
            function = tool["function"]
            if function["name"] in self.may_call:
                head = f'{{"name": "{function["name"]}", "{self.format.arguments}": '
                schema = {"type": "object"} | function["parameters"]
                schema["x-guidance"] = {"whitespace_pattern": WHITESPACE}
                starts.append(f'{lark_string(head)} args_{number} "}}"')
                rules.append(f"args_{number}: %json {json.dumps(schema)}")
                number += 1
        most = MOST_FORCED if self.is_parallel else 1
        mistral = self.format.name == "mistral"
        begin, end, comma = ("[", "]", ", ") if mistral else ("", "", "; ")
        call = "call"
        if self.format.is_marked:
            begin, end, comma = "", "", "\n"
            marks = (f"{self.format.begin}\n", f"\n{self.format.end}")
            call = f"{lark_string(marks[0])} call {lark_string(marks[1])}"
        more = f" ({lark_string(comma)} {call}){{0,{most - 1}}}" if most > 1 else ""
        parts = [lark_string(begin) if begin else "", call + more, lark_string(end) if end else ""]
        start = " ".join(filter(None, parts))
        text = "\n".join([f"start: {start}", f"call: {' | '.join(starts)}", *rules])
        try:
            return "tools", Grammar("lark", text)
        except ValueError as error:
            raise ApiError(400, f"tools {error}", param="tools") from None


def told(messages: list[dict[str, Any]], use: ToolUse | None) -> list[dict[str, Any]]:
    """A chat for a template that knows no tools: a system message describes the tools, and calls and
    their results become text."""
    plain: list[dict[str, Any]] = []
    for message in messages:
        text = message["content"]
        if message["role"] == "tool":
            given = f"<tool_response>\n{text}\n</tool_response>"
            if plain and plain[-1]["role"] == "user" and plain[-1].get("gives"):
                plain[-1]["content"] += f"\n{given}"
            else:
                plain.append({"role": "user", "content": given, "gives": True})
            continue
        calls = [
            json.dumps(call["function"], ensure_ascii=False)
            for call in message.get("tool_calls", ())
        ]
        shown = [f"<tool_call>\n{call}\n</tool_call>" for call in calls]
        plain.append({"role": message["role"], "content": "\n".join(filter(None, [text, *shown]))})
    plain = [{"role": message["role"], "content": message["content"]} for message in plain]
    if use is None:
        return plain
    lines = [json.dumps(tool["function"], ensure_ascii=False) for tool in use.tools]
    text = "\n".join([INTRODUCTION, *lines, INSTRUCTION])
    if plain and plain[0]["role"] == "system":
        text = f"{plain[0]['content']}\n\n{text}"
        plain = plain[1:]
    return [{"role": "system", "content": text}, *plain]
