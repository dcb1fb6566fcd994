"""Configs written once: flags, checks, errors; devices and formats; the shapes of known models."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from common.device import DTYPES, resolve_device, usable_cores
from common.http.run import ServerConfig
from common.models.checkpoint import empty_model, iter_weights, load_config, resolve
from common.models.presets import PRESETS
from common.options import option, parse, validate, value_type
from common.testing.parts import distinct_files, module_of


@dataclass(frozen=True)
class Settings:
    name: str = option("a", "a name, 100% of it")
    count: int = option(3, "a number", minimum=1, maximum=10, aliases=("-c", "--num"))
    share: float = option(0.5, "a share", minimum=0.0, maximum=1.0)
    limit: int | None = option(None, "a limit (none)", minimum=2)
    scale: float | None = option(None, "a scale")
    colour: str = option("red", "a colour", choices=("red", "green"))
    use_cache: bool = option(True, "keep things")
    access_log: bool = option(False, "log things")
    internal: int = 7  # no flag: not made with option()

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True)
class Other:
    port: int = option(80, "a port")


def parsed(*argv: str) -> Settings:
    [settings] = parse([Settings], argv, prog="prog")
    return settings


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line with which the process ends."""
    with pytest.raises(SystemExit) as caught:
        parse([Settings, Other], argv, prog="prog")
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("prog: error: ")
    assert captured.err.count("\n") == 1 and captured.err.endswith("\n")
    return captured.err


class TestValidate:
    def test_defaults_are_valid(self) -> None:
        assert dataclasses.asdict(Settings()) == {
            "name": "a",
            "count": 3,
            "share": 0.5,
            "limit": None,
            "scale": None,
            "colour": "red",
            "use_cache": True,
            "access_log": False,
            "internal": 7,
        }

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("name", None, "name must be str, not None"),
            ("name", 5, "name must be str, not 5"),
            ("count", None, "count must be int, not None"),
            ("count", "3", "count must be int, not '3'"),
            ("count", True, "count must be int, not True"),
            ("count", 3.0, "count must be int, not 3.0"),
            ("count", 0, "count must be at least 1, not 0"),
            ("count", 11, "count must be at most 10, not 11"),
            ("share", "0.5", "share must be float, not '0.5'"),
            ("share", False, "share must be float, not False"),
            ("share", -0.1, "share must be at least 0.0, not -0.1"),
            ("share", 2, "share must be at most 1.0, not 2.0"),
            ("share", float("nan"), "share must be a finite number, not nan"),
            ("scale", float("inf"), "scale must be a finite number, not inf"),
            ("scale", 10**400, "scale must be a finite number, not inf"),
            ("scale", "x", "scale must be float, not 'x'"),
            ("limit", 1, "limit must be at least 2, not 1"),
            ("limit", 2.5, "limit must be int, not 2.5"),
            ("colour", "blue", "colour must be one of red, green, not 'blue'"),
            ("colour", None, "colour must be str, not None"),
            ("use_cache", 1, "use_cache must be bool, not 1"),
            ("use_cache", "yes", "use_cache must be bool, not 'yes'"),
            ("internal", "x", "internal must be int, not 'x'"),
        ],
    )
    def test_what_is_wrong_is_said(self, name: str, value: Any, message: str) -> None:
        with pytest.raises(ValueError) as caught:
            Settings(**{name: value})
        assert str(caught.value) == message

    def test_bounds_are_inclusive_and_integers_are_floats(self) -> None:
        for fields in ({"count": 1}, {"count": 10}, {"share": 0}, {"share": 1.0}, {"limit": 2}):
            Settings(**fields)

    def test_unknown_fields_and_changes_are_errors(self) -> None:
        with pytest.raises(TypeError, match="colr"):
            Settings(colr="red")  # type: ignore[call-arg]
        with pytest.raises(dataclasses.FrozenInstanceError):
            Settings().count = 4  # type: ignore[misc]

    def test_types_of_fields(self) -> None:
        types = {f.name: value_type(Settings, f.name) for f in dataclasses.fields(Settings)}
        assert types["limit"] == (int, True)
        assert types["scale"] == (float, True)
        assert types["count"] == (int, False)
        assert types["use_cache"] == (bool, False)


class TestParse:
    def test_no_flags_are_the_defaults(self) -> None:
        assert parsed() == Settings()

    @pytest.mark.parametrize(
        ("argv", "name", "value"),
        [
            (["--name", "b c"], "name", "b c"),
            (["--name="], "name", ""),
            (["--count", "4"], "count", 4),
            (["-c", "4"], "count", 4),
            (["--num=5"], "count", 5),
            (["--share", "1"], "share", 1.0),
            (["--share=1e-3"], "share", 0.001),
            (["--limit", "2"], "limit", 2),
            (["--scale", "-1.5"], "scale", -1.5),
            (["--colour", "green"], "colour", "green"),
            (["--no-use-cache"], "use_cache", False),
            (["--no-use-cache", "--use-cache"], "use_cache", True),
            (["--access-log"], "access_log", True),
        ],
    )
    def test_a_flag_sets_its_field(self, argv: list[str], name: str, value: Any) -> None:
        settings = parsed(*argv)
        assert settings == dataclasses.replace(Settings(), **{name: value})
        assert type(getattr(settings, name)) is type(value)

    def test_underscores_are_dashes(self) -> None:
        """As vLLM takes them; a value keeps its own."""
        [server] = parse([ServerConfig], ["--max_waiting=3", "--served_model_name", "a_b"])
        assert (server.max_waiting, server.served_model_name) == (3, "a_b")

    def test_a_flag_that_two_configs_have_is_the_first_ones(self) -> None:
        @dataclass(frozen=True)
        class First:
            count: int = option(1, "another number", aliases=("--copies",))

        for argv in (["--count", "20"], ["--copies", "20"]):
            first, later = parse([First, Settings], [*argv, "--name", "b"], prog="prog")
            assert (first.count, later.count, later.name) == (20, 3, "b")

    def test_several_configs_from_one_line(self) -> None:
        configs = parse([Settings, Other], ["--port", "8", "--count", "2"], prog="prog")
        assert configs == [Settings(count=2), Other(port=8)]

    @pytest.mark.parametrize(
        ("argv", "words"),
        [
            (["--colr", "red"], ["--colr"]),
            (["--col", "red"], ["--col"]),  # no abbreviations: they change meaning with new flags
            (["--internal", "8"], ["--internal"]),
            (["stray"], ["stray"]),
            (["--count"], ["--count", "expected one argument"]),
            (["--count", "x"], ["--count", "int", "'x'"]),
            (["--count", "1.5"], ["--count", "'1.5'"]),
            (["--num", "11"], ["--count", "at most 10", "11"]),
            (["--count", "0"], ["--count", "at least 1", "0"]),
            (["--share", "nan"], ["--share", "finite", "nan"]),
            (["--share", "1e999"], ["--share", "finite", "inf"]),
            (["--limit", "none"], ["--limit", "'none'"]),
            (["--limit", "-3"], ["--limit", "at least 2", "-3"]),
            (["--colour", "blue"], ["--colour", "'blue'", "green"]),
            (["--use-cache", "yes"], ["yes"]),
            (["--use-cache=no"], ["--use-cache", "'no'"]),
        ],
    )
    def test_a_wrong_flag_is_one_line(
        self, argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        line = error_of(capsys, *argv)
        for word in words:
            assert word in line

    def test_the_flag_of_a_checked_value_is_named_with_dashes(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        @dataclass(frozen=True)
        class Long:
            max_model_len: int = option(5, "tokens", minimum=2)

            def __post_init__(self) -> None:
                validate(self)

        with pytest.raises(SystemExit):
            parse([Long], ["--max-model-len", "1"], prog="prog")
        assert "--max-model-len must be at least 2, not 1" in capsys.readouterr().err

    def test_help_lists_every_flag(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            parse([Settings], ["--help"], prog="prog", description="What it does.")
        assert caught.value.code == 0
        text = capsys.readouterr().out
        words = ["What it does.", "a name, 100% of it (default: a)", "-c", "--num", "red,green"]
        words += ["--no-use-cache", "keep things (default: on)", "log things (default: off)"]
        for word in words:
            assert word in " ".join(text.split()), word
        assert "--internal" not in text
        assert "a limit (none)" in text, "no default is shown for what has none"


@dataclass(frozen=True)
class Related:
    """Fields that mean nothing without another, and fields of which one decides the other."""

    mode: str = option("off", "how", choices=("off", "near", "far"))
    is_on: bool = option(False, "whether")
    distance: int | None = option(None, "how far", 1, 99, needs=("mode", ("near", "far")))
    target: str | None = option(None, "where to", needs=("mode", ("far",)))
    volume: int = option(5, "how loud", 0, needs=("is_on", (True,)))
    weight: int | None = option(None, "kilograms", 1, excludes="size")
    size: int | None = option(None, "litres", 1)

    def __post_init__(self) -> None:
        validate(self)


class TestFieldsThatDependOnOthers:
    @pytest.mark.parametrize(
        "given",
        [
            {},
            {"mode": "near", "distance": 3},
            {"mode": "far", "distance": 3, "target": "x"},
            {"mode": "far"},  # what needs a mode is not needed by it
            {"distance": None, "target": None},
            {"volume": 5},  # as good as not given
            {"is_on": True, "volume": 6},
            {"weight": 3},
            {"size": 3},
        ],
        ids=str,
    )
    def test_what_goes_together(self, given: dict[str, Any]) -> None:
        config = Related(**given)
        assert {name: getattr(config, name) for name in given} == given

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"distance": 3}, "distance is 3: it needs mode to be near or far, not off"),
            (
                {"mode": "near", "target": "x"},
                "target is 'x': it needs mode to be far, not near",
            ),
            ({"target": ""}, "target is '': it needs mode to be far, not off"),
            ({"target": "a\nb"}, "target is 'a\\nb': it needs mode to be far, not off"),
            ({"volume": 0}, "volume is 0: it needs is_on to be True, not False"),
            ({"distance": 0}, "distance must be at least 1, not 0"),  # its own fault comes first
            ({"mode": "up", "distance": 3}, "mode must be one of off, near, far, not 'up'"),
            (
                {"weight": 3, "size": 3},
                "weight and size are both given: one decides the other",
            ),
        ],
        ids=str,
    )
    def test_what_does_not(self, given: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError) as caught:
            Related(**given)
        assert str(caught.value) == message

    @pytest.mark.parametrize(
        ("argv", "line"),
        [
            (["--distance=3"], "--distance is 3: it needs mode to be near or far, not off"),
            (["--target", "a\nb"], "--target is 'a\\nb': it needs mode to be far, not off"),
            (
                ["--size=3", "--weight=3"],
                "--weight and size are both given: one decides the other",
            ),
        ],
    )
    def test_on_the_command_line(
        self, argv: list[str], line: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as caught:
            parse([Related], argv, prog="prog")
        assert caught.value.code == 2
        assert capsys.readouterr().err == f"prog: error: {line}\n"


class TestConfigsOfTheParts:
    @pytest.mark.parametrize("part", distinct_files("config.py"))
    def test_every_field_is_a_flag_and_checked(self, part: int) -> None:
        config_class = module_of(part, "config").EngineConfig
        assert config_class() == parse([config_class], [], prog="prog")[0]
        for field in dataclasses.fields(config_class):
            if field.name == "kv_secret":  # no flag: a command line can be seen by all
                assert not field.metadata and not field.repr
                continue
            assert field.metadata.get("help"), f"{field.name} has no help"
            with pytest.raises(ValueError, match=rf"^{field.name} must be "):
                config_class(**{field.name: [1]})

    @pytest.mark.parametrize("part", distinct_files("config.py"))
    def test_what_a_field_needs_is_a_field_with_such_values(self, part: int) -> None:
        """A name that is mistyped would let any value pass."""
        config_class = module_of(part, "config").EngineConfig
        fields = {field.name: field for field in dataclasses.fields(config_class)}
        for field in filter(lambda field: field.metadata, fields.values()):
            if field.metadata["excludes"] is not None:
                other = fields[field.metadata["excludes"]]
                assert other.default is None and field.default is None, field.name
            name, values = field.metadata["needs"] or (None, ())
            if name is None:
                continue
            other = fields[name]
            possible = other.metadata["choices"]
            if value_type(config_class, name)[0] is bool:
                possible = (True, False)
            assert values and set(values) <= set(possible), field.name
            others = [value for value in possible if value not in values]
            assert others, f"{field.name} would need nothing"
            kind, _ = value_type(config_class, field.name)
            [value] = {kind(field.metadata["minimum"] or 1)} - {field.default} or {2}
            if field.metadata["choices"] is not None:
                value = next(one for one in field.metadata["choices"] if one != field.default)
            given = {field.name: value}
            if other.default in values:
                given[name] = others[0]
            with pytest.raises(ValueError, match=f"^{field.name} is .*: it needs {name} to be "):
                config_class(**given)

    @pytest.mark.parametrize("part", distinct_files("config.py"))
    def test_the_formats_of_devices_are_the_flags(self, part: int) -> None:
        for dtype in DTYPES:
            assert module_of(part, "config").EngineConfig(dtype=dtype).dtype == dtype


class TestDevice:
    def test_a_cpu(self) -> None:
        for dtype, format in (
            ("auto", torch.float32),
            ("float32", torch.float32),
            ("bfloat16", torch.bfloat16),
            ("float16", torch.float16),
        ):
            assert resolve_device("cpu", dtype) == (torch.device("cpu"), format)

    @pytest.mark.parametrize("count", [0, 2])
    def test_auto_is_the_first_gpu_where_there_is_one(
        self, count: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        expected = ("cuda", torch.bfloat16) if count else ("cpu", torch.float32)
        device, dtype = resolve_device("auto")
        assert (device.type, dtype) == expected
        assert resolve_device("auto", "float16")[1] == torch.float16

    def test_gpus_by_number(self, monkeypatch: pytest.MonkeyPatch) -> None:
        current: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        assert resolve_device("cuda") == (torch.device("cuda"), torch.bfloat16)
        assert resolve_device("cuda:1")[0] == torch.device("cuda:1")
        assert current == [torch.device("cuda:1")], "what is put on a GPU without a number"
        with pytest.raises(ValueError, match="'cuda:2', but torch sees 2 GPUs"):
            resolve_device("cuda:2")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        with pytest.raises(ValueError, match="'cuda', but torch sees 0 GPUs"):
            resolve_device("cuda")

    @pytest.mark.parametrize(
        "name",
        ["", "gpu", "CPU", "cpu:0", "cuda:", "cuda:-1", "cuda:x", "cuda:01", "cuda:٣", "meta"],
    )
    def test_other_names(self, name: str) -> None:
        with pytest.raises(ValueError, match="device must be auto, cpu, cuda or cuda:N") as caught:
            resolve_device(name)
        assert repr(name) in str(caught.value)

    @pytest.mark.parametrize("dtype", ["", "float8", "int8", "Tensor", "float64"])
    def test_other_formats(self, dtype: str) -> None:
        """Not whatever torch has under that name."""
        with pytest.raises(ValueError, match="dtype must be one of auto, float32") as caught:
            resolve_device("cpu", dtype)
        assert repr(dtype) in str(caught.value)

    def test_at_least_one_core(self) -> None:
        assert usable_cores() >= 1


# Parameters as the model cards and checkpoints have them, tied embeddings counted once.
PUBLISHED = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "llama-3.2-1b": 1_235_814_400,
    "qwen3-30b-a3b": 30_532_122_624,
}
TINY = [name for name in PRESETS if name.startswith("tiny-")]


class TestPresets:
    @pytest.mark.parametrize("name", PRESETS)
    def test_transformers_knows_the_shape(self, name: str) -> None:
        """Its config class takes our values as they are, and has a model for them."""
        config = load_config(resolve(f"random:{name}"))
        for key, value in PRESETS[name].items():
            if key == "dtype":
                assert config.dtype == getattr(torch, value)
            else:
                assert getattr(config, key) == value, key
        assert type(empty_model(config)).__name__ == PRESETS[name]["architectures"][0]

    @pytest.mark.parametrize("name", [name for name in PRESETS if name not in TINY])
    def test_published_sizes(self, name: str) -> None:
        model = empty_model(load_config(resolve(f"random:{name}")))
        assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]

    @pytest.mark.parametrize("name", TINY)
    def test_tiny_weights_are_wide_enough_to_show_bugs(self, name: str) -> None:
        """At 0.02 a tied model repeats one token for ever. And they are the same every time."""
        folder = resolve(f"random:{name}")
        weights = dict(iter_weights(folder))
        assert sum(w.numel() for w in weights.values()) < 300_000
        for key, weight in weights.items():
            around = 1.0 if key.endswith("norm.weight") else 0.0
            assert abs(weight.std().item() - 0.2) < (0.08 if weight.numel() < 500 else 0.02), key
            assert abs(weight.mean().item() - around) < (0.15 if weight.numel() < 500 else 0.02), (
                key
            )
        again = dict(iter_weights(folder))
        assert weights.keys() == again.keys()
        assert all(torch.equal(weight, again[key]) for key, weight in weights.items())
        values = [tuple(weight.flatten()[:4].tolist()) for weight in weights.values()]
        assert len(set(values)) == len(values), "no two weights are the same numbers"
