"""The state of one call with ids: its plan, and what is computed once per call."""

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
    """Where aLoRA adapters start in each sample, counted from its end, as PEFT does when a call begins.

    Args:
        offsets: for each sample, the number of tokens from the invocation to the end; None without an invocation.
        tokens: the length of the samples.
        expands: True for ``generate``, whose steps are checked because offsets are counted from the prompt's end.
    """

    def __init__(self, offsets: Sequence[int | None], tokens: int, expands: bool) -> None:
        self.offsets = offsets
        self.tokens = tokens  # of the current forward
        self._total = 0 if expands else None  # tokens that the model has processed; None outside of generate
        self._prompt = tokens

    def step(self, tokens: int, before: int) -> None:
        """Check a forward inside ``generate``: the whole prompt first, then one token at a time.

        Raises:
            UnsupportedError: it has other tokens, so offsets from the prompt's end would be wrong.
        """
        if self._total is None:
            return
        first = self._total == 0
        if before + tokens != (self._prompt if first else self._total + 1) or not (first or tokens == 1):
            raise UnsupportedError(
                "generate with an aLoRA adapter didn't run the model on the whole prompt and then on one token at a "
                "time, and aLoRA counts tokens from the prompt's end: expected a cache, and no chunked prefill, "
                "guidance or assisted decoding. Leave these options out."
            )
        self._total, self.tokens = before + tokens, tokens


class Call:
    """A mixed batch, active on one thread or task until its block is left.

    Attributes:
        plan: which adapter serves each sample.
        expands: True inside ``generate``, where beams and returned sequences turn a sample into several rows.
        packed: True if entries are tokens, all in one row, as in continuous batching.
        base_layers: layers whose adapters were disabled when the call began, so that all rows get the base model.
        is_hooked: whether global module hooks are registered, so that PEFT's own modules have to run.
        is_tried: whether the model type was tested, so that the order of rows needn't be checked.
        for_graphs: True if CUDA graphs are captured during the call; it runs as they will from the start.
        origin: where it began.
        is_used: whether the model ran with these ids.
        inside: True while a model's forward runs that has checked this call.
        is_watched: whether layers have to look up the call before they run; see ``Router.current``.
        end: returns None once the block was left, in whatever way; see ``ActiveCall``.
        ended: True once the block was left normally.
        outer: the call that was active before, and is again afterwards.
        frame: the id of the frame whose ``with`` statement it belongs to; 0 if it was entered in another way.
        suspended: the frames of outer calls that weren't running when it began, because they are generators.
        thread: the thread on which it began.
        task: the asyncio task in which it began.
        sibling_outputs: for each fused group, the outputs that its first layer computed for the others.
        dora_scales: the factors of DoRA outputs, by bank.
        draws: the seeds and steps of its adapters' dropout masks.
        workspaces: memory for intermediate results, by device and stream.
        stacks: copies of weights for the steps of ``generate`` on a CPU.
        rows: the number of rows in the model's last forward inside ``generate``, or in an encoder of media.
        invocations: where aLoRA adapters start; None if no adapter in use is one.
        prompts: the input tokens of ``generate``, if the user's own code builds the rows.
        head: the call for the layer that computes logits, if it gets other rows than the rest of the model.
        arguments: of the forward or ``generate`` that is running, by name; None before a model runs, and empty if the
            model isn't the one that encodes media.
        is_media: whether entries are shares of images, videos or audio clips instead of samples.
        images: if entries are shares of patches, the plan for layers that see whole images, and the number of images.
        media: what ``MediaEncoder`` found in these arguments.
        media_error: why it isn't known which image belongs to which sample, or the empty string.
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
        self.frame = 0
        self.suspended: set[int] = set()
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
        self.arguments: dict[str, Any] | None = None
        self._noted_by: nn.Module | None = None
        self.is_media = False
        self.images: tuple[BatchPlan, int] | None = None
        self.media: dict[Any, tuple[BatchPlan, tuple[BatchPlan, int] | None, int | None]] = {}
        self.media_error = ""

    @property
    def is_active(self) -> bool:
        """Whether its block is still open."""
        return not self.ended and self.end() is not None

    def begin_model(self, invocations: Invocations | None = None) -> None:
        """Enter a model's forward, which has checked the call; without gradients, ``backward`` won't rerun layers."""
        self.inside, self.is_watched = True, torch.is_grad_enabled()
        self.invocations = invocations

    def again(self) -> Call:
        """A call with the same ids, for layers that ``backward`` runs again after this call has ended."""
        again = Call(self.plan, self.expands, self.packed, self.base_layers)
        again.is_tried = self.is_tried
        again.draws = self.draws.again()
        again.inside, again.rows, again.invocations = True, self.rows, self.invocations
        again.is_media, again.images = self.is_media, self.images
        again.arguments, again.media, again.media_error = self.arguments, self.media, self.media_error
        return again

    def alone(self, entry: Entry) -> Call:
        """A call for the samples of one entry, for a module that runs once per segment."""
        alone = self.again()
        alone.plan = self.plan.alone(entry)
        return alone

    def note_arguments(self, model: nn.Module, arguments: dict[str, Any]) -> None:
        """A forward of a model begins, or ``generate``.

        Args:
            model: the model.
            arguments: by name; empty if they aren't those of a model that encodes media.
        """
        texts = (arguments.get("input_ids"), arguments.get("inputs"))
        if arguments and self.arguments and all(text is None for text in texts):
            outer = self._noted_by
            if outer is not None and outer is not model and any(part is model for part in outer.modules()):
                return  # it got embeddings of the outer model's text
        self._noted_by = model
        self.arguments, self.media, self.media_error = arguments, {}, ""

    def of_media(self, plan: BatchPlan, images: tuple[BatchPlan, int] | None, rows: int | None = None) -> Call:
        """The call for a part of the model that encodes media.

        Args:
            plan: an entry for every share of the rows.
            images: if the rows are patches, which layers may get in a single row: the plan for layers that see whole
                images, and the number of images.
            rows: the number of rows in the encoder's layers, if it is known.
        """
        media = Call(plan, False, False, self.base_layers)
        media.draws = self.draws  # which repeat nothing
        media.sibling_outputs = self.sibling_outputs  # layers of a group may each have a call of their own
        media.inside, media.is_media, media.images, media.rows = True, True, images, rows
        return media

    def dim_of_rows(self, shape: Sequence[int]) -> int:
        """The dimension of an input ``[..., K]`` that holds the rows."""
        return 1 if self.images is not None and len(shape) > 2 and shape[0] == 1 else 0

    def num_rows(self, shape: Sequence[int]) -> int:
        """The number of rows in a layer's input of shape ``[..., K]``.

        Raises:
            RowMappingError: it isn't a multiple of the entries, or the samples seem to be in another dimension.
        """
        rows = math.prod(shape[:-1]) if self.packed else shape[self.dim_of_rows(shape)]
        self.plan.segments.rows_per_entry(rows)
        if not self.packed:
            self.check_order(shape)
        return rows

    def check_order(self, shape: Sequence[int], layer: str = "a layer") -> None:
        """Check that dimension 0 seems to have the samples, for model types that weren't tested.

        Raises:
            RowMappingError: another dimension seems to have them.
        """
        if self.is_tried or self.is_media or len(self.plan.runs[1]) == 1:
            return
        samples = {self.plan.segments.num_entries, self.rows}
        if shape[0] not in samples and samples.intersection(shape[1:-1]):
            raise RowMappingError(
                f"{layer} received an input of shape {[*shape]} for {self.plan.segments.num_entries} samples, which "
                "may be in a later dimension, and this model type hasn't been tested: expected the samples in "
                "dimension 0. Call mb.verify(...): if it finds all rows right, this check is turned off."
            )

    def check_rows(self, rows: int | None) -> None:
        """Check that ``generate`` doesn't drop samples between steps, because it doesn't tell which.

        Raises:
            RowMappingError: there are fewer rows than in the step before.
        """
        if not self.expands or rows is None:
            return
        if self.rows is not None and rows < self.rows:
            raise RowMappingError(
                f"generate continued with {rows} rows after {self.rows}, and doesn't tell which samples they belong "
                "to: expected the same rows at every step. Whisper does this with long audio; generate for one "
                "adapter at a time there."
            )
        self.rows = rows


def over() -> None:
    """The ``end`` of a call that isn't active."""
