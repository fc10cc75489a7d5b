"""Request schemas: the supported parameters of OpenAI's API and a few of vLLM's. All others are rejected by name.

Null parameters count as not given. Values aren't converted: "3" is not a number.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)


MOST_PROMPTS = 128
"""Maximum number of prompts per request, and of answers per prompt."""


def _encodable(text: str) -> str:
    text.encode()  # raises for lone surrogates
    return text


Str = Annotated[str, AfterValidator(_encodable)]
Token = Annotated[int, Field(ge=0)]
Stop = Annotated[Str, Field(min_length=1, max_length=1024)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Weight = Annotated[float, Field(ge=-1000, le=1000)]  # larger ones could overflow


class Strict(BaseModel):
    """A model that rejects unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = next((name for name, value in values.items() if value is not None and name not in known), None)
        # only one is reported: a body may have half a million, each of which would be a separate error
        kept = known if unknown is None else {*known, unknown}
        return {name: values[name] for name in values if name in kept and values[name] is not None}


class Sampled(Strict):
    """Parameters of all endpoints that generate text."""

    model: Str
    adapter: dict[Str, Weight] | None = Field(None, description="a mixture: weights by name; needs the base model")
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy; 1 by default")
    top_p: float | None = Field(None, gt=0, le=1)
    stream: bool | None = None
    user: Str | None = Field(None, max_length=256, description="written to the log")


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool | None = None


class Generated(Sampled):
    """Parameters of chat completions and completions."""

    max_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=MOST_PROMPTS)
    stop: Stop | Annotated[list[Stop], Field(max_length=4, fail_fast=True)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    stream_options: StreamOptions | None = None
    top_k: int | None = Field(None, ge=1, description="from vLLM's API")
    ignore_eos: bool | None = Field(None, description="from vLLM's API: continue after the end token")


class TextFormat(Strict):
    """Free text."""

    type: Literal["text"]


class JsonObjectFormat(Strict):
    """A JSON object."""

    type: Literal["json_object"]


class JsonSchema(Strict):
    """A JSON schema; the name is ignored."""

    name: Str
    description: Str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="ignored: answers always match the schema")


class JsonSchemaFormat(Strict):
    """JSON that matches a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: Str


class Message(Strict):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Str | Annotated[list[TextPart], Field(fail_fast=True)]
    name: Str | None = None


class ChatRequest(Generated):
    """Body of ``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: (
        Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")] | None
    ) = None


def _kind_of_prompt(given: Any) -> str:
    """Determine a prompt's kind by its first element, so that a long list isn't validated as every possible kind."""
    if not isinstance(given, list):
        return "text"
    first = given[0] if given else ""
    return "lists of tokens" if isinstance(first, list) else "tokens" if isinstance(first, int) else "texts"


class CompletionRequest(Generated):
    """Body of ``/v1/completions``."""

    prompt: Annotated[
        Annotated[Str, Tag("text")]
        | Annotated[list[Str], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True), Tag("texts")]
        | Annotated[list[Token], Field(min_length=1, fail_fast=True), Tag("tokens")]
        | Annotated[
            list[Annotated[list[Token], Field(min_length=1, fail_fast=True)]],
            Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True),
            Tag("lists of tokens"),
        ],
        Discriminator(_kind_of_prompt),
    ]
    logprobs: int | None = Field(None, ge=0, le=20)


class InputPart(Strict):
    """A part of a message of ``/v1/responses``."""

    type: Literal["input_text", "output_text", "text"]
    text: Str
    annotations: list[Any] | None = Field(None, max_length=0)
    logprobs: list[Any] | None = Field(None, max_length=0)


class InputMessage(Strict):
    """A message of ``/v1/responses``; its output messages can be sent back unchanged."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Str | Annotated[list[InputPart], Field(fail_fast=True)]
    id: Str | None = None
    status: Literal["completed", "incomplete"] | None = None


class ResponseRequest(Sampled):
    """Body of ``/v1/responses``: text in, text out. Nothing is stored."""

    input: Str | Annotated[list[InputMessage], Field(min_length=1, fail_fast=True)]
    instructions: Str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    store: Literal[False] | None = None


class LoadRequest(Strict):
    """Body of ``/v1/load_lora_adapter``, as in vLLM."""

    lora_name: Str
    lora_path: Str = Field(min_length=1, max_length=4096, description="a folder inside --adapters")
    load_inplace: bool = Field(False, description="replace the adapter with this name")


class UnloadRequest(Strict):
    """Body of ``/v1/unload_lora_adapter``, as in vLLM."""

    lora_name: Str
