"""Recovery training: patterns stay, errors fall or nothing changes, seeds reproduce bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsefx
from sparsefx.ir.errors import ArtifactError, SpecError, WeightError
from sparsefx.ir.format import Format
from sparsefx.ir.sites import Site
from sparsefx.passes.compress_site import compress_site
from sparsefx.passes.latent import Latent
from sparsefx.passes.recipe import Recipe
from sparsefx.runtime.calibration_inputs import batches_of
from sparsefx.runtime.install import packed_modules

SPECS = ("2:4+int4g16", "bitmap@50%", "tile4x1@50%+uint4g16", "int3g16", "2:4+int4g16+r2")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
        return out


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def batches(count: int = 12, seed: int = 1) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(32, 32, generator=torch.Generator().manual_seed(7)) / 5
    return [torch.randn(2, 20, 32, generator=random) @ mix for _ in range(count)]


def compressed(spec: str, **recovery: Any) -> tuple[nn.Module, float]:
    """The model and its relative output error on inputs that it was not calibrated on."""
    wanted: dict[str, Any] = {"format": spec}
    if recovery:
        wanted["recovery"] = recovery
    model = sparsefx.sparsify(Net().eval(), wanted, calibration=batches(), progress=False)
    x = torch.cat(batches(4, seed=2))
    with torch.no_grad():
        dense = Net().eval()(x)
        return model, float((model(x) - dense).norm() / dense.norm())


@pytest.mark.parametrize("spec", SPECS)
def test_training_lowers_the_error_on_other_inputs(spec: str) -> None:
    plain, before = compressed(spec)
    trained, after = compressed(spec, epochs=12, scale_epochs=2, learning_rate=3e-3)
    assert after < before
    for (name, was), now in zip(
        packed_modules(plain).items(), packed_modules(trained).values(), strict=True
    ):
        masks = was.packed.mask(), now.packed.mask()
        assert now.format == was.format, name
        if masks[0] is not None and name.startswith("blocks.0"):  # later ones see other inputs
            assert torch.equal(*masks)  # type: ignore[arg-type]
    row = sparsefx.explain(trained).lines[0].row
    names = [step["name"] for step in row.steps]
    assert names[-2:] == ["block output", "recovery"]
    assert row.steps[-1]["error"] < row.steps[-2]["error"]


def test_the_whole_model_trains_too() -> None:
    _, before = compressed("2:4+int4g16")
    _, after = compressed("2:4+int4g16", epochs=0, scale_epochs=0, whole_epochs=20)
    assert after < before


def test_a_step_that_does_harm_is_undone() -> None:
    model, error = compressed("2:4+int4g16")
    harmed, same = compressed("2:4+int4g16", epochs=1, scale_epochs=0, learning_rate=1.0)
    assert not sparsefx.explain(harmed).lines[0].row.steps[-1]["kept"]
    assert same == error
    for was, now in zip(model.state_dict().values(), harmed.state_dict().values(), strict=True):
        assert torch.equal(was, now)


def test_training_leaves_no_trace_on_norms() -> None:
    model, _ = compressed("2:4+int4g16", epochs=1, whole_epochs=1)
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    assert norms
    assert all(p.requires_grad and p.grad is None for p in norms)


def test_seeds_reproduce_bit_for_bit() -> None:
    first, second = (compressed("int3g16", epochs=2)[0].state_dict() for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("spec", SPECS)
def test_a_latent_is_what_is_stored(spec: str) -> None:
    """Untrained, in both stages: the same weight, bit for bit, and the same buffers."""
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    site = Site(("w",), (16, 32), "linear")
    result = compress_site(site, weight, Format.parse(spec), Recipe())
    for stage in ("values", "scales"):
        latent = Latent(result)
        list(latent.train(stage))
        with torch.no_grad():
            assert torch.equal(latent.weight(), result.dense())
        for was, now in zip(result.packed.buffers, latent.done(()).packed.buffers, strict=True):
            assert torch.equal(was, now)


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsefx.passes import compress, compress_site

    spec: dict[str, Any] = {"format": "2:4+int4g16+r2", "recovery": {"epochs": 1}}
    whole = sparsefx.sparsify(Net().eval(), spec, calibration=batches(), progress=False)
    seen: list[str] = []
    real = compress_site.compress_site

    def dies(site: Site, *args: Any, **kwargs: Any) -> Any:
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(site.name)
        return real(site, *args, **kwargs)

    monkeypatch.setattr(compress, "compress_site", dies)
    with pytest.raises(KeyboardInterrupt):
        sparsefx.sparsify(
            Net().eval(), spec, calibration=batches(), resume=tmp_path, progress=False
        )
    seen.clear()

    def counts(site: Site, *args: Any, **kwargs: Any) -> Any:
        seen.append(site.name)
        return real(site, *args, **kwargs)

    monkeypatch.setattr(compress, "compress_site", counts)
    again = sparsefx.sparsify(
        Net().eval(), spec, calibration=batches(), resume=tmp_path, progress=False
    )
    assert seen == [f"blocks.{i}.{n}.weight" for i in (1, 2) for n in ("up", "down")]
    for (name, was), now in zip(
        whole.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(was, now), name


def test_a_damaged_or_foreign_part(tmp_path: Path) -> None:
    def run(spec: str) -> nn.Module:
        return sparsefx.sparsify(
            Net().eval(), spec, calibration=batches(), resume=tmp_path, progress=False
        )

    run("int4g16")
    files = sorted(tmp_path.iterdir())
    run("int3g16")
    assert len(list(tmp_path.iterdir())) == 2 * len(files), "another spec has files of its own"
    files[0].write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="damaged"):
        run("int4g16")


# --- what calibration may be ---------------------------------------------------------------------


def test_calibration_as_a_function_and_as_text() -> None:
    assert batches_of(lambda: iter([1, 2])) == [1, 2]

    def tokenizer(text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    windows = batches_of((tokenizer, "ab" * 700))
    assert windows is not None
    assert [tuple(w["input_ids"].shape) for w in windows] == [(1, 512), (1, 512)]
    assert windows[-1]["input_ids"][0, -1] == ord("b")
    for bad, said in ((5, "is a int"), ([], "no batch"), ("text", "is a str")):
        with pytest.raises(SpecError, match=said):
            batches_of(bad)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="1 tokens"):
        batches_of((tokenizer, "a"))


def test_what_needs_data_says_so() -> None:
    for spec in ({"criterion": "wanda"}, {"solver": "sweep"}, {"after": ["descend"]},
                 {"recovery": {"epochs": 1}}):  # fmt: skip
        with pytest.raises(WeightError, match="needs calibration"):
            sparsefx.sparsify(Net(), {"format": "2:4", **spec}, example_inputs=batches(1)[0])
