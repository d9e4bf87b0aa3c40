"""The engine inside ONNX Runtime: nodes built by hand, against exact products and hostile files."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from itertools import cycle, product
from typing import Any

import numpy as np
import pytest
import torch
from native_cases import (
    ENGINE,
    FAMILIES,
    ISAS,
    KINDS,
    Extras,
    expected,
    fitting,
    random_branch,
    seeded,
)
from torch import Tensor

from sparsefx.codegen.native import why_missing
from sparsefx.ir.codecs import Int
from sparsefx.ir.errors import MissingPackageError
from sparsefx.ir.format import Format, Packed
from sparsefx.ir.layouts import NM, Tile
from sparsefx.ir.op import reference
from sparsefx.runtime.ort import ort_library, ort_session

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.skipif(ENGINE is None, reason=why_missing())

TYPES = {torch.float32: 1, torch.uint8: 2, torch.float16: 10, torch.bfloat16: 16}
LAYOUTS = [*FAMILIES, "1:3", "2:4", "5:8", "1:16", "tile3x5@37.5%", "tile16x1@50%"]
CODECS = [
    *KINDS, "int3", "uint4g16", "int8", "int5g8", "uint6", "int7g32", "uint2", "int4+a8",
    "uint4g32+a8g64", "int8+a8g24",
]  # fmt: skip
EXTRAS = [(False, 0), (True, 0), (False, 8), (True, 5)]
"""With a bias or not, rank of the branch."""


def attributes(packed: Packed, branch: bool = False, biased: bool = False) -> dict[str, Any]:
    """What the exporter writes."""
    fmt, layout, codec = packed.format, packed.format.layout, packed.format.codec
    where = [0]
    if isinstance(layout, NM):
        where = [1, layout.n, layout.m]
    elif isinstance(layout, Tile):
        where = [2, layout.rows, layout.cols]
    how = [1, codec.bits, codec.group_size, int(codec.symmetric)] if isinstance(codec, Int) else [0]
    return {
        "n": packed.n, "k": packed.k, "format": str(fmt), "layout": where, "codec": how,
        "a8": int(fmt.a8), "a8_group": fmt.a8_group, "branch": int(branch), "biased": int(biased),
    }  # fmt: skip


def proto(name: str, t: Tensor) -> Any:
    raw = t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return onnx.helper.make_tensor(name, TYPES[t.dtype], list(t.shape), raw, raw=True)


def tensors(packed: Packed, extras: Extras) -> dict[str, Tensor]:
    out = dict(zip(packed.format.buffers, packed.buffers, strict=True))
    out |= dict(zip(("down", "up", "branch_scale"), extras.branch, strict=False))
    return out if extras.bias is None else {**out, "bias": extras.bias}


def model(
    given: dict[str, Tensor], fields: dict[str, Any], rank: int = 2, fed: Sequence[str] = (),
    functions: Sequence[Any] = (), x_type: int = 1,
) -> bytes:  # fmt: skip
    """One node; the tensors in `fed` are inputs of the graph, the others are constant."""
    h = onnx.helper
    node = h.make_node("Linear", ["x", *given], ["y"], name="fc", domain="sparsefx", **fields)
    lead: list[Any] = [f"d{i}" for i in range(rank - 1)]
    inputs = [h.make_tensor_value_info("x", x_type, [*lead, "width"])]
    inputs += [h.make_tensor_value_info(n, TYPES[given[n].dtype], given[n].shape) for n in fed]
    outputs = [h.make_tensor_value_info("y", 1, [*lead, "out"])]
    constants = [proto(name, t) for name, t in given.items() if name not in fed]
    graph = h.make_graph([node], "g", inputs, outputs, constants)
    opsets = [h.make_opsetid("", 18), h.make_opsetid("sparsefx", 1)]
    made = h.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=10)
    return bytes(made.SerializeToString())


def options(threads: int = 1, full: bool = True) -> Any:
    out = ort.SessionOptions()
    out.intra_op_num_threads = threads
    out.log_severity_level = 4
    level = ort.GraphOptimizationLevel
    out.graph_optimization_level = level.ORT_ENABLE_ALL if full else level.ORT_DISABLE_ALL
    return out


def session(packed: Packed, extras: Extras | None = None, **how: Any) -> Any:
    extras = extras or Extras()
    rank = how.pop("rank", 2)
    fields = attributes(packed, bool(extras.branch), extras.bias is not None)
    return ort_session(model(tensors(packed, extras), fields, rank), options(**how))


def run(made: Any, x: Tensor, **fed: Tensor) -> Tensor:
    feeds = {name: t.numpy() for name, t in fed.items()}
    return torch.from_numpy(made.run(None, {"x": x.numpy(), **feeds})[0])


def assert_right(packed: Packed, x: Tensor, got: Tensor, extras: Extras | None = None) -> None:
    exact, limit = expected(packed, x, packed.format.a8, extras)
    assert got.shape == exact.shape
    wrong = ~((got.double() - exact).abs() <= limit)
    assert not bool(wrong.any()), f"{packed.format} {tuple(x.shape)}: {int(wrong.sum())} wrong"


def case(
    text: str, n: int = 37, k: int = 100, bias: bool = False, rank: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Packed, Extras]:  # fmt: skip
    fmt, rng = Format.parse(text), seeded(n + k)
    k = fitting(fmt, k)
    packed = fmt.pack(torch.randn(n, k, generator=rng))
    branch = [t.to(dtype) for t in random_branch(n, k, rank)] if rank else []
    return packed, Extras(torch.randn(n, generator=rng).to(dtype) if bias else None, branch)


def rows(k: int, *lead: int) -> Tensor:
    return torch.randn(*lead, k, generator=seeded(7))


# --- right answers -------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_codec(layout: str) -> None:
    ways = cycle(product(EXTRAS, TYPES, (1, 2), (True, False)))
    for codec in CODECS:
        (bias, rank), dtype, threads, full = next(ways)
        dtype = torch.float32 if dtype == torch.uint8 else dtype
        packed, extras = case(f"{layout}+{codec}", 37, 100, bias, rank, dtype)
        made = session(packed, extras, threads=threads, full=full)
        for m in (1, 3, 21):
            x = rows(packed.k, m)
            got = run(made, x)
            assert_right(packed, x, got, extras)
            assert torch.allclose(
                got, reference(x, packed, extras.bias, extras.branch), rtol=1e-3, atol=1e-3
            )


@pytest.mark.parametrize("text", ["int4g32", "bitmap@50%+uint3g8", "tile16x16@50%", "2:4+bf16"])
def test_shapes(text: str) -> None:
    for n, k, rank in ((1, 1, 0), (16, 64, 3), (17, 65, 1), (50, 1025, 4), (300, 7, 7), (5, 0, 0)):
        packed, extras = case(text, n, k, True, min(n, rank))
        for lead in ((), (0,), (1,), (2, 3), (4, 0), (257,)):
            x = rows(packed.k, *lead)
            assert_right(packed, x, run(session(packed, extras, rank=x.dim()), x), extras)


def test_no_rows_of_weight() -> None:
    packed = Packed(Format.parse("fp32"), 0, 8, (torch.zeros(0),))
    assert run(session(packed), rows(8, 3)).shape == (3, 0)


def test_a_large_product_in_several_threads() -> None:
    packed, extras = case("bitmap@50%+int4g128+a8", 1030, 640, True, 16)
    one, two = (session(packed, extras, threads=threads) for threads in (1, 2))
    for m in (1, 40, 300):
        x = rows(640, m)
        got = run(two, x)
        assert_right(packed, x, got, extras)
        assert torch.equal(got, run(one, x)), "threads change no sum"


def test_the_branch_may_change_from_run_to_run() -> None:
    packed, extras = case("int4g32", 20, 64, True, 4)
    given = tensors(packed, extras)
    fields = attributes(packed, True, True)
    x = rows(64, 5)
    for fed in (["down", "up", "branch_scale", "bias"], ["down"], ["up"], ["branch_scale"]):
        made = ort_session(model(given, fields, fed=fed), options())
        for factor in (1.0, -2.0, 0.5):
            now = {name: t * factor if name in fed else t for name, t in given.items()}
            branch = (now["down"], now["up"], now["branch_scale"])
            got = run(made, x, **{name: now[name] for name in fed})
            assert_right(packed, x, got, Extras(now["bias"], branch))


def test_sessions_side_by_side() -> None:
    first, second = case("2:4+int8+a8", 200, 256)[0], case("uint3g64", 130, 96, rank=3)[0]
    work = [(p, session(p, threads=t)) for p, t in ((first, 2), (second, 1))]
    failures: list[BaseException] = []

    def repeat(packed: Packed, made: Any) -> None:
        try:
            for i in range(60):
                x = rows(packed.k, 1 + i % 33)
                assert_right(packed, x, run(made, x))
        except BaseException as error:
            failures.append(error)

    # Two threads run the same session at once.
    threads = [threading.Thread(target=repeat, args=w) for w in (*work, work[0])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_it_is_the_engine_that_torch_uses() -> None:
    """One library, one choice of instruction set: equal bits, whichever is chosen."""
    assert ENGINE is not None
    packed = case("int4g32", 40, 512)[0]
    weight, made, x, before = ENGINE.pack(packed), session(packed), rows(512, 9), ENGINE.isa
    try:
        for isa in ISAS:
            ENGINE.use(isa)
            assert torch.equal(run(made, x), weight.linear(x)), isa
    finally:
        ENGINE.use(before)


# --- how it is registered ------------------------------------------------------------------------


def test_without_the_library_the_body_runs() -> None:
    packed = case("fp32", 6, 6)[0]
    h = onnx.helper
    body = h.make_function(
        "sparsefx", "Linear", ["x", "values"], ["y"], [h.make_node("Neg", ["x"], ["y"])],
        [h.make_opsetid("", 18)], list(attributes(packed)),
    )  # fmt: skip
    data = model(tensors(packed, Extras()), attributes(packed), functions=[body])
    x = rows(6, 2)
    for full in (False, True):
        stock = ort.InferenceSession(data, options(full=full), providers=["CPUExecutionProvider"])
        assert torch.equal(run(stock, x), -x)
        assert_right(packed, x, run(ort_session(data, options(full=full)), x))


def test_constants_may_be_nodes() -> None:
    packed = case("bitmap@50%+uint4g16", 6, 32)[0]
    read = onnx.load_from_string(model(tensors(packed, Extras()), attributes(packed)))
    nodes = [
        onnx.helper.make_node("Constant", [], [t.name], value=t) for t in read.graph.initializer
    ]
    nodes += read.graph.node
    del read.graph.initializer[:], read.graph.node[:]
    read.graph.node.extend(nodes)
    x = rows(32, 3)
    for full in (False, True):
        made = ort_session(read.SerializeToString(), options(full=full))
        assert_right(packed, x, run(made, x))


def test_one_set_of_options_for_several_sessions() -> None:
    packed = case("int8", 6, 8)[0]
    data, shared, x = model(tensors(packed, Extras()), attributes(packed)), options(), rows(8, 2)
    for _ in range(3):
        assert_right(packed, x, run(ort_session(data, shared), x))


def test_session_arguments(tmp_path: Any) -> None:
    packed = case("int8", 6, 8)[0]
    path = tmp_path / "model.onnx"
    path.write_bytes(model(tensors(packed, Extras()), attributes(packed)))
    made = ort_session(path, providers=["CPUExecutionProvider"])
    assert made.get_providers() == ["CPUExecutionProvider"]
    assert_right(packed, rows(8, 2), run(made, rows(8, 2)))


def test_a_missing_engine_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsefx.codegen.native.engine", lambda: None)
    with pytest.raises(MissingPackageError, match="no kernels for ONNX Runtime"):
        ort_library()


def test_an_old_onnx_runtime_is_told() -> None:
    made: list[bytes] = []

    def create_status(_: int, text: bytes) -> int:
        made.append(text)
        return 77

    status = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)(create_status)
    table = (ctypes.c_void_p * 1)(ctypes.cast(status, ctypes.c_void_p))
    api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(
        lambda version: ctypes.addressof(table) if version == 1 else None
    )
    running = ctypes.create_string_buffer(b"1.16.3")
    version = ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda: ctypes.addressof(running))
    base = (ctypes.c_void_p * 2)(*(ctypes.cast(f, ctypes.c_void_p).value for f in (api, version)))
    register = ctypes.CDLL(ort_library()).RegisterCustomOps
    register.restype, register.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p]
    assert register(None, base) == 77
    assert made == [b"sparsefx needs ONNX Runtime 1.17 or newer, this is 1.16.3"]


# --- hostile nodes -------------------------------------------------------------------------------

BITMAP, RUNS, PLAIN = "bitmap@50%+uint4g16", "1:16+int8", "fp16"
HUGE = 1 << 62
HOSTILE: list[tuple[str, dict[str, Any], str]] = [
    (BITMAP, {"layout": [3]}, "unknown layout 3"),
    (BITMAP, {"layout": [2, 1]}, "layout has 2 numbers"),
    (BITMAP, {"layout": [2, 0, 1]}, "sides of tiles"),
    (BITMAP, {"layout": [2, 1, -1]}, "sides of tiles"),
    (BITMAP, {"layout": [2, 2, 2]}, "index has 64 elements, not 16"),
    (BITMAP, {"layout": [1, 4, 4]}, "1 <= n < m <= 256"),
    (BITMAP, {"layout": [1, -(1 << 63), 4]}, "1 <= n < m <= 256"),
    (BITMAP, {"layout": [1, 2, 5]}, "not a multiple of m = 5"),
    (BITMAP, {"codec": [2]}, "unknown codec 2"),
    (BITMAP, {"codec": [-1, 4, 16, 0]}, "unknown codec -1"),
    (BITMAP, {"codec": [1, 4, 16]}, "codec has 3 numbers"),
    (BITMAP, {"codec": [1, 9, 16, 0]}, "2 to 8 bits, not 9"),
    (BITMAP, {"codec": [1, -4, 16, 0]}, "2 to 8 bits, not -4"),
    (BITMAP, {"codec": [1, 4, HUGE, 0]}, "group_size"),
    (BITMAP, {"codec": [1, 4, -16, 0]}, "group_size"),
    (BITMAP, {"codec": [1, 4, 16, 7]}, "symmetric must be 0 or 1"),
    (BITMAP, {"codec": [1, 3, 16, 0]}, "values has 128 elements, not 96"),
    (BITMAP, {"codec": [1, 4, 8, 0]}, "scales has 32 elements, not 64"),
    (BITMAP, {"codec": [1, 4, 16, 1]}, "it has 5 inputs, not 4"),
    (BITMAP, {"codec": [0]}, "it has 5 inputs, not 3"),
    (BITMAP, {"n": -1}, "n and k must not be negative"),
    (BITMAP, {"n": HUGE, "k": HUGE}, "too large"),
    (BITMAP, {"n": HUGE, "k": 0}, "too large"),
    (BITMAP, {"n": 1 << 30, "k": 1 << 10}, "too large"),
    (BITMAP, {"n": 17}, "index has 64 elements, not 68"),
    (BITMAP, {"k": 48}, "index has 64 elements, not 96"),
    (BITMAP, {"a8": 2}, "a8 must be 0 or 1"),
    (BITMAP, {"a8": 1, "a8_group": -8}, "a8_group must be"),
    (BITMAP, {"branch": 1}, "it has 5 inputs, not 8"),
    (BITMAP, {"biased": 1}, "it has 5 inputs, not 6"),
    (PLAIN, {"a8": 1}, "a8 needs a codec of integers"),
    (PLAIN, {"n": 8}, "values has 512 elements, not 256"),
]


def refusal(given: dict[str, Tensor], fields: dict[str, Any], **how: Any) -> str:
    with pytest.raises(Exception, match="sparsefx") as caught:
        ort_session(model(given, fields, **how), options())
    return str(caught.value)


@pytest.mark.parametrize(("text", "change", "why"), HOSTILE)
def test_hostile_attributes(text: str, change: dict[str, Any], why: str) -> None:
    packed = case(text, 16, 32)[0]
    message = refusal(tensors(packed, Extras()), attributes(packed) | change)
    assert f"'fc' of format '{text}'" in message
    assert why in message


@pytest.mark.parametrize("text", [BITMAP, RUNS, PLAIN, "int3"])
def test_buffers_of_another_length_or_type(text: str) -> None:
    packed = case(text, 16, 32)[0]
    given = tensors(packed, Extras())
    for name in packed.format.buffers:
        t = given[name]
        for bad in (t[:-1], torch.cat([t.reshape(-1), t.reshape(-1)[:1]]), t[:0]):
            assert f"{name} has {bad.numel()} elements" in refusal(
                given | {name: bad.contiguous()}, attributes(packed)
            ) or (name == "index" and bad.numel() == t.numel())
        other = torch.zeros(t.shape, dtype=torch.uint8 if t.dtype != torch.uint8 else torch.float32)
        assert f"{name} must be " in refusal(given | {name: other}, attributes(packed))


def test_an_index_that_counts_other_values() -> None:
    packed = case(BITMAP, 16, 32)[0]
    for byte in (0, 255):
        index = torch.full_like(packed.buffers[0], byte)
        message = refusal(tensors(packed, Extras()) | {"index": index}, attributes(packed))
        assert "values has 128 elements, not " in message
    runs = case("1:3+int8", 16, 33)[0]
    index = torch.full_like(runs.buffers[0], 255)
    message = refusal(tensors(runs, Extras()) | {"index": index}, attributes(runs))
    assert "outside its run of 3" in message


def test_missing_or_odd_attributes() -> None:
    packed = case(RUNS, 16, 32)[0]
    fields, given = attributes(packed), tensors(packed, Extras())
    for name in fields:
        refusal(given, {k: v for k, v in fields.items() if k != name})
    message = refusal(given, fields | {"format": b"\xff\n" * 5000, "layout": [9]})
    assert "??" in message
    assert len(message) < 1000


@pytest.mark.parametrize("name", ["index", "values", "scales", "zero_points"])
def test_a_weight_must_be_constant(name: str) -> None:
    packed = case(BITMAP, 16, 32)[0]
    message = refusal(tensors(packed, Extras()), attributes(packed), fed=[name])
    assert f"({name}) must be a constant initializer" in message


def test_x_of_another_width() -> None:
    packed = case(BITMAP, 16, 32)[0]
    made = session(packed)
    for width in (31, 33, 0):
        with pytest.raises(Exception, match=rf"x\) has shape \(2, {width}\), not \(…, 32\)"):
            run(made, rows(width, 2))
    made = session(packed, rank=1)
    with pytest.raises(Exception, match=r"has shape \(5\)"):
        run(made, rows(5))


def test_branch_and_bias_of_another_shape() -> None:
    packed, extras = case("int8", 16, 32, True, 4)
    given, fields = tensors(packed, extras), attributes(packed, True, True)
    for name, bad in (
        ("down", torch.zeros(4, 31)), ("up", torch.zeros(15, 4)), ("up", torch.zeros(16, 5)),
        ("down", torch.zeros(4, 32, dtype=torch.uint8)), ("down", torch.zeros(128)),
    ):  # fmt: skip
        assert f"({name}) " in refusal(given | {name: bad}, fields)
    for name, size in (("branch_scale", 5), ("bias", 15), ("bias", 0)):
        made = ort_session(model(given | {name: torch.zeros(size)}, fields), options())
        with pytest.raises(Exception, match=rf"\({name}\) has shape \({size}\)"):
            run(made, rows(32, 2))


def test_random_bytes_are_refused_or_multiplied() -> None:
    """Whatever the buffers hold, a product of the right shape or a sentence comes back."""
    rng, said = np.random.default_rng(3), list[str]()
    for text in (BITMAP, RUNS, "int3g8", "tile3x5@50%+uint5", "1:3+fp16"):
        packed = case(text, 15, 48)[0]
        given = tensors(packed, Extras())
        for _ in range(20):
            noise = dict(given)
            name = packed.format.buffers[int(rng.integers(len(given)))]
            size = given[name].numel() * given[name].element_size()
            raw = torch.from_numpy(rng.integers(0, 256, size, dtype=np.uint8))
            noise[name] = raw.view(given[name].dtype)
            try:
                made = ort_session(model(noise, attributes(packed)), options())
            except Exception as error:
                said.append(str(error))
            else:
                assert run(made, rows(48, 2)).shape == (2, 15)
    assert said
    assert all("sparsefx::Linear 'fc'" in message for message in said)
