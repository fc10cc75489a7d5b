"""The ASGI application: endpoints, and error handlers that answer in OpenAI's format."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from transformers.utils import logging

from peft_multibatch import __version__
from peft_multibatch.serve.answers import Answer, ChatAnswer, CompletionAnswer
from peft_multibatch.serve.engine import Engine
from peft_multibatch.serve.errors import ApiError, failed, invalid, unknown_model, unsupported
from peft_multibatch.serve.gate import Gate, Record, respond
from peft_multibatch.serve.jobs import Delta, Job
from peft_multibatch.serve.metrics import Metrics
from peft_multibatch.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    Generated,
    LoadRequest,
    ResponseRequest,
    Sampled,
    UnloadRequest,
)  # fmt: skip
from peft_multibatch.serve.requests import chat_job, completion_job, response_job
from peft_multibatch.serve.responses import ResponseAnswer
from peft_multibatch.serve.streams import EventStream, begun, unless_left


logger = logging.get_logger(__name__)

STATIC = Path(__file__).parent / "static"

POLICY = "default-src 'self'; img-src data:; frame-ancestors 'none'; form-action 'none'; base-uri 'none'"
"""Content security policy of the page: nothing from other origins, nothing inline."""

generating, admin, status = APIRouter(), APIRouter(), APIRouter()


def build_app(engine: Engine, on_end: Sequence[Callable[[Record], None]] = ()) -> Any:
    """Build the application.

    Args:
        engine: a started engine; the application stops it on shutdown.
        on_end: called with the record of each finished request.

    Returns:
        An ASGI application.
    """

    @asynccontextmanager
    async def until_stopped(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(engine.stop)

    app = FastAPI(title="peft_multibatch", version=__version__, docs_url=None, redoc_url=None, lifespan=until_stopped)
    app.state.engine, app.state.metrics = engine, Metrics(engine)
    app.include_router(status)
    app.include_router(generating)
    if engine.settings.allow_load:
        app.include_router(admin)
    app.add_exception_handler(ApiError, _told)
    app.add_exception_handler(RequestValidationError, _not_valid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unexpected)
    return Gate(app, engine.settings, [app.state.metrics.observe, *on_end])


@generating.post("/v1/chat/completions")
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Create a chat completion."""
    return await _generate(request, chat_job(_engine(request), body, _record(request).request_id), body, ChatAnswer)


@generating.post("/v1/completions")
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Create a text completion."""
    job = completion_job(_engine(request), body, _record(request).request_id)
    return await _generate(request, job, body, CompletionAnswer)


@generating.post("/v1/responses")
async def responses(body: ResponseRequest, request: Request) -> Response:
    """Create a response, in OpenAI's newer API."""
    engine, record = _engine(request), _record(request)
    job, deltas = await _begin(request, response_job(engine, body, record.request_id), body)
    answer = ResponseAnswer(job, body)
    if not job.is_streamed:
        return await _whole(request, answer.whole(deltas), deltas)
    return EventStream(answer.events(deltas), deltas, record, engine.settings.request_timeout, last=None)


@generating.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """List the base model and its adapters."""
    engine = _engine(request)
    base = engine.settings.model_names[0]
    adapters = [_model(name, written, base) for name, written in await unless_left(request, engine.core.names())]
    return {"object": "list", "data": [_model(name, 0) for name in engine.settings.model_names] + adapters}


@generating.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> dict[str, Any]:
    """Describe one model."""
    for each in (await models(request))["data"]:
        if each["id"] == name:
            return each
    raise unknown_model(name)


@admin.post("/v1/load_lora_adapter")
async def load_lora_adapter(body: LoadRequest, request: Request) -> Response:
    """Register an adapter, or replace it while requests run."""
    await _engine(request).core.load(body.lora_name, body.lora_path, body.load_inplace)
    request.app.state.metrics.remember(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@admin.post("/v1/unload_lora_adapter")
async def unload_lora_adapter(body: UnloadRequest, request: Request) -> Response:
    """Unregister an adapter; running requests still finish with it."""
    await _engine(request).core.unload(body.lora_name)
    request.app.state.metrics.forget(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


@status.get("/health")
async def health(request: Request) -> Response:
    """Whether the server is alive and able to run requests."""
    problem = await _engine(request).problem()
    return JSONResponse({"status": problem or "ok"}, 200 if problem is None else 503)


@status.get("/ready")
async def ready(request: Request) -> Response:
    """Whether new requests should be sent here."""
    engine = _engine(request)
    problem = await engine.problem() or ("it is about to stop" if engine.is_stopping else None)
    return JSONResponse({"status": problem or "ok"}, 200 if problem is None else 503)


@status.get("/metrics")
async def metrics(request: Request) -> Response:
    """Metrics for Prometheus."""
    return Response(request.app.state.metrics.text(await _engine(request).state()), media_type=CONTENT_TYPE_LATEST)


@status.get("/", include_in_schema=False)
async def page() -> Response:
    """A page for comparing the answers of several adapters."""
    return _file("index.html")


@status.get("/page.css", include_in_schema=False)
async def style() -> Response:
    """The page's style sheet."""
    return _file("page.css")


@status.get("/page.js", include_in_schema=False)
async def script() -> Response:
    """The page's script."""
    return _file("page.js")


def _file(name: str) -> Response:
    headers = {"content-security-policy": POLICY, "x-content-type-options": "nosniff", "cache-control": "no-cache"}
    return FileResponse(STATIC / name, headers=headers)


async def _generate(request: Request, preparing: Coroutine, body: Generated, kind: type[Answer]) -> Response:
    job, deltas = await _begin(request, preparing, body)
    options = body.stream_options
    answer = kind(job, body.model, _engine(request).tokenizer, bool(options and options.include_usage))
    if not job.is_streamed:
        return await _whole(request, answer.whole(deltas), deltas)
    timeout = _engine(request).settings.request_timeout
    return EventStream(answer.chunks(deltas), deltas, _record(request), timeout)


async def _begin(request: Request, preparing: Coroutine, body: Sampled) -> tuple[Job, AsyncGenerator[Delta, None]]:
    """Start a job; returns it and its output once there is some."""
    engine, record = _engine(request), _record(request)
    record.user = body.user
    if engine.settings.log_prompts:
        record.prompt = body.model_dump(include={"messages", "prompt", "input", "instructions"})

    async def first() -> tuple[Job, AsyncGenerator[Delta, None]]:
        try:
            async with engine.preparing():
                record.job = job = await preparing
        finally:
            preparing.close()  # in case it was never awaited
        return job, await begun(engine.run(job))

    return await unless_left(request, first())


async def _whole(request: Request, answering: Coroutine, deltas: AsyncGenerator[Delta, None]) -> Response:
    try:
        return JSONResponse(await unless_left(request, answering))
    finally:
        await deltas.aclose()


def _engine(request: Request) -> Engine:
    return request.app.state.engine


def _record(request: Request) -> Record:
    return request.state.record


def _model(name: str, written: int, parent: str | None = None) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": written, "owned_by": "peft_multibatch", "parent": parent}


async def _told(request: Request, error: Any) -> Response:
    _record(request).error = error
    return respond(error)


async def _not_valid(request: Request, error: Any) -> Response:
    """Report the first of pydantic's errors; unknown parameters come before all others."""
    found = sorted(error.errors(), key=lambda each: each["type"] != "extra_forbidden")[0]
    place = [str(each) for each in found["loc"][1:]]
    place = [each for each in place if each != "str" and "[" not in each]  # drops the branches of unions
    if found["type"] == "json_invalid":
        told = invalid("The body is not valid JSON.", code="invalid_json")
    elif found["type"] == "extra_forbidden":
        told = unsupported(".".join(place))
    else:
        where = f"'{place[0]}'" if place else "the body"
        told = invalid(f"{where} is invalid: {found['msg']}.", place[0] if place else None)
    return await _told(request, told)


async def _http(request: Request, error: Any) -> Response:
    codes = {404: "not_found", 405: "method_not_allowed"}
    told = ApiError(error.status_code, str(error.detail), codes.get(error.status_code, "bad_request"),
                    headers=dict(error.headers or {}))  # fmt: skip
    return await _told(request, told)


async def _unexpected(request: Request, error: Any) -> Response:
    logger.error(f"request {_record(request).request_id} failed: {error!r}", exc_info=error)
    return await _told(request, failed())
