"""Prometheus's and Grafana's files: each expression of the dashboard parses, and names series that the
server gives out, by labels that these have."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from common.http.run import ServerConfig
from common.testing.parts import ROOT, engine_of, folder_of, module_of
from common.testing.server import serving_thread

FOLDER = folder_of(15) / "monitoring"
DASHBOARD = json.loads((FOLDER / "grafana" / "dashboards" / "engine.json").read_text())
TARGETS = [(p["title"], t["expr"]) for p in DASHBOARD["panels"] for t in p["targets"]]
VLLMS_PANELS = {
    "E2E request latency", "Token throughput", "Inter-token latency", "Scheduler state",
    "Time to first token", "KV cache utilisation", "Request prompt length",
    "Request generation length", "Finish reasons", "Queue time", "Prefill and decode time",
    "Max generation tokens",
}  # fmt: skip
LABELS_ADDED = {"job", "instance"}  # by Prometheus


# PromQL, as far as the dashboard speaks it

TOKEN = re.compile(
    r"""\s*(?: (?P<number>\d+(?:\.\d+)?) | (?P<string>"(?:[^"\\]|\\.)*")
    | (?P<range>\[[^\]]+\]) | (?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*) | (?P<sign>=~|!~|!=|[-+*/(){},=]) )""",
    re.VERBOSE,
)
AGGREGATIONS = {"sum", "avg", "max", "min", "count"}
FUNCTIONS = {"rate", "increase", "histogram_quantile"}
DURATION = re.compile(r"\[(\d+[smh]|\$__rate_interval)\]")


class PromQL:
    """Parses an expression; `series` has (name, labels asked for, labels kept by its aggregation)."""

    def __init__(self, text: str) -> None:
        self.tokens: list[tuple[str, str]] = []
        self.series: list[tuple[str, set[str]]] = []
        place = 0
        while place < len(text.rstrip()):
            match = TOKEN.match(text, place)
            assert match and match.lastgroup, f"no token at {text[place:]!r}"
            self.tokens.append((match.lastgroup, match[match.lastgroup]))
            place = match.end()
        self.expression()
        assert not self.tokens, f"left over: {self.tokens}"

    def peek(self) -> str:
        return self.tokens[0][1] if self.tokens else ""

    def take(self, *wanted: str) -> str:
        kind, text = self.tokens.pop(0) if self.tokens else ("end", "")
        assert kind in wanted or text in wanted, f"{text!r} where {wanted} should be"
        return text

    def expression(self) -> None:
        self.term()
        while self.peek() in ("+", "-", "*", "/"):
            self.take("sign")
            if self.peek() in ("ignoring", "on"):
                self.take("name")
                self.names()
                if self.peek() in ("group_left", "group_right"):
                    self.take("name")
                    self.names()
            self.term()

    def term(self) -> None:
        if self.peek() == "(":
            return self.within(self.expression)
        if self.tokens[:1] and self.tokens[0][0] == "number":
            self.take("number")
            return None
        name = self.take("name")
        if name in AGGREGATIONS:
            before, kept = len(self.series), set()
            if self.peek() == "by":
                self.take("by")
                kept = self.names()
            self.within(self.expression)
            for _, labels in self.series[before:]:
                labels |= kept
        elif name in FUNCTIONS:
            self.within(self.arguments)
        else:
            self.selector(name)
        return None

    def within(self, inner: Any) -> None:
        self.take("(")
        inner()
        self.take(")")

    def arguments(self) -> None:
        self.expression()
        while self.peek() == ",":
            self.take(",")
            self.expression()

    def names(self) -> set[str]:
        found: set[str] = set()
        self.take("(")
        while self.peek() != ")":
            found.add(self.take("name"))
            if self.peek() == ",":
                self.take(",")
        self.take(")")
        return found

    def selector(self, name: str) -> None:
        assert self.peek() != "(", f"{name} is no function that is known here"
        labels: set[str] = set()
        if self.peek() == "{":
            self.take("{")
            while self.peek() != "}":
                labels.add(self.take("name"))
                self.take("=", "=~", "!=", "!~")
                self.take("string")
                if self.peek() == ",":
                    self.take(",")
            self.take("}")
        if self.tokens[:1] and self.tokens[0][0] == "range":
            assert DURATION.fullmatch(self.take("range"))
        self.series.append((name, labels))


@pytest.fixture(scope="module")
def series() -> Iterator[dict[str, set[str]]]:
    """Name of each series that a server with everything on gives out -> its labels."""
    engine = engine_of(
        15, "random:tiny-llama", threads=1, speculative="ngram", offload="both", prefix_cache="hash"
    )
    app = module_of(15, "server").create_app(engine, ServerConfig(port=0))
    with serving_thread(app) as url:
        body = {"prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200
        families = list(text_string_to_metric_families(httpx.get(f"{url}/metrics").text))
    found: dict[str, set[str]] = {}
    for sample in (sample for family in families for sample in family.samples):
        found.setdefault(sample.name, set()).update(sample.labels)
    yield found


@pytest.mark.parametrize(("title", "expression"), TARGETS)
def test_expressions_name_what_is_exported(
    title: str, expression: str, series: dict[str, set[str]]
) -> None:
    parsed = PromQL(expression)
    assert parsed.series, "a panel without a series"
    for name, labels in parsed.series:
        assert name in series, f"{title}: {name} is not exported"
        assert labels <= series[name] | LABELS_ADDED, f"{title}: {name} has no {labels}"


@pytest.mark.parametrize(
    "wrong",
    [
        "sum(rate(a[5m])",
        "rate(a{model_name=x}[5m])",
        "a a",
        "rat(a)",
        "a / ",
        "sum by le (a)",
        "a{b='c'}",
        "rate(a[5 minutes])",
    ],
)
def test_the_parser_refuses(wrong: str) -> None:
    with pytest.raises(AssertionError):
        PromQL(wrong)


def test_the_check_can_fail(series: dict[str, set[str]]) -> None:
    """vLLM's old name, and a label of another metric."""
    [(name, _)] = PromQL("vllm:gpu_cache_usage_perc").series
    assert name not in series
    [(name, labels)] = PromQL("sum by (reason) (vllm:num_requests_running)").series
    assert name in series and not labels <= series[name]


def test_the_dashboard_is_whole() -> None:
    titles = [panel["title"] for panel in DASHBOARD["panels"]]
    assert set(titles) >= VLLMS_PANELS and len(set(titles)) == len(titles)
    assert any("acceptance" in title for title in titles)
    assert any("hit rate" in title for title in titles)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(titles)
    places = {(p["gridPos"]["x"], p["gridPos"]["y"]) for p in DASHBOARD["panels"]}
    assert len(places) == len(titles), "panels lie on each other"
    variables = {entry["name"] for entry in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD["panels"]))) - {"__rate_interval"}
    assert used == variables
    for panel in DASHBOARD["panels"]:
        assert panel["type"] in ("timeseries", "heatmap") and panel["description"].endswith(".")
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    queries = [entry["query"] for entry in DASHBOARD["templating"]["list"]]
    [query] = [query["query"] for query in queries if isinstance(query, dict)]
    assert query == "label_values(vllm:num_requests_running, model_name)"


def test_one_port_everywhere() -> None:
    """What the server listens on by default is scraped; what Prometheus listens on is Grafana's source."""
    scraped = re.findall(r'targets: \["([\d.:]+)"\]', (FOLDER / "prometheus.yml").read_text())
    assert scraped == [f"{ServerConfig().host}:{ServerConfig().port}"]
    source = FOLDER / "grafana" / "provisioning" / "datasources" / "prometheus.yml"
    assert "url: http://127.0.0.1:9090" in source.read_text()
    assert "127.0.0.1:$(or $(PORT),9090)" in (ROOT / "Makefile").read_text()
    provider = FOLDER / "grafana" / "provisioning" / "dashboards" / "engine.yml"
    assert "path: $ENGINE_DASHBOARDS" in provider.read_text()


def test_make_monitor_without_prometheus(tmp_path: Path) -> None:
    """One line that says which package to install."""
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    for name in ("sh", "echo", "mktemp", "ls", "tail", "sed", "uname"):
        if found := shutil.which(name):
            (tmp_path / name).symlink_to(found)
    environment = {**os.environ, "PATH": str(tmp_path)}
    command = [make, "--no-print-directory", "monitor"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "prometheus is not installed: sudo apt install prometheus" in done.stderr
    assert done.stdout == ""


needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)"
)


@needs_promtool
def test_promtool_takes_the_configuration() -> None:
    command = ["promtool", "check", "config", str(FOLDER / "prometheus.yml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_promtool_takes_every_expression(tmp_path: Path) -> None:
    rules = [
        {"record": f"rule{n}", "expr": text.replace("$__rate_interval", "5m")}
        for n, (_, text) in enumerate(TARGETS)
    ]
    path = tmp_path / "rules.yml"  # JSON is YAML
    path.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(TARGETS)} rules found" in done.stdout
