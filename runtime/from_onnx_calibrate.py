"""What an ONNX model's products are given: its activations, seen by running it in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sparsefx.ir.errors import ExportError, SpecError, nearest
from sparsefx.passes.calibration import BUDGET
from sparsefx.passes.collector import Watch
from sparsefx.passes.padding import kept_tokens, without_padding
from sparsefx.passes.statistics import Statistics
from sparsefx.runtime.from_onnx_find import Weight

if TYPE_CHECKING:
    import onnx_ir as ir

Feeds = Mapping[str, np.ndarray[Any, Any]]
LEVELS = {"off": "ORT_DISABLE_ALL", "full": "ORT_ENABLE_ALL"}


def read_batches(model: ir.Model, batches: Any) -> list[Feeds]:
    """Calibration batches as arrays. Raises SpecError unless each has the graph's inputs."""
    wanted = {str(value.name) for value in model.graph.inputs if not value.is_initializer()}
    out: list[Feeds] = []
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise SpecError(
                f"a calibration batch is a {type(batch).__name__}; give {{input name: array}} "
                f"with {sorted(wanted)}"
            )
        for name in batch:
            if name not in wanted:
                raise SpecError(f"the model has no input {name!r}{nearest(str(name), wanted)}")
        if missing := wanted - set(batch):
            raise SpecError(f"a calibration batch lacks the inputs {sorted(missing)}")
        out.append({str(name): np.asarray(value) for name, value in batch.items()})
    if not out:
        raise SpecError("calibration has no batches")
    return out


def session(
    path: Path, level: str = "full", library: bool = False, optimised: Path | None = None
) -> Any:
    """An ONNX Runtime session on the CPU; with `library` the CPU engine runs our nodes.

    `optimised` is where the optimised graph goes. Raises ExportError where it cannot be loaded.
    """
    import onnxruntime

    from sparsefx.runtime.ort import ort_session

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, LEVELS[level])
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{optimised.name}.data"
        )
    try:
        if library:
            return ort_session(path, options)
        providers = ["CPUExecutionProvider"]
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise ExportError(
            f"onnxruntime (optimisation {level}) cannot load the graph: {error}"
        ) from error


def run(made: Any, names: Sequence[str] | None, feeds: Feeds) -> list[np.ndarray[Any, Any]]:
    """Outputs of one run. Raises ExportError naming the shapes that were fed."""
    try:
        return [np.asarray(y) for y in made.run(names, dict(feeds))]
    except Exception as error:  # onnxruntime's exceptions share no base class
        shapes = {name: list(np.shape(value)) for name, value in feeds.items()}
        raise ExportError(f"onnxruntime cannot run the model on {shapes}: {error}") from error


def watch_activations(model: ir.Model, weights: Sequence[Weight]) -> dict[str, str]:
    """Let the graph also return the activations of these weights' products, in float32.

    Returns the output's name by the activation's; the shape is an output ending in ".shape".
    """
    import onnx_ir
    from onnx_ir.tape import Tape

    out: dict[str, str] = {}
    for use in (use for weight in weights for use in weight.uses):
        name = str(use.x.name)
        if name in out:
            continue
        out[name] = f"sparsefx.activation.{len(out)}"
        tape = Tape()
        seen = tape.op("Cast", [use.x], {"to": onnx_ir.DataType.FLOAT.value})
        shape = tape.op("Shape", [use.x])
        for value, kind, end in ((seen, onnx_ir.DataType.FLOAT, ""),
                                 (shape, onnx_ir.DataType.INT64, ".shape")):  # fmt: skip
            value.name, value.type = out[name] + end, onnx_ir.TensorType(kind)
            model.graph.outputs.append(value)
        model.graph.extend(tape.nodes)
    return out


@dataclass
class Activations:
    """Runs a model whose activations are outputs, as many products at a time as fit in memory."""

    session: Any
    outputs: Mapping[str, str]
    batches: Sequence[Feeds]

    def show(
        self,
        part: Sequence[Weight],
        feeds: Feeds,
        sums: dict[str, Statistics] | None,
        watch: Watch,
    ) -> None:
        """Run one batch: `watch` sees every product of `part`, `sums` gain its rows."""
        names = list(dict.fromkeys(str(use.x.name) for weight in part for use in weight.uses))
        found = run(self.session, [self.outputs[name] for name in names], feeds)
        seen = {name: torch.from_numpy(x) for name, x in zip(names, found, strict=True)}
        kept = kept_tokens({name: torch.from_numpy(feed) for name, feed in feeds.items()})
        added: dict[object, Statistics] = {}
        for weight in part:
            site = weight.site
            rows = [without_padding(use.rows(seen[str(use.x.name)]), kept) for use in weight.uses]
            for x in rows:
                watch(site, weight.tensor(), x)
            if sums is None:
                continue
            # Products that read the same tensors share one Statistics, summed once.
            key = tuple((str(use.x.name), *use.strides) for use in weight.uses)
            if key not in added:
                added[key] = sums.setdefault(site.name, Statistics(site.k, rows[0].device))
                for x in rows:
                    added[key].add(x)
            sums[site.name] = added[key]

    def parts(self, weights: Sequence[Weight]) -> list[list[Weight]]:
        """Runs of weights whose second moments and activations fit in the budget together."""
        names = [f"{name}.shape" for name in self.outputs.values()]
        shapes = run(self.session, names, self.batches[0])
        sizes = {
            name: 4 * int(np.prod(shape)) for name, shape in zip(self.outputs, shapes, strict=True)
        }
        out: list[list[Weight]] = []
        left = 0
        for weight in weights:
            need = 4 * weight.site.k**2 + sum(sizes[str(use.x.name)] for use in weight.uses)
            if not out or need > left:
                out.append([])
                left = 2 * BUDGET
            out[-1].append(weight)
            left -= need
        return out
