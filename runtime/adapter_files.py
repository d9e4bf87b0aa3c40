"""Read adapters: LoRA (PEFT folders and plain safetensors) and sparse deltas. Nothing is unpickled.

A LoRA tensor's key is `<module>.<part>`, with or without `base_model.model.` in front. Parts are
spelled as PEFT (`lora_A.weight`, `lora_A.<name>.weight`), diffusers (`lora.down.weight`,
`lora_linear_layer.up.weight`) and kohya (`lora_down.weight`, `alpha`) write them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sparsefx.ir.errors import AdapterError

Lora: TypeAlias = dict[str, tuple[Tensor, Tensor]]
"""A (r, K) and B (N, r) of every module, float32; alpha / r is multiplied into B."""
Delta: TypeAlias = dict[str, tuple[Tensor, Tensor]]
"""Flat int64 positions (count,), ascending, in the (N, K) weight of every module, and float32
values (count,) that are added there."""
Alpha: TypeAlias = Callable[[str, int], float | None]

PREFIXES = ("_orig_mod.", "base_model.model.")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PART = re.compile(
    r"(?P<module>.+?)\.(?:(?P<down>lora_A|lora_down|lora\.down|lora_linear_layer\.down)"
    r"|(?P<up>lora_B|lora_up|lora\.up|lora_linear_layer\.up))(?:\.(?!weight$)\w+)?\.weight"
)
ALPHA = re.compile(r"(?P<module>.+)\.alpha")
SPARSE = re.compile(r"(?P<module>.+)\.weight\.(?P<part>indices|values)")
SHIFTED = re.compile(r"pissa|olora|corda", re.IGNORECASE)
"""Ways to start a LoRA that also change the base weights."""


@dataclass(frozen=True)
class Opened:
    """The tensors of an adapter's file, its header's texts, and its configuration if it has one."""

    where: Path
    tensors: dict[str, Tensor]
    header: dict[str, str]
    config: dict[str, Any] | None


def some(names: Iterable[str]) -> str:
    """The first names, quoted, and how many there are."""
    every = sorted(names)
    rest = f", … ({len(every)} in all)" if len(every) > 8 else ""
    return ", ".join(f"'{name}'" for name in every[:8]) + rest


def plain(key: str) -> str:
    """`key` without what wrappers put in front of it."""
    for prefix in PREFIXES:
        key = key.removeprefix(prefix)
    return key


def safetensors_of(path: str | os.PathLike[str]) -> list[Path]:
    """The safetensors files of a folder, or the file itself. Raises AdapterError without any."""
    where = Path(path)
    if where.is_file() and where.suffix == ".safetensors":
        return [where]
    if where.is_dir():
        found = sorted(where.glob("*.safetensors"))
        if (where / WEIGHTS).is_file():
            return [where / WEIGHTS]
        if found:
            return found
    pickles = [where] if where.is_file() else sorted([*where.glob("*.bin"), *where.glob("*.pt")])
    if pickles:
        raise AdapterError(
            f"'{pickles[0]}' is not read: a pickle can run code. Write it as safetensors where you "
            "trust it: save_file(torch.load(path, weights_only=True), 'adapter_model.safetensors')"
        )
    raise AdapterError(f"'{where}' is no .safetensors file and no folder that holds one")


def open_adapter(path: str | os.PathLike[str]) -> Opened:
    """Everything in an adapter's folder or file. Raises AdapterError where it is not sound."""
    from safetensors import SafetensorError, safe_open

    where, config = Path(path), None
    tensors: dict[str, Tensor] = {}
    header: dict[str, str] = {}
    try:
        if (where / CONFIG).is_file():
            config = json.loads((where / CONFIG).read_text())
        for file in safetensors_of(where):
            with safe_open(file, framework="pt") as opened:
                header |= opened.metadata() or {}
                tensors |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"'{where}' is no PEFT LoRA folder and no adapter: {error}") from error
    if config is not None and not isinstance(config, dict):
        raise AdapterError(f"'{where / CONFIG}' is no JSON object")
    bad = [k for k, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if bad:
        raise AdapterError(f"'{where}' holds NaN or infinity in {some(bad)}; train it again")
    return Opened(where, {plain(key): t for key, t in tensors.items()}, header, config)


# --- LoRA ----------------------------------------------------------------------------------------


def read_lora(opened: Opened, alpha: float | None = None) -> Lora:
    """The A and scaled B of every module.

    Scaling is alpha / r, with rslora alpha / √r; alpha comes from the configuration and its
    patterns, `<module>.alpha`, the header, or `alpha`, in this order. Raises AdapterError.
    """
    config = opened.config or {}
    _check_config(opened.where, config)
    parts: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    strange = []
    for key, tensor in opened.tensors.items():
        if match := PART.fullmatch(key):
            matrix = tensor.flatten(1) if tensor.dim() == 4 else tensor
            if matrix.dim() != 2 or (tensor.dim() == 4 and tensor.shape[2:].numel() != 1):
                raise AdapterError(f"'{key}' is {tuple(tensor.shape)}: no matrix of a LoRA")
            part = "down" if match["down"] else "up"
            parts.setdefault(match["module"], {})[part] = matrix.float()
        elif (match := ALPHA.fullmatch(key)) and tensor.numel() == 1:
            alphas[match["module"]] = float(tensor)
        elif ".base_layer." not in key:  # PEFT's copy of the base beside an adapted head
            strange.append(key)
    if strange:
        raise AdapterError(
            f"'{opened.where}': {some(strange)} is no matrix of a LoRA{_why(strange)}"
        )
    if not parts:
        raise AdapterError(f"'{opened.where}' holds no LoRA")
    _check_ranks(opened.where, config, parts)
    scales = {
        m: _scaling(opened, m, len(p["down"]), alphas.get(m), alpha) for m, p in parts.items()
    }
    if missing := [module for module, scale in scales.items() if scale is None]:
        raise AdapterError(
            f"'{opened.where}' has no lora_alpha for {some(missing)}; give it: load(…, alpha=…)"
        )
    return {m: (p["down"], p["up"] * scales[m]) for m, p in parts.items()}  # type: ignore[operator]


def _why(keys: list[str]) -> str:
    if any("magnitude" in key or "dora" in key for key in keys):
        return DORA
    if any(key.endswith((".weight", ".bias")) for key in keys):
        return "; parts trained whole (modules_to_save, bias) cannot be switched: leave them out"
    return ""


DORA = (
    "; DoRA rescales the base's columns, which a switched branch cannot: merge it in PEFT "
    "(merge_and_unload) and load the tuned checkpoint: load(path, name, rank=…)"
)


def _check_config(where: Path, config: Mapping[str, Any]) -> None:
    kind = str(config.get("peft_type", "LORA")).upper()
    if kind != "LORA":
        raise AdapterError(f"'{where}' is a {kind}; only LORA can be switched at run time")
    if config.get("use_dora"):
        raise AdapterError(f"'{where}'{DORA}")
    if SHIFTED.match(str(config.get("init_lora_weights"))):
        raise AdapterError(
            f"'{where}' was started as {config['init_lora_weights']}, which changes the base: save "
            "it with path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        )


def _check_ranks(
    where: Path, config: Mapping[str, Any], parts: Mapping[str, Mapping[str, Tensor]]
) -> None:
    half = [module for module, found in parts.items() if len(found) != 2]
    if half:
        raise AdapterError(f"'{where}': {some(half)} needs lora_A (r, K) and lora_B (N, r)")
    wrong = [
        m for m, p in parts.items() if len(p["down"]) != p["up"].shape[1] or not len(p["down"])
    ]
    if wrong:
        raise AdapterError(f"'{where}': {some(wrong)} needs lora_A and lora_B of one rank")
    ranks = {m: _by_pattern(config, "rank_pattern", m, config.get("r")) for m in parts}
    if other := [m for m, r in ranks.items() if r is not None and r != len(parts[m]["down"])]:
        first = other[0]
        raise AdapterError(
            f"'{where}': the configuration has rank {ranks[first]} for {some(other)}, the file "
            f"{len(parts[first]['down'])}"
        )


def _by_pattern(config: Mapping[str, Any], key: str, module: str, usual: Any) -> Any:
    """The value of the first pattern that ends the module's name, as PEFT chooses it."""
    for pattern, value in (config.get(key) or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return usual


def _scaling(
    opened: Opened, module: str, rank: int, own: float | None, usual: float | None
) -> float | None:
    """alpha / r, or None where there is no alpha."""
    config = opened.config or {}
    alpha = _by_pattern(config, "alpha_pattern", module, config.get("lora_alpha"))
    if alpha is None:
        alpha = own
    if alpha is None and opened.config is None:
        header = opened.header
        alpha = header.get("lora_alpha") or header.get("ss_network_alpha")
        alpha = usual if alpha is None else alpha
    try:
        number = None if alpha is None else float(alpha)
    except (TypeError, ValueError):
        number = None
    return None if number is None else number / (rank**0.5 if config.get("use_rslora") else rank)


# --- sparse deltas -------------------------------------------------------------------------------


def read_delta(opened: Opened) -> Delta:
    """Positions and values of every module, sorted by position. Raises AdapterError."""
    parts: dict[str, dict[str, Tensor]] = {}
    strange = []
    for key, tensor in opened.tensors.items():
        if match := SPARSE.fullmatch(key):
            parts.setdefault(match["module"], {})[match["part"]] = tensor
        else:
            strange.append(key)
    half = [module for module, found in parts.items() if len(found) != 2]
    if strange or half:
        raise AdapterError(
            f"'{opened.where}': {some([*strange, *half])} needs <weight>.indices and "
            "<weight>.values"
        )
    return {module: _sorted(opened.where, module, **found) for module, found in parts.items()}


def _sorted(where: Path, module: str, indices: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    if indices.dtype != torch.int64 or indices.dim() != 1 or indices.shape != values.shape:
        raise AdapterError(
            f"'{where}': '{module}' has indices {indices.dtype} {tuple(indices.shape)} and values "
            f"{tuple(values.shape)}; both must be (count,), indices int64 in the flat weight"
        )
    if not values.is_floating_point():
        raise AdapterError(f"'{where}': the values of '{module}' are {values.dtype}")
    positions, order = indices.sort()
    if len(positions) and (positions[0] < 0 or bool((positions.diff() == 0).any())):
        raise AdapterError(f"'{where}': '{module}' has a negative or repeated position")
    return positions, values[order].float()


def kind_of(path: str | os.PathLike[str]) -> str:
    """lora, sparse or checkpoint, by the keys in the file; only its header is read."""
    from safetensors import SafetensorError, safe_open

    if (Path(path) / CONFIG).is_file():
        return "lora"
    keys: list[str] = []
    try:
        for file in safetensors_of(path):
            with safe_open(file, framework="pt") as opened:
                keys += opened.keys()
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"'{path}' is no sound safetensors file: {error}") from error
    if not keys:
        raise AdapterError(f"'{path}' holds no tensor")
    if any(SPARSE.fullmatch(key) for key in keys):
        return "sparse"
    return "lora" if any(PART.fullmatch(key) or "lora" in key for key in keys) else "checkpoint"
