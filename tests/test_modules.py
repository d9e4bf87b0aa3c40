"""SparseLinear, SparseConv1x1 and unpacked parameters: they stand where the dense ones stood."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsefx.ir.format import Format
from sparsefx.passes.replaceable import plain_conv1x1, plain_linear
from sparsefx.runtime.install import install, packed_modules
from sparsefx.runtime.modules import SparseConv1x1, SparseLinear

torch.set_num_threads(1)

TEXTS = ["int8+a8", "tile16x1@50%+int4g16", "2:4+uint4g16", "bitmap@50%", "bf16"]
HALF = [torch.bfloat16, torch.float16]


def branch_of(n: int, k: int, rank: int = 2) -> list[Tensor]:
    return [torch.randn(rank, k), torch.randn(n, rank), torch.rand(rank)]


def layer(
    text: str = "tile16x1@50%+int4g16", n: int = 32, k: int = 16, rank: int = 0, bias: bool = True
) -> SparseLinear:
    torch.manual_seed(0)
    dense = nn.Linear(k, n, bias=bias)
    packed = Format.parse(text).pack(dense.weight.detach())
    return SparseLinear(packed, dense.bias, branch_of(n, k) if rank else (), name="block.fc.weight")


def as_dense(module: SparseLinear) -> nn.Linear:
    out = nn.Linear(module.k, module.n, bias=module.bias is not None)
    out.load_state_dict(
        {"weight": module.dense()} | ({} if module.bias is None else {"bias": module.bias})
    )
    return out


def replaced(model: nn.Module, name: str, text: str, transposed: bool = False) -> dict[str, str]:
    """Pack one parameter of `model`; what `install` answers."""
    weight = model.get_parameter(name).detach()
    matrix = weight.T if transposed else weight.flatten(1)
    return install(model, [name], Format.parse(text).pack(matrix), (), transposed)


class Conv1D(nn.Module):
    """GPT-2's linear: the weight is (K, N)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 12)), nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Scaled(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * F.linear(x, self.weight, self.bias)


# --- standing in for the dense module ------------------------------------------------------------


@pytest.mark.parametrize("text", [t for t in TEXTS if "a8" not in t])
@pytest.mark.parametrize("bias", [True, False])
def test_a_sparse_linear_is_its_dense_twin(text: str, bias: bool) -> None:
    module = layer(text, bias=bias)
    dense = as_dense(module)
    for shape in ((16,), (0, 16), (3, 16), (2, 3, 16)):
        x = torch.randn(shape)
        assert torch.allclose(module(x), dense(x), atol=1e-5)
    assert torch.equal(module.weight, dense.weight)
    assert (module.in_features, module.out_features) == (16, 32)
    assert text in repr(module)


@pytest.mark.parametrize("stride", [1, 2, (2, 1), (1, 3)])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_sparse_conv_is_its_dense_twin(stride: int | tuple[int, int], dims: int) -> None:
    if isinstance(stride, tuple) and dims != 2:
        pytest.skip("a stride per axis")
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    model: nn.Module = nn.Sequential(kind(8, 12, 1, stride))  # type: ignore[arg-type]
    assert replaced(model, "0.weight", "bitmap@50%+int8") == {}
    sparse = model[0]  # type: ignore[index]
    assert isinstance(sparse, SparseConv1x1)
    twin = kind(8, 12, 1, stride)  # type: ignore[arg-type]
    twin.load_state_dict({"weight": sparse.weight, "bias": sparse.bias})
    for shape in ((2, 8), (1, 8), (0, 8), (8,)):
        x = torch.randn(*shape, *range(5, 5 + dims))
        if 0 not in shape:
            assert torch.allclose(sparse(x), twin(x), atol=1e-5)
        assert sparse(x).shape == twin(x).shape


@pytest.mark.parametrize(
    "conv",
    [nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 8, 1, padding=1),
     nn.ConvTranspose2d(8, 8, 1), nn.Linear(8, 8)],
)  # fmt: skip
def test_other_convolutions_are_no_plain_products(conv: nn.Module) -> None:
    assert not plain_conv1x1(conv)


def test_what_is_a_plain_linear() -> None:
    assert plain_linear(nn.Linear(4, 6), False)
    assert plain_linear(Conv1D(), True)
    assert plain_linear(nn.Linear(64, 6).bfloat16(), False)

    class Slightly(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return nn.functional.linear(input, self.weight * 1.001, self.bias)

    assert not plain_linear(Slightly(4, 6), False)
    assert not plain_linear(Scaled(4, 6), False)
    assert not plain_linear(nn.Embedding(4, 6), False)
    assert not plain_linear(nn.Conv2d(4, 6, 1), False)
    hooked = nn.Linear(4, 6)
    hooked.register_forward_hook(lambda *args: None)
    assert not plain_linear(hooked, False)


@pytest.mark.parametrize(("n", "k"), [(0, 4), (4, 0), (0, 0), (1, 1)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_linears_with_empty_sides_are_replaced(n: int, k: int) -> None:
    model = nn.Sequential(nn.Linear(k, n))
    install(
        model, ["0.weight"], Format.parse("int4").pack(model.get_parameter("0.weight").detach())
    )
    assert isinstance(model[0], SparseLinear)
    assert model(torch.randn(2, k)).shape == (2, n)


def test_a_transposed_linear_is_replaced() -> None:
    model = nn.Sequential(Conv1D())
    x = torch.randn(3, 8)
    want = model(x)
    assert replaced(model, "0.weight", "fp32", transposed=True) == {}
    assert isinstance(model[0], SparseLinear)
    assert torch.allclose(model(x), want, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "name", "shape"),
    [
        (lambda: nn.Sequential(Scaled(8, 12)), "0.weight", (3, 8)),
        (lambda: Scaled(8, 12), "weight", (3, 8)),
        (lambda: nn.Sequential(nn.Conv1d(8, 12, 3, padding=1)), "0.weight", (2, 8, 5)),
        (lambda: nn.LSTM(8, 12, batch_first=True), "weight_ih_l0", (2, 5, 8)),
    ],
)
def test_other_owners_read_the_unpacked_weight(
    make: Callable[[], nn.Module], name: str, shape: tuple[int, ...]
) -> None:
    model = make().eval()
    x = torch.randn(shape)
    want = model(x)
    notes = replaced(model, name, "fp32")
    assert "computes with the weight itself" in notes[name]
    got = model(x)
    for a, b in zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]:
        for c, d in zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]:
            assert torch.allclose(c, d, atol=1e-5)


def attention() -> nn.MultiheadAttention:
    torch.manual_seed(0)
    return nn.MultiheadAttention(16, 2, batch_first=True).eval()


def packed_attention() -> nn.MultiheadAttention:
    model = attention()
    replaced(model, "in_proj_weight", "int8")
    return model


@pytest.mark.parametrize("grad", [True, False])
def test_attention_over_a_packed_projection(grad: bool) -> None:
    model = attention()
    x = torch.randn(2, 5, 16)
    want = model(x, x, x)[0]
    replaced(model, "in_proj_weight", "fp32")
    replaced(model, "out_proj.weight", "fp32")
    with torch.set_grad_enabled(grad):
        assert torch.allclose(model(x, x, x)[0], want, atol=1e-5)
    assert type(model).__name__ == "MultiheadAttention"
    assert isinstance(model, nn.MultiheadAttention)


@pytest.mark.parametrize("grad", [True, False])
def test_an_encoder_layer_over_packed_weights(grad: bool) -> None:
    """Its inference fast path hands raw weights to one fused kernel."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    want = model(x)
    for name in ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight"):
        replaced(model, name, "fp32")
    with torch.set_grad_enabled(grad):
        assert torch.allclose(model(x), want, atol=1e-5)


def test_tied_names_share_their_buffers() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    weight = model.get_parameter("0.weight")
    model[1].weight = weight
    install(model, ["0.weight", "1.weight"], Format.parse("int8").pack(weight.detach()))
    assert model[0].values is model[1].values
    assert model[0].bias is not model[1].bias


def test_training_mode_is_kept() -> None:
    model = nn.Sequential(nn.Linear(8, 8)).train()
    model[0].eval()
    replaced(model, "0.weight", "int8")
    assert not model[0].training
    assert list(packed_modules(model)) == ["0"]


# --- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("inner", HALF)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_autocast_gives_the_dtype_that_dense_gives(
    text: str, inner: torch.dtype, given: torch.dtype
) -> None:
    module = layer(text, rank=2)
    dense = as_dense(module).to(torch.float64 if given == torch.float64 else torch.float32)
    x = torch.randn(3, 16).to(given)
    with torch.autocast("cpu", inner):
        got, want = module(x), dense(x)
        with torch.autocast("cpu", enabled=False):
            assert module(x.float()).dtype == torch.float32
    assert got.dtype == want.dtype
    assert module(x.float()).dtype == torch.float32


@pytest.mark.parametrize("inner", HALF)
def test_autocast_computes_in_the_inner_dtype_and_trains(inner: torch.dtype) -> None:
    module = layer(rank=2)
    x = torch.randn(3, 16, requires_grad=True)
    with torch.autocast("cpu", inner):
        got = module(x)
    assert torch.equal(got, module(x.to(inner)))
    got.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert module.bias is not None
    assert module.bias.grad is not None
    assert module.bias.grad.dtype == torch.float32


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("dtype", HALF)
def test_casts_change_the_arithmetic_and_not_what_is_stored(text: str, dtype: torch.dtype) -> None:
    module, x = layer(text), torch.randn(3, 16)
    before = {key: b.clone() for key, b in module.named_buffers()}
    want = module(x)
    module.to(dtype)
    assert module.weight.dtype == dtype
    assert module.bias is not None
    assert module.bias.dtype == dtype
    assert module(x.to(dtype)).dtype == dtype
    assert torch.allclose(module(x.to(dtype)).float(), want, atol=0.05)
    module.float()
    for key, buffer in module.named_buffers():
        assert buffer.dtype == before[key].dtype
        assert torch.equal(buffer, before[key])
    module.half().float().to("cpu").cpu()
    assert module.weight.dtype == torch.float32


def test_a_mixed_model_follows_one_cast() -> None:
    model = nn.Sequential(layer(rank=2), nn.ReLU(), nn.Linear(32, 4)).bfloat16()
    assert model(torch.randn(3, 16).bfloat16()).dtype == torch.bfloat16


# --- training ------------------------------------------------------------------------------------


def test_gradients_reach_input_bias_and_branch() -> None:
    module = layer(rank=2)
    for tensor in module.branch:
        tensor.requires_grad_()
    x = torch.randn(3, 16, requires_grad=True)
    module(x).square().sum().backward()
    assert all(
        t.grad is not None and t.grad.abs().sum() > 0
        for t in (x, module.bias, *module.branch)
        if t is not None
    )
    assert [name for name, _ in module.named_parameters()] == ["bias"]


def test_a_branch_learns() -> None:
    module, x = layer(rank=2), torch.randn(64, 16)
    target = x @ torch.randn(16, 32)
    leaves = [t.requires_grad_() for t in module.branch]
    optimiser = torch.optim.Adam(leaves, 0.05)
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        loss = (module(x) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
