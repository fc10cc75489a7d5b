"""Convert a client's request to a job for the engine."""

from __future__ import annotations

from typing import Any

from peft_multibatch.serve.engine import Engine
from peft_multibatch.serve.errors import ApiError, invalid, too_long, unsupported
from peft_multibatch.serve.grammars import text_of
from peft_multibatch.serve.jobs import Job
from peft_multibatch.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    Generated,
    JsonObjectFormat,
    JsonSchemaFormat,
    Message,
    ResponseRequest,
    TextFormat,
    TextPart,
)


DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for completions; chat answers may be as long as the context allows."""


CHARACTERS = 8
"""Characters per allowed token that are tokenized first, to find out whether a long text is too long."""


async def chat_job(engine: Engine, body: ChatRequest, request_id: str) -> Job:
    """Convert a chat completion request.

    Raises:
        ApiError: the request is invalid.
    """
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise unsupported("max_tokens", "'max_completion_tokens' as well")
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("'top_logprobs' was given without 'logprobs': expected 'logprobs' to be true.", "top_logprobs")
    target = await engine.core.find(body.model, body.adapter)
    prompt = await engine.tokenize(chat_tokens, body.messages, engine.max_model_len)
    limit = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    job = _job(engine, body, Job(request_id, target, [prompt], "messages", max_tokens=limit), logprobs)
    schema = _schema_of(body.response_format)
    if schema is not None:
        if body.ignore_eos:
            raise unsupported("ignore_eos", "'response_format' as well, whose answers must end")
        job.options["grammar"] = text = text_of(schema)
        await engine.core.grammar(text)
    return job


async def completion_job(engine: Engine, body: CompletionRequest, request_id: str) -> Job:
    """Convert a completion request.

    Raises:
        ApiError: the request is invalid.
    """
    target = await engine.core.find(body.model, body.adapter)
    prompts = _as_tokens(body.prompt)
    if prompts is None:
        prompts = await engine.tokenize(_completion_tokens, body.prompt, engine.max_model_len)
    known = engine.core.vocabulary
    if any(token >= known for prompt in prompts for token in prompt):
        raise invalid(f"'prompt' has tokens outside the vocabulary: expected 0 to {known - 1}.", "prompt")
    limit = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    return _job(engine, body, Job(request_id, target, prompts, "prompt", max_tokens=limit), body.logprobs)


async def response_job(engine: Engine, body: ResponseRequest, request_id: str) -> Job:
    """Convert a request of ``/v1/responses``.

    Raises:
        ApiError: the request is invalid.
    """
    target = await engine.core.find(body.model, body.adapter)
    messages = [Message(role="system", content=body.instructions)] if body.instructions else []
    if isinstance(body.input, str):
        messages.append(Message(role="user", content=body.input))
    else:
        for each in body.input:
            given = each.content
            parts = given if isinstance(given, str) else [TextPart(type="text", text=part.text) for part in given]
            messages.append(Message(role=each.role, content=parts))
    prompt = await engine.tokenize(chat_tokens, messages, engine.max_model_len, "input")
    job = Job(request_id, target, [prompt], "input", max_tokens=body.max_output_tokens)
    job.is_streamed = bool(body.stream)
    job.options = sampling_options(1.0 if body.temperature is None else body.temperature, body.top_p)
    job.max_tokens_of(prompt, engine.max_model_len)
    return job


def tokens_of(tokenizer: Any, text: str, limit: int, param: str, **options: Any) -> list[int]:
    """Tokenize a text, or only a part of it if that is already too long.

    Four megabytes would take seconds, during which all other requests wait for the tokenizer.

    Args:
        tokenizer: the model's tokenizer.
        text: the text.
        limit: maximum number of tokens of a prompt.
        param: the request parameter that contains the text.
        **options: options for the tokenizer.

    Raises:
        ApiError: the text is too long.
    """
    length = CHARACTERS * limit
    while length < len(text):
        found = len(tokenizer(text[:length], **options).input_ids)
        if found > limit + 64:  # tokenization differs at the cut
            raise too_long(found, 1, limit, param)
        length *= 2
    return tokenizer(text, **options).input_ids


def chat_tokens(tokenizer: Any, messages: list[Message], limit: int, param: str = "messages") -> list[int]:
    """Tokenize a chat with the model's template.

    Raises:
        ApiError: the model has no template, or its template rejects the messages.
    """
    if not tokenizer.chat_template:
        raise invalid("The model has no chat template: use /v1/completions.", "messages", "no_chat_template")
    chat = [_plain(message) for message in messages]
    try:
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # templates may raise anything
        raise invalid(f"The model's chat template rejects these messages: {error}", "messages") from error
    return tokens_of(tokenizer, text, limit, param, add_special_tokens=False)


def _schema_of(given: TextFormat | JsonObjectFormat | JsonSchemaFormat | None) -> dict[str, Any] | None:
    """Return the schema that an answer must match, or None for free text."""
    if isinstance(given, JsonSchemaFormat):
        return given.json_schema.schema_
    return {"type": "object"} if isinstance(given, JsonObjectFormat) else None


def _plain(message: Message) -> dict[str, str]:
    parts = message.content
    text = parts if isinstance(parts, str) else "\n".join(part.text for part in parts)
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": text} | ({"name": message.name} if message.name else {})


def _as_tokens(prompt: Any) -> list[list[int]] | None:
    """Return the tokens of prompts that were sent as tokens, or None if they are texts."""
    if isinstance(prompt, str) or isinstance(prompt[0], str):
        return None
    return [prompt] if isinstance(prompt[0], int) else prompt


def _completion_tokens(tokenizer: Any, prompt: str | list[str], limit: int) -> list[list[int]]:
    texts = [prompt] if isinstance(prompt, str) else prompt
    found = [tokens_of(tokenizer, each, limit, "prompt") for each in texts]
    if all(found):
        return found
    start = tokenizer.bos_token_id
    if start is None:
        raise invalid("'prompt' is empty: expected text, because the model has no start token.", "prompt")
    return [each or [start] for each in found]


def _job(engine: Engine, body: Generated, job: Job, logprobs: int | None) -> Job:
    if body.stream_options is not None and not body.stream:
        raise invalid("'stream_options' was given without 'stream': expected 'stream' to be true.", "stream_options")
    job.n = body.n or 1
    job.stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    job.seed, job.ignore_eos, job.is_streamed = body.seed, bool(body.ignore_eos), bool(body.stream)
    temperature = 1.0 if body.temperature is None else body.temperature
    job.options = sampling_options(temperature, body.top_p, body.top_k)
    for name in ("presence_penalty", "frequency_penalty"):
        if getattr(body, name):
            job.options[name] = float(getattr(body, name))
    if logprobs is not None:
        job.options["logprobs"] = logprobs
    limit = engine.settings.max_batch + engine.settings.max_queue
    if len(job.prompts) * job.n > limit:
        raise ApiError(400, f"The request asks for {len(job.prompts) * job.n} answers: expected at most {limit}.",
                       "invalid_value", "n")  # fmt: skip
    for prompt in job.prompts:
        job.max_tokens_of(prompt, engine.max_model_len)
    return job


def sampling_options(temperature: float, top_p: float | None, top_k: int | None = None) -> dict[str, Any]:
    """Build the manager's sampling options; a temperature of 0 is greedy."""
    if temperature < 1e-5:
        return {}
    options: dict[str, Any] = {"temperature": float(temperature)}
    if top_p is not None and top_p < 1:
        options["top_p"] = float(top_p)
    if top_k is not None:
        options["top_k"] = min(top_k, 2**31 - 1)
    return options
