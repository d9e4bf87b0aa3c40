"""`sparsefx::Norm` in ONNX files: which norms become one, and what the engine and ONNX Runtime
alone compute for it."""

from __future__ import annotations

import copy
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from ort_nodes import options
from test_kernels import needs_engine
from test_norm import assert_normalised, made
from torch import Tensor, nn

import sparsefx
from sparsefx.runtime.ort import ort_session

onnx: Any = pytest.importorskip("onnx")
ort: Any = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
K = 32


class Rms(nn.Module):
    """As language models spell it."""

    def __init__(self, k: int = K) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(k) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


class Net(nn.Module):
    """A product, an addition and a norm behind it, in the ways of `how`."""

    norm: Any

    def __init__(self, norm: nn.Module, how: str = "") -> None:
        super().__init__()
        self.fc, self.norm, self.how = nn.Linear(K, K), norm, how

    def forward(self, x: Tensor) -> Any:
        h = self.fc(x)
        if self.how == "alone":
            return self.norm(h)
        if self.how == "broadcast":
            return self.norm(h + x[:1])
        s = h + x
        y = self.norm(s)
        if self.how == "kept":
            return y, s * 2
        if self.how == "sum is a result":
            return y, s
        return y


def written(net: nn.Module, folder: Path, spec: str = "int8", **how: Any) -> Any:
    """The model of the file that it becomes; the export compares it with eager."""
    torch.manual_seed(1)
    model = sparsefx.sparsify(net.eval(), spec) if spec else net.eval()
    axes = {"x": {0: "rows"}}
    sparsefx.export_onnx(model, folder / "m.onnx", torch.randn(3, K), axes, **how)
    return onnx.load(folder / "m.onnx")


def norms(model: Any) -> list[Any]:
    return [n for n in model.graph.node if (n.domain, n.op_type) == ("sparsefx", "Norm")]


def outputs(path: Path, x: Tensor, library: bool, full: bool) -> list[Tensor]:
    make = ort_session if library else ort.InferenceSession
    found = make(str(path), options(full=full), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(y) for y in found.run(None, {"x": x.numpy()})]


LAYER = {"axes": nn.LayerNorm(K, eps=1e-12), "no bias": nn.LayerNorm(K, bias=False), "rms": Rms(),
         "torch's rms": nn.RMSNorm(K, eps=1e-6)}  # fmt: skip


@needs_engine
@pytest.mark.parametrize("how", ["", "alone", "broadcast", "kept", "sum is a result"])
@pytest.mark.parametrize("norm", LAYER)
def test_one_node_with_the_addition(norm: str, how: str, tmp_path: Path) -> None:
    net = Net(copy.deepcopy(LAYER[norm]), how)
    model = written(net, tmp_path)
    [node] = norms(model)
    alone = how in ("alone", "broadcast")
    fields = {a.name: a.i for a in node.attribute if a.name != "eps"}
    assert fields["residual"] == (not alone)
    assert fields["keep"] == (how in ("kept", "sum is a result"))
    assert fields["centred"] == ("rms" not in norm)
    counts = Counter(n.op_type for n in model.graph.node)
    assert counts["Add"] == (how == "broadcast")
    assert not {"LayerNormalization", "Pow", "ReduceMean", "Sqrt"} & counts.keys()
    x = torch.randn(5, K)
    want = net(x)
    want = [want] if isinstance(want, Tensor) else want
    for library, full in product((False, True), (False, True)):
        got = outputs(tmp_path / "m.onnx", x, library, full)
        for y, exact in zip(got, want, strict=True):
            torch.testing.assert_close(y, exact, rtol=1e-4, atol=1e-4)


class Another(Net):
    """What is no norm of rows that the engine has."""

    def forward(self, x: Tensor) -> Any:
        h, weight = self.fc(x), self.norm.weight
        if self.how == "another axis":
            return h * torch.rsqrt(h.pow(2).mean(0, keepdim=True) + 1e-5) * weight
        if self.how == "inner value read":
            mean = h.pow(2).mean(-1, keepdim=True)
            return h * torch.rsqrt(mean + 1e-5) * weight + mean
        if self.how == "cubes":
            return h * torch.rsqrt(h.pow(4).mean(-1, keepdim=True) + 1e-5) * weight
        if self.how == "another's root":
            return x * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5) * weight
        if self.how == "weight computed":
            return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5) * x.abs().mean(0)
        return nn.functional.layer_norm(h.view(-1, 4, K // 4), (4, K // 4))


@pytest.mark.parametrize(
    "how",
    ["another axis", "inner value read", "cubes", "another's root", "weight computed", "two axes"],
)
def test_others_stay(how: str, tmp_path: Path) -> None:
    assert not norms(written(Another(Rms(), how), tmp_path))


def test_files_without_packed_weights_and_inline_ones_stay(tmp_path: Path) -> None:
    net = Net(nn.LayerNorm(K))
    dense = written(copy.deepcopy(net), tmp_path, spec="")
    assert [o.domain for o in dense.opset_import] == [""]
    plain = written(copy.deepcopy(net), tmp_path, inline=True)
    assert not norms(plain)
    assert Counter(n.op_type for n in plain.graph.node)["LayerNormalization"] == 1


def test_halves_stay_in_their_own_operators(tmp_path: Path) -> None:
    net = Net(nn.LayerNorm(K)).half()
    sparsefx.export_onnx(
        sparsefx.sparsify(net.eval(), "int8"), tmp_path / "m.onnx", torch.randn(3, K).half()
    )
    assert not norms(onnx.load(tmp_path / "m.onnx"))


# --- nodes built by hand -------------------------------------------------------------------------


def node(
    given: dict[str, Tensor], fields: dict[str, Any], names: list[str], x_type: int = 1
) -> bytes:
    """One Norm; x is fed, and so is what else `given` holds but weight and bias."""
    h = onnx.helper
    made = h.make_node("Norm", ["x", *given], names, name="ln", domain="sparsefx", **fields)
    shape = ["rows", "width"]
    fed = [n for n in given if n == "residual"]
    inputs = [h.make_tensor_value_info("x", x_type, shape)]
    inputs += [h.make_tensor_value_info(n, 1, ["a", "b"]) for n in fed]
    results = [h.make_tensor_value_info(n, 1, shape) for n in names]
    constants = [h.make_tensor(n, 1, t.shape, t.flatten().tolist())
                 for n, t in given.items() if n not in fed]  # fmt: skip
    graph = h.make_graph([made], "g", inputs, results, constants)
    opsets = [h.make_opsetid("", 18), h.make_opsetid("sparsefx", 1)]
    return bytes(h.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


FIELDS = {"eps": 1e-5, "centred": 1, "residual": 1, "biased": 1, "keep": 1}


@needs_engine
@pytest.mark.parametrize("k", [1, 15, 16, 17, 63, 64, 65, 1009])
def test_bounds(k: int) -> None:
    for m, centred, keep in product((0, 1, 2, 17), (0, 1), (0, 1)):
        x, residual, weight, bias = made(m, k, torch.float32)
        given = {"residual": residual, "weight": weight, "bias": bias}
        fields = {**FIELDS, "centred": centred, "keep": keep}
        found = ort_session(node(given, fields, ["y", "s"][: 1 + keep]), options())
        got = found.run(None, {"x": x.numpy(), "residual": residual.numpy()})
        s = x + residual
        if keep:
            assert torch.equal(torch.from_numpy(got[1]), s)
        assert_normalised(torch.from_numpy(got[0]), s, weight, bias, 1e-5, bool(centred))


@needs_engine
def test_several_threads_compute_the_same_bits() -> None:
    x, residual, weight, bias = made(999, 257, torch.float32)
    model = node({"residual": residual, "weight": weight, "bias": bias}, FIELDS, ["y", "s"])
    feeds = {"x": x.numpy(), "residual": residual.numpy()}
    one, more = (ort_session(model, options(threads)).run(None, feeds) for threads in (1, 4))
    for a, b in zip(one, more, strict=True):
        assert (a == b).all()


BAD: list[tuple[str, dict[str, Any], list[str]]] = [
    ("biased must be 0 or 1", {"biased": 2}, ["y", "s"]),
    ("keep needs a residual", {"residual": 0}, ["y", "s"]),
    ("it has 4 inputs, not 3", {"biased": 0}, ["y", "s"]),
    ("it has 1 outputs, not 2", {}, ["y"]),
    ("eps", {"eps": None}, ["y", "s"]),
]


@needs_engine
@pytest.mark.parametrize(("why", "fields", "names"), BAD, ids=[why for why, _, _ in BAD])
def test_nodes_that_contradict_themselves(
    why: str, fields: dict[str, Any], names: list[str]
) -> None:
    _, residual, weight, bias = made(2, 8, torch.float32)
    given = {"residual": residual, "weight": weight, "bias": bias}
    told = {k: v for k, v in {**FIELDS, **fields}.items() if v is not None}
    with pytest.raises(Exception, match=rf"sparsefx::Norm 'ln': .*{why}"):
        ort_session(node(given, told, names), options())


@needs_engine
def test_tensors_of_another_shape() -> None:
    x, residual, weight, bias = made(2, 8, torch.float32)
    given = {"residual": residual, "weight": weight, "bias": bias}
    for name, bad in (
        ("weight", torch.ones(7)),
        ("bias", torch.ones(2, 4)),
        ("bias", torch.ones(0)),
    ):
        found = ort_session(node({**given, name: bad}, FIELDS, ["y", "s"]), options())
        with pytest.raises(Exception, match=rf"sparsefx::Norm 'ln': input . \({name}\) has shape"):
            found.run(None, {"x": x.numpy(), "residual": residual.numpy()})
    found = ort_session(node(given, FIELDS, ["y", "s"]), options())
    with pytest.raises(Exception, match=r"\(residual\) has shape \(1, 8\), not \(2, 8\)"):
        found.run(None, {"x": x.numpy(), "residual": residual[:1].numpy()})
