"""Run the server of `peft-multibatch serve` on a Ray cluster, routing requests to replicas that have their adapter.

    python examples/ray_serve.py --model path/to/model --adapters path/to/adapters --replicas 4 --gpus-per-replica 1
    python examples/ray_serve.py --trial    # two replicas of the demo's model on this machine, and a few requests

Every replica is a complete server, with the base model and the adapters that it has been asked for. In front of them,
an ingress reads a request's `model` and passes it to Ray Serve's router, which knows the adapters that each replica
has loaded (Ray calls this multiplexing). Streams, errors and disconnects behave as without Ray.

If RAY_ADDRESS names a cluster, or one runs on this machine, it is used, and its machines must be able to read the
model and the adapters; otherwise Ray starts one here. PEFT_MULTIBATCH_API_KEY is the key that clients need.
"""

import asyncio
import json
import os
import signal
import time
import urllib.request
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Annotated, Any

import ray
import torch
import typer
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Scope

from peft_multibatch.demo.model import ADAPTERS_DIR, MODEL_ID, load_model
from peft_multibatch.serve.app import build_app
from peft_multibatch.serve.core import Core
from peft_multibatch.serve.engine import Engine
from peft_multibatch.serve.errors import ApiError
from peft_multibatch.serve.gate import respond
from peft_multibatch.serve.settings import Settings


ADAPTERS_PER_REPLICA = 64
"""Number of adapters that Ray's router remembers per replica; the adapter store decides which are in memory."""

KEPT = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers", "root_path")
"""Keys of the ASGI scope that can be sent to another process."""


@serve.deployment(max_ongoing_requests=1000)  # the server has its own limits, and answers 429
class Replica:
    """A server without a socket, called with ASGI messages."""

    def __init__(self, model: str, dtype: str, settings: Settings) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"  # Ray shows a replica its own GPUs
        if model:
            from transformers import AutoModelForCausalLM, AutoTokenizer

            base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, local_files_only=True).to(device).eval()
            tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        else:
            base, tokenizer = load_model(torch.float32, device)
        self.engine = Engine(Core(base, tokenizer, settings))
        self.engine.start()
        self.app = build_app(self.engine)
        self.name = serve.get_replica_context().replica_id.unique_id

    @serve.multiplexed(max_num_models_per_replica=ADAPTERS_PER_REPLICA)
    async def known(self, adapter: str) -> str:
        """Called for adapters that are new to this replica; tells Ray's router about them."""
        return adapter

    async def answer(self, scope: Scope, body: bytes) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the ASGI messages of a response. Closing the generator counts as a disconnect."""
        adapter = serve.get_multiplexed_model_id()
        if adapter and await self._is_there(adapter):
            await self.known(adapter)
        left, messages = asyncio.Event(), asyncio.Queue[dict[str, Any]]()
        received = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if received:
                return received.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        task = asyncio.ensure_future(self.app(scope, receive, messages.put))
        try:
            more = True
            while more:
                message = await messages.get()
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (b"x-replica", self.name.encode())]
                more = message["type"] == "http.response.start" or message.get("more_body", False)
                yield message
        finally:
            left.set()
            await task

    async def _is_there(self, adapter: str) -> bool:
        try:
            return bool((await self.engine.core.find(adapter)).names)
        except ApiError:  # the server answers with this error
            return False

    async def check_health(self) -> None:
        """Raise if the server is unhealthy, so that Ray restarts the replica."""
        problem = await self.engine.problem()
        if problem is not None:
            raise RuntimeError(problem)

    async def __del__(self) -> None:
        self.engine.stop()


@serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})
class Ingress:
    """Reads the adapter of a request, and passes it to a replica."""

    def __init__(self, replicas: DeploymentHandle, settings: Settings) -> None:
        self.replicas = replicas.options(method_name="answer", stream=True)
        self.limit, self.base = int(settings.max_body_mb * 1e6), settings.model_names

    async def __call__(self, request: Request) -> Response:
        """Stream a replica's response."""
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self.limit:
                return respond(ApiError(413, "The request's body is too large.", "body_too_large"))
        scope = {name: request.scope[name] for name in KEPT if name in request.scope}
        name = _model_of(body)
        adapter = "" if name in self.base else name  # every replica has the base model
        messages = self.replicas.options(multiplexed_model_id=adapter).remote(scope, bytes(body))
        start = await anext(messages)

        async def parts() -> AsyncGenerator[bytes, None]:
            async for message in messages:
                yield message["body"]

        response = StreamingResponse(parts(), start["status"])
        response.raw_headers = list(start["headers"])
        return response


def _model_of(body: bytes | bytearray) -> str:
    """Return the model that a request names, or an empty string."""
    try:
        found = json.loads(body)["model"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return ""
    return found if isinstance(found, str) and len(found) <= 64 and found.isprintable() else ""


def begin(
    model: str,
    dtype: str,
    settings: Settings,
    replicas: int,
    gpus_per_replica: float,
    cpus_per_replica: float,
    port: int,
) -> str:
    """Start the server on the cluster, and return its URL once all replicas are ready."""
    options = {"num_gpus": gpus_per_replica, "num_cpus": cpus_per_replica}
    behind = Replica.options(num_replicas=replicas, ray_actor_options=options).bind(model, dtype, settings)
    serve.start(http_options={"host": "127.0.0.1" if not settings.api_keys else "0.0.0.0", "port": port})
    serve.run(Ingress.bind(behind, settings), name="peft_multibatch", route_prefix="/")
    return f"http://127.0.0.1:{port}"


def try_it(url: str, adapters: list[str]) -> None:
    """Send two requests to every adapter, and print which replica answered."""
    for name in [MODEL_ID, *adapters, *adapters]:
        body = {"model": name, "prompt": "The night is long, and", "max_tokens": 12, "temperature": 0}
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request) as response:
            text = json.load(response)["choices"][0]["text"]
            print(f"{name}, by replica {response.headers['x-replica']}: {text!r}", flush=True)
        time.sleep(1)  # the router learns about new adapters with a delay


def main(
    model: str = "",
    adapters: Annotated[Path | None, typer.Option(help="folder with one subfolder per adapter")] = None,
    replicas: Annotated[int, typer.Option(min=1)] = 2,
    gpus_per_replica: Annotated[float, typer.Option(min=0)] = 0,
    cpus_per_replica: Annotated[float, typer.Option(min=0)] = 1,
    dtype: str = "auto",
    max_cache_tokens: Annotated[
        int | None, typer.Option(help="per replica; by default determined by transformers")
    ] = None,
    port: int = 8000,
    trial: Annotated[bool, typer.Option("--trial", help="send requests to the demo's model")] = False,
) -> None:
    """Serve MODEL and ADAPTERS on a Ray cluster until Ctrl-C or SIGTERM."""
    if trial != (not model) or trial != (adapters is None):
        raise SystemExit("expected --model and --adapters, or --trial without them.")
    folder = (adapters or ADAPTERS_DIR).resolve()
    names = (os.path.basename(os.path.normpath(model)) if model else MODEL_ID,)
    keys = tuple(filter(None, [os.environ.get("PEFT_MULTIBATCH_API_KEY")]))
    settings = Settings(adapters_dir=folder, model_names=names, api_keys=keys, max_cache_tokens=max_cache_tokens)
    path = os.path.abspath(model) if model and Path(model).exists() else model
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    ray.init()
    try:
        url = begin(path, dtype, settings, replicas, gpus_per_replica, cpus_per_replica, port)
        print(f"{url} is ready", flush=True)
        if trial:
            try_it(url, sorted(each.name for each in folder.iterdir() if each.is_dir()))
        while not trial:
            time.sleep(1)
    except KeyboardInterrupt:
        pass
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    typer.run(main)
