"""What the CPU engine keeps of a weight: made once, again after edits, gone with its tensors."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from test_kernels import TEXTS, held, linear, needs_engine
from test_op import check, made, random_branch
from torch import Tensor, nn

from sparsefx.codegen import fused, native  # noqa: F401  (kernels of the ops)
from sparsefx.codegen.prepared import BRANCHES, PRODUCTS, Store
from sparsefx.ir.format import Format, Packed
from sparsefx.ir.fused import LINEARS, Part, arguments
from sparsefx.runtime.modules import SparseLinear

torch.set_num_threads(1)

# --- what is kept, and until when ----------------------------------------------------------------


@needs_engine
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("which", [0, -1])
def test_edits_in_place_are_seen(text: str, which: int) -> None:
    x, packed = made(text, 3, 32, 48)
    other = packed.format.pack(torch.randn(32, 48))
    linear(x, packed)
    packed.buffers[which].copy_(other.buffers[which])
    check(lambda *args: linear(x, packed), x, packed)


@needs_engine
@pytest.mark.parametrize("text", TEXTS)
def test_new_memory_and_new_tensors_are_seen(text: str) -> None:
    x, packed = made(text, 3, 32, 48)
    linear(x, packed)
    other = packed.format.pack(torch.randn(32, 48))
    for ours, theirs in zip(packed.buffers, other.buffers, strict=True):
        ours.data = theirs.clone()
    check(lambda *args: linear(x, packed), x, packed)
    mixed = Packed(packed.format, 32, 48, (*packed.buffers[:-1], other.buffers[-1].clone()))
    third = packed.format.pack(torch.randn(32, 48))
    mixed.buffers[-1].copy_(third.buffers[-1])
    check(lambda *args: linear(x, mixed), x, mixed)


@needs_engine
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_state_dict_is_seen(inference: bool, assign: bool) -> None:
    with torch.inference_mode(inference):
        x = torch.randn(3, 48)
        fmt, bias = Format.parse("bitmap@50%+int4g16"), nn.Parameter(torch.randn(32))
        a, b = (
            SparseLinear(fmt.pack(torch.randn(32, 48)), bias, random_branch(32, 48))
            for _ in range(2)
        )
        want = a(x)
        assert not torch.equal(b(x), want)
        b.load_state_dict(copy.deepcopy(a.state_dict()), assign=assign)
        assert torch.equal(b(x), want)


@needs_engine
def test_other_formats_over_the_same_buffers_are_seen() -> None:
    """uint4 with groups of 16 read as groups of 24 columns: 3 scales a row either way."""
    x, packed = made("uint4g16", 2, 8, 48)
    linear(x, packed)
    other = Packed(Format.parse("uint4g23"), 8, 48, packed.buffers)
    check(lambda *args: linear(x, other), x, other)
    check(lambda *args: linear(x, packed), x, packed)


@needs_engine
def test_the_copy_goes_with_its_tensors() -> None:
    x, packed = made("int4g16", 3, 32, 48)
    linear(x, packed)
    product = held(packed)
    assert product is not None
    weight, key = weakref.ref(product.weight), id(packed.buffers[0])
    gc.collect()
    gc.disable()  # nothing that only a collection would free
    try:
        del packed, product
        assert key not in PRODUCTS.entries
        assert weight() is None
    finally:
        gc.enable()


def test_a_value_goes_with_any_of_its_tensors() -> None:
    store: Store[str] = Store()
    for count in (1, 2, 3, 4):
        tensors = [torch.ones(1) for _ in range(count)]
        assert store.get(tensors, lambda _: "made", lambda _: True) == "made"
        assert store.get(tensors, lambda _: "again", lambda _: True) == "made"
        assert store.get(tensors, lambda _: "again", lambda _: False) == "again"
        assert store.find([*tensors, torch.ones(1)]) is None
        assert store.find(tensors[:-1] or [torch.ones(1)]) is None
        for tensor in tensors:
            tensor.add_(1)
            assert store.find(tensors) is None
            assert store.get(tensors, lambda _: "new", lambda _: True) == "new"
        del tensors[-1], tensor
        assert not store.entries


@needs_engine
def test_copies_and_pickles_hold_only_buffers() -> None:
    x, packed = made("bitmap@50%+int4g16", 3, 32, 48)
    module = SparseLinear(packed, None, random_branch(32, 48))
    want, keys = module(x), set(vars(packed.buffers[0]))
    twin = copy.deepcopy(module)
    assert torch.equal(twin(x), want)
    assert held(module.packed) is not held(twin.packed)
    twin.packed.buffers[1].zero_()
    assert not torch.equal(twin(x), want)
    assert torch.equal(module(x), want)
    assert set(vars(packed.buffers[0])) == keys
    assert set(module.state_dict()) == {*packed.format.buffers, "down", "up", "branch_scale"}


@needs_engine
def test_inference_tensors_are_served() -> None:
    with torch.inference_mode():
        x, packed = made("int4g16", 3, 32, 48)
        branch = tuple(random_branch(32, 48))
        check(lambda *args: linear(x, packed, None, branch), x, packed, None, branch)
        first = held(packed)
        check(lambda *args: linear(x, packed, None, branch), x, packed, None, branch)
        assert held(packed) is first


@needs_engine
def test_threads_share_one_copy() -> None:
    for _ in range(100):  # what races does so at the first calls: 1 weight in 30 showed it
        x, packed = made("bitmap@50%+int4g16", 5, 64, 96)
        bias, branch = torch.randn(64), tuple(random_branch(64, 96))
        got = from_threads(partial(linear, x, packed, bias, branch), 8, 8)
        assert len(got) == 64
        assert all(torch.equal(y, got[0]) for y in got)
        check(lambda *args, y=got[0]: y, x, packed, bias, branch)


def from_threads(call: Callable[[], Tensor], count: int, times: int) -> list[Tensor]:
    """What `call` returns, `times` times in each of `count` threads that start together."""
    got: list[Tensor] = []
    start = threading.Barrier(count)

    def work() -> None:
        start.wait()
        got.extend(call() for _ in range(times))

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return got


# --- the branch ----------------------------------------------------------------------------------


@needs_engine
def test_a_new_scale_packs_nothing() -> None:
    x, packed = made("int4g16", 3, 32, 48)
    branch = tuple(random_branch(32, 48))
    linear(x, packed, None, branch)
    pair, weight = BRANCHES.find(branch[:2]), held(packed)
    assert pair is not None
    branch[2].mul_(3)
    check(lambda *args: linear(x, packed, None, branch), x, packed, None, branch)
    other = (*branch[:2], torch.rand(3))
    check(lambda *args: linear(x, packed, None, other), x, packed, None, other)
    assert (BRANCHES.find(branch[:2]), held(packed)) == (pair, weight)
    branch[1].mul_(2)
    check(lambda *args: linear(x, packed, None, branch), x, packed, None, branch)


@needs_engine
def test_a_trained_branch_is_not_packed() -> None:
    x, packed = made("int4g16", 3, 32, 48)
    branch = [t.requires_grad_() for t in random_branch(32, 48)]
    y = linear(x, packed, None, tuple(branch))
    assert y.requires_grad
    assert BRANCHES.find(branch[:2]) is None
    with torch.no_grad():
        check(lambda *args: linear(x, packed, None, tuple(branch)), x, packed, None, branch)
    branch[0].data.mul_(2)  # as some optimisers do: no version counts it
    check(lambda *args: linear(x, packed, None, tuple(branch)).detach(), x, packed, None,
          [t.detach() for t in branch])  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_branches_and_biases_of_other_types(text: str, dtype: torch.dtype) -> None:
    x, packed = made(text, 3, 32, 48)
    bias, branch = torch.randn(32).to(dtype), [t.to(dtype) for t in random_branch(32, 48)]
    wide = [t.float() for t in branch]
    got = linear(x, packed, bias, tuple(branch))
    check(lambda *args: got, x, packed, bias.float(), wide)


@pytest.mark.parametrize("text", TEXTS)
def test_strided_and_broadcast_biases(text: str) -> None:
    x, packed = made(text, 3, 32, 48)
    for bias in (torch.randn(64)[::2], torch.randn(1).expand(32), torch.randn(1)):
        got = linear(x, packed, bias)
        check(lambda *args, got=got: got, x, packed, bias.expand(32))


def packings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one entry whenever a branch is packed."""
    seen: list[int] = []
    real = native.branch_weights

    def counted(engine: Any, branch: Any) -> Any:
        seen.append(len(branch[0]))
        return real(engine, branch)

    monkeypatch.setattr(native, "branch_weights", counted)
    return seen


@needs_engine
@pytest.mark.parametrize("count", [1, 2])
def test_matrices_made_at_every_call_are_not_packed_at_every_call(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of single products and of merged ones; what comes again is packed once, edits are seen."""
    seen = packings(monkeypatch)
    made_ones = [made("int4g16", 3, 32, 48) for _ in range(count)]
    x, branches = made_ones[0][0], [random_branch(32, 48) for _ in range(count)]

    def run(fresh: bool) -> None:
        given = [(a.clone() if fresh else a, b, s) for a, b, s in branches]
        if count == 1:
            ys = [linear(x, made_ones[0][1], None, tuple(given[0]))]
        else:
            parts = [Part([*p.buffers], None, [*g], str(p.format), p.n)
                     for (_, p), g in zip(made_ones, given, strict=True)]  # fmt: skip
            ys = LINEARS(x, *arguments(parts))
        for y, (_, packed), own in zip(ys, made_ones, given, strict=True):
            check(lambda *args, y=y: y, x, packed, None, own)

    for _ in range(6):
        run(fresh=True)
    assert len(seen) <= 2 * count
    seen.clear()
    for _ in range(6):
        run(fresh=False)
    assert len(seen) == count
    for down, _, _ in branches:
        down.mul_(2)
    run(fresh=False)
