"""The server doesn't fail, whatever clients send: requests are generated from its own OpenAPI schema."""

from __future__ import annotations

import httpx
import pytest
from hypothesis import HealthCheck, given, settings


schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis")

LIMITS = ("max_tokens", "max_output_tokens", "max_completion_tokens")

NAMES = {"POST /v1/responses": "max_output_tokens"}

ENDPOINTS = (
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /v1/responses",
    "GET /v1/models",
    "GET /v1/models/{name}",
    "GET /health",
    "GET /ready",
    "GET /metrics",
)


@pytest.fixture(scope="module")
def operations(served):
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    return {each.ok().label: each.ok() for each in schema.get_all_operations()}


def test_all_endpoints_are_described(operations):
    assert set(operations) == set(ENDPOINTS)


@pytest.mark.parametrize("label", ENDPOINTS)
@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_no_request_makes_it_fail(operations, served, label, mode):
    statuses = set()

    def call(case):
        body = case.body
        if isinstance(body, dict):  # uses existing models, and keeps valid requests short
            if isinstance(body.get("model"), str) and len(body["model"]) < 3:
                body["model"] = "red"
            asked = [name for name in LIMITS if name in body] or [NAMES.get(label, "max_tokens")]
            for name in asked:
                if body.get(name) is None or isinstance(body[name], int):
                    body[name] = min(body.get(name) or 4, 4)
        found = case.call(headers={"connection": "close"})
        assert found.status_code < 500, found.text
        if found.status_code >= 400:
            assert set(found.json()["error"]) == {"message", "type", "param", "code"}
        statuses.add(found.status_code)

    strategy = operations[label].as_strategy(generation_mode=schemathesis.GenerationMode[mode])
    checks = list(HealthCheck)
    if mode == "NEGATIVE" and not label.startswith("POST"):
        pytest.skip("there is nothing that could be wrong")
    given(strategy)(settings(max_examples=25, deadline=None, suppress_health_check=checks, database=None)(call))()
    assert statuses
    assert httpx.get(f"{served.url}/health").status_code == 200
