"""What `generate` takes, checked before any work: prompts, and sampling parameters for each."""

from collections.abc import Sequence
from typing import Any

from common.sampling import SamplingParams, shown

Prompt = str | list[int]
Prompts = Prompt | Sequence[Prompt]
ParamsForPrompts = SamplingParams | Sequence[SamplingParams] | None


def check_prompt(token_ids: list[int], params: SamplingParams, limit: int, vocab: int) -> None:
    """Check a prompt's token ids, and its length with max_tokens against the context.

    limit: the context in tokens; vocab: the model's vocabulary. Raises ValueError.
    """
    if not token_ids:
        raise ValueError("prompt must have at least one token")
    if len(token_ids) >= limit:
        raise ValueError(
            f"prompt has {len(token_ids)} tokens; with a context of {limit} tokens"
            f" it may have at most {limit - 1}"
        )
    for token_id in token_ids:
        if type(token_id) is not int or not 0 <= token_id < vocab:  # a bool is an int, no id
            raise ValueError(f"prompt has token id {shown(token_id)}; ids go from 0 to {vocab - 1}")
    if params.max_tokens is not None and len(token_ids) + params.max_tokens > limit:
        raise ValueError(
            f"max_tokens is {params.max_tokens}, but a prompt of {len(token_ids)} tokens leaves"
            f" {limit - len(token_ids)} of the context of {limit}"
        )
    for name in ("stop_token_ids", "logit_bias"):
        for token_id in getattr(params, name) or ():
            if token_id >= vocab:
                raise ValueError(f"{name} has {token_id}; ids go from 0 to {vocab - 1}")


def prepare_prompts(
    engine: Any,
    prompts: Prompts,
    sampling_params: ParamsForPrompts,
    max_n: int = 1,
    prompt_logprobs: bool = False,
) -> list[tuple[list[int], SamplingParams]]:
    """(token ids, parameters) for each prompt.

    engine: its `tokenizer`, `max_model_len` and `vocab_size` are the limits. prompts: text or token
    ids, or a list of either. sampling_params: one for all (None: the engine's `sampling_defaults`),
    or one each. prompt_logprobs: whether the engine has them.
    Raises ValueError that names the prompt.
    """
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        prompts = [prompts]
    if sampling_params is None:
        sampling_params = SamplingParams(**getattr(engine, "sampling_defaults", {}))
    if isinstance(sampling_params, SamplingParams):
        sampling_params = [sampling_params] * len(prompts)
    if len(sampling_params) != len(prompts):
        raise ValueError(
            f"sampling_params has {len(sampling_params)} entries for {len(prompts)} prompts"
        )
    prepared = []
    for i, (prompt, params) in enumerate(zip(prompts, sampling_params, strict=True)):
        if isinstance(prompt, str) and engine.tokenizer is None:
            raise ValueError(f"prompts[{i}] is text, but this model has no tokenizer; give ids")
        if not isinstance(prompt, str | list | tuple):
            raise ValueError(f"prompts[{i}] must be text or token ids, not {shown(prompt)}")
        if params.n > max_n:
            raise ValueError(f"n must be at most {max_n} in this part, not {params.n}")
        if params.prompt_logprobs is not None and not prompt_logprobs:
            raise ValueError("prompt_logprobs is not supported by this part; part 04 has it")
        try:
            is_text = isinstance(prompt, str)
            token_ids = engine.tokenizer.encode(prompt) if is_text else list(prompt)
            check_prompt(token_ids, params, engine.max_model_len, engine.vocab_size)
        except ValueError as error:
            raise ValueError(f"prompts[{i}]: {error}") from None
        prepared.append((token_ids, params))
    return prepared
