"""Jinja's sandbox with a bound on what one operation of a chat template may build.

A template's time is limited line by line, and its text is measured when it is there. Neither helps
against `'a' * 10**10`, which is one call into C that takes ten gigabytes. So the size of a product, a
sum, a power, a format and a `~` is computed first, and numbers are limited that are given to what
pads. Not everything is seen (`replace` may grow a text a thousandfold, and a list that holds
itself twice, forty times over, is small until it is written): a checkpoint that is not trusted
belongs into a container with a limit of memory.

What a template writes is a `TracedText`: it says of each character whether the template's author
wrote it or a message brought it in.
"""

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from common.models.traced_text import TracedText, given, own

LIMIT = 1 << 24  # characters or items of one result, and a number that may be a width
ROLES = ("system", "developer", "user", "assistant", "tool")
PADDING = ("batch", "center", "format", "indent", "tojson")  # filters
WIDTH_IN_BRACES = r"\{[^{}]+\{"
BIT = 256  # characters that a bit of an integer counts for: a product of long ones takes long


class _Generator(CodeGenerator):
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """`a ~ b`, by the environment and not by jinja's function, which asks nobody."""
        self.write("environment.join_texts((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Const(self, node: nodes.Const, frame: Frame) -> None:
        self.write(self._source(node.as_const(frame.eval_ctx)))

    def _output_const_repr(self, group: Iterable[Any]) -> str:
        return self._source("".join(group))

    def _source(self, value: Any) -> str:
        """Python's source of a constant; a text is in the environment's table, marked as own."""
        if isinstance(value, list):
            return f"[{', '.join(map(self._source, value))}]"
        if isinstance(value, tuple):
            return f"({''.join(self._source(item) + ', ' for item in value)})"
        if isinstance(value, dict):
            items = (f"{self._source(k)}: {self._source(v)}" for k, v in value.items())
            return f"{{{', '.join(items)}}}"
        if not isinstance(value, str) or hasattr(value, "__html__"):
            return repr(value)
        texts = self.environment.own_texts  # type: ignore[attr-defined]
        texts.append(own(value))
        return f"environment.own_texts[{len(texts) - 1}]"


class _Template(ImmutableSandboxedEnvironment.template_class):  # type: ignore[misc, name-defined]
    """A template that the sandbox has compiled."""

    def render(self, *args: Any, **kwargs: Any) -> str:
        """Special tokens and known roles count as the template's own, all else as given."""
        variables = dict(*args, **kwargs)
        for name, value in variables.items():
            if name.endswith("_token") and isinstance(value, str):
                variables[name] = own(value)
            elif name == "messages":
                variables[name] = [_traced_message(message) for message in value]
            else:
                variables[name] = given(value)
        return super().render(variables)


def _traced_message(message: dict[str, Any]) -> dict[str, Any]:
    traced = given(message)
    if message.get("role") in ROLES:
        traced["role"] = own(message["role"])
    return traced


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """Raises OverflowError where a template would build too much at once."""

    code_generator_class = _Generator
    template_class = _Template
    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.own_texts: list[TracedText] = []  # the constants of its templates

    def from_string(self, *args: Any, **kwargs: Any) -> Any:
        self.filters |= {name: _bounded(name, self.filters[name]) for name in PADDING}
        self.filters["join"] = _joined(self.filters["join"])
        return super().from_string(*args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _check(_result_size(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(getattr(__obj, "__self__", None), str | bytes | int):
            _check_numbers((*args, *kwargs.values()))
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if (format := super().wrap_str_format(value)) is None:
            return None

        @functools.wraps(format)
        def bounded(*args: Any, **kwargs: Any) -> str:
            maps = [arg.values() for arg in args if isinstance(arg, dict)]
            values = (*args, *kwargs.values(), *(value for map in maps for value in map))
            _check_format(value.__self__, values, WIDTH_IN_BRACES)
            return format(*args, **kwargs)

        return bounded

    def join_texts(self, parts: tuple[Any, ...]) -> str:
        _check(sum(_size(part) for part in parts))
        return self.concat(map(str, parts))

    def concat(self, parts: Iterable[str]) -> str:  # type: ignore[override]
        """What a template, a macro or a block has written, put together."""
        return own("").join(parts)


def _check(size: int) -> None:
    if size > LIMIT:
        raise OverflowError(f"a result of size {size}")


def _check_numbers(values: tuple[Any, ...]) -> None:
    _check(max((abs(value) for value in values if isinstance(value, int)), default=0))


def _check_format(format: Any, values: tuple[Any, ...], width: str) -> None:
    """width: the pattern of a width that is one of the values."""
    _check(max((int(digits[:20]) for digits in re.findall(r"\d+", str(format))), default=0))
    if re.search(width, str(format)):
        _check_numbers(values)


def _bounded(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that takes no number beyond the limit; its marks for jinja stay."""

    @functools.wraps(call)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        if name == "format":
            _check_format(args[0], (*args[1:], *kwargs.values()), r"\*")
        else:
            _check_numbers((*args[1:], *kwargs.values()))
        return call(*args, **kwargs)

    return bounded


def _joined(join: Callable[..., Any]) -> Callable[..., Any]:
    """The filter `join`, also traced where the text between is jinja's default."""

    @functools.wraps(join)
    def joined(eval_ctx: Any, value: Any, d: str = "", attribute: Any = None) -> Any:
        is_plain = type(d) is str
        return join(eval_ctx, value, TracedText(d) if is_plain else d, attribute)

    return joined


def _size(value: Any) -> int:
    """Characters or items, and of an integer its bits in their place."""
    if isinstance(value, int):
        return BIT * value.bit_length()
    return len(value) if isinstance(value, str | bytes | list | tuple) else 0


def _result_size(operator: str, left: Any, right: Any) -> int:
    """At most so large is what an operator makes; 0 where it does not grow."""
    numbers = isinstance(left, int), isinstance(right, int)
    if operator == "+" or (operator == "*" and all(numbers)):
        return _size(left) + _size(right)
    if operator == "*" and any(numbers):
        return _size(right) * left if numbers[0] else _size(left) * right
    if operator == "**" and all(numbers):
        return _size(left) * right
    if operator == "%" and isinstance(left, str | bytes):
        _check_format(left, right if isinstance(right, tuple) else (right,), r"\*")
    return 0
