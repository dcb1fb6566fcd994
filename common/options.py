"""Command lines and validation from a frozen dataclass, so that a config field is written once.

A field made with `option(default, help, ...)` becomes a flag of the same name (`max_model_len` is
`--max-model-len`), is checked against its type and bounds by `validate`, and is described by
`--help`. Unknown flags and unknown fields are errors.
"""

import argparse
import dataclasses
import json
import math
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NoReturn, Protocol, TypeVar

Config = TypeVar("Config")


def option(
    default: Any,
    help: str,
    minimum: float | None = None,
    maximum: float | None = None,
    *,
    choices: Sequence[Any] | None = None,
    aliases: Sequence[str] = (),
    needs: tuple[str, Sequence[Any]] | None = None,
    excludes: str | None = None,
) -> Any:
    """A dataclass field that is also a command-line flag.

    `minimum` and `maximum` are inclusive. `aliases` are further flags, such as `--tp`. `needs` is
    another field and the values of it without which this one would have no effect: giving it then
    is an error. So is giving it together with the field that it `excludes`.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
        "aliases": tuple(aliases),
        "needs": needs,
        "excludes": excludes,
    }
    return dataclasses.field(default=default, metadata=metadata)


@cache
def type_hints(config_class: type) -> dict[str, Any]:
    """Evaluated once: with each of its fields it would take milliseconds."""
    return typing.get_type_hints(config_class)


def value_type(config_class: type, name: str) -> tuple[type, bool]:
    """(the type of a field's value, whether None is allowed): `int | None` gives (int, True), and
    `tuple[str, ...]`, a flag that may be repeated, (tuple, False)."""
    hint = type_hints(config_class)[name]
    if typing.get_origin(hint) is tuple:
        return tuple, False
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        return kinds[0], True
    return hint, False


def validate(config: Any) -> None:
    """Check every field of a config against its type, choices and bounds.

    Raises ValueError that names the field and the value; unlike an assert it survives `python -O`.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        kind, optional = value_type(type(config), field.name)
        if value is None and optional:
            continue
        if kind is float and type(value) is int:
            value = float(value) if abs(value) < 2**1000 else math.inf
        if type(value) is not kind:
            raise ValueError(f"{field.name} must be {kind.__name__}, not {value!r}")
        if kind is float and not math.isfinite(value):
            raise ValueError(f"{field.name} must be a finite number, not {value!r}")
        choices = field.metadata.get("choices")
        if choices is not None and value not in choices:
            listed = ", ".join(map(str, choices))
            raise ValueError(f"{field.name} must be one of {listed}, not {value!r}")
        minimum, maximum = field.metadata.get("minimum"), field.metadata.get("maximum")
        if minimum is not None and value < minimum:
            raise ValueError(f"{field.name} must be at least {minimum}, not {value!r}")
        if maximum is not None and value > maximum:
            raise ValueError(f"{field.name} must be at most {maximum}, not {value!r}")
        check_other_fields(config, field, value)


def check_other_fields(config: Any, field: dataclasses.Field[Any], value: Any) -> None:
    """Raises ValueError where a field that is given needs another, or excludes it."""
    if value == field.default:
        return
    other, values = field.metadata.get("needs") or (None, ())
    if other is not None and getattr(config, other) not in values:
        raise ValueError(
            f"{field.name} is {value!r}: it needs {other} to be {' or '.join(map(str, values))},"
            f" not {getattr(config, other)}"
        )
    other = field.metadata.get("excludes")
    if other is not None and getattr(config, other) is not None:
        raise ValueError(f"{field.name} and {other} are both given: one decides the other")


def add_flags(parser: argparse.ArgumentParser, config_class: type) -> None:
    """Add one flag a field of `config_class` to `parser`, in the order of the fields; none for a
    field that a class before has as well."""
    group = parser.add_argument_group(config_class.__name__)
    known = {action.dest for action in parser._actions}
    for field in dataclasses.fields(config_class):
        if "help" not in field.metadata or field.name in known:
            continue
        kind, _ = value_type(config_class, field.name)
        flags = ["--" + field.name.replace("_", "-"), *field.metadata["aliases"]]
        text = field.metadata["help"].replace("%", "%%")
        keywords: dict[str, Any] = {"dest": field.name, "default": field.default, "help": text}
        if field.default not in (None, "", ()) and kind is not bool:
            keywords["help"] += f" (default: {field.default})"
        if kind is bool:
            keywords["action"] = argparse.BooleanOptionalAction
            if field.default is not None:
                keywords["help"] += f" (default: {'on' if field.default else 'off'})"
        elif kind is tuple:
            keywords |= {"action": "append", "default": [], "metavar": field.name.upper()}
        else:
            keywords["type"] = kind
            keywords["metavar"] = field.name.rpartition("_")[2].upper()
            if field.metadata["choices"] is not None:
                keywords["choices"] = field.metadata["choices"]
                keywords.pop("metavar")
        group.add_argument(*flags, **keywords)


class Preset(Protocol):
    """Values for flags that are not given."""

    about: str

    def values(self, device: str) -> Mapping[str, Any]:
        """By field; those for a device by its name. Raises ValueError."""


def add_preset_flags(parser: argparse.ArgumentParser, presets: Mapping[str, Preset]) -> None:
    """`--preset`, whose names and meanings `--help` lists, and `--print-config`."""
    group = parser.add_argument_group(
        "presets", "; ".join(f"{name}: {preset.about}" for name, preset in presets.items())
    )
    group.add_argument("--preset", choices=presets, help="values for flags that are not given")
    group.add_argument(
        "--print-config", action="store_true", help="print all settings as JSON, and end"
    )


def preset_of(presets: Mapping[str, Preset], words: Sequence[str]) -> Mapping[str, Any]:
    """The values of the preset that a command line asks for; none where it asks for none, or wrongly."""
    try:
        preset = presets.get(peek("preset", words) or "")
        return preset.values(peek("device", words) or "auto") if preset else {}
    except ValueError:  # of a device: whoever asks for it again, with all else, says so
        return {}


def fill_in(
    values: dict[str, Any], preset: Mapping[str, Any], config_classes: Sequence[type]
) -> None:
    """Give the fields that are NOT_GIVEN the preset's values, but for those that mean nothing beside what
    is given: `--offload off` also sends away the size of what it turns off."""
    fields = {f.name: f for c in reversed(config_classes) for f in dataclasses.fields(c)}
    missing = [name for name, value in values.items() if value is NOT_GIVEN]
    values |= {name: preset[name] for name in missing}
    for name in missing:
        other, allowed = fields[name].metadata["needs"] or (None, ())
        if other is not None and values[other] not in allowed:
            values[name] = fields[name].default


def print_configs(configs: Sequence[Any]) -> None:
    """All settings that are flags, in one JSON object. Keys are shown as `***`."""
    shown = {}
    for config in configs:
        config = config.here() if hasattr(config, "here") else config
        for field in dataclasses.fields(config):
            if "help" in field.metadata:
                value = getattr(config, field.name)
                is_secret = field.name.endswith("api_key") and value is not None
                shown.setdefault(field.name, "***" if is_secret else value)
    print(json.dumps(shown, indent=2))


NOT_GIVEN = object()


class _Parser(argparse.ArgumentParser):
    """argparse without the paragraph of usage above each error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def _with_dashes(word: str) -> str:
    """A flag written with underscores, `--max_model_len=100`, as it is written here."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def peek(name: str, argv: Sequence[str] | None = None) -> str | None:
    """What `argv` gives as a flag's value, before anything is known of the others; None: nothing."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--" + name.replace("_", "-"), dest=name, nargs="?")
    words = sys.argv[1:] if argv is None else argv
    known, _ = parser.parse_known_args([_with_dashes(word) for word in words])
    return getattr(known, name)


def parse(
    config_classes: Sequence[type[Config]],
    argv: Sequence[str] | None = None,
    *,
    description: str = "",
    prog: str | None = None,
) -> list[Config]:
    """Parse `argv` into one instance of each class. A field that several of them have is the first
    one's, and has its default in the others.

    A class may have `presets`, by name: then `--preset` fills in what is not given, and
    `--print-config` prints what comes of it, where the class has a method `here` with what that
    resolves on this machine, and ends the process.

    A wrong flag or value ends the process with one line on standard error and exit status 2.
    """
    if prog is None:
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        prog = f"python -m {spec.name}" if spec else None
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    for config_class in config_classes:
        add_flags(parser, config_class)
    presets = next((c.presets for c in config_classes if hasattr(c, "presets")), {})
    if presets:
        add_preset_flags(parser, presets)
    words = [_with_dashes(word) for word in (sys.argv[1:] if argv is None else argv)]
    flags = {action.dest for action in parser._actions}
    preset = {n: value for n, value in preset_of(presets, words).items() if n in flags}
    blank = argparse.Namespace(**dict.fromkeys(preset, NOT_GIVEN))  # argparse lets it be
    values = vars(parser.parse_args(words, blank))
    values = {n: tuple(value) if type(value) is list else value for n, value in values.items()}
    given = {name for name, value in values.items() if value is not NOT_GIVEN}
    fill_in(values, preset, config_classes)
    configs = []
    try:
        for config_class in config_classes:
            names = [field.name for field in dataclasses.fields(config_class)]
            configs.append(config_class(**{n: values.pop(n) for n in names if n in values}))
        if values.get("print_config"):
            print_configs(configs)
            parser.exit(0)
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        named = {n: v for n, v in preset.items() if n in str(error) and n not in given}
        told = ", ".join(f"{n} {v}" for n, v in named.items())
        rest += f" (--preset {peek('preset', words)} has {told})" if told else ""
        parser.exit(2, f"{parser.prog}: error: --{name.replace('_', '-')} {rest}\n")
    return configs
