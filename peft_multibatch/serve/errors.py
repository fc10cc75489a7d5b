"""Errors in the format of OpenAI's API; their messages contain no paths and no names of other tenants' adapters."""

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
"""Seconds after which rejected clients may retry."""


class ApiError(Exception):
    """An error that is sent to the client.

    Args:
        status: the HTTP status.
        message: what came, what was expected, what to do.
        code: identifies the kind of error for programs.
        param: the request parameter that caused it.
        headers: additional headers of the response.
    """

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    def __reduce__(self) -> tuple:  # it may be raised in another process
        return type(self), (self.status, self.message, self.code, self.param, self.headers)

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's format."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """An error for an invalid request."""
    return ApiError(400, message, code, param)


def unsupported(param: str, why: str = "it is not supported") -> ApiError:
    """An error for a parameter that isn't supported."""
    return invalid(f"'{param}' was given, and {why}: leave it out.", param, "unsupported_parameter")


def too_long(prompt: int, asked: int, limit: int, param: str) -> ApiError:
    """An error for a prompt that, with the tokens requested, exceeds the model's context."""
    return invalid(
        f"This model's maximum context length is {limit} tokens. The request has {prompt} tokens in its {param} and "
        f"requests {asked} more: shorten the {param}, or request fewer tokens.",
        param,
        "context_length_exceeded",
    )


def unknown_model(name: str) -> ApiError:
    """An error for a name that is neither the base model's nor an adapter's."""
    return ApiError(404, f"The model `{name:.80}` does not exist.", "model_not_found", "model")


def busy(message: str, code: str) -> ApiError:
    """An error for a request beyond a limit, which may be retried."""
    return ApiError(429, message, code, headers={"Retry-After": str(RETRY_AFTER)})


def unavailable(message: str, code: str = "unavailable") -> ApiError:
    """An error for a server that currently can't run requests."""
    return ApiError(503, message, code, headers={"Retry-After": str(RETRY_AFTER)})


def took_too_long(seconds: float) -> ApiError:
    """An error for a request that exceeded its time limit."""
    message = f"The request took longer than {seconds:g} s: request fewer tokens."
    return ApiError(504, message, "timeout", headers={"x-should-retry": "false"})


def from_adapter(error: Exception, name: str) -> ApiError:
    """Convert an error of registering or loading an adapter; the details are only logged."""
    if isinstance(error, StoreFullError):
        return unavailable(f"There is no memory for the model `{name}` now: try again later.", "no_room")
    whys = {
        AdapterFileError: "its files are missing, damaged, or outside the allowed folders",
        AdapterMismatchError: "it doesn't fit the base model",
        AdapterUnsupportedError: "this server doesn't support its kind",
    }
    why = next((why for kind, why in whys.items() if isinstance(error, kind)), None)
    if why is None:
        return failed()
    return invalid(f"The model `{name}` can't be used, because {why}: ask the server's operator.", "model",
                   "adapter_unusable")  # fmt: skip


def failed() -> ApiError:
    """An error for an unexpected failure."""
    return ApiError(
        500, "The request failed. The server's log has the reason under the request's id.", "internal_error"
    )


def broken() -> ApiError:
    """An error for a server that can't run requests any more."""
    return unavailable("The server can't run requests: its operator should check the log.", "broken")
