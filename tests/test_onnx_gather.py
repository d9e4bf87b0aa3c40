"""Gathered columns in stock ONNX Runtime: exact weights, right products, where it is chosen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_onnx import bound, exact, left_at_run_time, session, single
from torch import Tensor, nn

from sparsefx.codegen import onnx_gather
from sparsefx.codegen.onnx_columns import MOST_STRIPS, Cut, cut, kept_columns, pick
from sparsefx.codegen.onnx_decode import Source
from sparsefx.codegen.onnx_gather import GAIN, narrowed, plan_gather, share
from sparsefx.codegen.onnx_lower import Problem, choose
from sparsefx.codegen.onnx_read import inlined, written_weight
from sparsefx.codegen.onnx_writer import Writer
from sparsefx.ir.format import Format, Packed
from sparsefx.ir.op import reference
from sparsefx.runtime.export import export_onnx
from sparsefx.runtime.install import install

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")

CODECS = ("int2", "int3g64", "int4", "uint4g32", "uint3g512", "int8", "uint6g24", "fp16")
CASES = (  # one strip or several, columns one by one or in runs, ragged rows and columns
    ("tile2048x1@50%", 40, 192), ("tile2048x16@25%", 37, 576), ("tile16x1@50%", 37, 100),
    ("tile16x32@75%", 40, 576), ("tile24x24@50%", 37, 100), ("tile64x8@60%", 64, 136),
)  # fmt: skip


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gather whatever it costs."""
    monkeypatch.setattr(onnx_gather, "GAIN", float("inf"))


def rounding_bound(x: Tensor, packed: Packed, want: Tensor) -> Tensor:
    """`bound`, and half a step of every activation group's own maximum instead of the row's."""
    group = packed.format.a8_group
    if not group:
        return bound(x, packed, want)
    plain = Packed(packed.format.float_activations, packed.n, packed.k, packed.buffers)
    weight = packed.unpack(torch.float64).abs()
    steps = (
        torch.stack([c.double().abs().amax(-1) for c in torch.split(x, group, -1)], -1) / 127 / 2
    )
    shares = torch.stack([c.sum(1) for c in torch.split(weight, group, 1)])
    sums = x.double().abs().sum(-1, keepdim=True) * weight.max()
    out: Tensor = (
        bound(x, plain, want) + 1.01 * steps @ shares + 2 * packed.k**0.5 * 2.0**-24 * sums
    )
    return out


def check(packed: Packed, rows: tuple[int, ...] = (7,), outlier: int | None = None) -> str:
    """The file's weight is the packed one, and its products are right; what was written."""
    model, row = single(packed)
    copy = inlined(ir.from_proto(ir.to_proto(model)))
    found = written_weight(copy, row.output).astype(np.float32)
    np.testing.assert_array_equal(found, packed.unpack().numpy())
    for full in (False, True):
        run = session(model, full).run
        for m in rows:
            x = torch.randn(m, packed.k)
            if outlier is not None:
                x[:, outlier] *= 300
            want = exact(x, packed)
            (y,) = run(None, {"x": x.numpy()})
            assert y.shape == (m, packed.n)
            assert bool(
                ((torch.from_numpy(y) - want).abs() <= rounding_bound(x, packed, want)).all()
            )
    return row.op


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("a8", ["", "+a8"])
@pytest.mark.parametrize("codec", CODECS)
def test_every_format_holds_its_weight_and_multiplies_right(codec: str, a8: str) -> None:
    torch.manual_seed(0)
    for layout, n, k in CASES:
        packed = Format.parse(f"{layout}+{codec}{a8}").pack(torch.randn(n, k))
        assert check(packed).startswith("Gather, ")


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    "fmt", ["tile16x1@50%+int4g32+a8", "tile16x16@50%+uint4g64", "tile16x8@50%+fp16"]
)
def test_no_row_one_and_seven(fmt: str) -> None:
    check(Format.parse(fmt).pack(torch.randn(37, 192)), rows=(0, 1, 7))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("codec", ["int4g32", "uint4g32+a8", "int2g64+a8", "uint8g24", "fp16"])
@pytest.mark.parametrize("cols", [1, 16])
@pytest.mark.parametrize("keeps", [(1, 1, 1), (0, 0.5, 0), (1, 0, 0.5), (0, 0, 0)])
def test_strips_that_keep_all_or_nothing(codec: str, cols: int, keeps: tuple[float, ...]) -> None:
    torch.manual_seed(1)
    shares = torch.tensor(keeps)[:, None]
    cells = torch.rand(3, -(-200 // cols)) < shares
    mask = cells.repeat_interleave(16, 0)[:40].repeat_interleave(cols, 1)[:, :200]
    packed = Format.parse(f"tile16x{cols}@50%+{codec}").pack(torch.randn(40, 200), mask)
    assert check(packed).startswith("Gather, ")


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("cols", [1, 8, 32])
@pytest.mark.parametrize("text", ["int4g64+a8g32", "int8+a8g64", "int4g32+a8g128", "fp16+a8g48"])
def test_blocks_cross_no_activation_group(text: str, cols: int) -> None:
    torch.manual_seed(0)
    packed = Format.parse(f"tile64x{cols}@50%+{text}").pack(torch.randn(40, 384))
    check(packed, outlier=5)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("fmt", ["tile16x1@50%+int4g32", "tile16x16@50%+bf16", "tile32x8@50%+int8"])
@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_bias_branch_rank_and_dtype(fmt: str, rank: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    packed = Format.parse(fmt).pack(torch.randn(24, 64))
    bias, branch = torch.randn(24), (torch.randn(4, 64), torch.randn(24, 4), torch.randn(4))
    model, row = single(packed, bias, branch, rank, dtype)
    assert row.op.startswith("Gather, ")
    x = torch.randn(*(3, 2, 2)[: rank - 1], 64, dtype=dtype)
    want = reference(x.double(), packed, bias, branch)
    share_ = {torch.float32: 1e-6, torch.float16: 1e-3, torch.float64: 1e-12}[dtype]
    for full in (False, True):
        (y,) = session(model, full).run(None, {"x": x.numpy()})
        assert y.shape == tuple(want.shape)
        assert np.abs(y - want.numpy()).max() <= share_ * want.abs().max()


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    ("fmt", "operators"),
    [
        ("tile64x16@50%+int4g32", ["Reshape", "Gather", "Reshape", "MatMulNBits"]),
        ("tile64x1@50%+uint3g32", ["Transpose", "Gather", "Transpose", "MatMulNBits"]),
        ("tile64x16@50%+uint6g24", ["Reshape", "Gather", "Reshape", "MatMul"]),
        ("tile64x16@50%+fp16", ["Reshape", "Gather", "Reshape", "MatMul"]),
    ],
)
def test_onnxruntime_folds_everything_but_the_product(
    fmt: str, operators: list[str], tmp_path: Path
) -> None:
    assert left_at_run_time(fmt, tmp_path) == operators


# --- whole files ---------------------------------------------------------------------------------


def two_layers() -> nn.Sequential:
    """Two weights of one Format and size that keep differently many columns in their strips."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).eval()
    fmt = Format.parse("tile32x1@50%+int4g32+a8")
    for name, counts in (("0.weight", (40, 24)), ("2.weight", (24, 40))):
        cells = torch.stack([torch.randperm(64) < count for count in counts])
        weight = model.get_parameter(name).detach()
        install(model, [name], fmt.pack(weight, cells.repeat_interleave(32, 0)))
    return model


def test_the_gate_accepts_and_bodies_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, 5, 64)
    plain = export_onnx(two_layers(), tmp_path / "plain.onnx", x)
    monkeypatch.setattr(onnx_gather, "GAIN", float("inf"))
    report = export_onnx(two_layers(), tmp_path / "gather.onnx", x, {"input": {0: "b", 1: "s"}})
    assert {row.op for row in plain.layers} == {"MatMulNBits"}
    assert {row.op for row in report.layers} == {"Gather, MatMulNBits"}
    assert all("of the weight is multiplied" in row.note for row in report.layers)
    assert all("of the time" in row.note for row in plain.layers)
    proto = onnx.load(report.path)
    assert len(proto.functions) == 2
    before = onnx.load(plain.path).graph.initializer
    sizes = [sum(np.prod(t.dims) for t in held) for held in (before, proto.graph.initializer)]
    assert sizes[0] == sizes[1]


def test_which_columns_is_not_written_out() -> None:
    packed = Format.parse("tile16x1@25%+int4g128").pack(torch.randn(16, 4096))
    plan = cut(packed, torch.ones(1, 4096, dtype=torch.bool), 128, 16)
    writer, names = Writer("fc"), packed.format.buffers
    values = [ir.Value(name=name) for name in names]
    pick(writer, Source.of(packed, values), plan)
    held = [n.attributes["value"].as_tensor() for n in writer.tape.nodes if "value" in n.attributes]
    assert max(tensor.size for tensor in held) == 256 * 8  # bytes as bits


# --- the choice ----------------------------------------------------------------------------------


def chosen(fmt: str, n: int, k: int) -> tuple[str, str]:
    torch.manual_seed(0)
    packed = Format.parse(fmt).pack(torch.randn(n, k))
    problem = Problem(packed.format, n, k)
    row, why = narrowed(problem, choose(problem)[0], packed)
    return row.op, why


@pytest.mark.parametrize(
    ("fmt", "n", "k", "op"),
    [
        ("tile2048x16@50%+int4", 512, 2048, "Gather, MatMulNBits"),
        ("tile2048x1@50%+fp16", 512, 2048, "Gather, MatMul"),
        ("tile2048x1@75%+int4g128", 512, 2048, "Gather, MatMulNBits"),
        ("tile2048x16@50%+int4", 16, 64, "MatMulNBits"),  # the nodes alone take longer
        ("tile2048x1@5%+int4g32+a8", 512, 2048, "MatMulNBits"),  # filled up to all there was
        ("tile16x1@50%+int4", 512, 2048, "MatMulNBits"),
    ],
)
def test_gathering_is_chosen_where_it_wins(fmt: str, n: int, k: int, op: str) -> None:
    found, why = chosen(fmt, n, k)
    assert found == op
    assert bool(why) != found.startswith("Gather")


def test_too_many_strips_and_other_layouts() -> None:
    rows = 16 * (MOST_STRIPS + 1)
    assert f"{MOST_STRIPS + 1} rows of tiles" in chosen("tile16x1@50%+int4", rows, 64)[1]
    assert chosen("bitmap@50%+int4", 16, 64) == ("MatMulNBits", "")
    assert chosen("tile16x1@50%+int4", 0, 64)[1] == "the weight is empty"


def test_filling_counts_by_segment() -> None:
    mask = torch.zeros(64, 256, dtype=torch.bool)
    mask[:, :33] = mask[:32, 128:160] = True
    packed = Format.parse("tile32x1@50%+int4g128").pack(torch.randn(64, 256), mask)
    kept = kept_columns(packed)
    assert isinstance(kept, Tensor)
    plan = cut(packed, kept, 128, 32)
    assert [(s.kept, s.width, s.before) for s in plan.strips] == [(65, 96, 0), (33, 64, 65 * 32)]
    assert plan.area == 32 * 96 + 32 * 64
    assert plan.name == "b32_65of96_33of64"


def test_the_plan_is_the_cheapest_block() -> None:
    torch.manual_seed(0)
    packed = Format.parse("tile2048x1@75%+int4g128").pack(torch.randn(512, 2048))
    problem = Problem(packed.format, 512, 2048)
    plan, kept = plan_gather(problem, choose(problem)[0], packed), kept_columns(packed)
    assert isinstance(plan, Cut)
    assert isinstance(kept, Tensor)
    shares = {b: share(cut(packed, kept, 128, b), 512 * 2048, 1, 128) for b in (128, 64, 32, 16)}
    assert shares[plan.block] == min(shares.values()) <= GAIN


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    ("text", "segment"),
    [
        ("int4g64+a8g32", 32), ("int4g32+a8g128", 32), ("int8+a8g64", 64), ("int4", 384),
        ("int4g128", 128), ("int4+a8g4096", 384), ("fp16+a8g48", 384),
    ],
)  # fmt: skip
def test_segments_keep_to_groups_of_weights_and_of_activations(text: str, segment: int) -> None:
    packed = Format.parse(f"tile64x1@50%+{text}").pack(torch.randn(40, 384))
    problem = Problem(packed.format, 40, 384)
    plan = plan_gather(problem, choose(problem)[0], packed)
    assert isinstance(plan, Cut)
    assert plan.segment == segment
