"""Packed modules in use: refused edits, copies, threads, torch.compile and torch.export."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from test_modules import TEXTS, branch_of, layer, packed_attention, replaced
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsefx.ir.errors import FrozenWeightError, StaleWeightError
from sparsefx.ir.format import Format
from sparsefx.runtime.modules import SparseLinear, SparseParameter

# --- a packed weight cannot be edited ------------------------------------------------------------

EDITS: dict[str, Callable[[Any], object]] = {
    "add_": lambda w: w.add_(1),
    "+=": lambda w: w.__iadd__(1),
    "setitem": lambda w: w.__setitem__(0, 1.0),
    "slice": lambda w: w[0].fill_(1.0),
    "transpose": lambda w: w.T.mul_(2),
    "detach": lambda w: w.detach().zero_(),
    "data": lambda w: w.data,
    "set data": lambda w: setattr(w, "data", torch.zeros(1)),
    "copy_": lambda w: w.copy_(torch.zeros_like(w)),
    "init": lambda w: nn.init.normal_(w),
    "init kaiming": lambda w: nn.init.kaiming_uniform_(w),
    "out": lambda w: torch.add(torch.ones(1), 1, out=w),
}


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("kind", ["linear", "parameter"])
def test_edits_are_refused(name: str, kind: str) -> None:
    weight = layer().weight if kind == "linear" else packed_attention().in_proj_weight
    with torch.no_grad(), pytest.raises(StaleWeightError, match=r"copy.*sparsefx\.sparsify"):
        EDITS[name](weight)


def test_messages_name_the_layer() -> None:
    with pytest.raises(
        StaleWeightError, match=r"block\.fc\.weight is packed as 'tile16x1@50%\+int4g16'"
    ):
        layer().weight.add_(1)
    with pytest.raises(StaleWeightError, match="in_proj_weight is packed as 'int8'"):
        packed_attention().in_proj_weight.add_(1)


def test_a_gradient_of_the_weight_is_refused() -> None:
    for weight in (layer().weight, packed_attention().in_proj_weight):
        with pytest.raises(FrozenWeightError, match="train a branch"):
            weight.requires_grad_()
        with pytest.raises(FrozenWeightError, match="train a branch"):
            weight.requires_grad = True
        assert not weight.requires_grad


@pytest.mark.parametrize("value", [nn.Parameter(torch.zeros(32, 16)), torch.zeros(32, 16), None])
def test_assigning_the_weight_is_refused(value: Tensor | None) -> None:
    with pytest.raises(StaleWeightError):
        layer().weight = value  # type: ignore[misc, assignment]
    with pytest.raises(StaleWeightError):
        packed_attention().in_proj_weight = value  # type: ignore[assignment]


def test_reading_the_weight_is_ordinary() -> None:
    module = layer()
    weight = module.weight
    assert (weight + 1).shape == (32, 16)
    assert weight.dtype == torch.float32
    assert weight.device == torch.device("cpu")
    assert float(weight.abs().sum()) > 0
    assert weight.clone().add_(1).shape == (32, 16), "a copy is the caller's"
    assert weight.numpy().shape == (32, 16)
    assert repr(weight)
    assert torch.equal(torch.cat([weight, weight])[:32], module.dense())
    assert weight.tolist() == module.dense().tolist()


# --- copies, threads, compilation ----------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [lambda: layer(rank=2), packed_attention, lambda: nn.Sequential(layer())]
)
def test_deepcopies_are_independent(make: Callable[[], nn.Module]) -> None:
    model = make()
    twin = copy.deepcopy(model)
    for (name, a), (_, b) in zip(model.named_buffers(), twin.named_buffers(), strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr(), name
    before = {n: b.clone() for n, b in model.named_buffers()}
    for _, buffer in twin.named_buffers():
        buffer.zero_()
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


def test_state_dicts_move_between_sparse_linears() -> None:
    a, b, x = layer(rank=2), layer(rank=2), torch.randn(3, 16)
    torch.manual_seed(1)
    packed, bias = Format.parse(a.format).pack(torch.randn(32, 16)), nn.Parameter(torch.randn(32))
    b.load_state_dict(SparseLinear(packed, bias, branch_of(32, 16)).state_dict())
    assert not torch.equal(a(x), b(x))
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(x), b(x))
    assert set(a.state_dict()) == {
        "bias",
        "index",
        "values",
        "scales",
        "down",
        "up",
        "branch_scale",
    }


def test_saving_whole_modules_with_pickle() -> None:
    """A SparseLinear is a plain module; a model with a replaced class cannot be pickled by name."""
    file = io.BytesIO()
    module, x = layer(rank=2), torch.randn(3, 16)
    torch.save(module, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), module(x))
    with pytest.raises(Exception, match=r"(?i)pickle|sparsefx\.save"):
        pickle.dumps(packed_attention())


@pytest.mark.parametrize("text", ["int8+a8", "tile16x1@50%+int4g16"])
def test_threads_get_the_same_answer(text: str) -> None:
    module, x = layer(text, rank=2), torch.randn(9, 16)
    want = module(x)
    results: list[Tensor] = []

    def work() -> None:
        results.extend(module(x).detach() for _ in range(50))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 400
    assert all(torch.equal(r, want) for r in results)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_equals_eager(text: str, backend: str) -> None:
    module = nn.Sequential(layer(text, rank=2), nn.ReLU())
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    x = torch.randn(3, 16, requires_grad=True)
    assert torch.equal(compiled(x), module(x))
    compiled(x).sum().backward()
    assert x.grad is not None
    torch._dynamo.reset()


def test_one_dynamic_graph_serves_all_batches() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    module = layer()
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    for rows in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29):
        x = torch.randn(rows, 16)
        assert torch.equal(compiled(x), module(x))
    assert len(graphs) <= 2
    torch._dynamo.reset()


def test_attention_compiles() -> None:
    model, x = packed_attention(), torch.randn(2, 5, 16)
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(compiled(x, x, x)[0], model(x, x, x)[0], atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize("text", TEXTS)
def test_export(text: str) -> None:
    module = layer(text, rank=2).eval()
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(module, (torch.randn(3, 16),), dynamic_shapes=({0: rows},))
    assert any(node.target == torch.ops.sparsefx.linear.default for node in program.graph.nodes)
    for n in (2, 3, 17):
        x = torch.randn(n, 16)
        assert torch.equal(program.module()(x), module(x))


def test_export_of_a_conv_and_an_attention() -> None:
    conv = nn.Sequential(nn.Conv2d(8, 12, 1, 2))
    replaced(conv, "0.weight", "int8")
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(torch.export.export(conv, (x,)).module()(x), conv(x))
    model, y = packed_attention(), torch.randn(2, 5, 16)
    program = torch.export.export(model, (y, y, y))
    assert torch.allclose(program.module()(y, y, y)[0], model(y, y, y)[0], atol=1e-6)


def test_fake_tensors_keep_shape_and_dtype() -> None:
    module = layer()
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = module(torch.empty(2, 3, 16))
    assert out.shape == (2, 3, 32)
    assert out.dtype == torch.float32


def test_parameters_know_their_shape() -> None:
    model = packed_attention()
    assert model.in_proj_weight.shape == (48, 16)
    assert isinstance(model.get_submodule("in_proj_weight_packed"), SparseParameter)
    assert "in_proj_weight" not in dict(model.named_parameters())
    assert "in_proj_weight_packed.values" in model.state_dict()
