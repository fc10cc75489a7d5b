"""The command line of ``peft-multibatch serve``."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer


NEEDED = ("fastapi", "uvicorn", "prometheus_client")

DEMO = "demo"
"""Stands for the demo's model and its adapters, instead of a path."""


def serve(
    base: Annotated[str, typer.Argument(help="Base model: a folder, a name on the hub, or 'demo'.")],
    adapters: Annotated[Path | None, typer.Option(help="Folder with one subfolder per adapter.")] = None,
    adapter: Annotated[list[str] | None, typer.Option(help="An additional adapter as NAME=PATH; repeatable.")] = None,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="Name of the base model in requests; repeatable.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; needs an API key unless loopback.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="PEFT_MULTIBATCH_API_KEY", show_default=False, help="Key for clients; repeatable."),
    ] = None,
    admin_key: Annotated[
        str | None,
        typer.Option(envvar="PEFT_MULTIBATCH_ADMIN_KEY", show_default=False, help="Key for (un)loading adapters."),
    ] = None,
    allow_load: Annotated[bool, typer.Option("--allow-load", help="Enable loading and unloading by request.")] = False,
    max_adapters: Annotated[int, typer.Option(min=1, help="Maximum number of registered adapters.")] = 100_000,
    max_rank: Annotated[int, typer.Option(min=1, help="Maximum rank of an adapter.")] = 64,
    max_adapter_mb: Annotated[float, typer.Option(min=0, help="Maximum size of an adapter's weights.")] = 1024,
    adapter_memory: Annotated[str, typer.Option(help="Host memory for adapters.")] = "8GB",
    max_mixture: Annotated[int, typer.Option(min=1, help="Maximum number of adapters in a mixture.")] = 4,
    max_model_len: Annotated[int | None, typer.Option(min=2, help="Maximum tokens of prompt and answer.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Maximum number of running sequences.")] = 64,
    max_batch_tokens: Annotated[int | None, typer.Option(min=1, help="Maximum tokens per step.")] = None,
    max_cache_tokens: Annotated[int | None, typer.Option(min=1, help="Size of the KV cache in tokens.")] = None,
    max_queue: Annotated[int, typer.Option(min=0, help="Maximum number of waiting sequences; more get 429.")] = 256,
    max_requests_per_adapter: Annotated[
        int | None, typer.Option(min=1, help="Maximum running and waiting sequences per adapter.")
    ] = None,
    max_body_mb: Annotated[float, typer.Option(min=0, help="Maximum size of a request body.")] = 4,
    request_timeout: Annotated[float, typer.Option(min=0, help="Maximum duration of a request in seconds.")] = 600,
    device: Annotated[str, typer.Option(help="Device for the model.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto (as in the files).")] = "auto",
    attn_implementation: Annotated[str | None, typer.Option(help="As in transformers.")] = None,
    grace: Annotated[float, typer.Option(min=0, help="Seconds for requests to finish on shutdown.")] = 30,
    log_format: Annotated[str, typer.Option(help="text or json.")] = "text",
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts to the log.")] = False,
    allow_download: Annotated[
        bool, typer.Option("--allow-download", help="Download the base model from the hub.")
    ] = False,
) -> None:
    """Serve a base model and its adapters through OpenAI's API: `model` selects the adapter."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"serve needs {', '.join(missing)}: install them with pip install 'peft-multibatch[serve]'")
    from peft_multibatch.serve.engine import Engine
    from peft_multibatch.serve.logs import set_up
    from peft_multibatch.serve.process import CoreProcess
    from peft_multibatch.serve.server import Server
    from peft_multibatch.serve.settings import Settings

    if log_format not in ("text", "json"):
        raise typer.BadParameter("expected text or json", param_hint="--log-format")
    if adapters is None and base == DEMO:
        from peft_multibatch.demo.model import ADAPTERS_DIR

        adapters = ADAPTERS_DIR
    if adapters is not None and not adapters.is_dir():
        raise typer.BadParameter(f"{adapters} is not a folder", param_hint="--adapters")
    try:
        settings = Settings(
            adapters_dir=adapters,
            adapters=_named(adapter or []),
            model_names=tuple(served_model_name or [_name_of(base)]),
            api_keys=tuple(api_key or ()),
            admin_key=admin_key,
            allow_load=allow_load,
            max_adapters=max_adapters,
            max_rank=max_rank,
            max_adapter_mb=max_adapter_mb,
            adapter_memory=adapter_memory,
            max_mixture=max_mixture,
            max_model_len=max_model_len,
            max_batch=max_batch,
            max_batch_tokens=max_batch_tokens,
            max_cache_tokens=max_cache_tokens,
            max_queue=max_queue,
            max_requests_per_adapter=max_requests_per_adapter,
            max_body_mb=max_body_mb,
            request_timeout=request_timeout,
            grace=grace,
            log_prompts=log_prompts,
        )
        settings.check_host(host)
    except ValueError as error:
        sys.exit(str(error))
    set_up(log_format)
    load = functools.partial(load_base, base, device, dtype, attn_implementation, allow_download)
    engine = Engine(CoreProcess(load, settings, log_format))
    try:
        engine.start()
    except (RuntimeError, ValueError) as error:
        sys.exit(str(error))
    server = Server(engine, host, port)
    server.run()
    if server.has_failed:
        sys.exit(1)


def _named(adapters: list[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for each in adapters:
        name, _, path = each.partition("=")
        if not path or name in found:
            raise ValueError(f"--adapter {each}: expected NAME=PATH, with a name that isn't used twice.")
        found[name] = Path(path).resolve()
    return found


def _name_of(base: str) -> str:
    if base == DEMO:
        from peft_multibatch.demo.model import MODEL_ID

        return MODEL_ID
    return Path(base).resolve().name if os.path.isdir(base) else base


def load_base(base: str, device: str, dtype: str, attention: str | None, may_download: bool) -> tuple[Any, Any]:
    """Load a causal language model in eval mode, and its tokenizer.

    Args:
        base: a folder, a name on the hub, or ``"demo"``.
        device: the device to load it on.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"`` for the dtype of the files.
        attention: ``attn_implementation``, as in transformers.
        may_download: whether it may be downloaded from the hub.
    """
    if base == DEMO:
        import torch

        from peft_multibatch.demo.model import load_model

        return load_model(torch.float32 if dtype == "auto" else getattr(torch, dtype), device)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"local_files_only": not may_download, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(base, **options)
    if attention is not None:
        options["attn_implementation"] = attention
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **options)
    return model.to(device).eval(), tokenizer
