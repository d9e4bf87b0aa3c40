"""The engine inside ONNX Runtime: nodes built by hand, against exact products and hostile files."""

from __future__ import annotations

import ctypes
import threading
from itertools import cycle, product
from typing import Any

import pytest
import torch
from native_cases import (
    ENGINE,
    FAMILIES,
    ISAS,
    KINDS,
    Extras,
)
from ort_nodes import (
    TYPES,
    assert_right,
    attributes,
    case,
    model,
    options,
    rows,
    run,
    session,
    tensors,
)

from sparsefx.codegen.native import why_missing
from sparsefx.ir.errors import MissingPackageError
from sparsefx.ir.format import Format, Packed
from sparsefx.ir.op import reference
from sparsefx.runtime.ort import ort_library, ort_session

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.skipif(ENGINE is None, reason=why_missing())

LAYOUTS = [*FAMILIES, "1:3", "2:4", "5:8", "1:16", "tile3x5@37.5%", "tile16x1@50%"]
CODECS = [
    *KINDS, "int3", "uint4g16", "int8", "int5g8", "uint6", "int7g32", "uint2", "int4+a8",
    "uint4g32+a8g64", "int8+a8g24",
]  # fmt: skip
EXTRAS = [(False, 0), (True, 0), (False, 8), (True, 5)]
"""With a bias or not, rank of the branch."""


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
