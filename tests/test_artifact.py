"""Saved folders: byte-exact round trips, refused targets, crashes that lose nothing."""

from __future__ import annotations

import os
import resource
import signal
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import (
    PATTERN,
    assert_equal,
    dense,
    put,
    saved_into,
    sparse,
    state,
    weights,
)
from safetensors.torch import load_file
from torch import nn

from sparsefx.ir.errors import ArtifactError
from sparsefx.ir.format import Format
from sparsefx.ir.layouts import LAYOUTS
from sparsefx.runtime import artifact
from sparsefx.runtime.artifact import load, save
from sparsefx.runtime.install import packed_modules, set_module
from sparsefx.runtime.modules import SparseLinear

torch.set_num_threads(1)
CODECS = ["", "bf16", "fp16", "int8", "int4g32", "int3g16", "uint4g16", "uint2", "int5"]
FORMATS = [f"{layout.example}+{codec}".rstrip("+") for layout in LAYOUTS for codec in CODECS]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved_into(tmp_path)


# --- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text", FORMATS)
def test_round_trip_is_byte_equal(text: str, tmp_path: Path) -> None:
    want = sparse(text)
    save(want, tmp_path / "m")
    model = dense()
    assert load(tmp_path / "m", model) is model
    assert_equal(model, want)


def test_meta_model_is_filled_completely(tmp_path: Path) -> None:
    want = sparse()
    save(want, tmp_path)
    got = load(tmp_path, dense(device="meta"))
    assert_equal(got, want)
    assert [p.requires_grad for p in got.parameters()] == [
        p.requires_grad for p in want.parameters()
    ]


def test_a_second_save_of_a_loaded_model_is_the_same_file(tmp_path: Path) -> None:
    save(sparse(), tmp_path / "a")
    save(load(tmp_path / "a", dense()), tmp_path / "b")
    names = [next((tmp_path / side).glob(PATTERN)).name for side in "ab"]
    assert names[0] == names[1]


def test_a_real_model_keeps_its_parameters_and_own_transient_buffers(tmp_path: Path) -> None:
    save(sparse(), tmp_path)
    model = dense()
    model.shift += 1
    norm = model.norm.weight
    load(tmp_path, model)
    assert model.norm.weight is norm
    assert model.shift.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_models(dtype: torch.dtype, tmp_path: Path) -> None:
    want = sparse().to(dtype)
    save(want, tmp_path)
    got = load(tmp_path, dense().to(dtype))
    assert isinstance(got.a, SparseLinear)
    assert got.a.dtype == dtype
    assert torch.equal(got.a.weight, want.a.weight)
    with pytest.raises(ArtifactError, match=r"float32 in the model.*\.to\(\)"):
        load(tmp_path, dense())


def test_tied_tensors_are_stored_once(tmp_path: Path) -> None:
    save(sparse(), tmp_path)
    stored = load_file(next(tmp_path.glob(PATTERN)))
    assert "embed.weight" not in stored or "head.weight" not in stored
    assert not {"a.values", "b.values"} <= stored.keys()


@pytest.mark.parametrize("tied_in_file", [True, False])
def test_ties_are_those_of_the_file(tied_in_file: bool, tmp_path: Path) -> None:
    want, got = dense(1), dense(0)
    other = got if tied_in_file else want
    other.embed.weight = nn.Parameter(torch.randn(10, 32))
    save(want, tmp_path)
    assert_equal(load(tmp_path, got), want)
    assert (got.embed.weight is got.head.weight) == tied_in_file


def test_crossed_ties_do_not_overwrite_each_other(tmp_path: Path) -> None:
    def model(pairs: list[int]) -> nn.Sequential:
        made = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4)))
        for i, j in enumerate(pairs):
            made[i].weight = made[j].weight
        return made

    want, got = model([0, 1, 0, 1]), model([0, 0, 2, 2])
    save(want, tmp_path)
    load(tmp_path, got)
    assert all(
        torch.equal(a, b) for a, b in zip(state(got).values(), state(want).values(), strict=True)
    )
    assert got[0].weight is got[2].weight is not got[1].weight


def test_one_module_under_two_names(tmp_path: Path) -> None:
    layer = nn.Linear(8, 8)
    want, other = nn.Sequential(layer, layer), nn.Linear(8, 8)
    packed = SparseLinear(Format.parse("int8").pack(layer.weight.detach()), layer.bias)
    for name in "01":
        set_module(want, name, packed)
    save(want, tmp_path)
    got = load(tmp_path, nn.Sequential(other, other))
    assert got[0] is got[1]
    assert torch.equal(packed_modules(got)["0"].dense(), packed.dense())


def test_views_of_one_storage_and_odd_tensors(tmp_path: Path) -> None:
    def model(fill: float) -> nn.Module:
        made = nn.Module()
        both = torch.full((6, 4), fill)
        made.q, made.k = nn.Parameter(both[:3]), nn.Parameter(both[2:5])
        made.register_buffer("t", torch.arange(6.0).view(2, 3).T * fill)
        made.register_buffer("empty", torch.zeros(0, 5))
        made.register_buffer("scalar", torch.tensor(fill, dtype=torch.float64))
        made.register_buffer("count", torch.tensor(int(fill)))
        made.add_module("items", nn.ParameterList([torch.full((16, 16), fill)]))
        return made

    want = model(3.0)
    put(want, ["items.0"], "2:4+int4")
    save(want, tmp_path)
    got = load(tmp_path, model(0.0))
    assert all(torch.equal(a, state(want)[n]) for n, a in state(got).items())
    one, two = (m.get_submodule("items") for m in (got, want))
    assert isinstance(one, nn.ParameterList)
    assert isinstance(two, nn.ParameterList)
    assert torch.equal(one[0], two[0])


def test_compiled_wrappers_use_plain_names(tmp_path: Path) -> None:
    want = sparse()
    model = dense()
    wrappers: list[Any] = [torch.compile(want), torch.compile(model)]
    save(wrappers[0], tmp_path)
    assert load(tmp_path, wrappers[1]) is wrappers[1]
    assert_equal(model, want)


@pytest.mark.parametrize(("n", "k"), [(0, 8), (8, 0), (0, 0), (1, 1), (7, 13), (17, 33)])
@pytest.mark.parametrize("text", ["int4g8", "bitmap@50%+uint3", "tile16x1@50%+bf16"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_boundary_shapes(n: int, k: int, text: str, tmp_path: Path) -> None:
    want = nn.Sequential(nn.Linear(k, n))
    put(want, ["0.weight"], text)
    save(want, tmp_path)
    got = load(tmp_path, nn.Sequential(nn.Linear(k, n, device="meta")))
    x = torch.randn(3, k)
    assert torch.equal(got(x), want(x))


def test_a_dense_model_and_a_model_without_tensors(tmp_path: Path) -> None:
    want = dense(1)
    save(want, tmp_path / "dense")
    assert_equal(load(tmp_path / "dense", dense()), want)
    save(nn.ReLU(), tmp_path / "none")
    load(tmp_path / "none", nn.ReLU())


def test_saving_again_replaces_and_leaves_no_litter(tmp_path: Path) -> None:
    for seed in range(3):
        save(sparse(seed=seed), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".sparsefx-dead").mkdir()
    save(sparse(seed=3), tmp_path)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".safetensors", ".txt"]
    assert_equal(load(tmp_path, dense()), sparse(seed=3))


def test_files_have_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    save(dense(), tmp_path)
    plain = tmp_path / "plain"
    plain.touch()
    assert len({stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}) == 1


# --- what save refuses ---------------------------------------------------------------------------


class Extra(nn.Module):
    def get_extra_state(self) -> Any:
        return object()

    def set_extra_state(self, state: Any) -> None:
        return None


def hyphened() -> nn.Module:
    return nn.ModuleDict({"q-proj": nn.Linear(2, 2)})


def bare() -> nn.Module:
    return SparseLinear(Format.parse("int8").pack(torch.randn(4, 4)))


def complex128() -> nn.Module:
    model = nn.Module()
    model.register_buffer("z", torch.zeros(2, dtype=torch.complex128))
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Extra, "extra state"),
        (hyphened, "q-proj"),
        (bare, "Sequential"),
        (complex128, "'z'.*complex128"),
        (lambda: nn.Linear(2, 2, device="meta"), "'weight'.*meta"),
    ],
)
def test_save_refuses_models_it_could_not_restore(
    make: Callable[[], nn.Module], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=words):
        save(make(), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def as_link(target: Path) -> None:
    (target.parent / "real").mkdir()
    target.symlink_to("real")


def inside(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def run(target: Path) -> None:
        target.mkdir()
        make(target / name)

    return run


W = f"weights-{0:016}.safetensors"


@pytest.mark.parametrize(
    "spoil",
    [
        as_link,
        lambda target: target.write_text("x"),
        os.mkfifo,
        inside("manifest.json", lambda p: p.symlink_to("elsewhere")),
        inside("manifest.json", os.mkfifo),
        inside("manifest.json", Path.mkdir),
        inside("manifest.json", lambda p: p.write_text('{"name": "somebody else\'s"}')),
        inside(W, lambda p: p.symlink_to("elsewhere")),
        inside(W, os.mkfifo),
    ],
)
def test_save_refuses_odd_targets_before_writing(
    spoil: Callable[[Path], object], tmp_path: Path
) -> None:
    spoil(tmp_path / "m")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ArtifactError, match="m"):
        save(dense(), tmp_path / "m")
    assert sorted(tmp_path.rglob("*")) == before


def test_save_does_not_write_through_a_device() -> None:
    with pytest.raises(ArtifactError, match="no folder"):
        save(dense(), "/dev/null")


# --- crashes and company -------------------------------------------------------------------------


def forked(work: Callable[[], None]) -> int:
    """Exit code of a child that does `work`: 0, 1 after ArtifactError, negative for a signal.

    The child only writes files: torch's threads do not survive a fork.
    """
    pid = os.fork()
    if pid == 0:
        code = 2
        try:
            work()
            code = 0
        except ArtifactError as error:
            code = 1 if "unchanged" in str(error) else 3
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("short", [1, 5000, None])
def test_a_full_disk_leaves_the_old_artifact(short: int | None, folder: Path) -> None:
    limit = weights(folder).stat().st_size - short if short else 0
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    model = sparse(seed=7)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        save(model, folder)

    assert forked(work) == 1
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_sigkill_at_every_step_leaves_one_complete_artifact(folder: Path) -> None:
    models = {seed: sparse(seed=seed) for seed in (1, 7)}
    steps = ["write", "sync", "replace", "sync", "sync", "replace", "sync"]
    for step in range(1, len(steps) + 1):

        def work(step: int = step) -> None:
            seen = 0

            def killed(real: Callable[..., Any]) -> Callable[..., Any]:
                def run(*args: Any, **kwargs: Any) -> Any:
                    nonlocal seen
                    seen += 1
                    if seen == step:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args, **kwargs)

                return run

            for owner, name in ((artifact, "save_file"), (artifact, "_sync"), (os, "replace")):
                setattr(owner, name, killed(getattr(owner, name)))
            save(models[7], folder)

        assert forked(work) == -signal.SIGKILL
        assert_equal(load(folder, dense()), models[7 if step == len(steps) else 1])
    save(models[1], folder)
    assert len(list(folder.iterdir())) == 2


def test_concurrent_writers_and_readers(tmp_path: Path) -> None:
    models = [sparse(seed=s) for s in range(3)]
    save(models[0], tmp_path)
    wanted = [packed_modules(m)["a"].buffer_list[1] for m in models]

    def read() -> None:
        got = packed_modules(load(tmp_path, dense()))["a"].buffer_list[1]
        assert any(torch.equal(got, values) for values in wanted)

    work: list[Callable[[], None]] = [*(partial(save, m, tmp_path) for m in models), read] * 8
    with ThreadPoolExecutor(4) as pool:
        for job in [pool.submit(step) for step in work]:
            job.result()
    read()
    assert len(list(tmp_path.iterdir())) == 2


def test_saving_holds_no_second_copy_of_the_weights(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4096, 4096, bias=False))
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    save(model, tmp_path)
    assert peak() - before < 32 << 20


def peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
