"""Jinja's sandbox with a bound on what one operation of a chat template may build.

A template's time is limited line by line, and its text is measured when it is there. Neither helps
against `'a' * 10**10`, which is one call into C that takes ten gigabytes. So the size of a product, a
sum, a power, a format and a `~` is computed first, and numbers are limited that are given to what
pads. Not everything is seen (`replace` may grow a text a thousandfold, and a list that holds
itself twice, forty times over, is small until it is written): a checkpoint that is not trusted
belongs into a container with a limit of memory.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import Context, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment

LIMIT = 1 << 24  # characters or items of one result, and a number that may be a width
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


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """Raises OverflowError where a template would build too much at once."""

    code_generator_class = _Generator
    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def from_string(self, *args: Any, **kwargs: Any) -> Any:
        self.filters |= {name: _bounded(name, self.filters[name]) for name in PADDING}
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
        return str_join(parts)


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
