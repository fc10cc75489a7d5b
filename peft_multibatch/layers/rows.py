"""Splitting a layer's inputs by segment, and joining its outputs in the order of the samples."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from peft_multibatch.errors import RowMappingError, UnsupportedError
from peft_multibatch.plan.segments import Segments


ADVICE = "Remove the adapters from this layer, or run them one at a time."

SETTINGS = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, enum.Enum)
"""Types of arguments that are the same for all samples."""


class Inputs:
    """The arguments of a layer's call, to be split by segment.

    Args:
        name: the layer's name, for messages.
        segments: the segments of the batch.
        args: positional arguments; tensors may be nested in lists, tuples and dictionaries.
        kwargs: keyword arguments.
        dim: the dimension of the rows in all tensors.
        is_shared: whether a tensor belongs to the model, and so is the same for all samples.

    Attributes:
        first: the tensor that defines the number of rows.
        dim: the dimension of the rows in all tensors.
        num_tensors: the number of tensors that don't belong to the model.

    Raises:
        RowMappingError: with several segments, all tensors belong to the model.
        UnsupportedError: the rows of an argument can't be mapped to samples.
    """

    def __init__(
        self,
        name: str,
        segments: Segments,
        args: tuple,
        kwargs: dict[str, Any],
        dim: int,
        is_shared: Callable[[Tensor], bool],
    ) -> None:
        self._name, self._entries = name, segments.num_entries
        self._values, self._spec = pytree.tree_flatten((args, kwargs))
        tensors = {i: each for i, each in enumerate(self._values) if isinstance(each, Tensor) and each.dim()}
        own = {index: value for index, value in tensors.items() if not is_shared(value)}
        if not own and segments.num_segments > 1:
            shapes = [list(each.shape) for each in tensors.values()]
            raise RowMappingError(
                f"{name} was called only with the model's own parameters and buffers ({shapes}): expected tensors "
                "with rows of samples. Leave this layer out of target_modules, or give all samples of a batch the "
                "same adapter."
            )
        nothing = {0: torch.zeros(1, dtype=torch.float32, device="cpu")}
        own = own or tensors or nothing  # with one adapter, rows don't have to be mapped
        self.num_tensors = len(own)
        self.dim = dim
        rows = {index: value.shape[self.dim] for index, value in own.items() if value.dim() > self.dim}
        fits = (index for index, number in rows.items() if number and not number % max(self._entries, 1))
        self.first: Tensor = own[next(fits, min(own))]
        # with one adapter there is nothing to split, whatever the arguments are
        self._split = set() if segments.num_segments == 1 else {i for i, each in own.items() if self._is_split(each)}
        if segments.num_segments > 1:
            self._check_others(args, kwargs)

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return self.first.shape[self.dim]

    def of(self, rows: slice | Tensor) -> tuple[tuple, dict[str, Any]]:
        """The arguments, with only these rows of ``first`` and of all other tensors that are split."""
        index: Any = (*[slice(None)] * self.dim, rows)
        values = [value[index] if number in self._split else value for number, value in enumerate(self._values)]
        return pytree.tree_unflatten(values, self._spec)

    def _is_split(self, value: Tensor) -> bool:
        first, size = self.first, self.num_rows
        if value is first:
            return True
        if value.dim() <= self.dim or (value.shape[self.dim] == 1 and size > 1):
            return False  # shared by all samples
        if value.shape[self.dim] != size or value.shape[: self.dim] != first.shape[: self.dim]:
            raise UnsupportedError(
                f"{self._name} was called with tensors of shapes {list(first.shape)} and {list(value.shape)}, and "
                f"only tensors with the samples in dimension {self.dim} can be split: expected size {size} there in "
                f"both, or 1. {ADVICE}"
            )
        if first.dim() > 2 and value.dim() <= 2 and {*value.shape} == {*first.shape[:2]} == {size}:
            raise UnsupportedError(
                f"{self._name} was called with tensors of shapes {list(first.shape)} and {list(value.shape)}, and "
                "dimension 0 of the second could be samples or positions, because their numbers are equal: expected "
                "different numbers. Pad the samples to another length, or run the adapters one at a time."
            )
        return True

    def _check_others(self, args: tuple, kwargs: dict[str, Any]) -> None:
        for value in self._values:
            if not isinstance(value, (Tensor, *SETTINGS)):
                raise UnsupportedError(
                    f"{self._name} was called with a {type(value).__name__}, which can't be split by samples: "
                    f"expected tensors with the samples in dimension {self.dim}, lists of them, and settings. {ADVICE}"
                )
        for value in (*args, *kwargs.values()):
            if isinstance(value, list) and len(value) in (self._entries, self.num_rows) and not _has_tensor(value):
                raise UnsupportedError(
                    f"{self._name} was called with a list of {len(value)} values, possibly one per sample: "
                    f"expected a tensor with the samples in dimension {self.dim}. {ADVICE}"
                )


class Outputs:
    """The outputs of a layer for all segments: tensors, possibly nested in tuples, lists and dictionaries.

    A sample may have more rows than in the input, if the layer flattens tokens, or fewer, if it pools them.

    Args:
        name: the layer's name, for messages.
        segments: the segments of the batch; at least two.
        parts: the outputs, in the order of the segments.
        labels: the adapter or mixture of each segment, for messages.
        dim_of: returns the dimension of the rows in an output, given its position and one of its parts.

    Raises:
        UnsupportedError: the outputs of the segments have different structures.
    """

    def __init__(
        self,
        name: str,
        segments: Segments,
        parts: Sequence[Any],
        labels: Sequence[str],
        dim_of: Callable[[int, Tensor], int],
    ) -> None:
        self._name, self._segments, self._labels = name, segments, labels
        self._lens = [stop - start for _, start, stop in segments.spans]
        flat = [pytree.tree_flatten(part) for part in parts]
        self.spec = flat[0][1]
        self._columns = list(zip(*(leaves for leaves, _ in flat)))
        if any(spec != self.spec for _, spec in flat):
            raise self._error([type(part).__name__ for part in parts], "the same kind of output")
        self._dims = [
            dim_of(number, column[0]) if isinstance(column[0], Tensor) else 0
            for number, column in enumerate(self._columns)
        ]

    @property
    def is_certain(self) -> bool:
        """Whether segments differ in length, so that ``joined`` can tell outputs with rows of samples from others."""
        return len({*self._lens}) > 1

    def check_grows(self, twice: Any) -> None:
        """Check that every output is twice as long for the samples of two segments as for those of the first.

        Args:
            twice: the outputs for these samples, with the adapter of the first segment.

        Raises:
            UnsupportedError: one isn't.
        """
        for column, dim, whole in zip(self._columns, self._dims, pytree.tree_leaves(twice)):
            part = column[0]
            if isinstance(part, Tensor) and (part.dim() <= dim or whole.shape[dim] != 2 * part.shape[dim]):
                raise UnsupportedError(
                    f"{self._name} returned a tensor of shape {list(part.shape)} for {self._segments.longest} "
                    f"samples and of shape {list(whole.shape)} for twice as many: expected the samples in "
                    f"dimension {dim} of all outputs. {ADVICE}"
                )

    def joined(self) -> Any:
        """The rows of all segments, in the order of the samples.

        Raises:
            RowMappingError: the samples have different numbers of rows in an output.
            UnsupportedError: the outputs of the segments can't be concatenated.
        """
        return pytree.tree_unflatten(list(map(self._join, self._columns, self._dims)), self.spec)

    def _join(self, parts: Sequence[Any], dim: int) -> Any:
        if not all(isinstance(part, Tensor) for part in parts):
            if all(isinstance(part, SETTINGS) and part == parts[0] for part in parts):
                return parts[0]
            raise self._error([type(part).__name__ for part in parts], "tensors")
        sizes = [part.shape[dim] if part.dim() > dim else 1 for part in parts]
        lens = self._lens
        shapes = [list(part.shape) for part in parts]
        if (
            min(part.dim() for part in parts) <= dim
            or any(size * lens[0] != sizes[0] * n for size, n in zip(sizes, lens))
            or sizes[0] % lens[0]
        ):
            given = [f"{shape} for {n} samples" for shape, n in zip(shapes, lens)]
            raise self._error(given, f"the same number of rows for every sample, in dimension {dim}", RowMappingError)
        if len({part.shape[:dim] + part.shape[dim + 1 :] for part in parts}) > 1:
            given = ["×".join(map(str, shape[:dim] + shape[dim + 1 :])) for shape in shapes]
            raise UnsupportedError(
                f"{self._name} returned rows of different sizes, {self._listed(given)}, which don't fit into one "
                "tensor: expected adapters of equal output sizes, such as heads with the same number of labels. Batch "
                "only adapters of one size together, or give all heads the size of the largest one."
            )
        result = torch.cat(list(parts), dim)
        if self._segments.permutation is None:
            return result
        rows = self._segments.rows(result.shape[dim], result.device)
        order = torch.cat([index for _, index in rows if isinstance(index, Tensor)])
        return result.index_select(dim, order.argsort())

    def _error(self, given: Sequence[str], expected: str, kind: type[Exception] = UnsupportedError) -> Exception:
        return kind(f"{self._name} returned {self._listed(given)}: expected {expected}. {ADVICE}")

    def _listed(self, given: Sequence[str]) -> str:
        """The values that were returned, and the adapters for which they were."""
        under: dict[str, list[str]] = {}
        for each, label in zip(given, self._labels):
            under.setdefault(each, []).append(label)
        return ", ".join(f"{each} under {_some(labels)}" for each, labels in under.items())


def _some(labels: Sequence[str]) -> str:
    return ", ".join(labels) if len(labels) <= 5 else f"{', '.join(labels[:4])} and {len(labels) - 4} others"


def _has_tensor(value: Any) -> bool:
    return any(isinstance(each, Tensor) for each in pytree.tree_leaves(value))
