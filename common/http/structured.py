"""What a request says its output must be like: OpenAI's `response_format`, vLLM's `guided_*` and
`structured_outputs`. A request may say it once."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from common.http import neutral
from common.http.errors import ApiError
from common.sampling import shown
from common.structured.compiler import GrammarCompiler, GrammarsBusy
from common.structured.grammar import Grammar

MAX_CHOICES = 1000
ANY_OBJECT = {"type": "object"}


def grammar_of(fields: Mapping[str, Any]) -> tuple[str, Grammar] | None:
    """(the field that asks, the grammar), if one does. Raises ApiError naming the field."""
    asked = [
        name
        for name in READERS
        if not neutral.asks_for_nothing(neutral.REQUEST, name, fields.get(name))
    ]
    if len(asked) > 1:
        raise ApiError(400, f"{asked[1]} and {asked[0]} exclude each other", param=asked[1])
    for name in asked:
        try:
            return name, READERS[name](fields[name])
        except (ValueError, RecursionError) as error:
            reason = str(error) if isinstance(error, ValueError) else "is nested too deep"
            raise ApiError(400, f"{name} {reason}", param=name) from None
    return None


async def compiled(grammars: GrammarCompiler, name: str, grammar: Grammar) -> Grammar:
    """The grammar, when it is known to be usable. Raises ApiError naming the field."""
    try:
        await grammars.check(grammar)
    except GrammarsBusy as error:
        raise ApiError(
            503, f"{name}: {error}", param=name, code="overloaded", headers={"Retry-After": "1"}
        ) from None
    except ValueError as error:
        raise ApiError(400, f"{name} {error}", param=name) from None
    return grammar


def of_json(value: Any) -> Grammar:
    """A schema, or its JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"must be a JSON schema: {error}") from None
    if not isinstance(value, dict | bool):
        raise ValueError(f"must be a JSON schema, not {shown(value)}")
    return Grammar.of_schema(value)


def of_regex(value: Any) -> Grammar:
    return Grammar("regex", text_in(value, "regular expression"))


def of_choices(value: Any) -> Grammar:
    is_list = isinstance(value, list) and 1 <= len(value) <= MAX_CHOICES
    if not is_list or not all(isinstance(item, str) and item for item in value):
        raise ValueError(f"must be a list of 1 to {MAX_CHOICES} texts, not {shown(value)}")
    return Grammar.of_choices(value)


def of_grammar(value: Any) -> Grammar:
    return Grammar("grammar", text_in(value, "grammar"))


def of_response_format(value: Any) -> Grammar:
    keys_in(value, "type", "json_schema")
    kind = value.get("type")
    if kind == "json_object" and value.get("json_schema") is None:
        return Grammar.of_schema(ANY_OBJECT)
    if kind != "json_schema":
        raise ValueError(f"must have type text, json_object or json_schema, not {shown(kind)}")
    inner = value.get("json_schema")
    keys_in(inner, "name", "description", "schema", "strict")
    if not isinstance(inner.get("name"), str) or not inner["name"]:
        raise ValueError(f"must have a name in json_schema, not {shown(inner.get('name'))}")
    if not isinstance(inner.get("strict"), bool | None):  # it is kept to in any case
        raise ValueError(f"must have strict true or false, not {shown(inner['strict'])}")
    if not isinstance(inner.get("schema"), dict):
        raise ValueError(f"must have a schema in json_schema, not {shown(inner.get('schema'))}")
    return Grammar.of_schema(inner["schema"])


def of_structured_outputs(value: Any) -> Grammar:
    keys_in(value, *KINDS)
    given = [name for name, item in value.items() if item is not None and item is not False]
    if len(given) != 1:
        raise ValueError(f"must have one of {', '.join(KINDS)}, not {shown(value)}")
    return KINDS[given[0]](value[given[0]])


def of_json_object(value: Any) -> Grammar:
    if value is not True:
        raise ValueError(f"must have json_object true or false, not {shown(value)}")
    return Grammar.of_schema(ANY_OBJECT)


def text_in(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be a {what}, not {shown(value)}")
    return value


def keys_in(value: Any, *names: str) -> None:
    """Raises ValueError unless this is an object with such keys only."""
    if not isinstance(value, dict) or not value.keys() <= set(names):
        raise ValueError(f"must be an object of {', '.join(names)}, not {shown(value)}")


KINDS: dict[str, Callable[[Any], Grammar]] = {
    "json": of_json,
    "regex": of_regex,
    "choice": of_choices,
    "grammar": of_grammar,
    "json_object": of_json_object,
}
READERS: dict[str, Callable[[Any], Grammar]] = {
    "response_format": of_response_format,
    "guided_json": of_json,
    "guided_regex": of_regex,
    "guided_choice": of_choices,
    "guided_grammar": of_grammar,
    "structured_outputs": of_structured_outputs,
}
