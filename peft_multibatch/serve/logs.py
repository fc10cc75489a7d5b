"""A line for every request, as text or JSON: never a prompt unless it was asked for, never a key."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

from peft_multibatch.serve.gate import Record


logger = logging.getLogger("peft_multibatch.serve")

FIELDS = "fields"
"""Attribute of a log record with what else there is to say."""

QUIET = ("/health", "/ready", "/metrics")
"""Paths that are asked for every few seconds, and logged only when something is wrong."""


def set_up(kind: str) -> None:
    """Write this package's lines, transformers' and uvicorn's, and warnings, to stderr, in one format.

    Args:
        kind: ``"text"`` or ``"json"``.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if kind == "json" else TextFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.captureWarnings(True)
    for name in ("peft_multibatch", "transformers", "uvicorn", "py.warnings"):
        each = logging.getLogger(name)
        each.handlers[:], each.propagate = [handler], False
    logger.setLevel(logging.INFO)


def log_request(record: Record) -> None:
    """A request has ended."""
    if record.path in QUIET and record.status < 400:
        return
    job = record.job
    fields: dict[str, Any] = {
        "request_id": record.request_id,
        "method": record.method,
        "path": record.path,
        "status": record.status,
        "seconds": round(record.seconds, 4),
    }
    if record.error is not None:
        fields["code"] = record.error.code
    if record.user is not None:
        fields["user"] = record.user
    if job is not None:
        fields |= {
            "adapter": job.target.label,
            "prompt_tokens": job.prompt_tokens,
            "completion_tokens": job.completion_tokens,
            "first_token_seconds": None if job.first_token is None else round(job.first_token, 4),
        }
    if record.prompt is not None:
        fields["prompt"] = record.prompt
    logger.log(logging.ERROR if record.status >= 500 else logging.INFO, "request", extra={FIELDS: fields})


class TextFormatter(logging.Formatter):
    """``name=value`` behind the message; what clients wrote is quoted, so that no line can be made up."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and a traceback where there is one."""
        fields = getattr(record, FIELDS, {})
        return " ".join([super().format(record), *(f"{name}={json.dumps(value)}" for name, value in fields.items())])


class JsonFormatter(logging.Formatter):
    """An object for every line."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)
