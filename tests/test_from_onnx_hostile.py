"""ONNX files from elsewhere: external data that lies outside, broken and compressed files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from test_from_onnx import SPEC, assert_checked, mlp, onnx

from sparsefx.ir.errors import ArtifactError
from sparsefx.runtime.from_onnx import compress_onnx


def outside(tmp_path: Path, location: str, length: int | None = None) -> Path:
    """A model whose weight lies at `location`."""
    source = mlp(tmp_path / "in.onnx")
    model = onnx.load(source)
    tensor = model.graph.initializer[0]
    size = len(tensor.raw_data)
    (tmp_path / "real.bin").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = 1
    for key, value in (("location", location), ("offset", "0"), ("length", str(length or size))):
        tensor.external_data.add(key=key, value=value)
    source.write_bytes(model.SerializeToString())
    return source


def test_external_data_beside_the_model(tmp_path: Path) -> None:
    source = outside(tmp_path, "real.bin")
    report = compress_onnx(source, tmp_path / "out.onnx", SPEC)
    assert_checked(report)
    assert report.bytes_before == source.stat().st_size + (tmp_path / "real.bin").stat().st_size


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("../real.bin", "below the model's folder"),
        ("/etc/passwd", "below the model's folder"),
        ("a/../../real.bin", "below the model's folder"),
        ("link.bin", "symbolic link"),
        ("linked/real.bin", "symbolic link"),
        ("hard.bin", "hard link"),
        ("short.bin", "too short"),
        ("gone.bin", "cannot be read"),
        (".", "below the model's folder"),
        ("folder", "not a regular file"),
    ],
)
def test_external_data_elsewhere_is_refused(tmp_path: Path, location: str, message: str) -> None:
    source = outside(tmp_path, location)
    real = tmp_path / "real.bin"
    (tmp_path / "short.bin").write_bytes(real.read_bytes()[:-1])
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.bin").symlink_to(real)
    (tmp_path / "linked").symlink_to(tmp_path)
    if location == "hard.bin":
        os.link(real, tmp_path / "hard.bin")
    with pytest.raises(ArtifactError, match=message):
        compress_onnx(source, tmp_path / "out.onnx", SPEC)
    assert not (tmp_path / "out.onnx").exists()


def test_lengths_that_are_not_the_tensors(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="too short"):
        compress_onnx(outside(tmp_path, "real.bin", 12), tmp_path / "out.onnx", SPEC)


@pytest.mark.parametrize("cut", [0, 1, 100, 3000])
def test_truncated_files(tmp_path: Path, cut: int) -> None:
    source = mlp(tmp_path / "in.onnx")
    source.write_bytes(source.read_bytes()[:cut])
    with pytest.raises(ArtifactError):
        compress_onnx(source, tmp_path / "out.onnx", SPEC)
    with pytest.raises(ArtifactError):
        compress_onnx(tmp_path / "none.onnx", tmp_path / "out.onnx", SPEC)


def test_compressed_files_are_refused(tmp_path: Path) -> None:
    done = compress_onnx(mlp(tmp_path / "in.onnx"), tmp_path / "out.onnx", SPEC).path
    with pytest.raises(ArtifactError, match="packed weights already"):
        compress_onnx(done, tmp_path / "twice.onnx", SPEC)
