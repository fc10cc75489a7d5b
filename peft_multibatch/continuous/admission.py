"""Check which requests can run, so that one that can't fails by itself instead of stopping the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.generation.continuous_batching import model_runner
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus

from peft_multibatch.adapters.views import get_base
from peft_multibatch.calls.captures import cant_run
from peft_multibatch.continuous.head import HeadRouter
from peft_multibatch.continuous.leaving import CANCELLED, children_of
from peft_multibatch.continuous.prefixes import KEPT, Prefixes
from peft_multibatch.continuous.scheduler import entry_of
from peft_multibatch.errors import ModelStateError, MultibatchError, UnsupportedError
from peft_multibatch.layers.per_segment import view_for
from peft_multibatch.plan.ids import Entry, ids_of, without
from peft_multibatch.plan.segments import BASE


if TYPE_CHECKING:
    from peft_multibatch.model.handle import Handle


class Admission:
    """Checks requests when they are added, and all of them again before every step.

    Args:
        handle: the handle of the enabled model.
        model: the model that runs the requests.
        prefixes: knows the versions of adapters; a request that could run under one version may fail under the next.

    Attributes:
        uses_graphs: whether steps are captured in CUDA graphs.
        left_out: layers that can't be captured in a graph; all rows get the base layer's output there.
        has_head: whether the output layer (LM head) has adapters.
    """

    def __init__(self, handle: Handle, model: nn.Module, prefixes: Prefixes) -> None:
        self.uses_graphs = False
        self.left_out: frozenset = frozenset()
        self._left_out: dict[nn.Module, str] = {}
        self.has_head = False
        self._handle = handle
        self._registry = handle._registry
        self._model: Any = model
        self._prefixes = prefixes
        self._longest = 0  # length in tokens of the longest request that fits into the cache
        self._positions: int | None = None  # number of learned position embeddings, if the model has them
        self._is_disabled = False
        self._problem: MultibatchError | None = None  # a problem of the model that keeps every request from running
        # what requests' errors depend on, as of the last check: problem, is_disabled, deleted adapters
        self._then: tuple[MultibatchError | None, bool, int] | None = None
        self._versions: dict[int, int] = {}  # and versions of the running requests' adapters, by id
        self._promised: dict[str, RequestState] = {}  # ids of future children → the request to be forked into them
        self._new: dict[Any, RequestState] = {}  # requests added since the last check, by id
        self._looked_at: tuple | None = None  # layers and head as of the last scan
        self._checked: dict[Entry, tuple] = {}  # entries that can run, with the versions of their adapters

    def prepare(self, processor: Any) -> None:
        """Inspect the batch processor and the model before the first step."""
        runner = processor.model_runner
        self.uses_graphs = runner.use_cuda_graph_varlen or runner.use_cuda_graph_decode
        self._looked_at = None
        self._look_at_layers()
        infer = getattr(model_runner, "infer_max_single_request_tokens", None)  # not in older transformers
        self._longest = infer(processor.cache) if infer else processor.cache.num_pages
        if any(isinstance(get_base(each), nn.Embedding) for each in self._position_embeddings()):
            self._positions = self._model.config.get_text_config().max_position_embeddings

    def note(self, state: RequestState) -> None:
        """Record a new request, which hasn't been checked yet."""
        self._new[state.request_id] = state

    def once(self, scheduler: Any, add: Callable[[RequestState], None]) -> Callable[[RequestState], None]:
        """Wrap a scheduler's ``add`` so that it refuses ids, or ids of future children, that are already in use."""

        def holder(name: Any) -> RequestState | None:
            found = scheduler.active_requests.get(name) or scheduler.waiting_requests.get(name)
            if found is None:
                found = self._promised.get(name)
                if found is not None and not found.num_children:  # already forked
                    found = None
            return None if found is None or found.status == RequestStatus.FINISHED else found

        def add_once(state: RequestState) -> None:
            names = [state.request_id, *children_of(state.request_id, state.num_children)]
            wrong = [name for name in names if (found := holder(name)) is not None and found is not state]
            if wrong:
                state.num_children = 0  # the children with these ids belong to the other request
                raise UnsupportedError(
                    f"a request was added with the id {wrong[0]!r}, which a running request already has: expected "
                    "a unique id. Leave request_id out to have one generated."
                )
            self._promised.update(dict.fromkeys(names[1:], state))
            if len(self._promised) > KEPT:
                self._promised = {name: each for name, each in self._promised.items() if holder(name) is each}
            forks = [state]
            if state.num_children and len(state.initial_tokens) == 1:  # no token is left to run before the fork
                state.num_children = 0
                forks += [state.fork(name) for name in names[1:]]
            for each in forks:
                self.note(each)
                add(each)
            if CANCELLED in state.__dict__:
                scheduler.set_request_cancellation(state.request_id)

        return add_once

    def hopeless(
        self, active: Mapping[Any, RequestState], waiting: Mapping[Any, RequestState]
    ) -> Iterator[tuple[RequestState, Exception]]:
        """Yield the requests that can't run, or no longer can, each with its error.

        Waiting requests are checked when they are new, when an adapter was deleted, when the model changes in a way
        that concerns all, and by ``may_begin``, so that a step takes no longer because many wait.

        Args:
            active: the running requests, by id.
            waiting: the waiting ones.
        """
        try:
            self._handle._refresh()
            with torch.no_grad():
                self._handle._check_state()
            self._look_at_layers()
            self._problem = None
        except MultibatchError as caught:
            self._problem = caught
        self._is_disabled = any(layer.module._disable_adapters for layer in list(self._handle._layers.values()))
        used = {number for entry in {entry_of(state) for state in active.values()} for number in ids_of(entry)}
        versions, known = {number: self._registry.version(number) for number in used}, self._versions
        now = self._problem, self._is_disabled, self._registry.names.removals
        if now == self._then and all(known.get(number, version) == version for number, version in versions.items()):
            due = {name: state for name, state in active.items() if state.max_new_tokens is None}  # they get longer
            due |= {
                name: state
                for name, state in self._new.items()
                if state is active.get(name) or state is waiting.get(name)
            }
        else:
            due = {**active, **waiting}
        self._then, self._versions = now, versions
        self._new.clear()
        for state in due.values():
            error = self.why_not(state)
            if error is not None:
                yield state, error

    def may_begin(self, state: RequestState) -> bool:
        """Whether a waiting request can run. If one can't, ``hopeless`` checks all next."""
        can = self.why_not(state) is None
        if not can:
            self._then = None  # others may have become hopeless, too
        return can

    def why_not(self, state: RequestState) -> Exception | None:
        """Return the error that keeps a request from running, or None if it can run."""
        entry = entry_of(state)
        if self._problem is not None:
            return self._problem
        if entry != BASE and self._is_disabled:
            return ModelStateError(
                f"adapters were disabled while request {state.request_id!r} was running: expected them to stay "
                "enabled. Leave model.disable_adapter() first, and use the adapter id '__base__' for the base model."
            )
        gone = [number for number in ids_of(entry) if number not in self._registry.names.by_id]
        if gone:
            return ModelStateError(
                f"the adapter with the id {gone[0]} was deleted before request {state.request_id!r} had finished: "
                "expected it to exist until then. Delete adapters inside manager.changing(...), and send the request "
                "again with another adapter."
            )
        try:
            self.check_entry(entry)
        except MultibatchError as caught:
            return caught
        except Exception as caught:  # adapters come and go on other threads
            return ModelStateError(
                f"checking request {state.request_id!r} raised {type(caught).__name__} ({caught}): "
                "expected an adapter that doesn't change meanwhile. Change adapters inside manager.changing(...)."
            )
        tokens = len(state.initial_tokens) + (state.max_new_tokens or 0)
        if state.max_new_tokens is None:  # it may run until the cache is full
            tokens = max(tokens, state.position_offset + 1)
        if tokens > self._longest:
            return UnsupportedError(
                f"request {state.request_id!r} has a prompt of {len(state.initial_tokens)} tokens and "
                f"max_new_tokens={state.max_new_tokens}, but the cache holds {self._longest}: expected fewer. Pass a "
                "continuous_batching_config with more blocks."
            )
        if self._positions is not None and tokens - 1 > self._positions:
            return UnsupportedError(
                f"request {state.request_id!r} has a prompt of {len(state.initial_tokens)} tokens and "
                f"max_new_tokens={state.max_new_tokens}, but the model has {self._positions} positions: expected "
                "fewer. Shorten the prompt, or lower max_new_tokens."
            )
        return None

    def check_entry(self, entry: Entry) -> None:
        """Raise an error if requests can't run under an entry; each version of its adapters is checked once.

        Raises:
            UnsupportedError: it names an adapter or a mixture that continuous batching can't run.
        """
        # a replaced adapter may no longer be supported, and requests may be added before the loop starts
        if self._checked.get(entry) == (self._prefixes.version(entry), self.uses_graphs):
            return
        self._look_at_entry(entry)
        if len(self._checked) >= KEPT:
            self._checked.clear()
        self._checked[entry] = self._prefixes.version(entry), self.uses_graphs

    def _look_at_entry(self, entry: Entry) -> None:
        store, whole = self._registry.store, entry
        stored = [each for each in ids_of(entry) if store is not None and store.has(each)]
        entry = without(entry, stored)  # stored adapters are plain LoRA, and may not be in memory yet
        adapters = self._registry.adapters(ids_of(entry))  # raises if their weights don't fit
        configs: Any = getattr(self._handle._inner, "peft_config", None) or {}
        for name in [adapter.name for adapter in adapters.values()]:
            if getattr(configs.get(name), "alora_invocation_tokens", None):
                raise UnsupportedError(
                    f"adapter {name!r} is an aLoRA, which needs the whole prompt to find its invocation tokens: "
                    "expected another adapter, because continuous batching splits prompts. Use generate for it."
                )
        for module, what in self._left_out.items():
            if any(adapter.has(module) for adapter in adapters.values()) or any(
                store is not None and store.covers(number, module) for number in stored
            ):
                raise UnsupportedError(
                    f"{what}, which a CUDA graph can't capture: expected adapters on segmented layers, see "
                    "mb.report(). Pass ContinuousBatchingConfig(use_cuda_graph=False)."
                )
        graph = self._handle._router.graph
        plan = self._handle._router.plan([entry])
        reason = plan.why_not_compiled(graph.banks) or graph.captures.why_no_kernels(plan) if self.uses_graphs else ""
        formats = [(number, each) for number in stored if store is not None for each in store.formats(number)]
        for number, each in formats if self.uses_graphs else ():
            if not graph.captures.can_run(*each):
                reason = cant_run(self._registry.names.by_id[number], *each)
        if reason:
            raise UnsupportedError(
                f"a request can't run in continuous batching with CUDA graphs, because {reason}: expected plain LoRA, "
                "of a dtype and rank with kernels. Pass ContinuousBatchingConfig(use_cuda_graph=False)."
            )
        most = graph.components
        if self.uses_graphs and isinstance(whole, tuple) and len(whole) > most:
            raise UnsupportedError(
                f"a mixture has {len(whole)} adapters, but CUDA graphs were captured for {most}: expected at most "
                f"{most}. Pass mixtures={len(whole)} to mb.continuous_batching."
            )
        for layer in list(self._handle._layers.values()) if isinstance(entry, tuple) else ():
            view_for(layer.module, plan.entries[0], plan, layer)

    def _position_embeddings(self) -> list[nn.Module]:
        """Modules of learned position embeddings, as in GPT-2, OPT and other models without rotary embeddings."""
        words = ("wpe", "embed_positions", "position_embeddings")
        return [module for name, module in self._model.named_modules() if name.rpartition(".")[2] in words]

    def _look_at_layers(self) -> None:
        output = self._model.get_output_embeddings()
        if self._looked_at == (self._handle._scan, output):
            return
        self._looked_at = self._handle._scan, output
        self._checked.clear()
        head = next((each for each in list(self._handle._layers.values()) if each.place is output), None)
        self.has_head = head is not None and not head.refusal
        if head is not None and not isinstance(head.router, HeadRouter):
            head.router = HeadRouter(head.router)  # type: ignore[assignment]
        if self.uses_graphs:
            self._left_out = {
                layer.module: f"{layer.name} gets only the last token of every request"
                if layer is head
                else f"{layer.name} runs PEFT's own code per segment"
                for layer in list(self._handle._layers.values())
                if not layer.refusal and (layer is head or not layer.is_fast)
            }
            self.left_out = frozenset(self._left_out)


def vocabulary_of(model: Any) -> int:
    """Return the size of a model's vocabulary."""
    embedding: Any = get_base(model.get_input_embeddings())
    return embedding.num_embeddings
