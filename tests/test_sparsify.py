"""sparsify: what is installed, what calibration buys, memory of the model, real generation."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsefx
from sparsefx.ir.format import Format
from sparsefx.ir.sites import Site
from sparsefx.passes.blocks import find_blocks
from sparsefx.passes.collector import Collector
from sparsefx.passes.sparsegpt import sparsegpt
from sparsefx.passes.statistics import Statistics
from sparsefx.runtime.install import packed_modules
from sparsefx.runtime.modules import SparseConv1x1, SparseLinear, SparseParameter


def llama(layers: int = 3) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    config.use_cache = False
    return transformers.LlamaForCausalLM(config).eval()


def tokens(count: int, batch: int = 2, length: int = 12) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(0, 64, (batch, length), generator=generator)}
        for _ in range(count)
    ]


def test_every_kind_of_owner() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)
            self.conv = nn.Conv2d(16, 8, 1, stride=2)
            self.mha = nn.MultiheadAttention(16, 2, batch_first=True)
            self.twin = nn.Linear(16, 16)
            self.twin.weight = self.fc.weight

        def forward(self, x: Tensor) -> Tensor:
            h = self.twin(self.fc(self.fc(x)))
            h = h + self.mha(h, h, h)[0]
            out: Tensor = self.conv(h.view(-1, 4, 4, 16).permute(0, 3, 1, 2))
            return out

    torch.manual_seed(0)
    model: Any = Net().eval()
    x = torch.randn(2, 16, 16)
    dense = model(x)
    names = set(dict(model.named_modules()))
    out = sparsefx.sparsify(model, "fp32", example_inputs=x)
    assert out is model
    torch.testing.assert_close(model(x), dense)
    assert type(model.fc) is SparseLinear
    assert type(model.conv) is SparseConv1x1
    assert isinstance(model.mha.in_proj_weight_packed, SparseParameter)
    assert model.fc.packed.buffers[0].data_ptr() == model.twin.packed.buffers[0].data_ptr(), (
        "tied weights stay tied"
    )
    assert names <= set(dict(model.named_modules()))
    rows = {line.row.name: line for line in sparsefx.explain(model).lines}
    assert rows["fc.weight"].row.calls == 3
    assert "computes with" in rows["mha.in_proj_weight"].row.fallbacks[0]
    assert "computes with" in rows["mha.out_proj.weight"].row.fallbacks[0]


def test_branches_go_only_where_they_are_used() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)).eval()
    x = torch.randn(2, 5, 32)
    dense = model(x)
    plain = sparsefx.sparsify(copy.deepcopy(model), "int2g16", example_inputs=x)
    branched = sparsefx.sparsify(copy.deepcopy(model), "int2g16+r16", example_inputs=x)
    rows = {line.row.name: line.row for line in sparsefx.explain(branched).lines}
    assert rows["0.linear1.weight"].format == "int2g16+r16"
    assert rows["0.self_attn.in_proj_weight"].format == "dense"
    assert "need a product of our own" in rows["0.self_attn.in_proj_weight"].reason
    assert (branched(x) - dense).norm() < 0.5 * (plain(x) - dense).norm()


@pytest.mark.parametrize("spec", ["bitmap@50%+int4g16", "2:4+int8", "tile4x1@50%", "int3g16+r4"])
def test_calibration_pays(spec: str) -> None:
    data, held_out = tokens(8), tokens(9)[-1]
    with torch.no_grad():
        dense = llama()(**held_out).logits
        errors = {}
        for batches in (None, data):
            model = sparsefx.sparsify(
                llama(), spec, example_inputs=held_out, calibration=batches, progress=False
            )
            errors[batches is None] = float((model(**held_out).logits - dense).norm())
    assert errors[False] < errors[True]


def test_blocks_are_streamed_and_seen() -> None:
    model = llama()
    sites = [
        Site((n,), tuple(p.shape), "linear") for n, p in model.named_parameters() if p.dim() == 2
    ]
    (blocks,) = find_blocks(model, sites)
    assert blocks.name == "model.layers"
    assert [len(s) for s in blocks.sites] == [7, 7, 7]


def test_shared_inputs_are_summed_once_and_exactly() -> None:
    q, k = nn.Linear(8, 4, bias=False), nn.Linear(8, 6, bias=False)
    pairs = {
        name: (Site((name,), tuple(m.weight.shape), "linear"), m.weight)
        for name, m in (("q", q), ("k", k))
    }
    xs = [torch.randn(3, 8), torch.randn(5, 8)]
    collector = Collector(pairs)
    for x in xs:
        collector.begin(None)
        with collector, torch.no_grad():
            q(x), k(x)
    want = sum(x.T @ x for x in xs)
    assert collector.statistics["q"] is collector.statistics["k"]
    torch.testing.assert_close(collector.statistics["q"].second, want)
    assert collector.statistics["q"].rows == 8


@pytest.mark.parametrize("spec", ["int4g16", "uint3", "bf16", "int8g24"])
def test_gptq_beats_rounding_on_its_own_data(spec: str) -> None:
    """Against rounding to nearest with the same grid, by the objective both minimise."""
    torch.manual_seed(0)
    x = torch.randn(256, 48) @ torch.randn(48, 48)
    w = torch.randn(20, 48)
    seen = Statistics(48, x.device)
    seen.add(x)
    fmt = Format.parse(spec)
    error = {
        name: float(((p.unpack() - w) @ x.T).norm())
        for name, p in (("rtn", fmt.pack(w)), ("gptq", sparsegpt(w, fmt, None, seen, 0.01)))
    }
    assert error["gptq"] < error["rtn"]


def test_a_second_call_with_the_same_floats_is_a_no_op() -> None:
    model = nn.Sequential(nn.Linear(16, 16)).eval()
    x = torch.randn(2, 16)
    sparsefx.sparsify(model, "2:4", example_inputs=x)
    before = model[0]
    assert sparsefx.sparsify(model, "2:4", example_inputs=x)[0] is before


def test_generate_gives_the_same_tokens_eager_and_compiled() -> None:
    model = sparsefx.sparsify(llama(), "bitmap@50%+int4g16", example_inputs=tokens(1)[0])
    prompt = tokens(1, batch=1, length=5)[0]
    want = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="sparsefx", options={"inner": "eager"})
    assert torch.equal(model.generate(**prompt, max_new_tokens=8, do_sample=False), want)


def test_threads_agree() -> None:
    model = sparsefx.sparsify(
        nn.Sequential(nn.Linear(32, 32)).eval(), "2:4+int8", example_inputs=torch.ones(1, 32)
    )
    x = torch.randn(4, 32)
    want, got = model(x), []
    threads = [threading.Thread(target=lambda: got.append(model(x))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 8
    assert all(torch.equal(y, want) for y in got)


def test_symbolic_trace_serves_without_inputs() -> None:
    model = sparsefx.sparsify(nn.Sequential(nn.Linear(16, 16)).eval(), "int8")
    assert sparsefx.explain(model).lines[0].row.format == "int8"
    assert list(packed_modules(model)) == ["0"]
