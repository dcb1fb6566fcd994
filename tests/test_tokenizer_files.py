"""`tokenizer.json` as it is, whatever class transformers builds for the folder."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from common.models.errors import ModelError
from common.models.tokenizer import Tokenizer
from common.models.tokenizer_files import PROBES

LETTERS = [chr(code) for code in range(0x20, 0x7F)]
CHARACTERS = [*LETTERS, "\n", "▁", "é", "你"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TEXTS = (*PROBES, "a 12 345\n\n b", " x", "<s>[INST] a [/INST]</s> b", "  two")


def metaspace_bpe() -> Backend:
    """Spaces and numbers in pairs, which no class of transformers does by itself."""
    words = ["<unk>", "<s>", "</s>", *BYTES, *CHARACTERS, "▁▁", "12", "a▁"]
    vocabulary = {text: id for id, text in enumerate(words)}
    merges = [("▁", "▁"), ("1", "2"), ("a", "▁")]
    return Backend(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )


def llama_2() -> Backend:
    backend = metaspace_bpe()
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(steps)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return backend


def no_prefix() -> Backend:
    backend = metaspace_bpe()
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "never", False)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return backend


def digits() -> Backend:
    alphabet = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "ab"]
    vocabulary = {text: id for id, text in enumerate(alphabet)}
    backend = Backend(models.BPE(vocabulary, [("1", "2"), ("a", "b")]))
    split = pre_tokenizers.Split(Regex(r"\d|\w"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend


MAKERS: dict[str, Callable[[], Backend]] = {
    "llama 2": llama_2,
    "no prefix": no_prefix,
    "digits": digits,
}
CLASSES = {  # tokenizer_class, model_type
    "PreTrainedTokenizerFast": "llama",
    "LlamaTokenizer": "llama",
    "LlamaTokenizerFast": "llama",
    "GPT2Tokenizer": "gpt2",
    "Qwen2Tokenizer": "qwen2",
    "GemmaTokenizer": "gemma",
}


def folder_of(folder: Path, backend: Backend, cls: str, **config: Any) -> Path:
    flags = {"normalized": False, "special": True}
    backend.add_special_tokens([AddedToken(text, **flags) for text in ("<unk>", "<s>", "</s>")])
    backend.save(str(folder / "tokenizer.json"))
    model_type = CLASSES.get(cls, "llama")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer_config = {"tokenizer_class": cls, "bos_token": "<s>", "eos_token": "</s>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return folder


def loaded(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    return tokenizer


def library_of(folder: Path) -> Backend:
    return Backend.from_file(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("maker", MAKERS)
def test_ids_and_text_are_the_files(
    tmp_path: Path, maker: str, cls: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(tmp_path, MAKERS[maker](), cls)
    with caplog.at_level(logging.WARNING, "common.models.tokenizer_files"):
        tokenizer = loaded(folder)
    library = library_of(folder)
    rebuilt = tokenizer._tokenizer
    differ = False
    for text in TEXTS:
        ids = library.encode(text).ids
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == library.decode(ids), text
        differ |= rebuilt.encode(text) != ids
        differ |= rebuilt.backend_tokenizer.decode(ids) != library.decode(ids)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("common")]
    assert len(lines) == differ, lines
    for line in lines:
        assert str(folder) in line and type(rebuilt).__name__ in line and "\n" not in line
    assert tokenizer.vocab_size == library.get_vocab_size()


def test_one_of_them_differs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The control: a class is rebuilt by this version of transformers, and with other ids."""
    tokenizer = loaded(folder_of(tmp_path, no_prefix(), "LlamaTokenizer"))
    text = "a 12"
    assert tokenizer.encode(text) != tokenizer._tokenizer.encode(text)
    assert "those of tokenizer.json are taken" in caplog.text


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Backend]:
    folder = folder_of(tmp_path_factory.mktemp("model"), llama_2(), "LlamaTokenizer")
    return loaded(folder), library_of(folder)


@settings(max_examples=100)
@given(text=st.text(max_size=30))
def test_any_text(rebuilt: tuple[Tokenizer, Backend], text: str) -> None:
    tokenizer, library = rebuilt
    ids = library.encode(text).ids
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == library.decode(ids)


class TestWhatIsPutAround:
    """The file's post_processor; `add_bos_token` of the config does not count beside a file."""

    @pytest.mark.parametrize("cls", ["PreTrainedTokenizerFast", "LlamaTokenizer"])
    @pytest.mark.parametrize("config", [{}, {"add_bos_token": True}, {"add_bos_token": False}])
    @pytest.mark.parametrize("in_file", ["<s> $A", "$A </s>", "<s> $A </s>", None])
    def test_is_the_files(
        self, tmp_path: Path, cls: str, config: dict[str, bool], in_file: str | None
    ) -> None:
        backend = llama_2()
        if in_file is not None:
            backend.post_processor = processors.TemplateProcessing(
                single=in_file, special_tokens=[("<s>", 1), ("</s>", 2)]
            )
        folder = folder_of(tmp_path, backend, cls, **config)
        tokenizer = loaded(folder)
        inner = library_of(folder).encode("a", add_special_tokens=False).ids
        around = in_file or "$A"
        expected = [1] * around.startswith("<s>") + inner + [2] * around.endswith("</s>")
        assert tokenizer.encode("a") == expected

    def test_transformers_leaves_it_too(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path, llama_2(), "PreTrainedTokenizerFast", add_bos_token=True)
        tokenizer = loaded(folder)
        assert tokenizer._tokenizer.encode("a") == tokenizer.encode("a")


class TestSpecialTokens:
    def test_the_file_says_how_a_token_is_matched(self, tmp_path: Path) -> None:
        """White space that a token takes stays so where the config names the token by its text."""
        backend = no_prefix()
        flags = {"special": True, "normalized": False}
        backend.add_special_tokens([AddedToken("<|end|>", rstrip=True, **flags)])
        folder = folder_of(
            tmp_path, backend, "PreTrainedTokenizerFast", additional_special_tokens=["<|end|>"]
        )
        tokenizer = loaded(folder)
        ids = library_of(folder).encode("a<|end|> \n b").ids
        assert tokenizer.encode("a<|end|> \n b") == ids
        assert len(ids) == 3

    def test_what_only_the_config_names_is_added(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path, no_prefix(), "PreTrainedTokenizerFast", pad_token="<pad>")
        tokenizer = loaded(folder)
        size = library_of(folder).get_vocab_size()
        assert tokenizer.encode("a<pad>")[1] == size
        assert tokenizer.special_ids[size] == "<pad>"
        assert tokenizer.encode("a<pad>") == tokenizer._tokenizer.encode("a<pad>")

    def test_a_word_that_the_config_calls_special_is(self, tmp_path: Path) -> None:
        backend = no_prefix()
        backend.add_tokens([AddedToken("<|turn|>", normalized=False)])
        config = {
            "additional_special_tokens": ["<|turn|>"],
            "chat_template": "{{ messages[0].content }}",
        }
        folder = folder_of(tmp_path, backend, "PreTrainedTokenizerFast", **config)
        tokenizer = loaded(folder)
        id = library_of(folder).token_to_id("<|turn|>")
        assert tokenizer.special_ids[id] == "<|turn|>"
        assert id in tokenizer.encode("<|turn|>")
        assert id not in tokenizer.encode_chat([{"role": "user", "content": "<|turn|>"}])

    def test_nothing_is_added_for_a_class(self, tmp_path: Path) -> None:
        """Llama's class has `<s>` by itself; a file without it has no such token."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Backend(models.BPE({text: id for id, text in enumerate(alphabet)}, []))
        backend.pre_tokenizer = pre_tokenizers.Metaspace("Ġ", "never", False)
        backend.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
        tokenizer = loaded(tmp_path)
        assert tokenizer.vocab_size == 256 and not tokenizer.special_ids
        assert tokenizer.encode("a<s>") == backend.encode("a<s>").ids


class TestRefused:
    def test_without_the_file(self, tmp_path: Path) -> None:
        """transformers could build one from the vocabulary of GPT-2's form."""
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
        vocabulary = {text: id for id, text in enumerate([*LETTERS, "<|endoftext|>"])}
        (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
        (tmp_path / "merges.txt").write_text("#version: 0.2\n")
        with pytest.raises(ModelError, match=r"has no tokenizer\.json") as error:
            Tokenizer.load(tmp_path)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("cls", CLASSES)
    @pytest.mark.parametrize(
        "text", ["", "[]", "{", '{"model": {}}', '{"added_tokens": 1}', '{"version": "1.0"}', "\0"]
    )
    def test_hostile_files(self, tmp_path: Path, cls: str, text: str) -> None:
        folder = folder_of(tmp_path, llama_2(), cls)
        (folder / "tokenizer.json").write_text(text)
        with pytest.raises(ModelError) as error:
            Tokenizer.load(folder)
        assert "\n" not in str(error.value) and str(folder) in str(error.value)
