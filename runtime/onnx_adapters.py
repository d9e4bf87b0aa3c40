"""`export_adapter`: a PEFT LoRA folder becomes an `.onnx_adapter` file for a compressed base."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import torch
from torch import Tensor

from sparsefx.ir.errors import ArtifactError
from sparsefx.runtime.adapter_files import CONFIG, open_adapter, read_lora


def export_adapter(
    adapter: str | os.PathLike[str], base: str | os.PathLike[str], path: str | os.PathLike[str]
) -> list[str]:
    """Write the PEFT folder `adapter` for the ONNX file `base`; the names of what was written.

    Scaling (alpha / r, with rslora alpha / √r) is folded into B. In a run:
    `run_options.add_active_adapter(adapter)` after `onnxruntime.LoraAdapter().Load(path)`.
    Raises ArtifactError for files that are no PEFT LoRA and for modules that have no slot in
    `base` (`export_onnx(…, adapters=[…])` makes them), naming both lists.
    """
    tensors = read_peft(Path(adapter))
    slots = _slots(Path(base))
    unknown = sorted(set(tensors) - set(slots))
    if unknown:
        raise ArtifactError(
            f"{base} has no slots for {unknown[:6]}{' …' * (len(unknown) > 6)}; it has slots for "
            f"{sorted(slots)[:6]}: export it with adapters=[…]"
        )
    for name, tensor in tensors.items():
        for have, want in zip(tensor.shape, slots[name], strict=True):
            if isinstance(want, int) and have != want:
                raise ArtifactError(
                    f"'{name}' is {tuple(tensor.shape)}, {base} needs {slots[name]}"
                )
    _write(tensors, Path(path))
    return sorted(tensors)


def read_peft(folder: Path) -> dict[str, Tensor]:
    """`<module>.lora_A.weight` (r, K) and `<module>.lora_B.weight` (N, r), float32, B scaled."""
    if not (folder / CONFIG).is_file():
        raise ArtifactError(f"'{folder}' is no PEFT LoRA folder: it has no {CONFIG}")
    out: dict[str, Tensor] = {}
    for module, (a, b) in read_lora(open_adapter(folder)).items():
        out[f"{module}.lora_A.weight"] = a.contiguous()
        out[f"{module}.lora_B.weight"] = b.contiguous()
    return out


def _slots(base: Path) -> dict[str, tuple[int | str, ...]]:
    """Overridable inputs of an ONNX file, with their shapes."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        graph = onnx.load(str(base), load_external_data=False).graph
    except (OSError, DecodeError) as error:
        raise ArtifactError(f"'{base}' is no ONNX file: {error}") from error
    held = {tensor.name for tensor in graph.initializer}
    return {
        value.name: tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
        for value in graph.input if value.name in held
    }  # fmt: skip


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    import onnxruntime as ort

    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    held = ort.AdapterFormat()
    held.set_adapter_version(1)
    held.set_model_version(1)
    with torch.no_grad():
        held.set_parameters(
            {k: ort.OrtValue.ortvalue_from_numpy(v.numpy()) for k, v in tensors.items()}
        )
    try:
        held.export_adapter(str(draft))
        os.replace(draft, path)
    except (OSError, RuntimeError) as error:
        draft.unlink(missing_ok=True)
        raise ArtifactError(f"'{path}' could not be written: {error}") from error
