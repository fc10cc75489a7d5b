"""One call with ids: its plan, and what was made for it alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_multibatch.calls.batch_plan import BatchPlan
from peft_multibatch.calls.dropout import Draws
from peft_multibatch.calls.origin import Origin
from peft_multibatch.calls.stacks import Stacks
from peft_multibatch.errors import RowMappingError, UnsupportedError
from peft_multibatch.plan.ids import Entry


if TYPE_CHECKING:
    from peft_multibatch.adapters.bank import Bank
    from peft_multibatch.calls.threads import ThreadState


class Invocations:
    """Where aLoRA adapters begin in each sample, counted from its end, as PEFT counts when a call begins.

    Args:
        offsets: for each sample the number of tokens from its invocation on; None where there is none.
        tokens: length of the samples.
        expands: True for ``generate``, whose steps are checked against what the offsets mean.
    """

    def __init__(self, offsets: Sequence[int | None], tokens: int, expands: bool) -> None:
        self.offsets = offsets
        self.tokens = tokens  # of the forward under way
        self._total = 0 if expands else None  # tokens that the model has seen; None outside of generate
        self._prompt = tokens

    def step(self, tokens: int, before: int) -> None:
        """A forward inside ``generate`` begins: the whole prompt first, then one token after the other.

        Raises:
            UnsupportedError: it isn't, and offsets from the end would point elsewhere.
        """
        if self._total is None:
            return
        first = self._total == 0
        if before + tokens != (self._prompt if first else self._total + 1) or not (first or tokens == 1):
            raise UnsupportedError(
                "generate with an aLoRA adapter ran the model on other tokens than the prompt and then one at a time, "
                "and aLoRA counts tokens from the prompt's end: expected a cache, and no chunked prefill, guidance or "
                "assisted decoding. Leave these options out."
            )
        self._total, self.tokens = before + tokens, tokens


class Call:
    """A mixed batch that is active on one thread or task, for as long as its block isn't left.

    Attributes:
        plan: who serves which sample.
        expands: True inside ``generate``, where beams and returned sequences make a sample several rows.
        packed: True where entries are tokens, all in one row, as in continuous batching.
        base_layers: layers whose adapters were disabled when the call began, so that all rows get the base model.
        is_hooked: whether somebody hooked all modules, for which PEFT's own have to run.
        is_tried: whether the order of rows in models of this type is known, so that it needn't be looked at.
        for_graphs: True where CUDA graphs are captured of the call, which runs as they will from the beginning.
        origin: where it began.
        is_used: whether the model ran with these ids.
        inside: True while a model's forward runs that has checked this call.
        is_watched: whether layers have to look before they run under it; see ``Router.current``.
        end: gives None once the block was left, by whatever way; see ``ActiveCall``.
        ended: True once it was left as it should be.
        outer: the call that was active before, and will be again.
        thread: the thread on which it began.
        task: the asyncio task.
        sibling_outputs: for each fused group, what its first layer computed for the others.
        dora_scales: what DoRA multiplies outputs with, for each bank.
        draws: which masks its adapters' dropouts have.
        workspaces: memory for intermediate results, for each device and stream.
        stacks: copies of weights for the steps of ``generate`` on a CPU.
        rows: rows of the model's last forward inside ``generate``.
        invocations: where aLoRA adapters begin; None where no adapter in use is one.
        prompts: the tokens of ``generate``, where code of the user's own makes rows of them.
        head: the call that the layer sees which gives logits, where it gets other rows than all others.
    """

    def __init__(
        self, plan: BatchPlan, expands: bool, packed: bool = False, base_layers: frozenset = frozenset()
    ) -> None:
        self.plan = plan
        self.expands = expands
        self.packed = packed
        self.base_layers = base_layers
        self.is_hooked = nn.modules.module._has_any_global_hook()
        self.is_tried = True
        self.for_graphs = False
        self.origin = Origin.here()
        self.is_used = False
        self.inside = False
        self.is_watched = True
        self.end: Callable[[], Any] = over
        self.ended = False
        self.outer: Call | None = None
        self.thread: ThreadState | None = None
        self.task = 0
        self.sibling_outputs: dict[Any, tuple[Tensor, int, list[Tensor | None]]] = {}
        self.dora_scales: dict[Bank, list[Tensor | None]] = {}
        self.draws = Draws()
        self.workspaces: dict[tuple, Tensor] = {}
        self.stacks = Stacks() if expands else None
        self.rows: int | None = None
        self.invocations: Invocations | None = None
        self.prompts: Tensor | None = None
        self.head: Call | None = None

    @property
    def is_active(self) -> bool:
        """Whether its block is still open."""
        return not self.ended and self.end() is not None

    def begin_model(self, invocations: Invocations | None = None) -> None:
        """A model's forward begins that has checked the call. Without gradients nothing will run its layers again."""
        self.inside, self.is_watched = True, torch.is_grad_enabled()
        self.invocations = invocations

    def again(self) -> Call:
        """The same ids for layers that ``backward`` runs once more after the call has ended."""
        again = Call(self.plan, self.expands, self.packed, self.base_layers)
        again.is_tried = self.is_tried
        again.draws = self.draws.again()
        again.inside, again.rows, again.invocations = True, self.rows, self.invocations
        return again

    def alone(self, entry: Entry) -> Call:
        """The same for the samples of one entry alone, of a part of the model that runs inside of this one."""
        alone = self.again()
        alone.plan = self.plan.alone(entry)
        return alone

    def num_rows(self, shape: Sequence[int]) -> int:
        """Rows that belong to entries in a layer's input of the shape ``[..., K]``.

        Raises:
            RowMappingError: they are no multiple of the entries, or look like another dimension.
        """
        rows = math.prod(shape[:-1]) if self.packed else shape[0]
        self.plan.segments.rows_per_entry(rows)
        if not self.packed:
            self.check_order(shape)
        return rows

    def check_order(self, shape: Sequence[int], layer: str = "a layer") -> None:
        """Raise where rows look like another dimension than the samples', in a model that nobody tried.

        Raises:
            RowMappingError: they do.
        """
        if self.is_tried or self.plan.segments.num_segments == 1:
            return
        samples = {self.plan.segments.num_entries, self.rows}
        if shape[0] not in samples and samples.intersection(shape[1:-1]):
            raise RowMappingError(
                f"{layer} received an input of the shape {[*shape]} for {self.plan.segments.num_entries} samples, "
                "which may have the samples in a later dimension, in a model of a type that wasn't tried: expected "
                "them first. Ask mb.verify(...): where it finds all rows right, the model counts as tried."
            )

    def check_rows(self, rows: int | None) -> None:
        """Raise where ``generate`` goes on with fewer rows than before: it dropped samples, and nobody knows which.

        Raises:
            RowMappingError: it did.
        """
        if not self.expands or rows is None:
            return
        if self.rows is not None and rows < self.rows:
            raise RowMappingError(
                f"generate went on with {rows} rows after {self.rows}, and can't tell which rows belong to which "
                "sample: expected the same rows at every step. Whisper does so with long audio; generate for one "
                "adapter at a time there."
            )
        self.rows = rows


def over() -> None:
    """The end of a call that isn't active, or not any more."""
