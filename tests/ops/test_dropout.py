"""Dropout in products: the generator, the statistics of its masks, and independence from the rest of the batch."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from products import (
    DEVICE,
    GPU_DTYPES,
    MIXES,
    RANKS,
    Case,
    Counted,
    TorchProduct,
    TritonProduct,
    check,
    dropped_by,
    kernels,
    make,
    triton_gradients,
)
from tolerances import assert_close

from peft_multibatch.ops.dropout import ROUNDS, Mask, dropped, philox
from peft_multibatch.ops.triton_dropout import keep_tile


KEY = 0x9E3779B97F4A7C15
LAST_STEP = (1 << 31) - 1
BOTH = pytest.mark.parametrize("kind", [TorchProduct, pytest.param(TritonProduct, marks=kernels)])


def masks_of(mix, slices=3):
    """Return different masks for each slice; slot 1 drops in only one slice, and mixtures drop nothing."""
    found = {(0, i): Mask(KEY * (i + 1) % (1 << 64), 3, 0.5) for i in range(slices)}
    found |= {(2, i): Mask(KEY ^ (i + 77), LAST_STEP, 0.25) for i in range(slices)}
    found[1, 0] = Mask(12345, 0, 1.0)
    mixed = {slot for slots in zip(*MIXES[mix]) if len(slots) > 1 and slots[1] >= 0 for slot in slots}
    return {place: mask for place, mask in found.items() if place[0] not in mixed}


def dropping(mix, slices=3, **options):
    return make(mix, slices, masks=masks_of(mix, slices), **options)


class TestGenerator:
    @pytest.mark.parametrize(
        ("rounds", "counter", "key", "words"),
        [
            (7, [0] * 4, [0] * 2, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
            (7, [0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
            (
                7,
                [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
                [0xA4093822, 0x299F31D0],
                [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A],
            ),
            (10, [0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
            (10, [0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
            (
                10,
                [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
                [0xA4093822, 0x299F31D0],
                [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
            ),
        ],
    )
    def test_known_answers(self, rounds, counter, key, words):
        """Compare with the values published by the authors of Philox."""
        assert by_hand(key, counter, rounds) == words
        found = philox(*(torch.tensor([each]) for each in (*key, *counter)), rounds)
        assert [int(each) for each in found] == words

    @kernels
    @pytest.mark.parametrize("rounds", [ROUNDS, 10])
    def test_it_is_that_of_triton(self, rounds):
        offsets = torch.arange(256, dtype=torch.int64) * 16777259 % (1 << 31)
        for seed in (0, 7, KEY - (1 << 64)):
            found = torch.zeros(4, 256, dtype=torch.int64, device=DEVICE)
            _randint4x[1,](found, offsets.to(DEVICE, torch.int32), seed, 256, rounds)
            low, high, none = (torch.tensor(each) for each in (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, 0))
            expected = philox(low, high, offsets, none, none, none, rounds)
            assert torch.equal(found.cpu() & 0xFFFFFFFF, torch.stack(expected))

    @kernels
    @pytest.mark.parametrize("columns", [32, 128])
    @pytest.mark.parametrize(("key", "step", "p"), [(1, 0, 0.5), (KEY, 9, 0.1), (KEY, LAST_STEP, 0.9), (2, 5, 1.0)])
    def test_tiles_of_kernels(self, key, step, p, columns):
        mask, per_entry, start = Mask(key, step, p), 5, 3
        found = torch.zeros(32, columns, dtype=torch.int32, device=DEVICE)
        signed = torch.tensor([key - (1 << 64) if key >> 63 else key], dtype=torch.int64, device=DEVICE)
        _keep[1,](found, signed, step, mask.threshold, 17, start, per_entry, 2, 32, columns)
        rows = dropped_by(mask, 64, per_entry, 3 * columns)[17 - start * per_entry :][:32, 2 * columns :]
        assert torch.equal(found.cpu() == 0, rows)


def by_hand(key, counter, rounds=ROUNDS):
    """Compute Philox4x32 as in the paper."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(rounds):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = b >> 32 ^ c1 ^ k0, b % (1 << 32), a >> 32 ^ c3 ^ k1, a % (1 << 32)
        k0, k1 = (k0 + 0x9E3779B9) % (1 << 32), (k1 + 0xBB67AE85) % (1 << 32)
    return [c0, c1, c2, c3]


@triton.jit
def _randint4x(found, offsets, seed, SIZE: tl.constexpr, ROUNDS: tl.constexpr):
    index = tl.arange(0, SIZE)
    word0, word1, word2, word3 = tl.randint4x(seed, tl.load(offsets + index), ROUNDS)
    tl.store(found + index, word0.to(tl.int64))
    tl.store(found + SIZE + index, word1.to(tl.int64))
    tl.store(found + 2 * SIZE + index, word2.to(tl.int64))
    tl.store(found + 3 * SIZE + index, word3.to(tl.int64))


@triton.jit
def _keep(found, key, step, threshold, first, start, per_entry, block, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    rows = tl.arange(0, BLOCK_T)
    keep = keep_tile(tl.load(key), step, threshold, first + rows, start, per_entry, block, BLOCK_T, BLOCK_C)
    tl.store(found + rows[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :], keep.to(tl.int32))


class TestMasks:
    @pytest.mark.parametrize("p", [0.0, 0.01, 0.1, 0.5, 0.9, 1.0])
    def test_as_many_are_dropped_as_should_be(self, p):
        """The rate is right within five standard deviations: overall, in every row, and in every column."""
        dropped = dropped_by(Mask(KEY, 1, p), 512, 16, 512).double()
        for mean, number in ((dropped.mean(), dropped.numel()), (dropped.mean(0), 512), (dropped.mean(1), 512)):
            assert ((mean - p).abs() <= 5 * (p * (1 - p) / number) ** 0.5).all()

    def test_elements_by_hand(self):
        """Two adapters in two slices; one of them drops in only one slice."""
        masks = [[Mask(KEY, 4, 0.5), Mask(KEY + 3, 4, 0.25)], [None, Mask(12, LAST_STEP, 0.5)]]
        found = dropped([(6, masks[0]), (9, masks[1])], 3, 21, torch.device("cpu"))
        assert found.shape == (15, 2, 21)
        for row in range(15):
            for i in range(2):
                mask, own = masks[row >= 6][i], row % 6 if row < 6 else row - 6
                for column in range(21):
                    expected = False
                    if mask is not None:
                        key = mask.key % (1 << 32), mask.key >> 32
                        words = by_hand(key, (column // 8, own % 3, own // 3, mask.step))
                        bits = words[column % 8 // 2] >> 16 * (column % 2) & 0xFFFF
                        expected = bits < mask.p * (1 << 16)
                    assert found[row, i, column] == expected

    def test_what_is_near_is_independent(self):
        """Compare masks that differ in a single number, and a mask with itself shifted by one row, column, sample
        or word."""
        base = Mask(KEY, 4, 0.3)
        own = dropped_by(base, 256, 16, 256)
        others = {
            "step": dropped_by(base._replace(step=5), 256, 16, 256),
            "key": dropped_by(base._replace(key=KEY + 1), 256, 16, 256),
            "upper half of the key": dropped_by(base._replace(key=KEY ^ 1 << 32), 256, 16, 256),
            **{f"{n} columns": own.roll(n, 1) for n in (1, 2, 4, 8)},
            **{f"{n} rows": own.roll(n, 0) for n in (1, 16)},
        }
        for name, other in others.items():
            pairs = torch.stack([own.flatten(), other.flatten()]).double()
            assert torch.corrcoef(pairs)[0, 1].abs() < 5 / own.numel() ** 0.5, name

    def test_a_row_has_its_mask_whatever_comes_after_it(self):
        """Masks don't depend on longer samples, more samples, more columns, or on how chunks start."""
        small = dropped_by(Mask(KEY, 2, 0.5), 6, 3, 20).view(2, 3, 20)
        large = dropped_by(Mask(KEY, 2, 0.5), 700 * 5, 5, 333).view(700, 5, 333)
        assert torch.equal(large[:2, :3, :20], small)

    def test_the_scale_keeps_the_mean(self):
        for p in (0.1, 0.25, 0.9):
            mask = Mask(KEY, 2, p)
            kept = 1 - mask.threshold / (1 << 16)
            assert mask.scale == 1 / (1 - p) and abs(kept * mask.scale - 1) < 1e-4
        assert Mask(KEY, 2, 1.0).scale == 0


@pytest.mark.parametrize("mix", MIXES)
def test_torch_against_autograd(mix):
    case = dropping(mix, dtype=torch.float64, rows=3)
    for mine, theirs in zip(case.gradients(TorchProduct), case.by_autograd()):
        for actual, expected in zip(mine, theirs):
            assert_close(actual, expected)


@kernels
@pytest.mark.parametrize("slices", [1, 2, 3])
@pytest.mark.parametrize("mix", MIXES)
def test_kernels(mix, slices):
    check(dropping(mix, slices, dtype=torch.float32, rows=5))


@kernels
@pytest.mark.parametrize(("dtype", "weights"), [("float16", "float16"), ("float16", "float32")])
def test_dtypes(dtype, weights):
    check(dropping("interleaved", dtype=getattr(torch, dtype), weights=getattr(torch, weights), rows=7))


@kernels
def test_large_ranks_and_many_rows():
    """Several tiles of rows and columns, and several blocks of ranks."""
    case = Case([[0, 1, 0]], [[80], [4]], 300, [70], torch.float32, rows=45, masks={(0, 0): Mask(KEY, 1, 0.5)})
    check(case)


@BOTH
@pytest.mark.parametrize("mix", ["interleaved", "with base", "[0, 0, 1]"])
def test_the_others_are_left_alone(kind, mix):
    """Rows, and gradients of inputs and weights, are bitwise equal."""
    case = make(mix, dtype=torch.float32, rows=5, masks={(1, i): Mask(KEY + i, 4, 0.5) for i in range(3)})
    (outputs, gradients), (before, gradients_before) = case.gradients(kind), case.without_dropout().gradients(kind)
    others = [row for row, slot in enumerate(MIXES[mix][0]) if slot != 1]
    own = [row for row, slot in enumerate(MIXES[mix][0]) if slot == 1]
    for actual, expected in zip([*outputs, gradients[0]], [*before, gradients_before[0]]):
        assert torch.equal(actual[others], expected[others])
    assert not torch.equal(gradients[0][own], gradients_before[0][own])
    trained = case.trained()
    places = [trained.places[index // 2][0] for index in range(len(trained.parameters))]
    weights = zip(places, gradients[1 + len(case.ys) :], gradients_before[1 + len(case.ys) :])
    assert all(torch.equal(actual, expected) == (slot != 1) for slot, actual, expected in weights)


@BOTH
def test_a_mixed_batch_is_each_adapter_alone(kind):
    dtype = torch.float64 if kind is TorchProduct else torch.float32
    case = dropping("interleaved", dtype=dtype, rows=5)
    outputs, gradients = case.gradients(kind)
    trained = case.trained()
    slots = MIXES["interleaved"][0]
    for slot in (0, 1, 2):
        own = [row for row, each in enumerate(slots) if each == slot]
        alone = Case([[slot] * len(own)], RANKS, 72, [40, 24, 33], dtype, rows=5, masks=case.masks)
        alone.x = case.x.detach()[own].requires_grad_()
        alone.ys = [y.detach()[own].requires_grad_() for y in case.ys]
        alone.grads, alone.parts = [grad[own] for grad in case.grads], {slot: case.parts[slot]}
        expected, expected_gradients = alone.gradients(kind)
        for mine, theirs in zip([*outputs, gradients[0]], [*expected, expected_gradients[0]]):
            assert_close(mine[own], theirs)
        found = [
            each for index, each in enumerate(gradients[1 + len(case.ys) :]) if trained.places[index // 2][0] == slot
        ]
        for mine, theirs in zip(found, expected_gradients[1 + len(case.ys) :], strict=True):
            assert_close(mine, theirs)


@BOTH
def test_no_rows(kind):
    case = dropping("[0, 0, 1]", dtype=torch.float32, rows=0)
    outputs, gradients = case.gradients(kind)
    assert [output.shape for output in outputs] == [y.shape for y in case.ys]
    assert not any(each.any() for each in gradients)


@BOTH
def test_no_mask_is_kept_for_backward(kind):
    def kept(case):
        found = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda each: found.append(each.numel()) or each, lambda each: each
        ):
            case.run(kind)
        return found

    case = dropping("interleaved", dtype=torch.float32, rows=16)
    assert kept(case) == kept(case.without_dropout())


@kernels
@pytest.mark.parametrize("mix", ["[0, 0, 1]", "interleaved"])
def test_launches_are_as_many_as_without(monkeypatch, mix):
    launches = []
    for name in ("shrink_kernel", "expand_kernel", "grad_x_kernel", "grad_weight_kernel"):
        monkeypatch.setattr(triton_gradients, name, Counted(getattr(triton_gradients, name), launches))
    dropping(mix, dtype=torch.float32).gradients(TritonProduct)
    assert len(launches) == 6


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "weights"), GPU_DTYPES, ids=["-".join(pair) for pair in GPU_DTYPES])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("slices", [1, 3])
def test_mixes_on_a_gpu(slices, mix, dtype, weights):
    dtypes = {"dtype": getattr(torch, dtype), "weights": getattr(torch, weights)}
    for rows in (1, 33):
        check(dropping(mix, slices, inputs=576, widths=[576, 192, 192], rows=rows, **dtypes))


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [8, 64, 256])
def test_ranks_on_a_gpu(rank):
    masks = {(0, 0): Mask(KEY, 1, 0.1)}
    check(Case([[0, 1, 0]], [[rank], [rank]], 4096, [1024], torch.bfloat16, rows=150, masks=masks))
