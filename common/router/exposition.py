"""Prometheus's text format, read and written line by line: many servers' metrics in one text."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

HEAD = re.compile(r"# (HELP|TYPE) (\S+)")
SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?( .+)", re.DOTALL)
ENGINE = re.compile(r'(?<![^,])engine="(?:[^"\\]|\\.)*",?')


@dataclass
class Family:
    """One metric: what is said about it, and its samples."""

    head: dict[str, str] = field(default_factory=dict)
    samples: list[str] = field(default_factory=list)


def merge(texts: Iterable[tuple[str, str]]) -> str:
    """One text of several servers': (engine, its text). Each sample's label `engine` says whose it is.

    A family stands once, with all its samples, as the format wants it.
    """
    families: dict[str, Family] = {}
    for engine, text in texts:
        name = "\n"
        for line in text.split("\n"):
            if match := HEAD.match(line):
                name = match[2]
                families.setdefault(name, Family()).head.setdefault(match[1], line)
            elif match := SAMPLE.fullmatch(line):
                own = name if match[1].startswith(name) else match[1]
                family = families.setdefault(own, Family())
                labels = ENGINE.sub("", match[2] or "").rstrip(",")
                labels = f'{labels},engine="{engine}"' if labels else f'engine="{engine}"'
                family.samples.append(f"{match[1]}{{{labels}}}{match[3]}")
    lines = [
        line for family in families.values() for line in (*family.head.values(), *family.samples)
    ]
    return "".join(f"{line}\n" for line in lines)


def total(text: str, name: str) -> float | None:
    """The sum of a metric's samples; None where there are none."""
    pattern = re.compile(rf"^{re.escape(name)}(?:\{{.*\}})? ([^ \n]+)", re.MULTILINE)
    values = [float(value) for value in pattern.findall(text)]
    return sum(values) if values else None


def family(name: str, kind: str, text: str, samples: Sequence[tuple[dict[str, str], float]]) -> str:
    """One metric of the router's own. kind: gauge or counter, whose samples end in `_total`."""
    lines = [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
    for labels, value in samples:
        written = ",".join(f'{key}="{escape(item)}"' for key, item in labels.items())
        lines.append(f"{name}{'{' + written + '}' if written else ''} {value:g}")
    return "".join(f"{line}\n" for line in lines)


def escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
