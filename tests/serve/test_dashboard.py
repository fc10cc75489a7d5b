"""The docs' Grafana dashboard uses only metrics that a running server has."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from test_completions import ask


METRIC = re.compile(r"peft_multibatch_\w+")


@pytest.fixture(scope="module")
def dashboard():
    return json.loads((Path(__file__).parents[2] / "docs/serving-dashboard.json").read_text())


@pytest.fixture(scope="module")
def expressions(dashboard):
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_every_metric_and_label_is_exported(client, served, dashboard, expressions):
    ask(client, "red", "Hi"), ask(client, "base", "Hi", extra_body={"adapter": {"red": 0.5, "blue": 0.5}})
    with pytest.raises(openai.NotFoundError):
        ask(client, "yellow", "Hi")
    stream = ask(client, "red", "Hi", stream=True, max_tokens=100)
    next(iter(stream))  # makes a sequence run
    text = httpx.get(f"{served.url}/metrics").text
    stream.close()
    labels: dict[str, set] = {}
    for sample in (each for family in text_string_to_metric_families(text) for each in family.samples):
        labels.setdefault(sample.name, set()).update(sample.labels)
    assert len(expressions) >= 8
    queries = [each["query"] for each in dashboard["templating"]["list"] if each["type"] == "query"]
    for expression in [*expressions, *queries]:
        names = METRIC.findall(expression)
        assert names and set(names) <= set(labels), expression
        asked = {label for names in re.findall(r"by \(([^)]*)\)", expression) for label in re.split(r",\s*", names)}
        asked |= {each for inside in re.findall(r"\{([^}]*)\}", expression) for each in re.findall(r"(\w+)=", inside)}
        asked |= set(re.findall(r"label_values\(\w+, (\w+)\)", expression))
        for name in names:
            assert asked <= labels[name], (expression, name)


def test_it_is_a_dashboard(dashboard, expressions):
    panels, variables = dashboard["panels"], {each["name"] for each in dashboard["templating"]["list"]}
    assert dashboard["title"] and dashboard["uid"] and dashboard["schemaVersion"] >= 36
    assert len({panel["id"] for panel in panels}) == len(panels)
    for one, other in itertools.combinations([panel["gridPos"] for panel in panels], 2):
        apart = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert apart or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
    for panel in panels:
        assert panel["title"] and panel["type"] in ("timeseries", "stat", "gauge", "table", "heatmap")
        assert panel["gridPos"]["x"] >= 0 and panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${source}"}
    text = json.dumps(dashboard)
    used = set(re.findall(r"\$\{?(\w+)", text)) - {"__all", "__rate_interval"}
    assert used == variables
    for expression in expressions:
        assert all(expression.count(pair[0]) == expression.count(pair[1]) for pair in ("()", "{}", "[]"))
        assert "[" not in expression or re.search(r"rate\([^[]*\[\$__rate_interval\]", expression)
