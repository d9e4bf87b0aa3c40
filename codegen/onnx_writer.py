"""New ONNX nodes: a thin layer over onnx_ir's tape that knows types and small constants."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import onnx_ir as ir


class Writer:
    """Nodes of one function body, or of one place in a graph."""

    def __init__(self, name: str) -> None:
        import onnx_ir

        self.name = name
        self.tape = onnx_ir.tape.Tape()
        self.types = onnx_ir.DataType
        self._constants: dict[tuple[object, ...], ir.Value] = {}

    def op(
        self, kind: str, *inputs: ir.Value, domain: str = "", **attributes: float | str | list[int]
    ) -> ir.Value:
        """One node's only output."""
        return self.tape.op(kind, inputs, attributes, domain=domain)

    def constant(self, values: Tensor) -> ir.Value:
        """A constant tensor inside the graph or body, written once."""
        import onnx_ir

        key = (values.dtype, tuple(values.shape), values.numpy().tobytes())
        if key not in self._constants:
            tensor = onnx_ir.tensor_adapters.TorchTensor(values.contiguous())
            self._constants[key] = self.tape.op("Constant", (), {"value": tensor})
        return self._constants[key]

    def ints(self, *values: int) -> ir.Value:
        """A constant int64 vector."""
        return self.constant(torch.tensor(values, dtype=torch.int64))

    def number(self, value: float) -> ir.Value:
        """A constant float32 scalar."""
        return self.constant(torch.tensor(value, dtype=torch.float32))

    def cast(self, value: ir.Value, to: ir.DataType) -> ir.Value:
        """`value` as `to`; no node when it already is."""
        if value.dtype == to:
            return value
        out = self.op("Cast", value, to=to.value)
        out.dtype = to
        return out

    def reshape(self, value: ir.Value, *shape: int) -> ir.Value:
        """Sizes may be 0; one may be -1 where none is."""
        return self.op("Reshape", value, self.ints(*shape), allowzero=int(-1 not in shape))

    def head(self, value: ir.Value, count: int, axis: int = 0) -> ir.Value:
        """The first `count` along `axis`."""
        return self.op("Slice", value, self.ints(0), self.ints(count), self.ints(axis))
