"""Tiny models that have a text: a folder with random weights and a byte-level tokenizer of its own."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from common.models.presets import PRESETS

EOS = 257  # <|im_end|>
WORDS = ('{"', '": ', ', "', '"}', "true", "null", "12", "yes", "<tool_call>", "</tool_call>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer_json() -> str:
    """256 bytes, the two tokens of ChatML, and some words that are longer than a byte."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({text: i for i, text in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    backend.add_tokens([AddedToken(word, normalized=False) for word in WORDS])
    return backend.to_str()


def write_model(
    folder: Path, preset: str = "tiny-llama", seed: int = 0, template: str = TEMPLATE, **values: Any
) -> str:
    """The folder of a model of this shape with that tokenizer; its path."""
    import transformers

    shape = PRESETS[preset] | {"eos_token_id": EOS, "vocab_size": 288} | values
    config = transformers.AutoConfig.for_model(**shape)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    state = {
        name: torch.randn(tensor.shape) * 0.2 + name.endswith("norm.weight")
        for name, tensor in model.state_dict().items()
        if not (name == "lm_head.weight" and config.tie_word_embeddings)
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(shape))
    (folder / "tokenizer.json").write_text(tokenizer_json())
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"chat_template": template}))
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return str(folder)
