"""What the server may be told when it starts, and what it refuses to start with."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path


NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)
"""Names that adapters may have."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Settings:
    """Limits and doors of a server; the defaults are safe on a machine of one's own.

    Attributes:
        adapters_dir: folder whose folders are adapters, each by its name.
        adapters: more adapters, folders by name.
        model_names: what clients may call the base model; the first one is what it is listed as.
        api_keys: of which clients must send one; any client may come where there are none.
        admin_key: with which adapters may be loaded and unloaded.
        allow_load: whether they may be at all.
        max_adapters: most adapters that may be known at a time.
        max_rank: largest rank of any adapter.
        max_adapter_mb: size of the largest file of weights, in MB.
        adapter_memory: host memory for adapters, such as ``"8GB"``.
        max_mixture: most adapters in a mixture.
        max_model_len: most tokens of a prompt and its answer; as many as the model and its cache have where not given.
        max_batch: most sequences that run at a time.
        max_batch_tokens: most tokens in a step; found by transformers where not given.
        max_cache_tokens: tokens that the cache holds; found by transformers where not given.
        max_queue: most sequences that wait for a place in the batch.
        max_requests_per_adapter: most sequences that run or wait for one adapter; as many as there is room for where
            not given.
        max_body_mb: size of the largest body, in MB.
        request_timeout: seconds that a request may take.
        body_timeout: seconds in which a request's body has to have come.
        grace: seconds that requests have to end when the server stops.
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
                "--allow-load was given without --admin-key or --adapters: expected a key, without which anybody "
                "could change the adapters, and a folder, outside of which none are read. Pass both."
            )
        if self.admin_key is not None and self.admin_key in self.api_keys:
            raise ValueError("--admin-key is one of the --api-key: expected a key of its own. Make another one.")
        if any(not key for key in (*self.api_keys, self.admin_key or "-")):
            raise ValueError("a key is empty: expected text. Leave the option or its environment variable out.")
        for name in self.adapters:
            if not NAME.fullmatch(name) or name in self.model_names:
                raise ValueError(
                    f"--adapter was given the name {name!r}: expected one that the base model doesn't have, of "
                    "letters, digits, '.', '_' and '-', 64 at most, the first one a letter or digit."
                )

    def check_host(self, host: str) -> None:
        """Raise where everybody could reach a server that asks nobody for a key.

        Raises:
            ValueError: they could.
        """
        if host not in LOOPBACK and not self.api_keys:
            raise ValueError(
                f"--host {host} lets other machines in, and there is no key: expected --api-key, or one of "
                f"{', '.join(LOOPBACK)}. Set PEFT_MULTIBATCH_API_KEY, or leave --host out."
            )
