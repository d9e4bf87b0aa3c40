"""torch.compile(backend="sparsefx"): found by name, exact lowering, dynamic shapes, training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsefx
from sparsefx.ir.errors import FrozenWeightError, SpecError, StaleWeightError
from sparsefx.ir.format import Format

INNER = ["eager", "inductor"]


class Net(nn.Module):
    """Linear, functional linear, a 1×1 convolution, a tied head, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 32)
        self.fc = nn.Linear(32, 64)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.w = nn.Parameter(torch.randn(64, 32) * 0.1)
        self.conv = nn.Conv1d(32, 16, 1, stride=2)
        self.head = nn.Linear(32, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        h = self.fc(self.embed(ids)).relu()
        h = h + self.attention(h, h, h)[0]
        h = h @ self.w
        return self.conv(h.transpose(1, 2)), self.head(h)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)


def ids(length: int = 6) -> Tensor:
    return torch.arange(2 * length).view(2, length) % 10


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="sparsefx", options=options)


def close(a: tuple[Tensor, ...], b: tuple[Tensor, ...], tolerance: float = 1e-5) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def test_the_entry_point_needs_no_import() -> None:
    assert "sparsefx" in torch._dynamo.list_backends()


@pytest.mark.parametrize("inner", INNER)
def test_a_lossless_spec_changes_nothing(inner: str) -> None:
    model = Net().eval()
    with torch.no_grad():
        close(compiled(model, spec="fp32", inner=inner)(ids()), model(ids()))


@pytest.mark.parametrize("inner", INNER)
def test_dense_weights_are_compressed_at_compile_time(inner: str) -> None:
    model = Net().eval()
    spec = {"format": "2:4+int4g16", "ignore": ["w"]}
    run = compiled(model, spec=spec, inner=inner)
    twin = Net().eval()
    twin.load_state_dict(model.state_dict())
    fmt = Format.parse("2:4+int4g16")
    with torch.no_grad():
        got = run(ids())
        for name in ("fc.weight", "conv.weight"):
            weight = twin.get_parameter(name)
            packed = fmt.pack(weight.detach().view(weight.shape[0], -1))
            weight.data = packed.unpack().view(weight.shape)
        close(got, twin(ids()))
    lines = {line.row.name: line for line in sparsefx.explain(run).lines}
    assert lines["fc.weight"].row.format == "2:4+int4g16"
    assert lines["w"].row.reason == "ignore='w' in the spec"
    assert "tied" in lines["embed.weight"].row.reason
    assert "dense weight" in lines["attention.in_proj_weight"].row.reason


@pytest.mark.parametrize("inner", INNER)
def test_a_sparsified_model_is_lowered_as_it_is(inner: str) -> None:
    model = sparsefx.sparsify(Net().eval(), "tile4x1@50%+int4g32", example_inputs=ids())
    with torch.no_grad():
        want = model(ids())
        got = torch.compile(model, backend="sparsefx", options={"inner": inner}, fullgraph=True)
        close(got(ids()), want)


@pytest.mark.parametrize("inner", INNER)
def test_dynamic_shapes_compile_once(inner: str) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)).eval()
    run = torch.compile(model, backend="sparsefx", options={"inner": inner}, dynamic=True)
    reference = sparsefx.sparsify(
        nn.Sequential(*[*model]), "int8", example_inputs=torch.ones(2, 16)
    )
    with torch.no_grad():
        for batch in (3, 7, 64, 2):
            x = torch.randn(batch, 16)
            close((run(x),), (reference(x),))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        torch._dynamo.graph_break()
        return x.relu()


def test_graph_breaks_do_not_mix_up_layers() -> None:
    model = nn.Sequential(*[Layer() for _ in range(4)]).eval()
    x = torch.randn(2, 16)
    with torch.no_grad():
        close((compiled(model, spec="fp32", inner="eager")(x),), (model(x),))


def test_layers_past_the_recompile_limit_are_named() -> None:
    model = nn.Sequential(*[Layer() for _ in range(4)]).eval()
    run = compiled(model, spec="fp32", inner="eager")
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2):
        run(torch.randn(2, 16))
    reasons = [line.row.reason for line in sparsefx.explain(run).lines]
    assert any("recompile_limit" in reason for reason in reasons)


def test_an_edited_weight_is_noticed() -> None:
    model: Any = nn.Sequential(nn.Linear(16, 8)).eval()
    run = compiled(model, inner="eager")
    x = torch.randn(2, 16)
    with torch.no_grad():
        run(x)
        model[0].weight.mul_(2)
        with pytest.raises(StaleWeightError, match=r"0\.weight was edited"):
            run(x)
        torch._dynamo.reset()
        run(x)


@pytest.mark.parametrize("inner", INNER)
def test_training_says_so_or_is_right(inner: str) -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    run = compiled(model, spec="fp32", inner=inner)
    x = torch.randn(2, 16, requires_grad=True)
    with pytest.raises(FrozenWeightError, match=r"0\.weight.*requires_grad_\(False\)"):
        run(x).sum().backward()
    model[0].weight.requires_grad_(False)
    torch._dynamo.reset()
    run(x).square().sum().backward()
    got, x.grad = x.grad, None
    bias, model[0].bias.grad = model[0].bias.grad, None
    model(x).square().sum().backward()
    assert got is not None
    assert x.grad is not None
    assert bias is not None
    torch.testing.assert_close(got, x.grad)
    torch.testing.assert_close(bias, model[0].bias.grad)


def test_inference_mode() -> None:
    model = nn.Sequential(nn.Linear(16, 8)).eval()
    with torch.inference_mode():
        x = torch.randn(2, 16)
        close((compiled(model, spec="fp32", inner="inductor")(x),), (model(x),))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"specc": "int8"}, "no option 'specc'; did you mean 'spec'"),
        ({"inner": "inductr"}, "did you mean 'inductor'"),
        ({"spec": "bitmp@50%"}, "did you mean 'bitmap@50%'"),
    ],
)
def test_wrong_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(Exception, match=r"BackendCompilerFailed|sparsefx") as error:
        compiled(nn.Linear(4, 4), **options)(torch.ones(1, 4))
    cause: BaseException | None = error.value
    while cause is not None and not isinstance(cause, SpecError):
        cause = cause.__cause__ or getattr(cause, "inner_exception", None)
    assert isinstance(cause, SpecError)
    assert says in str(cause)
