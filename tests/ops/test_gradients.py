"""Training products: torch's against autograd, one adapter at a time, and the kernels' against torch's."""

from __future__ import annotations

import pytest
import torch
from products import (
    DEVICE,
    GPU_DTYPES,
    MIXES,
    Case,
    Counted,
    TorchProduct,
    TritonProduct,
    check,
    kernels,
    make,
    triton_gradients,
)
from tolerances import assert_close

from peft_multibatch import UnsupportedError
from peft_multibatch.ops.launches import Limits


@pytest.mark.parametrize("mix", MIXES)
def test_torch_against_autograd(mix):
    case = make(mix, dtype=torch.float64)
    for mine, theirs in zip(case.gradients(TorchProduct), case.by_autograd()):
        assert len(mine) == len(theirs)
        for actual, expected in zip(mine, theirs):
            assert_close(actual, expected)


@kernels
@pytest.mark.parametrize("slices", [1, 2, 3])
@pytest.mark.parametrize("mix", MIXES)
def test_kernels(mix, slices):
    check(make(mix, slices, dtype=torch.float32, rows=5))


@kernels
@pytest.mark.parametrize(
    ("dtype", "weights"), [("float16", "float16"), ("float16", "float32"), ("float32", "float16")]
)
def test_dtypes(dtype, weights):
    check(make("interleaved", dtype=getattr(torch, dtype), weights=getattr(torch, weights), rows=7))


@kernels
@pytest.mark.parametrize(
    "frozen",
    [
        ("x",),
        ((0, "a"), (0, "b")),
        ((0, "a"), (1, "a"), (2, "a")),
        tuple((slot, half) for slot in range(3) for half in "ab"),
    ],
    ids=["x", "one adapter", "every lora_A", "every adapter"],
)
def test_what_is_frozen_gets_no_gradient(frozen):
    case = make("with base" if "x" in frozen else "interleaved", dtype=torch.float32, frozen=frozen)
    check(case)
    product, trained = case.product(TritonProduct)
    found = product.backward(case.grads, *product_inputs(case, product))[1]
    assert [grad is not None for grad in found] == [parameter.requires_grad for parameter in trained.parameters]


def product_inputs(case, product):
    _, h = product.forward(case.ys, case.x)
    return case.x if product.wanted.any_a else None, h


@pytest.mark.parametrize("kind", [TorchProduct, pytest.param(TritonProduct, marks=kernels)])
def test_gradients_that_come_in_any_form(kind):
    """Gradients that are expanded, transposed, strided between columns, or missing because an output isn't used."""
    case = make("interleaved", dtype=torch.float32)
    shapes = [y.shape for y in case.ys]
    forms = [
        torch.randn((), device=DEVICE).expand(shapes[0]),
        torch.randn(shapes[1][::-1], device=DEVICE).permute(2, 1, 0),
        torch.randn(*shapes[2], 2, device=DEVICE)[..., 0],
    ]
    contiguous = [form.contiguous() for form in forms]
    for actual, expected in zip(case.gradients(kind, forms)[1], case.gradients(kind, contiguous)[1]):
        assert_close(actual, expected)
    outputs, trained = case.run(kind)
    found = torch.autograd.grad(outputs[1], trained.parameters, contiguous[1], allow_unused=True)
    zeros = [torch.zeros_like(contiguous[0]), contiguous[1], torch.zeros_like(contiguous[2])]
    every = case.gradients(kind, zeros)[1][1 + len(case.ys) :]
    for index, (grad, expected) in enumerate(zip(found, every)):
        assert (grad is None) == (trained.places[index // 2][1] != 1)
        if grad is not None:
            assert_close(grad, expected)


@pytest.mark.parametrize("kind", [TorchProduct, pytest.param(TritonProduct, marks=kernels)])
def test_an_input_that_is_not_contiguous(kind):
    case = make("interleaved", dtype=torch.float32, rows=4)
    expected = case.gradients(kind)
    case.x = case.x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert not case.x.is_contiguous()
    for mine, theirs in zip(case.gradients(kind), expected):
        for actual, wanted in zip(mine, theirs):
            assert_close(actual, wanted)


@pytest.mark.parametrize("kind", [TorchProduct, pytest.param(TritonProduct, marks=kernels)])
def test_no_rows(kind):
    case = make("[0, 0, 1]", dtype=torch.float32, rows=0)
    outputs, gradients = case.gradients(kind)
    assert [output.shape for output in outputs] == [y.shape for y in case.ys]
    for gradient, tensor in zip(gradients, case.tensors(case.trained())):
        assert torch.equal(gradient, torch.zeros_like(tensor))


@pytest.mark.parametrize("kind", [TorchProduct, pytest.param(TritonProduct, marks=kernels)])
def test_a_graph_is_used_twice(kind):
    case = make("mixtures", dtype=torch.float32)
    outputs, trained = case.run(kind)
    tensors = case.tensors(trained)
    first = torch.autograd.grad(outputs, tensors, case.grads, retain_graph=True)
    for once, again in zip(first, torch.autograd.grad(outputs, tensors, case.grads)):
        assert torch.equal(once, again)


@pytest.mark.parametrize("kind", [TorchProduct, pytest.param(TritonProduct, marks=kernels)])
def test_second_derivatives_are_refused(kind):
    case = make("[0, 0, 1]", dtype=torch.float32)
    outputs, trained = case.run(kind)
    loss = sum(output.square().sum() for output in outputs)
    found = torch.autograd.grad(loss, [case.x, *trained.parameters], create_graph=True)
    for grad in found:
        with pytest.raises(UnsupportedError, match="second derivatives were requested"):
            torch.autograd.grad(grad.sum(), case.x, retain_graph=True)


@pytest.mark.parametrize("kind", [TorchProduct, pytest.param(TritonProduct, marks=kernels)])
def test_weights_that_were_written_before_backward_are_noticed(kind):
    case = make("[0, 0, 1]", dtype=torch.float32)
    outputs, trained = case.run(kind)
    with torch.no_grad():
        trained.parameters[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(outputs, trained.parameters, case.grads)


@pytest.mark.parametrize("kind", [TorchProduct, pytest.param(TritonProduct, marks=kernels)])
def test_what_is_kept_for_backward(kind):
    """Only the input, which base layers keep as well, and a row of rank columns per input row are kept."""
    case = make("interleaved", dtype=torch.float32, rows=16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        _, trained = case.run(kind)
    known = {each.data_ptr() for each in (case.x, *trained.parameters)}
    others = [tensor for tensor in kept if tensor.data_ptr() not in known]
    assert len(kept) - len(others) == len(known)
    rows, slices, rank = case.x.shape[:-1].numel(), len(case.ys), 16  # kernels have ranks of at least 16
    assert 0 < sum(tensor.numel() for tensor in others) <= rows * slices * rank


@kernels
@pytest.mark.parametrize("mix", ["[0, 0, 1]", "interleaved", "mixtures"])
def test_launches_do_not_depend_on_the_number_of_adapters(monkeypatch, mix):
    launches = []
    for name in ("shrink_kernel", "expand_kernel", "grad_x_kernel", "grad_weight_kernel"):
        monkeypatch.setattr(triton_gradients, name, Counted(getattr(triton_gradients, name), launches))
    make(mix, dtype=torch.float32).gradients(TritonProduct)
    assert len(launches) == 6 * len(MIXES[mix])


@kernels
def test_uneven_plans_are_cut(monkeypatch):
    """All kernels but those that sum up the rows of an adapter read pieces of at most 128 rows."""
    grids = {}
    for name in ("shrink_kernel", "expand_kernel", "grad_x_kernel", "grad_weight_kernel"):
        grids[name] = []
        monkeypatch.setattr(triton_gradients, name, Counted(getattr(triton_gradients, name), grids[name]))
    case = make("uneven", dtype=torch.float32)  # 204, 4, 4 and 4 rows
    case.gradients(TritonProduct)
    tiles, slices = 128 // 32, len(case.ys)
    assert [grid[0] for grid in grids["shrink_kernel"]] == [5 * tiles * slices] * 2
    assert [grid[0] for grid in grids["grad_x_kernel"]] == [5 * tiles]
    assert grids["expand_kernel"][0][0] % 5 == 0
    assert [grid[1] for grid in grids["grad_weight_kernel"]] == [4, 4]


@kernels
def test_rows_of_the_base_model_do_not_narrow_the_gradients_blocks(monkeypatch):
    blocks = []
    monkeypatch.setattr(triton_gradients, "grad_weight_kernel", Counted(triton_gradients.grad_weight_kernel, blocks))
    monkeypatch.setattr(triton_gradients, "limits_of", lambda _: Limits(4, 2**20))
    counts = []
    for slots in ([0, 0, 1, 1, 2, 2], [-1] * 30 + [0, 0, 1, 1, 2, 2]):
        Case([slots], [[3], [8], [5], [0]], 300, [300], torch.float32).gradients(TritonProduct)
        counts.append([grid[0] for grid in blocks])
        blocks.clear()
    assert counts[0] == counts[1]


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "weights"), GPU_DTYPES, ids=["-".join(pair) for pair in GPU_DTYPES])
@pytest.mark.parametrize("rank", [1, 5, 8, 16, 32, 64, 100, 256])
def test_ranks_on_a_gpu(rank, dtype, weights):
    dtypes = {"dtype": getattr(torch, dtype), "weights": getattr(torch, weights)}
    for rows in (1, 7, 150):
        ranks = [[rank], [max(1, rank // 2)], [0], [0]]
        check(make("interleaved", 1, ranks=ranks, inputs=576, widths=[1536], rows=rows, **dtypes))


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "weights"), GPU_DTYPES, ids=["-".join(pair) for pair in GPU_DTYPES])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("slices", [2, 3])
def test_mixes_on_a_gpu(slices, mix, dtype, weights):
    dtypes = {"dtype": getattr(torch, dtype), "weights": getattr(torch, weights)}
    for rows in (1, 33):
        check(make(mix, slices, inputs=576, widths=[576, 192, 192], rows=rows, **dtypes))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_float32_follows_what_the_user_allows_to_matrix_products(monkeypatch, precision):
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", precision)
    case = make("[0, 0, 1]", 1, dtype=torch.float32, inputs=4096, widths=[4096], rows=64)
    (output,), _ = case.gradients(TritonProduct)
    (exact,), _ = case.exact().gradients(TorchProduct)
    delta = float((output.detach() - exact.detach()).norm() / (exact - case.ys[0]).detach().norm())
    assert delta < 1e-5 if precision == "ieee" else 1e-5 < delta < 2e-3


@pytest.mark.gpu
def test_many_adapters_on_a_gpu():
    case = Case([list(range(256)) * 2], [[8, 0]] * 128 + [[4, 16]] * 128, 192, [320, 64], torch.bfloat16, rows=3)
    check(case)
