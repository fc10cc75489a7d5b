"""``shrink`` and ``expand`` on a GPU, with one launch each of the kernels in ``triton_kernels``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_multibatch.adapters.tables import TableRows
from peft_multibatch.ops.launches import Launch, choose, even_out, fits, limits_of, piece_for
from peft_multibatch.ops.triton_kernels import expand_kernel, shrink_kernel
from peft_multibatch.plan.segments import HEADER, Segments


DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
INTERPRETED = triton.knobs.runtime.interpret


class Product:
    """A product of fixed shapes whose kernels are compiled, so that running it again costs two bare launches.

    Triton's launcher checks every argument's dtype, value and alignment to find the compiled kernel, and queries the
    driver about every pointer. These are fixed for a product, so it launches the kernels that it found the first time,
    and passes addresses, unless one of them is less aligned than it was then.
    """

    def __init__(self, key: ProductKey, launch: Launch) -> None:
        num_rows, num_inputs, widths, rank = key.num_rows, key.num_inputs, key.widths, padded(key.rank)
        dependent = not INTERPRETED and torch.cuda.get_device_capability(key.device) >= (9, 0)
        # without partial sums, h is rounded to the dtype in which it is multiplied, as in PEFT
        self._h_dtype = torch.float32 if launch.splits > 1 else key.weights
        self._h_shape = launch.splits, num_rows, len(widths), rank
        self._h_bytes = math.prod(self._h_shape) * self._h_dtype.itemsize
        self._device = key.device
        self._missing = 3 - len(widths)
        self._widths = widths
        self._is_whole = key.is_whole
        size = key.y_dtype.itemsize
        self._offset1, self._offset2 = (sum(widths[:i]) * size if i < len(widths) else 0 for i in (1, 2))
        num_segments = min(key.num_segments, _MOST_PROGRAMS)
        most = _MOST_PROGRAMS // num_segments
        tiles, expand_tiles = min(launch.tiles, most), min(launch.expand_tiles, most)
        loops = key.loops or num_segments < key.num_segments
        shared = DTYPES[key.weights], key.is_aligned, dependent, loops
        options = {"launch_pdl": True} if dependent else {}
        self._shrink_grid = len(widths), launch.splits, num_segments * tiles
        self._shrink_args = (
            key.stride_table, num_rows, num_inputs, key.stride_x, launch.split_blocks, tiles,
            len(widths), rank, launch.block_t, launch.block_k, launch.split_blocks == 1, *shared,
        )  # fmt: skip
        nvidia = {"num_stages": launch.shrink_stages, "maxnreg": launch.shrink_registers or None}
        self._shrink_options = {"num_warps": launch.shrink_warps, **options, **({} if torch.version.hip else nvidia)}
        columns = sum(triton.cdiv(width, launch.block_n) for width in widths)
        grid = columns, num_segments * expand_tiles, 1
        self._expand_grid = (grid[1], grid[0], 1) if launch.by_columns else grid
        self._expand_args = (
            key.stride_table, num_rows, *[*widths, *[widths[0]] * self._missing],
            *[*key.strides, *[key.strides[0]] * self._missing],
            expand_tiles, len(widths), rank, launch.expand_block_t, launch.block_n, launch.splits, key.adds,
            *shared, launch.by_columns,
        )  # fmt: skip
        self._expand_options = {"num_warps": launch.expand_warps, **options}
        self._bare: tuple | None = None

    def __call__(
        self, ys: Sequence[Tensor], x: Tensor, plan: Tensor, table: Tensor, workspaces: dict | None = None
    ) -> None:
        """Add the deltas of ``x`` to ``ys``, or write them there.

        Args:
            ys: the base layer's outputs, with the shapes of the product.
            x: the base layer's input.
            plan: the packed plan, on the device.
            table: the rows of the bank's table.
            workspaces: a cache for the memory of ``h``, which the next product on the same stream reuses.
        """
        y0 = ys[0].data_ptr()
        if self._is_whole:
            y1, y2 = y0 + self._offset1, y0 + self._offset2
        else:
            y1 = ys[1].data_ptr() if len(ys) > 1 else y0
            y2 = ys[2].data_ptr() if len(ys) > 2 else y0
        x_address = x.data_ptr()
        if self._bare is None or (x_address | y0 | y1 | y2) & 15:
            self._launch(ys, x, plan, table)
        elif self._device.index == torch.cuda.current_device():
            self._launch_bare((y0, y1, y2), x_address, plan.data_ptr(), table.data_ptr(), workspaces)
        else:
            with torch.cuda.device(self._device):
                self._launch_bare((y0, y1, y2), x_address, plan.data_ptr(), table.data_ptr(), workspaces)

    def _launch_bare(
        self, ys: tuple[int, int, int], x: int, plan: int, table: int, workspaces: dict[tuple, Tensor] | None
    ) -> None:
        assert self._bare is not None
        get_stream, (shrink, *shrink_handles), (expand, *expand_handles) = self._bare
        stream = get_stream(self._device.index)
        workspace = workspaces.get((self._device, stream)) if workspaces is not None else None
        if workspace is None or workspace.numel() < self._h_bytes:
            workspace = torch.empty(self._h_bytes, dtype=torch.uint8, device=self._device)
            if workspaces is not None and self._h_bytes <= _LARGEST_WORKSPACE:
                workspaces[self._device, stream] = workspace
        h = workspace.data_ptr()
        shrink(*self._shrink_grid, stream, *shrink_handles, h, x, plan, table, *self._shrink_args)
        expand(*self._expand_grid, stream, *expand_handles, *ys, h, plan, table, *self._expand_args)

    def _launch(self, ys: Sequence[Tensor], x: Tensor, plan: Tensor, table: Tensor) -> None:
        """Launch through Triton's launcher, which compiles kernels for these alignments if needed."""
        if self._is_whole:
            ys = ys[0].split(self._widths, dim=-1)
        addresses = [x.data_ptr(), *(y.data_ptr() for y in ys)]
        h = torch.empty(self._h_shape, dtype=self._h_dtype, device=x.device)
        y3 = [*ys, *[ys[0]] * self._missing]
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            shrink = shrink_kernel[self._shrink_grid](h, x, plan, table, *self._shrink_args, **self._shrink_options)
            expand = expand_kernel[self._expand_grid](*y3, h, plan, table, *self._expand_args, **self._expand_options)
        if self._bare is None and not INTERPRETED and all(address % 16 == 0 for address in addresses):
            # the arguments of a bare launch after the stream: the function, its metadata, and no hooks
            handles = [(each.run, each.function, each.packed_metadata, None, None, None) for each in (shrink, expand)]
            self._bare = triton.runtime.driver.active.get_current_stream, *handles


_LARGEST_WORKSPACE = 1 << 20  # the most bytes that a call keeps until it ends
_MOST_PROGRAMS = 65535  # in dimensions 1 and 2 of a grid; programs go round what is left


class ProductKey(NamedTuple):
    """The parameters of a ``Product``. Dimension letters are those of ``ops``.

    Attributes:
        device: the device of all tensors.
        x_dtype: dtype of ``x``.
        y_dtype: dtype of all ``ys``.
        num_rows: ``T``.
        num_inputs: ``K``.
        stride_x: row stride of ``x`` in elements.
        widths: ``N`` of each slice.
        strides: row stride of each slice in elements.
        is_whole: whether all slices are concatenated in one tensor.
        num_segments: at least the segments of the plan; any number if programs loop.
        longest: rows of the longest segment; affects only speed.
        loops: whether programs loop until all segments are done.
        weights: dtype of the weights.
        rank: largest rank in the table.
        is_aligned: whether weights can be read 16 bytes at a time.
        stride_table: the distance of slots in the table in elements.
        adds: whether deltas are added to ``ys``; otherwise they are written there, zeros for rows without an adapter.
    """

    device: torch.device
    x_dtype: torch.dtype
    y_dtype: torch.dtype
    num_rows: int
    num_inputs: int
    stride_x: int
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    is_whole: bool
    num_segments: int
    longest: int
    loops: bool
    weights: torch.dtype
    rank: int
    is_aligned: bool
    stride_table: int
    adds: bool


_products: dict[tuple, Product] = {}
_MOST_PRODUCTS = 4096  # limits memory if prompts have many different lengths


def product(
    ys: Sequence[Tensor],
    x: Tensor,
    widths: Sequence[int],
    num_segments: int,
    longest: int,
    table: TableRows,
    launch: Launch | None = None,
    loops: bool = False,
    adds: bool = True,
) -> Product:
    """The product for tensors of these shapes.

    Args:
        ys: the base layer's outputs, one to three, ``[..., N]``, or one with all slices concatenated; contiguous, or
            ``[T, N]`` with columns of stride 1.
        x: the input of all slices, ``[..., K]``; contiguous, or ``[T, K]`` with columns of stride 1.
        widths: ``N`` of each slice.
        num_segments: at least the segments of the plan; any number if programs loop.
        longest: rows of the longest segment; affects only speed.
        table: the bank's table.
        launch: the launch parameters; chosen automatically by default.
        loops: whether programs loop until all segments are done.
        adds: whether deltas are added to ``ys`` or written there.
    """
    assert table.dtype is not None
    is_whole = len(ys) < len(widths)
    strides = [_row_stride(ys[0])] * len(widths) if is_whole else map(_row_stride, ys)
    key = ProductKey(
        x.device, x.dtype, ys[0].dtype, x.numel() // x.shape[-1], x.shape[-1], _row_stride(x),
        tuple(widths), tuple(strides), is_whole,
        num_segments, longest, loops, table.dtype, padded(table.rank), table.is_aligned, table.rows.stride(0), adds,
    )  # fmt: skip
    found = _products.get((key, launch))
    if found is None:
        if len(_products) >= _MOST_PRODUCTS:
            _products.clear()
        chosen = launch or choose(
            num_segments, longest, key.num_inputs, key.widths, key.rank,
            max(key.weights.itemsize, key.x_dtype.itemsize), limits_of(x.device),
        )  # fmt: skip
        found = _products[key, launch] = Product(key, chosen)
    return found


class Products:
    """The products of a bank for one plan and one input shape: one per component and dtype of weights.

    Args:
        ys: the base layer's outputs as in ``product``, contiguous.
        x: the input of all slices, ``[..., K]``.
        widths: ``N`` of each slice.
        components: the segments of each component.
        tables: the bank's tables, one per dtype.
        adds: as in ``product``; without, there can be only one component and table.
    """

    def __init__(
        self,
        ys: Sequence[Tensor],
        x: Tensor,
        widths: Sequence[int],
        components: Sequence[Segments],
        tables: Sequence[TableRows],
        adds: bool = True,
    ) -> None:
        tables = [table for table in tables if table.rank]
        self.can_run = takes(ys, x, tables) and (adds or len(components) == len(tables) == 1)
        self._shape = x.shape
        self._dtypes = [x.dtype, *(y.dtype for y in ys)]
        self._products: list[tuple[Product, Tensor, Tensor]] = []
        self._is_contiguous = x.is_contiguous()
        if self.can_run and x.numel():
            rows = _rows(x)
            num_rows = rows.numel() // rows.shape[-1]
            for each in components:
                for table in tables:
                    segments = even_out(each, num_rows, piece_for(num_rows, padded(table.rank)))
                    longest = segments.longest * (num_rows // segments.num_entries)
                    found = product(ys, rows, widths, segments.num_segments, longest, table, adds=adds)
                    self._products.append((found, segments.packed_on(x.device), table.rows))

    def fit(self, ys: Sequence[Tensor], x: Tensor) -> bool:
        """Whether tensors have the shapes and dtypes of the products, and are contiguous."""
        return (
            x.shape == self._shape
            and [x.dtype, *[y.dtype for y in ys]] == self._dtypes
            and x.is_contiguous()
            and all(map(Tensor.is_contiguous, ys))
            and self._is_contiguous
        )

    def __call__(self, ys: Sequence[Tensor], x: Tensor, workspaces: dict[tuple, Tensor]) -> None:
        """Add the deltas of ``x`` to ``ys``, or write them there."""
        x = _rows(x)
        for each, plan, table in self._products:
            each(ys, x, plan, table, workspaces)


def add_(ys: Sequence[Tensor], x: Tensor, widths: Sequence[int], plan: Tensor, tables: Sequence[TableRows]) -> None:
    """Add the deltas of ``x`` to ``ys`` for the plan that is in a buffer when the kernels run.

    No launch parameter depends on the plan. There are programs for the most segments that a plan without mixtures can
    have, cut into pieces as ``piece_for`` says. Mixtures and plans of single entries can have more, and then programs
    loop. Longer segments work too, but with few programs. Arguments are as in ``product``.
    """
    if not x.numel():
        return
    x = _rows(x)
    num_rows = x.numel() // x.shape[-1]
    capacity = (plan.numel() - HEADER - 3) // 4
    for table in tables:
        if table.rank:
            piece = piece_for(num_rows)
            num_segments = min(capacity, num_rows, num_rows // piece + len(table.rows) + 1)
            longest = max(triton.cdiv(num_rows, num_segments), min(num_rows, piece))
            product(ys, x, widths, num_segments, longest, table, loops=True)(ys, x, plan, table.rows)


def _rows(x: Tensor) -> Tensor:
    """A tensor that kernels can read row by row, copied only if necessary."""
    if x.is_contiguous():
        return x
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _row_stride(x: Tensor) -> int:
    """The row stride in elements. Contiguous tensors may have any stride in dimensions of size 1, as ``[T, 1, K]``."""
    return x.shape[-1] if x.is_contiguous() else x.stride(-2)


def runs_on(x: Tensor) -> bool:
    """Whether kernels can run on the device of a tensor."""
    return x.is_cuda or INTERPRETED


def is_capturing() -> bool:
    """Whether launches are being captured in a CUDA graph."""
    return not INTERPRETED and torch.cuda.is_current_stream_capturing()


def padded(rank: int) -> int:
    """The rank of a tile: a power of two that tensor cores support."""
    return max(16, triton.next_power_of_2(rank))


def can_run(dtype: torch.dtype | None, rank: int, device: torch.device) -> bool:
    """Whether graphs can run weights of a dtype and rank on a device: with kernels if it has any, or with torch."""
    if device.type != "cuda" and not INTERPRETED:
        return True
    return dtype in DTYPES and fits(padded(rank), 4, limits_of(device).shared)


def takes(ys: Sequence[Tensor], x: Tensor, tables: Sequence[TableRows], trains: bool = False) -> bool:
    """Whether the kernels support all these dtypes and ranks.

    The torch backend runs float64, non-contiguous weights, and ranks that are too large for the GPU's shared memory.
    """
    shared = limits_of(x.device).shared
    return (
        all(
            table.dtype in DTYPES and fits(padded(table.rank), max(table.dtype.itemsize, x.itemsize), shared, trains)
            for table in tables
            if table.rank
        )
        and x.dtype in DTYPES
        and ys[0].dtype in DTYPES
        and all(y.dtype == ys[0].dtype for y in ys)
    )
