"""Log a line per request, as text or JSON, without keys, and without prompts unless enabled."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

from peft_multibatch.serve.gate import Record


logger = logging.getLogger("peft_multibatch.serve")

FIELDS = "fields"
"""Attribute of a log record with additional fields."""

QUIET = ("/health", "/ready", "/metrics")
"""Paths that are polled every few seconds, and logged only if they fail."""


def set_up(kind: str) -> None:
    """Log this package, transformers, uvicorn and warnings to stderr in one format.

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
    """Log a finished request."""
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
    """Appends ``name=value`` to the message; clients' input is quoted, so that it can't forge lines."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as one line, followed by its traceback if it has one."""
        fields = getattr(record, FIELDS, {})
        return " ".join([super().format(record), *(f"{name}={json.dumps(value)}" for name, value in fields.items())])


class JsonFormatter(logging.Formatter):
    """Formats each record as a JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as one line."""
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
