"""Errors as clients of OpenAI's API expect them, and what is told about ours: never a path, never another's name."""

from __future__ import annotations

from typing import Any

from peft_multibatch.errors import (
    AdapterFileError,
    AdapterMismatchError,
    AdapterUnsupportedError,
    StoreFullError,
)


TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}

RETRY_AFTER = 1
"""Seconds after which clients that were turned away for want of room may come again."""


class ApiError(Exception):
    """An error that a client is told about.

    Args:
        status: the HTTP status.
        message: what came, what was expected, what to do.
        code: what programs tell errors apart by.
        param: of the request, which one it is about.
        headers: of the response.
    """

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's shape."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """The request can't be run as it is."""
    return ApiError(400, message, code, param)


def unsupported(param: str, why: str = "it is not supported") -> ApiError:
    """A parameter that would have to be ignored."""
    return invalid(f"'{param}' was given, and {why}: leave it out.", param, "unsupported_parameter")


def too_long(prompt: int, asked: int, limit: int, param: str) -> ApiError:
    """A prompt that, with what it asks for, is longer than the model's context."""
    return invalid(
        f"This model's maximum context length is {limit} tokens. The request has {prompt} tokens in its {param} and "
        f"asks for {asked} more: shorten the {param}, or ask for fewer tokens.",
        param,
        "context_length_exceeded",
    )


def unknown_model(name: str) -> ApiError:
    """Neither the base model nor an adapter is called so."""
    return ApiError(404, f"The model `{name:.80}` does not exist.", "model_not_found", "model")


def busy(message: str, code: str) -> ApiError:
    """There is no room now."""
    return ApiError(429, message, code, headers={"Retry-After": str(RETRY_AFTER)})


def unavailable(message: str, code: str = "unavailable") -> ApiError:
    """The server can't run requests now."""
    return ApiError(503, message, code, headers={"Retry-After": str(RETRY_AFTER)})


def took_too_long(seconds: float) -> ApiError:
    """A request that had as much time as it may have."""
    message = f"The request took longer than {seconds:g} s: ask for fewer tokens."
    return ApiError(504, message, "timeout", headers={"x-should-retry": "false"})


def from_adapter(error: Exception, name: str) -> ApiError:
    """What a client is told when its adapter can't be registered or loaded; the log has the rest."""
    if isinstance(error, StoreFullError):
        return unavailable(f"There is no room for the model `{name}` now: try again later.", "no_room")
    whys = {
        AdapterFileError: "its files are missing, damaged, or where they may not be",
        AdapterMismatchError: "it doesn't fit the base model",
        AdapterUnsupportedError: "it is of a kind that this server doesn't take",
    }
    why = next((why for kind, why in whys.items() if isinstance(error, kind)), None)
    if why is None:
        return failed()
    return invalid(f"The model `{name}` can't be used, because {why}: ask whoever runs this server.", "model",
                   "adapter_unusable")  # fmt: skip


def failed() -> ApiError:
    """Something went wrong that the client can't do anything about."""
    return ApiError(500, "The request failed. The server's log says why, under the request's id.", "internal_error")
