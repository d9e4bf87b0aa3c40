"""`sparsefx::triton_linear`: one product by our kernels, which `torch.compile` sees through.

A `torch.library.triton_op` over a weight in a kernel's order: Inductor gets its launches as kernels
of its own, and plans memory and the operators around them together with them. Importing this needs
triton.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton
from triton.runtime.jit import JITFunction

from sparsefx.codegen import triton_kernels
from sparsefx.codegen.triton_kernels import (
    columns_kernel,
    mask_kernel,
    reduce_kernel,
    rows_kernel,
    vector_kernel,
)
from sparsefx.codegen.triton_launch import Config, Product, Tasks
from sparsefx.codegen.triton_pack import Columns, Masked
from sparsefx.ir.format import Format

SIZES = {Columns: ("rows", "slice", "parts", "gather"), Masked: ("cell", "mask_rows", "step_words")}
OWN = {Columns: ("columns", "order"), Masked: ("mask", "begins", "starts")}
"""Fields of each order that are numbers, and that are tensors, besides those of `Prepared`."""
KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in SIZES}


def spelled(weight: Columns | Masked, config: Config, tasks: Tasks) -> tuple[list[Any], str]:
    """`weight` and `how` of the op: its tensors, None where there is none, and the rest as JSON."""
    kind = type(weight)
    planes = [*weight.planes, None, None][:3]
    own = [getattr(weight, name) for name in OWN[kind]]
    blocks = tasks.blocks if tasks.split else None
    how = {
        "kind": kind.__name__, "format": str(weight.format), "n": weight.n, "k": weight.k,
        "sizes": [getattr(weight, name) for name in SIZES[kind]], "config": asdict(config),
    }  # fmt: skip
    return [*planes, weight.scales, weight.zeros, *own, tasks.tasks, blocks], json.dumps(how)


def read(weight: list[Tensor | None], how: str) -> tuple[Product, Config, Tasks]:
    """What `spelled` was given."""
    said = json.loads(how)
    kind = KINDS[said["kind"]]
    *given, tasks, blocks = weight
    assert tasks is not None
    fields: dict[str, Any] = dict(zip(OWN[kind], given[5:], strict=True))
    fields |= dict(zip(SIZES[kind], said["sizes"], strict=True))
    fields |= {"counts": ()} if kind is Columns else {}
    planes = tuple(plane for plane in given[:3] if plane is not None)
    fmt = Format.parse(said["format"])
    order = kind(fmt, said["n"], said["k"], planes, given[3], given[4], **fields)
    split = blocks is not None
    plan = Tasks(tasks, blocks if blocks is not None else tasks, split)
    return Product(order, _visible()), Config(**said["config"]), plan


def _visible() -> Any:
    """Our kernels under their names, wrapped for tracing: torch looks for these calls by name.

    Interpreted kernels are launched as they are.
    """
    if not isinstance(rows_kernel, JITFunction):
        return triton_kernels
    return SimpleNamespace(
        columns_kernel=wrap_triton(columns_kernel),
        vector_kernel=wrap_triton(vector_kernel),
        mask_kernel=wrap_triton(mask_kernel),
        reduce_kernel=wrap_triton(reduce_kernel),
        rows_kernel=wrap_triton(rows_kernel),
    )


def triton_linear(
    x: Tensor, weight: list[Tensor | None], how: str, bias: Tensor | None, branch: list[Tensor],
    activation: str, multiply: Tensor | None, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """act(x · Wᵀ + bias + branch) ⊙ multiply + residual: `triton_launch.Product.linear` for one
    row of x (…, K) or more, with W and how it is multiplied as `spelled` gives them.
    """
    product, config, tasks = read(weight, how)
    x, multiply, residual = _written(x), _operand(multiply), _operand(residual)
    bias = None if bias is None else bias.to(x.dtype)
    return product.launch(x, config, tasks, bias, branch, activation, multiply, residual)


def _written(t: Tensor) -> Tensor:
    """`t`, contiguous, as something that Inductor writes once.

    What is cheap to compute it would else compute and write anew for each launch that reads it.
    """
    t = t.contiguous()
    return t.as_strided(t.shape, t.stride())


def _operand(t: Tensor | None) -> Tensor | None:
    return None if t is None else _written(t)


triton_op("sparsefx::triton_linear", triton_linear, mutates_args=())
TRITON_LINEAR = torch.ops.sparsefx.triton_linear.default
