"""Chat requests with tools: the schemas of `tools`, `tool_choice` and messages with calls."""

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StrictBool, StrictStr

from common.http import neutral
from common.http.errors import ApiError
from common.http.schemas import MAX_MESSAGES, ChatCompletionRequest, Message, TextPart, _Object
from common.structured.grammar import check_depth

MAX_TOOLS = 128
MAX_CALLS = 128  # in one message
Name = Annotated[StrictStr, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
TOOL_MESSAGE = {name: rule for name, rule in neutral.MESSAGE.items() if name[:5] != "tool_"}


class _Plain(_Object):
    rules: ClassVar[dict[str, neutral.Rule]] = {"index": lambda value: isinstance(value, int)}


class Function(_Plain):
    """strict: accepted, and changes nothing. Forced calls keep to the parameters in any case."""

    name: Name
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class Tool(_Plain):
    type: Literal["function"]
    function: Function

    def as_dict(self) -> dict[str, Any]:
        """The tool as chat templates expect it."""
        function = self.function.model_dump(exclude_none=True, exclude={"strict"})
        function.setdefault("parameters", {"type": "object", "properties": {}})
        return {"type": "function", "function": function}


class FunctionName(_Plain):
    name: StrictStr


class NamedTool(_Plain):
    type: Literal["function"]
    function: FunctionName


class CalledFunction(_Plain):
    name: StrictStr
    arguments: StrictStr


class ToolCall(_Plain):
    id: StrictStr
    type: Literal["function"] = "function"
    function: CalledFunction


class ToolMessage(Message):
    """A message that may also hold a model's calls, or the result of one."""

    rules = TOOL_MESSAGE

    role: Literal["system", "developer", "user", "assistant", "tool"]  # type: ignore[assignment]
    content: (  # type: ignore[assignment]
        StrictStr | Annotated[list[TextPart], Field(fail_fast=True)] | None
    ) = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS, fail_fast=True)] | None = None
    tool_call_id: StrictStr | None = None

    def as_dict(self) -> dict[str, Any]:
        """Raises ValueError where arguments are not a JSON object."""
        text = super().as_dict() if self.content is not None else {"role": self.role, "content": ""}
        message: dict[str, Any] = dict(text)
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": arguments_of(call.function.arguments),
                    },
                }
                for call in self.tool_calls
            ]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


def arguments_of(text: str) -> dict[str, Any]:
    """A call's arguments as chat templates expect them. Raises ValueError."""
    try:
        value = json.loads(text or "{}")
    except RecursionError:
        raise ValueError("arguments are nested too deep") from None
    except ValueError as error:
        raise ValueError(f"arguments are no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError("arguments are no JSON object")
    check_depth(value)
    return value


class ToolChatRequest(ChatCompletionRequest):
    """POST /v1/chat/completions, with tools."""

    messages: Annotated[  # type: ignore[assignment]
        list[ToolMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    ]
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: StrictBool | None = None

    def check(self, *args: Any, **kwargs: Any) -> None:
        super().check(*args, **kwargs)
        self._check_messages()
        names = [tool.function.name for tool in self.tools or ()]
        for i, tool in enumerate(self.tools or ()):
            path = f"tools[{i}].function"
            if tool.function.name in names[:i]:
                raise ApiError(400, f"{path}.name is there twice", param=f"{path}.name")
            try:
                check_depth(tool.function.parameters)
                json.dumps(tool.as_dict(), ensure_ascii=False).encode()
            except UnicodeEncodeError:
                text = f"{path} has half of a character (a surrogate)"
                raise ApiError(400, text, param=path) from None
            except ValueError as error:
                path = f"{path}.parameters"
                raise ApiError(400, f"{path} {error}", param=path) from None
        choice = self.tool_choice
        if choice is not None and choice != "none" and not names and choice != "auto":
            raise ApiError(400, "tool_choice needs tools", param="tool_choice")
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            text = f"tool_choice names {choice.function.name[:64]!r}, which is not among tools"
            raise ApiError(400, text, param="tool_choice")

    def _check_messages(self) -> None:
        """Raises ApiError for a message that may not stand where it does."""
        may_answer = False
        for i, message in enumerate(self.messages):
            path = f"messages[{i}]"
            if message.role == "tool" and not may_answer:
                text = "tool must follow a message with tool_calls, or another tool's"
                raise ApiError(400, f"{path}.role: {text}", param=f"{path}.role")
            may_answer = message.role == "tool" or bool(message.tool_calls)
            if message.content is None and not message.tool_calls:
                raise ApiError(400, f"{path}.content: Field required", param=f"{path}.content")
            for name, role in (("tool_calls", "assistant"), ("tool_call_id", "tool")):
                if getattr(message, name) and message.role != role:
                    text = f"{path}.{name} is for role {role}, not {message.role}"
                    raise ApiError(400, text, param=f"{path}.{name}")
            try:
                message.as_dict()
            except ValueError as error:
                path = f"{path}.tool_calls"
                raise ApiError(400, f"{path}: {error}", param=path) from None
