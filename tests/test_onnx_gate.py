"""The gate lets right exports pass, stops wrong ones and names the first differing layer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsefx.codegen import onnx as codegen
from sparsefx.codegen import onnx_decode, onnx_lower
from sparsefx.ir.errors import ExportError, WeightError
from sparsefx.ir.format import Format
from sparsefx.runtime import export
from sparsefx.runtime.export import ExportReport, export_onnx
from sparsefx.runtime.gate_probe import Probe
from sparsefx.runtime.install import install

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny products in several threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Chain(nn.Module):
    """Three packed layers, the middle one called twice."""

    def __init__(self, *formats: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.middle, self.tail = (nn.Linear(32, 32) for _ in range(3))
        for name, fmt in zip(("head", "middle", "tail"), formats, strict=True):
            weight = self.get_submodule(name).weight.detach()  # type: ignore[operator]
            install(self, [f"{name}.weight"], Format.parse(fmt).pack(weight))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.head(x))
        x = torch.tanh(self.middle(x))
        out: Tensor = self.tail(torch.tanh(self.middle(x)))
        return out


def chain(suffix: str = "") -> Chain:
    return Chain(*(f + suffix for f in ("int4g32", "bitmap@50%+int4g16", "uint4g32"))).eval()


def break_product(
    monkeypatch: pytest.MonkeyPatch, name: str, call: int, how: Callable[[Any, Any], Any]
) -> None:
    """Let the `call`-th product of layer `name` be followed by `how(writer, y)`."""
    row, *others = onnx_lower.LOWERINGS
    seen: list[str] = []

    def product(writer: Any, x: Any, weight: Any) -> Any:
        y = row.product(writer, x, weight)
        seen.append(writer.name)
        return how(writer, y) if writer.name == name and seen.count(name) == call else y

    broken = (replace(row, product=product), *others)
    monkeypatch.setattr(onnx_lower, "LOWERINGS", broken)


def scaled(by: float) -> Callable[[Any, Any], Any]:
    return lambda writer, y: writer.op("Mul", y, writer.number(by))


@pytest.mark.parametrize(
    ("suffix", "layer", "call", "by"),
    [("", "middle", 1, 1.0001), ("", "tail", 1, 0.0),
     ("", "head", 1, float("nan")), ("+a8", "middle", 1, 1.2), ("+a8", "tail", 1, 1.1)],
)  # fmt: skip
def test_a_wrong_product_names_the_layer_and_writes_nothing(
    suffix: str, layer: str, call: int, by: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    break_product(monkeypatch, layer, call, scaled(by))
    with pytest.raises(ExportError, match=f"First differing layer: '{layer}'"):
        export_onnx(chain(suffix), path, torch.randn(16, 32))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_skipping_the_gate_must_be_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    break_product(monkeypatch, "head", 1, scaled(2.0))
    report = export_onnx(chain(), tmp_path / "m.onnx", torch.randn(4, 32), verify=False)
    assert report.path.exists()
    assert report.differences == ()
    assert report.worst is None


@pytest.mark.parametrize("wrong", ["codes", "scales"])
def test_a_wrong_weight_names_the_layer(
    wrong: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fields, blocks_of = onnx_decode.fields, onnx_lower._blocks_of

    def shifted(w: Any, stream: Any, size: int, width: int, table: Tensor) -> Any:
        return fields(w, stream, size, width, table.roll(1) if w.name == "middle" else table)

    def negated(w: Any, *rest: Any) -> Any:
        out = blocks_of(w, *rest)
        return w.op("Neg", out) if w.name == "middle" else out

    if wrong == "codes":
        monkeypatch.setattr(onnx_lower, "fields", shifted)
    else:
        monkeypatch.setattr(onnx_lower, "_blocks_of", negated)
    with pytest.raises(ExportError, match=r"layer 'middle' \(bitmap@50%\+int4g16 as MatMulNBits\)"):
        export_onnx(chain(), tmp_path / "m.onnx", torch.randn(4, 32))


def test_other_operators_are_named_as_the_cause(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def wrong(*args: Any) -> Any:
        model, rows = codegen.to_onnx(*args)
        node = [node for node in model.graph if node.op_type == "Tanh"][-1]
        node.op_type = "Softsign"
        return model, rows

    monkeypatch.setattr(export, "to_onnx", wrong)
    with pytest.raises(ExportError, match=r"First differing layer: 'tail'.*all is well up to 'mid"):
        export_onnx(chain(), tmp_path / "m.onnx", torch.randn(4, 32))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Threshold(10.0, 0.0), "is zero for example_inputs"),
        (nn.Threshold(10.0, float("nan")), "no finite value"),
        (nn.Flatten(), "no float tensor"),
    ],
)
def test_outputs_that_prove_nothing_are_refused(
    model: nn.Module, message: str, tmp_path: Path
) -> None:
    x = torch.ones(4, 4) if not isinstance(model, nn.Flatten) else torch.ones(4, 4).long()
    with pytest.raises(ExportError, match=message):
        export_onnx(model, tmp_path / "m.onnx", x)


def test_the_noise_is_what_the_bound_promises() -> None:
    model, x = chain(), torch.randn(64, 32)
    with torch.no_grad():
        y = model.head(x)
        dense = model.head.weight.abs()
        reach = x.abs() @ dense.T + model.head.bias.abs()
        noisy = Probe(noise=0).run(model.head, (x,), {})
    bound = 2.0**-24 * y.abs() + 2 * 32**0.5 * 2.0**-24 * reach
    assert ((noisy - y).abs() <= 1.01 * bound + 2.0**-24 * y.abs()).all()
    assert (noisy - y).abs().mean() > bound.mean() / 2
    assert torch.equal(Probe().run(model, (x,), {}), model(x))


# --- language models -----------------------------------------------------------------------------


def pack_linears(model: nn.Module, formats: list[str]) -> nn.Module:
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    for index, name in enumerate(linears):
        weight = model.get_parameter(f"{name}.weight").detach()
        try:
            packed = Format.parse(formats[index % len(formats)]).pack(weight)
        except WeightError:
            continue
        install(model, [f"{name}.weight"], packed)
    return model.eval()


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=86, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def bert() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=32, intermediate_size=86, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=9,
    )  # fmt: skip
    return transformers.BertModel(config)


def export_language_model(model: nn.Module, path: Path) -> ExportReport:
    inputs = {
        "attention_mask": torch.tensor([[1] * 9, [1] * 6 + [0] * 3]),
        "input_ids": torch.randint(0, 100, (2, 9)),
    }
    shapes = {name: {0: "batch", 1: "seq"} for name in inputs}
    return export_onnx(model, path, inputs, shapes)


def test_llama_with_int8_activations(tmp_path: Path) -> None:
    model = pack_linears(llama(), ["int4g32+a8", "int8+a8", "bitmap@50%+int3g16+a8"])
    report = export_language_model(model, tmp_path / "m.onnx")
    assert {row.op for row in report.layers} == {"MatMulNBits"}
    assert len(report.layers) == 7
    assert {d.sizes for d in report.differences} == {
        "batch=2, seq=9", "batch=1, seq=1", "batch=3, seq=10", "batch=3, seq=17"
    }  # fmt: skip
    assert report.notes == ()


def test_bert_whose_positions_end_at_the_example(tmp_path: Path) -> None:
    model = pack_linears(bert(), ["int4g32", "int8", "2:4+uint3g32", "tile16x1@50%+bf16"])
    report = export_language_model(model, tmp_path / "m.onnx")
    assert {d.sizes for d in report.differences} == {
        "batch=2, seq=9", "batch=1, seq=1", "batch=1, seq=8"
    }  # fmt: skip
    assert len(report.notes) == 2
    assert "seq=10" in report.notes[0]
