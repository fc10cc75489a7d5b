"""What an engine and its core send each other; all of it can be pickled, because the core may be another process."""

from __future__ import annotations

from typing import Any, NamedTuple

from peft_multibatch.report import StoreStats
from peft_multibatch.serve.errors import ApiError
from peft_multibatch.serve.logprobs import TokenLogprobs


class Target(NamedTuple):
    """The adapters of a request.

    Attributes:
        entry: the ``adapter_id`` for continuous batching.
        label: an adapter's name, the base model's, or ``"mixture"``; for logs and metrics.
        names: the names of its adapters.
    """

    entry: Any
    label: str
    names: tuple[str, ...] = ()


class Order(NamedTuple):
    """An answer to be generated.

    Attributes:
        name: identifies the answer.
        request_id: the id of the HTTP request.
        target: the adapters that it uses.
        prompt: the tokens of the prompt.
        max_tokens: maximum number of new tokens.
        ignore_eos: whether to continue after the model's end token.
        is_streamed: whether there are outputs before the answer ends.
        is_urgent: whether there is one for each token.
        options: sampling options for the manager's ``add_request``, and ``grammar``, a schema that ``Core.grammar``
            compiled.
    """

    name: str
    request_id: str
    target: Target
    prompt: list[int]
    max_tokens: int
    ignore_eos: bool
    is_streamed: bool
    is_urgent: bool
    options: dict[str, Any]


class Output(NamedTuple):
    """What is new in an answer since its previous output.

    Attributes:
        name: the answer's name.
        tokens: the new tokens.
        logprobs: their log-probabilities; empty if they weren't requested.
        is_finished: whether the answer has ended.
        error: why it failed.
        time: when the first of the tokens was generated, by ``time.perf_counter``.
    """

    name: str
    tokens: list[int]
    logprobs: list[TokenLogprobs]
    is_finished: bool
    error: ApiError | None
    time: float

    def followed_by(self, later: Output) -> Output:
        """Join an output and the next one of the same answer."""
        return self._replace(tokens=self.tokens + later.tokens, logprobs=self.logprobs + later.logprobs,
                             is_finished=later.is_finished, error=later.error)  # fmt: skip


class State(NamedTuple):
    """The state of a core.

    Attributes:
        problem: why answers can't be generated, or None.
        active: number of answers that are being generated.
        prefix_hits: number of tokens found in the prefix cache.
        store: the adapter store's statistics.
    """

    problem: str | None
    active: int
    prefix_hits: int
    store: StoreStats
