"""Run a step of the loop with one adapter entry per token, and one per request in the LM head."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState

from peft_multibatch.calls.call import Call
from peft_multibatch.continuous.admission import Admission
from peft_multibatch.continuous.leaving import on_stream
from peft_multibatch.continuous.quarantine import Quarantine, as_error
from peft_multibatch.continuous.scheduler import FairScheduler, entry_of
from peft_multibatch.plan.ids import Entry, ids_of, label_of
from peft_multibatch.plan.segments import BASE


if TYPE_CHECKING:
    from peft_multibatch.model.handle import Handle


CHECKS = 1
"""Number of adapters compared with PEFT's state per step, in rotation: comparing dozens takes a millisecond."""


def finish_writes(device: torch.device) -> None:
    """Wait for what was written on the current stream: steps run on other streams, which don't wait for it.

    If a new or reset batch processor fills its tensors late, as on a busy device, that would overwrite the inputs that
    the first asynchronous steps have copied already.
    """
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


class Steps:
    """Runs steps under the entries of their requests.

    Attributes:
        served: number of tokens that ran for each adapter, by name; for a mixture, by its names and weights.
        holds: whether a request has to wait until its last token is known; by default none has to.

    Args:
        handle: the handle of the enabled model.
        admission: knows how layers run.
        queue: counts the tokens that ran.
    """

    def __init__(self, handle: Handle, admission: Admission, queue: FairScheduler) -> None:
        self.served: defaultdict[str, int] = defaultdict(int)
        self.holds: Callable[[RequestState], bool] = lambda _: False
        self._registry, self._router = handle._registry, handle._router
        self._admission, self._queue = admission, queue
        # whether another thread's call uses the graphs' plan, or changed their tables, so the step runs without graphs
        self._is_contended = False
        self._discards = 0  # how often graphs had been discarded, by any manager, when this one's were last

    def wrap(self, processor: Any, quarantine: Quarantine) -> None:
        """Make a batch processor run its steps through this object."""
        runner, io = processor.model_runner, processor.inputs_and_outputs
        self._io, self._runner, self._scheduler = io, runner, processor.scheduler
        runner._get_forward_fn = self._eager_beside_others(runner._get_forward_fn)
        runner.compute_batch = self._with_ids(runner.compute_batch, quarantine)
        self._scheduler._process_candidates = self._without_held(self._scheduler._process_candidates)

    def _without_held(self, process: Callable[..., tuple]) -> Callable[..., tuple]:
        """Wrap the scheduling of a step to leave out requests that wait for the result of the running step: those to
        be forked, and those that need to know their last token.

        Until then they have no tokens to run, and need no blocks. If no other request can run, they form a step
        without tokens, because the result of a step is read once the next one has started.
        """

        def process_candidates(candidates: list[RequestState], *args: Any) -> tuple:
            held = list(self._scheduler._requests_to_fork)  # only asynchronous steps leave any
            held += [each for each in candidates if self.holds(each)]
            found = process([each for each in candidates if not any(each is state for state in held)], *args)
            if found[0] or not held:
                return found
            for state in held:
                state.tokens_to_process = []
            # number of blocks that become complete; older versions of transformers have one for all kinds of attention
            none: Any = {} if hasattr(self._scheduler.cache, "count_new_complete_blocks") else 0
            return [FutureRequestState(state, False, none, 0) for state in held], False, False, 0, 0

        return process_candidates

    def _with_ids(self, compute: Callable[..., None], quarantine: Quarantine) -> Callable[..., None]:
        def compute_batch(model: Any, batch_data: dict) -> None:
            futures = self._packed().requests_in_batch
            if not any(future.query_length for future in futures):
                return
            known = self._scheduler.active_requests
            is_warmup = not any(known.get(future.state.request_id) is future.state for future in futures)
            # transformers would write it to the configuration, where other threads would see it. Decoders don't need
            # it: masks are passed with the step, and without a mask attention is causal
            batch_data.pop("is_causal", None)
            try:
                self._run(compute, model, batch_data, futures, is_warmup)
            except Exception as caught:
                if is_warmup:
                    raise
                quarantine.step_failed(futures, as_error(caught))

        return compute_batch

    def _run(
        self,
        compute: Callable[..., None],
        model: Any,
        batch_data: dict,
        futures: Sequence[FutureRequestState],
        is_warmup: bool,
    ) -> None:
        entries: list[Entry] = []
        begin: set[int] = set()
        served: Counter[Entry] = Counter()
        for future in futures:
            entry, tokens = entry_of(future.state), future.query_length
            entries += [entry] * tokens
            served[entry] += tokens
            if future.state.position_offset == tokens:
                begin.update(ids_of(entry))
        if not is_warmup:  # warmup steps only capture graphs
            for entry, tokens in served.items():
                self._queue.charge(entry, tokens)
                self.served[label_of(entry, self._registry.names)] += tokens
        entries += [BASE] * (batch_data["input_ids"].shape[1] - len(entries))  # padding
        self._registry.adapters(sorted(begin), len(begin))  # all of them, because a prompt is read only once
        plan = self._router.plan(entries, checks=0)
        if self._router.graph.outgrown_by(plan):
            self._router.graph.discard_captures()
        self._drop_graphs()
        del plan  # waiting for memory below must not keep adapters that may have to be evicted
        for_graphs, left_out = self._admission.uses_graphs, self._admission.left_out
        stream = self._io.compute_stream
        if stream is not None and not hasattr(self._io, "io_pairs"):
            # without asynchronous batching, transformers writes the inputs on the current stream, and doesn't wait for
            # the last of these writes
            stream.wait_stream(torch.cuda.current_stream(stream.device))
        # plans must be copied on the stream that computes
        routing = self._router.routing(entries, expands=False, packed=True, checks=CHECKS, base_layers=left_out)
        with on_stream(stream), routing as call:
            graph = self._router.graph  # which another thread's call may have changed just before this one began
            self._is_contended = graph.contended or graph.outgrown_by(call.plan) or self._are_discarded()
            call.begin_model()
            call.for_graphs = for_graphs and not self._is_contended
            if call.for_graphs and self._router.kernels is not None:  # graphs that are already captured read it
                self._router.graph.prepare(call, batch_data["input_ids"].device)
            self._mask_wholly(batch_data)
            call.head = self._head(model, batch_data, futures, entries)
            compute(model, batch_data)

    def _eager_beside_others(self, forward_of: Callable[..., tuple]) -> Callable[..., tuple]:
        """Wrap the choice of a step's forward pass so that no CUDA graph is used while other threads run calls.

        Graphs and compiled code read their plan from one location, which such a call occupies until ``generate`` ends.
        """

        def forward_beside_others(*args: Any, **kwargs: Any) -> tuple:
            if self._is_contended:
                return self._runner._forward_process_and_sample, False
            return forward_of(*args, **kwargs)

        return forward_beside_others

    def _head(
        self, model: Any, batch_data: dict, futures: Sequence[FutureRequestState], entries: list[Entry]
    ) -> Call | None:
        """The call for the LM head if it has adapters and gets only the last tokens, otherwise None."""
        slices = getattr(self._runner, "supports_logits_to_keep", None)  # not in older versions of transformers
        if not (self._admission.has_head and slices is not None and slices(model)):
            return None
        last = [entry_of(future.state) for future in futures if future.has_new_token]
        last += entries[:1] * (len(batch_data["logits_indices"]) - len(last))  # padding repeats the first token
        call = Call(self._router.plan(last, checks=0), False, True, self._admission.left_out)
        call.begin_model()
        return call

    def _mask_wholly(self, batch_data: dict) -> None:
        """Use -inf to mask requests from each other in float16, whose lowest finite number scores can reach."""
        masks = batch_data["attention_mask"]
        for mask in masks.values() if isinstance(masks, dict) else [masks]:
            if mask is not None and mask.dtype == torch.float16:
                rows = mask[..., : self._packed().total_seqlen_q, :]  # padding rows stay: a fully masked row gives NaN
                rows.masked_fill_(rows < 0, -torch.inf)

    def _packed(self) -> Any:
        """transformers' description of the step that is being prepared or about to run."""
        return self._io.io_pairs[self._io.current_pair].host_io if hasattr(self._io, "io_pairs") else self._io

    def _are_discarded(self) -> bool:
        """Whether graphs of this model were discarded, maybe by another manager, that this one still has."""
        return self._discards != self._router.graph.captures.discards

    def _drop_graphs(self) -> None:
        """Drop CUDA graphs that were discarded; they are captured again, with the adapters' shapes of that time."""
        if not self._are_discarded():
            return
        self._discards = self._router.graph.captures.discards
        pairs = [pair.device_io for pair in self._io.io_pairs] if hasattr(self._io, "io_pairs") else [self._io]
        for each in pairs:
            each.graphs = type(each.graphs)()
