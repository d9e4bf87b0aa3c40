"""Bugs that other compilers had with graphs like ours, each by its issue: compiled equals eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsefx

INNER = ["eager", "inductor"]
K, N = 32, 16


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)


def compiled(model: Any, inner: str) -> Any:
    return torch.compile(model, backend="sparsefx", options={"spec": "fp32", "inner": inner})


def close(got: Tensor, want: Tensor, terms: int = 4 * K) -> None:
    """Equal up to the order of sums of `terms` terms of the size of the result."""
    unit = torch.finfo(want.dtype).eps
    atol = terms * unit * max(1.0, float(want.detach().abs().max()))
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


# --- pytorch#105445: hooks were lost --------------------------------------------------------------


@pytest.mark.parametrize("inner", INNER)
def test_forward_hooks_still_run(inner: str) -> None:
    model, x = nn.Sequential(nn.Linear(K, N), nn.Linear(N, N)).eval(), torch.randn(3, K)
    model[0].register_forward_hook(lambda module, args, out: out * 3)
    model[1].register_forward_pre_hook(lambda module, args: (args[0] - 1,))
    with torch.no_grad():
        want = model(x)
        close(compiled(model, inner)(x), want)
        sparsefx.sparsify(model, "fp32", example_inputs=x)
        close(model(x), want)
        torch._dynamo.reset()
        close(compiled(model, inner)(x), want)


# --- pytorch#107538: a constant that the code changes kept its change -----------------------------


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(K, N)

    def forward(self, x: Tensor) -> Tensor:
        start = torch.tensor(1.0)
        start.add_(1.0)
        y: Tensor = self.fc(x)
        return y * start


@pytest.mark.parametrize("inner", INNER)
def test_a_constant_starts_anew_at_every_call(inner: str) -> None:
    model, x = Counts().eval(), torch.randn(3, K)
    run = compiled(model, inner)
    with torch.no_grad():
        for _ in range(3):
            close(run(x), model(x))


class Accumulates(nn.Module):
    """A buffer that every call changes: the change must stay, once per call."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(K, N)
        self.register_buffer("seen", torch.zeros(N))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        self.seen.add_(y.detach().mean(0))
        return y + self.seen


@pytest.mark.parametrize("inner", INNER)
def test_a_buffer_changes_once_per_call(inner: str) -> None:
    model, twin, x = Accumulates().eval(), Accumulates().eval(), torch.randn(3, K)
    twin.load_state_dict(model.state_dict())
    run = compiled(model, inner)
    with torch.no_grad():
        for _ in range(3):
            close(run(x), twin(x))
            close(model.seen, twin.seen)


class InPlace(nn.Module):
    """Writes whose results nobody names: dead-code elimination must not take them for dead."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(K, N)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        y.relu_()
        z = y + 1
        F.relu(z, inplace=True)
        z[0] = 3
        z[:, 1:3].mul_(2)
        x.add_(1)
        return z


@pytest.mark.parametrize("inner", INNER)
def test_writes_without_readers_are_kept(inner: str) -> None:
    model, x = InPlace().eval(), torch.randn(3, K)
    a, b = x.clone(), x.clone()
    with torch.no_grad():
        close(compiled(model, inner)(a), model(b))
        close(a, b)


# --- pytorch#157363: a custom op between linears was computed wrongly -----------------------------


@torch.library.custom_op("sparsefx_tests::double_first", mutates_args=("x",))
def double_first(x: Tensor, row: Tensor) -> None:
    x[0].mul_(2)
    x[0].add_(row)


@double_first.register_fake
def _(x: Tensor, row: Tensor) -> None:
    return None


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(K, N), nn.Linear(K, N)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        double_first(h, self.b(x)[1])
        y: Tensor = self.b(x) + h
        return y


@pytest.mark.parametrize("inner", INNER)
def test_a_custom_op_that_writes(inner: str) -> None:
    model, x = Custom().eval(), torch.randn(3, K)
    run = compiled(model, inner)
    with torch.no_grad():
        for _ in range(3):
            close(run(x), model(x))
        sparsefx.sparsify(model, "int8", example_inputs=x)
        torch._dynamo.reset()
        close(compiled(model, inner)(x), model(x))


# --- pytorch#121231: biases of several ranks beside each other ------------------------------------


class Biases(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.w = nn.ParameterList(torch.randn(N, K) / 6 for _ in range(4))
        shapes = ((N,), (1, N), (rows, N), (1,))
        self.bias = nn.ParameterList(torch.randn(shape) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        pairs = zip(self.bias, self.w, strict=True)
        return torch.cat([torch.addmm(b, x, w.t()) for b, w in pairs], -1)


@pytest.mark.parametrize("inner", INNER)
def test_biases_of_every_rank(inner: str) -> None:
    model, x = Biases(3).eval(), torch.randn(3, K)
    with torch.no_grad():
        close(compiled(model, inner)(x), model(x))


# --- pytorch#191433, #186577: norms fused with a product in 16 bits, or as its epilogue -----------

NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.LayerNorm(N),
    "rms": lambda: nn.RMSNorm(N, eps=1e-6),
    "layer without weight": lambda: nn.LayerNorm(N, elementwise_affine=False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", list(NORMS))
def test_norms_around_products(norm: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(K, N), NORMS[norm](), nn.Linear(N, N), nn.GELU()).eval()
    model.to(dtype)
    sparsefx.sparsify(model, "int8", example_inputs=torch.randn(3, K).to(dtype))
    x = torch.randn(3, K).to(dtype)
    with torch.no_grad():
        want = model(x)
        for inner in INNER:
            torch._dynamo.reset()
            # In 16 bits an inner compiler may keep what lies between two ops in float32.
            close(compiled(model, inner)(x), want, terms=4 * K if dtype == torch.float32 else 8)


# --- pytorch#197539, ao#2795: folding changed what is used twice ----------------------------------


class SharedConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(K, N, 1)
        self.norm = nn.BatchNorm2d(N)
        with torch.no_grad():
            self.norm.running_mean.normal_()  # type: ignore[union-attr]
            self.norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        z: Tensor = self.norm(self.conv(x + 1))
        out: Tensor = z + self.norm(y) + y
        return out


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("inner", INNER)
def test_a_norm_after_a_shared_convolution(inner: str, train: bool) -> None:
    import copy

    model, x = SharedConvolution().train(train), torch.randn(2, K, 3, 3)
    twin = copy.deepcopy(model)
    run = compiled(model, inner)
    with torch.no_grad():
        for _ in range(2):
            close(run(x), twin(x))
            close(model.norm.running_mean, twin.norm.running_mean)  # type: ignore[arg-type]


# --- found with Mamba: what dynamo writes out of vmap, and weights given by name ------------------


class Mapped(nn.Module):
    """A function over rows beside a product: `vmap` becomes marks in the graph without readers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(K, N)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.func.vmap(lambda row: row.sin() * row.sum())(self.fc(x))
        return out


@pytest.mark.parametrize("inner", INNER)
def test_vmap_inside_the_model(inner: str) -> None:
    model, x = Mapped().eval(), torch.randn(5, K)
    with torch.no_grad():
        close(compiled(model, inner)(x), model(x))


class ByName(nn.Module):
    """A convolution and a product whose weights are keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv1d(4, 4, 3, groups=4), nn.Linear(K, N)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv1d(x, weight=self.conv.weight, bias=self.conv.bias, padding=1, groups=4)
        return F.linear(y * 2, weight=self.fc.weight, bias=self.fc.bias)


@pytest.mark.parametrize("inner", INNER)
def test_weights_given_by_name(inner: str) -> None:
    model, x = ByName().eval(), torch.randn(2, 4, K)
    with torch.no_grad():
        close(compiled(model, inner)(x), model(x))
