"""A model's KV cache goes in under the name that this transformers version has, without a warning."""

import warnings

import pytest
import torch
from transformers import DynamicCache

from common.models.checkpoint import load_transformers_model, resolve
from common.models.transformers_names import cache_argument


class Old:
    def forward(self, input_ids, past_key_values=None, use_cache=None): ...


class New:
    def forward(self, input_ids, cache=None, **kwargs): ...


class Both:
    def forward(self, input_ids, past_key_values=None, cache=None): ...


class Open:
    def forward(self, input_ids, **kwargs): ...


@pytest.mark.parametrize(
    ("model", "name"),
    [(Old(), "past_key_values"), (New(), "cache"), (Both(), "cache"), (Open(), "past_key_values")],
)
def test_the_name_is_the_signature_s(model: object, name: str) -> None:
    assert cache_argument(model) == name


@pytest.mark.parametrize("model_name", ["random:tiny-llama", "random:tiny-qwen3"])
def test_a_forward_with_a_cache_warns_of_nothing(model_name: str, capfd) -> None:
    model = load_transformers_model(resolve(model_name), torch.float32)
    cache, token_ids = DynamicCache(config=model.config), torch.tensor([[5, 6, 7]])
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("error")
        for _ in range(2):
            model(token_ids, **{cache_argument(model): cache}, use_cache=True)
    assert cache.get_seq_length() == 6
    assert "past_key_values" not in capfd.readouterr().err
