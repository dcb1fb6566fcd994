"""`formats`: its arithmetic, its table and its picture, and one real engine. No assertion on time."""

import gc
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from part14.config import EngineConfig
from part14.quantization import FORMATS

from common.bench import BenchError
from common.bench.__main__ import main
from common.bench.core.results import load_result, make_result, save_result
from common.bench.quantized import run as formats
from common.bench.quantized import variants as format_variants
from common.bench.quantized.plot import draw_formats, front
from common.bench.quantized.rows import bandwidth_share, columns, kv_bits, read_quality
from common.bench.quantized.sizes import (
    LAYOUTS,
    checkpoint_shapes,
    formats_of,
    looked_up_bytes,
    model_bytes,
)
from common.bench.quantized.variants import FormatVariant, empty_caches
from common.bench.quantized.worker import PrivateMemory, formats_job

LIMITS = {"device": "cpu", "read_gbps": 10.0, "fp32_gflops": 100.0, "bf16_tflops": None}
SHAPES = {
    "model.embed_tokens.weight": (50, 64),
    "model.layers.0.self_attn.q_proj.weight": (64, 64),
    "model.layers.0.mlp.down_proj.weight": (64, 128),
    "model.norm.weight": (64,),
}


# Bytes


def test_every_format_has_its_arithmetic() -> None:
    assert LAYOUTS.keys() == FORMATS.keys()
    weight = torch.randn(6, 256, generator=torch.Generator().manual_seed(0))
    for name, quantize in FORMATS.items():
        assert quantize(weight).nbytes == LAYOUTS[name].num_bytes(6, 256), name


def test_a_models_bytes_by_hand() -> None:
    assert model_bytes(SHAPES, {}) == 4 * (50 * 64 + 64 * 64 + 64 * 128 + 64)
    layers = 64 * 64 + 64 * 128
    half = layers / 2 + layers / 32 * 2
    embedding = 50 * 64 * (1 + 2 / 32)
    assert model_bytes(SHAPES, {"quantization": "int4"}) == half + embedding + 4 * 64
    chosen = {"quantization": "int4", "quantize_embeddings": "off"}
    assert model_bytes(SHAPES, chosen) == half + 4 * (50 * 64 + 64)
    assert formats_of({"quantize_embeddings": "int8"}) == ("off", "int8")
    assert looked_up_bytes(SHAPES, chosen) == 0  # the embedding is the head, and read whole
    untied = SHAPES | {"lm_head.weight": (50, 64)}
    assert looked_up_bytes(untied, chosen) == 4 * 50 * 64


def test_a_real_engine_has_the_bytes_of_the_formula() -> None:
    """And decodes what it is asked to."""
    fields = {"quantization": "int8", "quantize_embeddings": "int8", "kv_cache_dtype": "auto"}
    settings = {"kernels": "reference", "device": "cpu", "threads": 1, "max_num_seqs": 3}
    job = {"part": 14, "model": "random:tiny-llama", "settings": settings | fields}
    work = {"prompt_len": 5, "output_len": 4, "batch_sizes": [3, 1], "seed": 0}
    answer = formats_job(job | work)
    shapes = checkpoint_shapes("random:tiny-llama")
    assert answer["weight_bytes"] == model_bytes(shapes, fields)
    assert answer["weight_bytes"] != model_bytes(shapes, fields | {"quantize_embeddings": "off"})
    assert kv_bits(answer) == 32 and answer["load_private_mib"] >= 0
    runs = answer["runs"]
    assert list(runs) == ["batch 3", "batch 1"]
    assert runs["batch 1"]["num_tokens"] == 3  # without the first, which the prompt gives
    assert runs["batch 3"]["num_tokens"] >= 6 and all(run["seconds"] > 0 for run in runs.values())


def test_private_memory_is_seen() -> None:
    gc.collect()  # what earlier tests left would go meanwhile
    with PrivateMemory() as memory:
        held = torch.ones(32 << 20)  # 128 MiB
    assert 90 < memory.growth < 170 and held.numel()
    with PrivateMemory() as memory:
        del held
    assert memory.growth < 40


# Rows


def scripted(name: str, settings: dict[str, Any], **facts: Any) -> FormatVariant:
    found = FormatVariant(name, lambda work: {}, 2, settings=settings)
    found.facts = {"weight_bytes": 1000, "token_bytes": 10, "shape": None, "rss_mib": 1.0, **facts}
    found.rates = {"batch 4": {0: 30.0, 1: 50.0}, "batch 2": {0: 20.0, 1: 20.0}}
    return found


def test_the_share_of_the_read_limit_by_hand() -> None:
    variant = scripted("int8", {"quantization": "int8"})
    share = bandwidth_share(variant, SHAPES, 10.0, prompt_len=30, output_len=20)
    assert share == pytest.approx(100 * (1000 + 2 * 40 * 10) / (2 / 20.0) / 10e9)
    untied = SHAPES | {"lm_head.weight": (50, 64)}
    unread = looked_up_bytes(untied, variant.settings)
    variant.facts["weight_bytes"] += unread
    assert bandwidth_share(variant, untied, 10.0, 30, 20) == pytest.approx(share)
    file = scripted("file", {"model": "somewhere"})
    assert bandwidth_share(file, SHAPES, 10.0, 30, 20) == pytest.approx(share)
    assert bandwidth_share(file, untied, 10.0, 30, 20) is None


def test_the_front_is_what_nothing_beats() -> None:
    rows = [{"x": x, "kl": kl} for x, kl in itertools.product((1, 2, 3), (0.1, 0.2))]
    assert front(rows, "x", least=True) == [{"x": 1, "kl": 0.1}]
    assert front(rows, "x", least=False) == [{"x": 3, "kl": 0.1}]
    rows = [{"x": 1, "kl": 0.3}, {"x": 2, "kl": 0.2}, {"x": 2, "kl": 0.25}, {"x": 3, "kl": 0.1}]
    assert front(rows, "x", least=True) == [rows[0], rows[1], rows[3]]
    assert front(rows, "x", least=False) == [rows[3]]
    assert front([rows[0]] * 2, "x", least=True) == [rows[0]] * 2  # equals do not beat each other


def test_the_picture_names_every_point_and_no_name_hides_another() -> None:
    """Two of them coincide, and one is a checkpoint, of which the front does not know."""
    points = [("int4", 5.4, 0.36, 40), ("int4+int8", 5.4, 0.36, 60), ("int8", 8.1, 0.003, 50)]
    points += [("q4_1+int8", 5.7, 0.0035, 70), ("fp32", 32.0, 0.0, 30)]
    unknown = dict.fromkeys((entry["key"] for entry in columns([1, 4])), None)
    rows = []
    for name, bits, kl, rate in points:
        found = {"variant": name, "bits": bits, "kl": kl, "rate_1": rate, "rate_4": 3 * rate}
        rows.append(unknown | found | {"settings": ""})
    rows[1]["settings"] = "quantization=int4, activations=int8"
    rows[3]["settings"] = "model=smollm2-135m-q4_1, activations=int8"
    result = make_result("Formats", columns([1, 4]), rows, limits={"unmeasured": "no need"})
    figure = Figure(figsize=(13, 6.4))
    FigureCanvasAgg(figure)
    draw_formats(figure, result)
    assert len(figure.axes) == 3
    for panel in figure.axes:
        names = [text for text in panel.texts if isinstance(text, Annotation)]
        assert {text.get_text() for text in names} == {name for name, *_ in points[:-1]}
        boxes = [Text.get_window_extent(text) for text in names]
        pairs = itertools.combinations(boxes, 2)
        assert not any(first.overlaps(second) for first, second in pairs)
        (steps,) = (line for line in panel.lines if line.get_drawstyle().startswith("steps"))
        assert 0.0035 not in steps.get_ydata() and 0.003 in steps.get_ydata()


# The command


def saved_quality(path: Path, *names: str) -> Path:
    keys = ("variant", "perplexity", "kl", "same")
    columns = [{"key": key, "label": key, "unit": "", "digits": 1} for key in keys]
    rows = [
        {"variant": name, "perplexity": 20.0 + i, "kl": 0.1 / (1 + i), "same": 90.0 + i}
        for i, name in enumerate(names)
    ]
    save_result(path, make_result("Quality", columns, rows, limits={"unmeasured": "no need"}))
    return path


@pytest.fixture
def caches() -> dict[str, list[str]]:
    """Where each variant's workers keep quantised weights, start after start."""
    return {}


@pytest.fixture
def played(
    monkeypatch: pytest.MonkeyPatch, caches: dict[str, list[str]]
) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Workers that answer at once; mxfp4's does not start. Yields the jobs they were given."""
    jobs: list[tuple[str, dict[str, Any]]] = []

    def run_json(
        command: list[str], job: dict[str, Any], environment: dict[str, str], name: str, *rest: Any
    ) -> dict[str, Any]:
        assert Path(environment["FIFTEEN_ENGINES_CACHE"]).is_dir()
        caches.setdefault(name, []).append(environment["FIFTEEN_ENGINES_CACHE"])
        jobs.append((name, job))
        if name == "mxfp4":
            raise BenchError("mxfp4 failed: no such luck")
        speed = 1.0 + len(jobs)
        return {
            "runs": {
                f"batch {size}": {"num_tokens": 10 * size, "seconds": 1 / speed}
                for size in job["batch_sizes"]
            },
            "construct_s": 9.0 if not job["batch_sizes"] else 2.0,
            "load_peak_mib": 5.0, "load_private_mib": 4.0, "rss_mib": 7.0,
            "weight_bytes": int(model_bytes(SHAPES, job["settings"])),
            "token_bytes": 40, "shape": None, "device": "cpu", "wall_other_cores": 0.0,
        }  # fmt: skip

    monkeypatch.setattr(format_variants, "run_json", run_json)
    monkeypatch.setattr(formats, "run_worker", lambda job: LIMITS)
    monkeypatch.setattr(formats, "checkpoint_shapes", lambda model: SHAPES)
    yield jobs


def test_formats_from_first_starts_to_the_picture(
    played: list[tuple[str, dict[str, Any]]],
    caches: dict[str, list[str]],
    tmp_path: Path,
    capsys: Any,
) -> None:
    quality = saved_quality(tmp_path / "q.json", "int4", "int8+int8", "own", "reference")
    flags = ["formats", "--only", "fp32", "mxfp4", "int4", "int8+int8", "--quality", str(quality)]
    flags += ["--variant", "own:quantization=int4-g64,threads=1", "--batch-sizes", "4", "1"]
    flags += ["--pairs", "2", "--set", "kernels=reference"]
    out = ["--json", str(tmp_path / "f.json"), "--plot", str(tmp_path / "f.png")]
    assert main([*flags, *out]) == 1  # since one failed
    names = ["fp32", "int4", "int8+int8", "own"]
    started = [name for name, job in played if not job["batch_sizes"]]
    assert started == ["fp32", "int4", "mxfp4", "int8+int8", "own"]
    turns = [(name, job["batch_sizes"]) for name, job in played if job["batch_sizes"]]
    assert turns == [*((name, [1, 4]) for name in names), *((name, [4, 1]) for name in names[::-1])]
    assert all(job["settings"]["kernels"] == "reference" for _, job in played)
    assert [len(caches[name]) for name in names] == [3] * 4  # a first start and two rounds …
    assert all(len(set(folders)) == 1 for folders in caches.values())  # … in one cache
    assert len({folders[0] for folders in caches.values()}) == len(caches)  # that no other has
    result = load_result(tmp_path / "f.json")
    rows = {row["variant"]: row for row in result["rows"]}
    assert list(rows) == names
    assert rows["fp32"]["bits"] == 32 and rows["fp32"]["of_formula"] == 100
    assert rows["own"]["of_formula"] == 100 and rows["own"]["kl"] == pytest.approx(0.1 / 3)
    assert rows["fp32"]["kl"] == 0.1 / 4 and rows["int4"]["same"] == 90.0
    assert (rows["int4"]["first_s"], rows["int4"]["cached_s"]) == (9.0, 2.0)
    assert len(rows["int4"]["rates_4"]) == 2
    assert any("mxfp4 failed" in note for note in result["notes"])
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    assert "| int8+int8 |" in capsys.readouterr().out


def test_formats_of_keys_and_values(
    played: list[tuple[str, dict[str, Any]]], tmp_path: Path
) -> None:
    flags = ["formats", "--kv", "--pairs", "1", "--json", str(tmp_path / "f.json")]
    assert main(flags) == 0
    result = load_result(tmp_path / "f.json")
    assert [row["variant"] for row in result["rows"]] == ["fp32", "kv-int8", "kv-fp8"]
    kinds = [job["settings"].get("kv_cache_dtype") for _, job in played[:3]]
    assert kinds == [None, "int8", "fp8"] and played[0][1]["prompt_len"] == 1024


def test_built_in_variants_are_settings_of_the_part() -> None:
    for settings in [*format_variants.WEIGHTS.values(), *format_variants.KV.values()]:
        EngineConfig(**{"model": "smollm2-135m", **settings})


def test_empty_caches_have_the_model_and_go() -> None:
    with empty_caches() as new_cache:
        first, second = (Path(new_cache()["FIFTEEN_ENGINES_CACHE"]) for _ in range(2))
        assert first != second
        for folder in (first, second):
            assert [path.name for path in folder.iterdir()] == ["smollm2-135m-v1"]
            assert (folder / "smollm2-135m-v1" / "config.json").is_file()
    assert not first.exists() and not second.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--only int3", "--only 'int3': the built-in variants are: fp32, int8"),
        ("--variant int8:quantization=int4", "there is a built-in one of this name"),
        ("--variant a:quantisation=int4", "quantisation"),
        ("--variant a:quantization=int3", "quantization"),
        ("--plot f.png", "--plot needs --quality"),
        ("--plot f.txt", "must name a .png or an .svg"),
        ("--quality nowhere.json", "nowhere.json: No such file"),
    ],
)
def test_bad_flags_give_one_line(
    flags: str, message: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "checkpoint_shapes", lambda model: SHAPES)
    assert main(["formats", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_result_that_is_not_of_quality(tmp_path: Path) -> None:
    path = saved_quality(tmp_path / "q.json", "int4")
    assert read_quality(path)["int4"]["kl"] == 0.1
    result = json.loads(path.read_text())
    result["columns"] = result["columns"][:1]
    del result["rows"][0]["kl"]
    path.write_text(json.dumps(result))
    with pytest.raises(ValueError, match="a row has no 'kl'"):
        read_quality(path)
