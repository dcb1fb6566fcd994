"""`POST /tokenize` and `/detokenize`, in vLLM's form: what the model would read, and back.

A client counts tokens with them before it sends a prompt, so a text may be longer than the context.
"""

from typing import Annotated, Any

from fastapi import Request, Response
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr

from common.http import neutral
from common.http.errors import ApiError, field_error
from common.http.responses import to_json
from common.http.schemas import MAX_MESSAGES, Ids, Message, template_options
from common.sampling import shown

MAX_CHARACTERS = 1 << 20  # of one text
MAX_TOKENS = 1 << 18  # of one list


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: StrictStr | None = None

    def check(self, rules: dict[str, neutral.Rule]) -> None:
        """Refuse what is not supported. Raises ApiError naming the field."""
        for name, value in (self.model_extra or {}).items():
            if not neutral.asks_for_nothing(rules, name, value):
                field = name if len(name) <= 64 else name[:64] + "…"
                raise ApiError(400, f"{field} is not supported", param=field, code="unsupported")


class TokenizeRequest(_Body):
    """A raw prompt, or a conversation."""

    prompt: StrictStr | None = None
    messages: (
        Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
        | None
    ) = None
    add_special_tokens: StrictBool | None = None
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool | None = None
    return_token_strs: StrictBool | None = None


class DetokenizeRequest(_Body):
    tokens: Ids


def add_tokenize_routes(frontend: Any) -> None:
    """frontend: a `Frontend`; its tokenizer and limits are the model's."""

    def tokenizer() -> Any:
        if frontend.tokenizer is None:
            raise ApiError(400, f"{frontend.model} has no tokenizer")
        return frontend.tokenizer

    def encode(body: TokenizeRequest) -> list[int]:
        if (body.prompt is None) == (body.messages is None):
            text = "prompt or messages is needed, and only one of them"
            raise ApiError(400, text, param="prompt")
        is_chat = body.messages is not None
        name = "messages" if is_chat else "prompt"
        messages = [message.as_dict() for message in body.messages or []]
        size = len(body.prompt or "") + sum(len(message["content"]) for message in messages)
        if size > MAX_CHARACTERS:
            raise ApiError(
                400,
                f"{name} has {size} characters; it may have {MAX_CHARACTERS}",
                param=name,
            )
        asked = body.add_generation_prompt, body.continue_final_message
        if not is_chat and body.continue_final_message:
            field = "continue_final_message"
            raise ApiError(400, f"{field} needs messages", param=field)
        if is_chat and body.add_special_tokens:
            raise ApiError(
                400,
                "add_special_tokens is not supported with messages: the template has them",
                param="add_special_tokens",
            )
        try:
            if is_chat:
                return tokenizer().encode_chat(messages, **template_options(body.messages, *asked))
            return tokenizer().encode(body.prompt, body.add_special_tokens is not False)
        except ValueError as error:
            raise field_error(str(error)) from None

    def answer(body: TokenizeRequest) -> str:
        tokens, texts = encode(body), None
        if body.return_token_strs:
            text_of = {token_id: tokenizer().token_text(token_id) for token_id in set(tokens)}
            texts = [text_of[token_id] for token_id in tokens]
        return to_json(
            {
                "count": len(tokens),
                "max_model_len": frontend.max_model_len,
                "tokens": tokens,
                "token_strs": texts,
            }
        )

    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        frontend.check_model(body.model)
        body.check(neutral.REQUEST)
        text = await frontend.tokenizing(lambda: answer(body))
        return Response(text, media_type="application/json")

    async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, str]:
        frontend.check_model(body.model)
        body.check(neutral.REQUEST)
        if len(body.tokens) > MAX_TOKENS:
            raise ApiError(
                400,
                f"tokens has {len(body.tokens)} ids; it may have {MAX_TOKENS}",
                param="tokens",
            )
        for token_id in body.tokens:
            if not 0 <= token_id < frontend.vocab_size:
                raise ApiError(
                    400,
                    f"tokens has token id {shown(token_id)}; ids go from 0 to"
                    f" {frontend.vocab_size - 1}",
                    param="tokens",
                )
        text = await frontend.tokenizing(lambda: tokenizer().decode(body.tokens, False))
        return {"prompt": text}

    frontend.app.add_api_route("/tokenize", tokenize, methods=["POST"], response_model=None)
    frontend.app.add_api_route("/detokenize", detokenize, methods=["POST"])
