"""The server's settings, and checks of unsafe ones."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path


NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)
"""Valid names of adapters."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Settings:
    """Limits and access control of a server; the defaults are safe on a personal machine.

    Attributes:
        adapters_dir: folder with one subfolder per adapter, which gives the adapter its name.
        adapters: folders of additional adapters, by name.
        model_names: names of the base model in requests; the first one is listed.
        api_keys: accepted API keys; without any, all clients have access.
        admin_key: key for loading and unloading adapters.
        allow_load: whether loading and unloading by request is enabled.
        max_adapters: maximum number of registered adapters.
        max_rank: maximum rank of an adapter.
        max_adapter_mb: maximum size of an adapter's weights, in MB.
        adapter_memory: host memory for adapters, such as ``"8GB"``.
        max_mixture: maximum number of adapters in a mixture.
        max_model_len: maximum number of tokens of a prompt and its answer; by default as many as the model and its
            cache allow.
        max_batch: maximum number of running sequences.
        max_batch_tokens: maximum number of tokens per step; by default determined by transformers.
        max_cache_tokens: size of the KV cache in tokens; by default determined by transformers.
        max_queue: maximum number of waiting sequences.
        max_requests_per_adapter: maximum number of running and waiting sequences per adapter; by default unlimited.
        max_body_mb: maximum size of a request body, in MB.
        request_timeout: maximum duration of a request, in seconds.
        body_timeout: maximum time for a request body to arrive, in seconds.
        grace: time for requests to finish on shutdown, in seconds.
        log_prompts: whether prompts are logged.
    """

    adapters_dir: Path | None = None
    adapters: dict[str, Path] = field(default_factory=dict)
    model_names: tuple[str, ...] = ("base",)
    api_keys: tuple[str, ...] = ()
    admin_key: str | None = None
    allow_load: bool = False
    max_adapters: int = 100_000
    max_rank: int = 64
    max_adapter_mb: float = 1024
    adapter_memory: str = "8GB"
    max_mixture: int = 4
    max_model_len: int | None = None
    max_batch: int = 64
    max_batch_tokens: int | None = None
    max_cache_tokens: int | None = None
    max_queue: int = 256
    max_requests_per_adapter: int | None = None
    max_body_mb: float = 4
    request_timeout: float = 600
    body_timeout: float = 30
    grace: float = 30
    log_prompts: bool = False

    def __post_init__(self) -> None:
        if self.allow_load and not (self.admin_key and self.adapters_dir):
            raise ValueError(
                "--allow-load was given without --admin-key or --adapters: expected a key, because otherwise anyone "
                "could change the adapters, and a folder that adapters are restricted to. Pass both."
            )
        if self.admin_key is not None and self.admin_key in self.api_keys:
            raise ValueError("--admin-key is also an --api-key: expected different keys. Choose another one.")
        if any(not key for key in (*self.api_keys, self.admin_key or "-")):
            raise ValueError("a key is empty: expected text. Leave the option or its environment variable out.")
        for name in self.adapters:
            if not NAME.fullmatch(name) or name in self.model_names:
                raise ValueError(
                    f"--adapter was given the name {name!r}: expected at most 64 letters, digits, '.', '_' and '-', "
                    "starting with a letter or digit, and not the base model's name."
                )

    def check_host(self, host: str) -> None:
        """Check that a server without keys is reachable only from its own machine.

        Raises:
            ValueError: other machines could reach it.
        """
        if host not in LOOPBACK and not self.api_keys:
            raise ValueError(
                f"--host {host} gives other machines access without a key: expected --api-key, or one of "
                f"{', '.join(LOOPBACK)}. Set PEFT_MULTIBATCH_API_KEY, or leave --host out."
            )
