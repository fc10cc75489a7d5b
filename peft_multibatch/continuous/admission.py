"""Which requests can run in continuous batching: one that can't must end with an error of its own, not the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.generation.continuous_batching import model_runner
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus

from peft_multibatch.adapters.views import get_base
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
    """Looks at requests when they are added, and at all of them before every step.

    Args:
        handle: of the enabled model.
        model: what runs.
        prefixes: which know the versions of adapters: what could run under one version need not under the next.

    Attributes:
        uses_graphs: whether steps are captured in CUDA graphs.
        left_out: layers that graphs can't hold, in which all rows get what the base layer gives.
        has_head: whether the layer that gives logits has adapters.
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
        self._longest = 0  # tokens of a request that fits into the cache
        self._positions: int | None = None  # learned positions, beyond which a model has none
        self._is_disabled = False
        self._problem: MultibatchError | None = None  # of the model, under which no request can run
        self._then: tuple | None = None  # all that requests' errors depend on, when they were last looked for
        self._promised: dict[str, RequestState] = {}  # ids of children, and who will be forked into them
        self._new: set[str] = set()  # requests that came since then
        self._looked_at: tuple | None = None  # layers and head, when they were last looked at
        self._checked: set[tuple] = set()  # entries that can run, with the versions of their adapters

    def prepare(self, processor: Any) -> None:
        """Look at what will run the requests, before it does."""
        runner = processor.model_runner
        self.uses_graphs = runner.use_cuda_graph_varlen or runner.use_cuda_graph_decode
        self._looked_at = None
        self._look_at_layers()
        infer = getattr(model_runner, "infer_max_single_request_tokens", None)  # not in older transformers
        self._longest = infer(processor.cache) if infer else processor.cache.num_pages
        if any(isinstance(get_base(each), nn.Embedding) for each in self._position_embeddings()):
            self._positions = self._model.config.get_text_config().max_position_embeddings

    def note(self, state: RequestState) -> None:
        """A request came that wasn't looked at yet."""
        self._new.add(state.request_id)

    def once(self, scheduler: Any, add: Callable[[RequestState], None]) -> Callable[[RequestState], None]:
        """What adds requests to a scheduler, for requests whose id, or whose children's ids, nobody has."""

        def holder(name: Any) -> RequestState | None:
            found = scheduler.active_requests.get(name) or scheduler.waiting_requests.get(name)
            if found is None:
                found = self._promised.get(name)
                if found is not None and not found.num_children:  # it was forked
                    found = None
            return None if found is None or found.status == RequestStatus.FINISHED else found  # as those evicted

        def add_once(state: RequestState) -> None:
            names = [state.request_id, *children_of(state.request_id, state.num_children)]
            wrong = [name for name in names if (found := holder(name)) is not None and found is not state]
            if wrong:
                state.num_children = 0  # those with their ids are the other one's
                raise UnsupportedError(
                    f"a request has the id {wrong[0]!r}, which another one has that is under way: expected "
                    "another id. Leave request_id out to have one made up."
                )
            self._promised.update(dict.fromkeys(names[1:], state))
            if len(self._promised) > KEPT:
                self._promised = {name: each for name, each in self._promised.items() if holder(name) is each}
            forks = [state]
            if state.num_children and len(state.initial_tokens) == 1:  # no token is left to run before they part
                state.num_children = 0
                forks += [state.fork(name) for name in names[1:]]
            for each in forks:
                self.note(each)
                add(each)
            if CANCELLED in state.__dict__:
                scheduler.set_request_cancellation(state.request_id)

        return add_once

    def hopeless(self, states: Iterable[RequestState]) -> Iterator[tuple[RequestState, Exception]]:
        """Requests that can't run, or can't any more, and why."""
        try:
            self._handle._refresh()
            with torch.no_grad():
                self._handle._check_state()
            self._look_at_layers()
            self._problem = None
        except MultibatchError as caught:
            self._problem = caught
        self._is_disabled = any(layer.module._disable_adapters for layer in list(self._handle._layers.values()))
        states = list(states)
        used = {number for entry in {entry_of(state) for state in states} for number in ids_of(entry)}
        now = self._problem, self._is_disabled, {number: self._registry.version(number) for number in sorted(used)}
        if now == self._then:  # what could run then can run now; not so those without an end
            states = [state for state in states if state.max_new_tokens is None or state.request_id in self._new]
        else:
            self._checked = {key for key in list(self._checked) if key[1] == self._prefixes.version(key[0])}
        self._then = now
        self._new.clear()
        for state in states:
            error = self.why_not(state)
            if error is not None:
                yield state, error

    def may_begin(self, state: RequestState) -> bool:
        """Whether a request that waits can run; all but those that came since ``hopeless`` looked can."""
        return state.request_id not in self._new or self.why_not(state) is None

    def why_not(self, state: RequestState) -> Exception | None:
        """Why a request can't run, None where it can."""
        entry = entry_of(state)
        if self._problem is not None:
            return self._problem
        if entry != BASE and self._is_disabled:
            return ModelStateError(
                f"adapters were disabled while request {state.request_id!r} ran: expected them to stay enabled. Leave "
                "model.disable_adapter() first, and ask for '__base__' where the base model is meant."
            )
        gone = [number for number in ids_of(entry) if number not in self._registry.names.by_id]
        if gone:
            return ModelStateError(
                f"the adapter with the id {gone[0]} was deleted before request {state.request_id!r} had ended: "
                "expected it to stay until then. Delete adapters inside manager.changing(...), and send the request "
                "to another one."
            )
        try:
            self.check_entry(entry)
        except MultibatchError as caught:
            return caught
        except Exception as caught:  # adapters come and go on other threads
            return ModelStateError(
                f"request {state.request_id!r} can't run, which raises {type(caught).__name__} ({caught}): "
                "expected an adapter that stays as it is. Change adapters inside manager.changing(...)."
            )
        tokens = len(state.initial_tokens) + (state.max_new_tokens or 0)
        if state.max_new_tokens is None:  # which ends when the cache is full
            tokens = max(tokens, state.position_offset + 1)
        if tokens > self._longest:
            return UnsupportedError(
                f"request {state.request_id!r} has a prompt of {len(state.initial_tokens)} tokens and asks for "
                f"{state.max_new_tokens}, and the cache holds {self._longest}: expected fewer. Pass a "
                "continuous_batching_config with more blocks."
            )
        if self._positions is not None and tokens - 1 > self._positions:
            return UnsupportedError(
                f"request {state.request_id!r} has a prompt of {len(state.initial_tokens)} tokens and asks for "
                f"{state.max_new_tokens}, and the model has {self._positions} positions: expected fewer."
            )
        return None

    def check_entry(self, entry: Entry) -> None:
        """Raise where no request can run under an entry; looks once at every version of its adapters.

        Raises:
            UnsupportedError: it names an adapter or a mixture that continuous batching can't run.
        """
        # what comes into an adapter's place needn't be able to run here; requests may come before the loop begins
        if (entry, self._prefixes.version(entry), self.uses_graphs) in self._checked:
            return
        self._look_at_entry(entry)
        if len(self._checked) >= KEPT:
            self._checked.clear()
        self._checked.add((entry, self._prefixes.version(entry), self.uses_graphs))

    def _look_at_entry(self, entry: Entry) -> None:
        store, whole = self._registry.store, entry
        stored = [each for each in ids_of(entry) if store is not None and store.has(each)]
        entry = without(entry, stored)  # plain LoRA, which may not be in memory yet
        adapters = self._registry.adapters(ids_of(entry))  # whose weights may not fit
        configs: Any = getattr(self._handle._inner, "peft_config", None) or {}
        for name in [adapter.name for adapter in adapters.values()]:
            if getattr(configs.get(name), "alora_invocation_tokens", None):
                raise UnsupportedError(
                    f"adapter {name!r} is an aLoRA, which looks for its invocation tokens in whole prompts: expected "
                    "another one, because continuous batching cuts prompts. Use generate for it."
                )
        for module, what in self._left_out.items():
            if any(adapter.has(module) for adapter in adapters.values()) or any(
                store is not None and store.covers(number, module) for number in stored
            ):
                raise UnsupportedError(
                    f"{what}, which a CUDA graph can't hold: expected adapters on segmented layers, see mb.report(). "
                    "Pass ContinuousBatchingConfig(use_cuda_graph=False)."
                )
        plan = self._handle._router.plan([entry])
        reason = plan.why_not_compiled(self._handle._router.graph.banks) if self.uses_graphs else ""
        if reason:
            raise UnsupportedError(
                f"a request can't run in continuous batching with CUDA graphs, because {reason}: expected plain LoRA. "
                "Pass ContinuousBatchingConfig(use_cuda_graph=False)."
            )
        most = self._handle._router.graph.components
        if self.uses_graphs and isinstance(whole, tuple) and len(whole) > most:
            raise UnsupportedError(
                f"a mixture has {len(whole)} adapters, and CUDA graphs were captured for {most}: "
                "expected no more. Pass mixtures=... to mb.continuous_batching."
            )
        for layer in list(self._handle._layers.values()) if isinstance(entry, tuple) else ():
            view_for(layer.module, plan.entries[0], plan, layer)

    def _position_embeddings(self) -> list[nn.Module]:
        """Modules that hold a vector for each position, of GPT-2, OPT and other models without rotary positions."""
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
                layer.module: f"{layer.name} gets the last token of every request alone"
                if layer is head
                else f"{layer.name} runs PEFT's own code per segment"
                for layer in list(self._handle._layers.values())
                if not layer.refusal and (layer is head or not layer.is_fast)
            }
            self.left_out = frozenset(self._left_out)


def vocabulary_of(model: Any) -> int:
    """How many tokens a model knows."""
    embedding: Any = get_base(model.get_input_embeddings())
    return embedding.num_embeddings
