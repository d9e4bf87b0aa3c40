"""The compiler's figures against counts by hand, and reading assembly against written-out loops."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

import pytest
from triton_table import apart, faults

from sparsefx.codegen.gpu_loops import KINDS, Loop, hottest, loops, read_amdgcn, read_sass
from sparsefx.codegen.triton_aot import TARGETS, Compiled, compile_for
from sparsefx.ir.errors import MissingPackageError, SpecError

BLOCK_M, BLOCK_N, BLOCK_K, WARPS = 64, 128, 64, 4  # as in triton_samples
# Per target and type: the instruction, its products, and the warps that issue it together.
TENSOR = {
    ("sm_80", "fp16"): ("HMMA.16816.F32", 16 * 8 * 16, 1),
    ("sm_80", "i8"): ("IMMA.16832.S8.S8", 16 * 8 * 32, 1),
    ("sm_89", "fp16"): ("HMMA.16816.F32", 16 * 8 * 16, 1),
    ("sm_89", "i8"): ("IMMA.16832.S8.S8", 16 * 8 * 32, 1),
    ("sm_90", "fp16"): ("HGMMA.64x128x16.F32", 64 * 128 * 16, 4),
    ("sm_90", "i8"): ("IGMMA.64x128x32.S8.S8", 64 * 128 * 32, 4),
    ("sm_100", "fp16"): ("UTCHMMA", 64 * 128 * 16, 4),
    ("sm_100", "i8"): ("IMMA.16832.S8.S8", 16 * 8 * 32, 1),
    ("gfx942", "fp16"): ("v_mfma_f32_32x32x8_f16", 32 * 32 * 8, 1),
    ("gfx942", "i8"): ("v_mfma_i32_32x32x16_i8", 32 * 32 * 16, 1),
}


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    """What `triton_samples` prints; skips where it cannot compile."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    said: dict[str, Any] = apart("triton_samples")
    if "missing" in said:
        pytest.skip(said["missing"])
    return said


@pytest.mark.parametrize(("target", "dtype"), TENSOR)
def test_the_loop_holds_what_a_block_must_do(made: Any, target: str, dtype: str) -> None:
    one = made[dtype][target]
    name, products, together = TENSOR[target, dtype]
    assert one["threads"] == WARPS * TARGETS[target].warp_size
    assert all(found.startswith(name) for found in one["tensor"]), one["tensor"]
    kinds = one["loop"]["kinds"]
    assert kinds["tensor"] * products * WARPS // together == BLOCK_M * BLOCK_N * BLOCK_K
    size = 2 if dtype == "fp16" else 1
    moved = (BLOCK_M + BLOCK_N) * BLOCK_K * size
    assert kinds["global_load"] * 16 * one["threads"] == moved  # 16 bytes a load
    assert tuple(kinds) == KINDS
    assert sum(kinds.values()) == one["loop"]["instructions"]
    assert sum(one["loop"]["opcodes"].values()) == one["loop"]["instructions"]


@pytest.mark.parametrize(("target", "dtype"), TENSOR)
def test_resources(made: Any, target: str, dtype: str) -> None:
    """The sums alone take BLOCK_M · BLOCK_N registers; x and w in flight fill shared memory."""
    one = made[dtype][target]
    most = 512 if target == "gfx942" else 255
    assert BLOCK_M * BLOCK_N // one["threads"] < one["registers"] < most
    assert one["spilled"] == one["loop"]["kinds"]["local"] == 0
    size = 2 if dtype == "fp16" else 1
    assert (BLOCK_M + BLOCK_N) * BLOCK_K * size <= one["shared"] <= TARGETS[target].shared_limit
    assert one["static_shared"] == (1024 if target in ("sm_90", "sm_100") else 0)


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_a_spill_is_seen(made: Any, target: str) -> None:
    one = made["spill"][target]
    assert one["spilled"] > 0
    assert one["loop"]["kinds"]["local"] > 0


def test_compiling_anew_gives_the_same(made: Any) -> None:
    assert made["again"] == made["fp16"]["sm_80"]


def test_a_kernel_without_a_loop(made: Any) -> None:
    assert made["no loop"]["loop"] is None
    assert made["no loop"]["tensor"] == {}
    with pytest.raises(SpecError, match="without a loop"):
        Compiled(**made["no loop"]).per_weight(1)


def test_signature_of_a_call(made: Any) -> None:
    signature, constants = made["signature"]
    expected = {"x": "*fp16:16", "w": "*fp32", "y": "*fp32:16", "N": "i64:16", "K": "i32"}
    assert signature == expected
    assert constants == {"M": 1, "BM": 16, "BN": None, "BK": None, "SUM": None}


def test_wrong_arguments(made: Any) -> None:
    refused = made["refused"]
    assert "takes x, y, SIZE" in refused["missing"]
    assert refused["missing"].endswith(": y")
    assert refused["unknown"].endswith(": z")
    assert "may end in ':16' only" in refused["hint"]
    assert "cannot take x='text'" in refused["value"]


def test_refusals() -> None:
    with pytest.raises(SpecError, match="did you mean 'sm_90'"):
        compile_for(None, {}, {}, "sm_91", 4, 3)
    if find_spec("triton"):
        with pytest.raises(SpecError, match="TRITON_INTERPRET"):
            compile_for(print, {}, {}, "sm_90", 4, 3)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(MissingPackageError, match="pip install triton"):
        compile_for(None, {}, {}, "sm_90", 4, 3)


def test_per_weight_and_fits() -> None:
    kinds = dict.fromkeys(KINDS, 0) | {"integer": 12, "tensor": 4}
    loop = Loop(16, kinds, {})
    one = Compiled("sm_89", 128, 64, 0, 99 * 1024, 0, {}, loop)
    assert one.fits
    assert one.per_weight(64 * 16) == {"all": 2.0, **kinds, "integer": 1.5, "tensor": 0.5}
    assert not Compiled("sm_89", 128, 64, 0, 99 * 1024 + 1, 0, {}, loop).fits


@pytest.mark.parametrize(
    ("opcode", "count", "block", "warps", "weights"),
    [
        ("HMMA.16816.F32.BF16", 16, (16, 64), 4, 8 * 16 * 64),  # 8 tiles, 2 for each warp
        ("HMMA.16816.F32", 8, (16, 16), 4, 8 * 16 * 16),  # 2 tiles: two warps repeat the others
        ("IMMA.16832.S8.S8.SAT", 8, (128, 64), 8, 32 * 64),
        ("HGMMA.64x128x16.F32.BF16", 8, (128, 128), 8, 8 * 16 * 128),
        ("UTCHMMA", 1, (64, 64), 4, 16 * 64),
        ("UTCBAR", 1, (64, 64), 4, None),
        ("v_mfma_f32_32x32x8_bf16", 2, (64, 64), 4, 2 * 8 * 64),
        ("FFMA", 8, (64, 64), 4, None),
    ],
)
def test_weights_of_a_pass(
    opcode: str, count: int, block: tuple[int, int], warps: int, weights: int | None
) -> None:
    target = "gfx942" if opcode.startswith("v_") else "sm_90"
    loop = Loop(count, dict.fromkeys(KINDS, 0) | {"tensor": count}, {opcode: count})
    threads = warps * TARGETS[target].warp_size
    assert Compiled(target, threads, 64, 0, 0, 0, {}, loop).weights(*block) == weights


# --- Assembly ------------------------------------------------------------------------------------

# An outer loop .L_x_1 … `BRA .L_x_1` with a loop of loads .L_x_2 and the tensor loop .L_x_3, whose
# wait .L_x_8 lies behind the end; .L_x_9 is the padding nothing reaches.
SASS = """
f:
.text.f:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_2:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   LOP3.LUT R4, R4, 0xf, RZ, 0xc0, !PT ;
        /*0040*/                   I2F.S8 R5, R4 ;
        /*0050*/              @!P1 BRA `(.L_x_2) ;
.L_x_3:
        /*0060*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0070*/              @!PT LDS RZ, [RZ] ;
        /*0080*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R4 ;
        /*0090*/              @!P0 BRA `(.L_x_8) ;
.L_x_4:
        /*00a0*/                   BRA.U UP0, `(.L_x_3) ;
        /*00b0*/               @P2 BRA `(.L_x_1) ;
        /*00c0*/                   STL [R1], R4 ;
        /*00d0*/                   EXIT ;
.L_x_8:
        /*00e0*/                   NANOSLEEP 0x1 ;
        /*00f0*/              @!P0 BRA `(.L_x_8) ;
        /*0100*/                   BRA `(.L_x_4) ;
.L_x_9:
        /*0110*/                   BRA `(.L_x_9);
"""


def test_loops_of_sass() -> None:
    code = read_sass(SASS)
    wait = {14, 15}
    expected = [set(range(1, 12)) | {14, 15, 16}, {2, 3, 4, 5}, {6, 7, 8, 9, 10, 16} | wait, wait]
    assert [set(body) for body in loops(code, "f")] == expected
    hot = hottest(code, "f")
    assert hot is not None
    assert hot.instructions == 8
    assert {kind: count for kind, count in hot.kinds.items() if count} == {"tensor": 1, "other": 7}


def test_hottest_without_tensor_cores_loads_most() -> None:
    hot = hottest(read_sass(SASS.replace("HMMA.16816.F32", "FFMA")), "f")
    assert hot is not None
    assert hot.opcodes == {"BRA": 1, "I2F.S8": 1, "LDG.E.128": 1, "LOP3.LUT": 1}
    assert (hot.kinds["global_load"], hot.kinds["integer"], hot.kinds["convert"]) == (1, 1, 1)


def test_hottest_of_two_is_the_longer() -> None:
    code = read_sass(SASS.replace("HMMA.16816.F32", "LDG.E"))
    hot = hottest(code, "f")
    assert hot is not None
    assert hot.instructions == 8
    assert code.instructions[12].kind == "local"  # STL


AMDGCN = """
f:                                      ; @f
	s_load_dwordx2 s[2:3], s[0:1], 0x0
	s_cbranch_scc1 .LBB0_2
.LBB0_1:                                ; %loop
	buffer_load_dwordx4 v[2:5], v1, s[0:3], 0 offen
	v_cvt_f32_i32_e32 v3, v3
	v_pk_mul_f16 v2, v2, v3
	v_and_b32_e32 v2, 15, v2
	ds_read_b64 v[6:7], v2
	v_mfma_f32_32x32x8_f16 v[16:31], v[2:3], v[6:7], v[16:31]
	scratch_load_dword v1, off, s4
	s_cbranch_scc0 .LBB0_1
.LBB0_2:
	global_store_dword v1, v2, s[0:1]
	s_endpgm
	.amdgpu_metadata
"""


def test_loops_of_amdgcn() -> None:
    code = read_amdgcn(AMDGCN)
    assert [set(body) for body in loops(code, "f")] == [set(range(2, 10))]
    hot = hottest(code, "f")
    assert hot is not None
    once = ("tensor", "integer", "float", "convert", "global_load", "shared_load", "local", "other")
    assert {kind for kind, count in hot.kinds.items() if count == 1} == set(once)
    assert hot.instructions == len(once)


# --- The table -----------------------------------------------------------------------------------

ENTRY = {"registers": 100, "spills": 0, "shared": 1024, "mma": {"HMMA": 4}, "per_weight": 2.0}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"registers": 116, "mma": {"HMMA": 1, "IMMA": 1}, "per_weight": None}, None),
        ({"registers": 117}, "from 100 to 117 registers"),
        ({"spills": 4}, "spills 4 bytes"),
        ({"mma": {"IMMA": 4}}, "lost HMMA"),
        ({"shared": 99 * 1024 + 1}, "bytes of shared memory"),
    ],
)
def test_faults(change: dict[str, Any], said: str | None) -> None:
    found = faults({"k": {"sm_89": ENTRY | change}}, {"k": {"sm_89": ENTRY}})
    assert len(found) == (said is not None)
    assert said is None or said in found[0]


def test_faults_of_missing_entries() -> None:
    found = faults({"new": {"sm_89": ENTRY}}, {"old": {"sm_89": ENTRY}})
    assert found == ["old on sm_89 is recorded, and not there", "new on sm_89 is not recorded"]
