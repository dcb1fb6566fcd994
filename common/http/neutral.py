"""Fields that clients send and that ask for nothing, with the values that do so.

Clients write their libraries' defaults out, name their user, attach metadata. None of it changes an
answer, so none of it is a reason to refuse one. A field of OpenAI's or vLLM's interface that is not
implemented is accepted with the values below and null; everything else is a 400 that names it.
"""

from collections.abc import Callable
from typing import Any

MAX_METADATA = 16  # entries, as OpenAI's


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_metadata(value: Any) -> bool:
    """Texts by text, as OpenAI stores them beside an answer."""
    items = value.items() if isinstance(value, dict) else [(None, None)]
    return len(items) <= MAX_METADATA and all(is_text(key) and is_text(item) for key, item in items)


Rule = tuple[Any, ...] | Callable[[Any], bool]

# Of a request: who sends it and for what.
NOTES: dict[str, Rule] = {
    "metadata": is_metadata,
    "prompt_cache_key": is_text,  # a hint; the prefix cache finds what is there without it
    "safety_identifier": is_text,
    "user": is_text,
}
REQUEST: dict[str, Rule] = NOTES | {
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "detokenize": (True,),
    "documents": ([],),
    "early_stopping": (False,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "include_reasoning": (True,),
    "kv_transfer_params": (),
    "length_penalty": (1.0, 1),
    "logits_processors": ([],),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "priority": (0,),
    "prompt_cache_retention": ("in_memory", "in-memory"),
    "prompt_embeds": (),
    "reasoning_effort": ("none",),
    "repetition_penalty": (1.0, 1),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "vllm_xargs": ({},),
    "web_search_options": (),
}
# What differs between the two ways to ask: special tokens are the template's, or the tokenizer's.
CHAT: dict[str, Rule] = REQUEST | {"add_special_tokens": (False,)}
COMPLETION: dict[str, Rule] = REQUEST | {
    "add_generation_prompt": (True, False),  # a raw prompt has no template
    "add_special_tokens": (True,),
    "continue_final_message": (False,),
}
STREAM_OPTIONS: dict[str, Rule] = {
    "include_obfuscation": (False,),
}
MESSAGE: dict[str, Rule] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": ("",),
    "prefix": (False,),
    "reasoning": ("",),
    "reasoning_content": ("",),
    "refusal": ("",),
    "tool_call_id": (),
    "tool_calls": ([],),
    "type": ("text", "message"),
}
CONTENT_PART: dict[str, Rule] = {}


def asks_for_nothing(rules: dict[str, Rule], name: str, value: Any) -> bool:
    """Whether a field may be left aside. A null is as good as no field."""
    if value is None:
        return True
    rule = rules.get(name, ())
    if callable(rule):
        return rule(value)
    if isinstance(value, dict):  # its own nulls are none either
        value = {key: item for key, item in value.items() if item is not None}
    # With the type, because 0 == False and 1 == True.
    return (type(value), value) in [(type(neutral), neutral) for neutral in rule]
