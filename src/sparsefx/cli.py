"""The command line: `sparsefx compress | export | explain | demo`, over the same API."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsefx.ir.errors import SparsefxError, SpecError, nearest

if TYPE_CHECKING:
    from sparsefx.models import Bundle

app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode="markdown",
    help="Make pruned, quantised models actually smaller and faster.",
)  # fmt: skip

Model = Annotated[
    str,
    typer.Argument(
        help="smollm2, minilm or antiberty; a Hugging Face folder on disk; or "
        "`package.module:function` that returns a model and its example inputs"
    ),
]
SpecOption = Annotated[str, typer.Option(help="Format text or a YAML/JSON file")]
Calibrate = Annotated[int, typer.Option(help="Calibration inputs (bundled models only)", min=0)]
Out = Annotated[Path, typer.Option(help="Where to write")]


@app.command()
def compress(
    model: Model, spec: SpecOption = "int8", calibrate: Calibrate = 0, out: Out = Path("compressed")
) -> None:
    """Compress a model and save it as a folder of safetensors and a manifest.

    Example: `sparsefx compress minilm --spec bitmap@50%+int4g128 --calibrate 8 --out my-minilm`
    """
    import sparsefx

    compressed = _sparsify(model, spec, calibrate)[0]
    sparsefx.save(compressed, out)
    _print(sparsefx.explain(compressed))
    size = sum(f.stat().st_size for f in out.glob("*.safetensors"))
    _print(f"saved to {out}/ ({size / 1e6:.1f} MB). Load: sparsefx.load({str(out)!r}, model)")


@app.command()
def export(
    model: Model, spec: SpecOption = "int4g128", calibrate: Calibrate = 0,
    out: Out = Path("model.onnx"),
) -> None:  # fmt: skip
    """Compress a model and write it as ONNX, checked against PyTorch before it appears.

    Example: `sparsefx export minilm --spec int4g128 --out minilm.onnx`
    """
    import sparsefx

    compressed, inputs, shapes = _sparsify(model, spec, calibrate)
    report = sparsefx.export_onnx(compressed, out, inputs, shapes)
    _print(
        f"wrote {report.path} ({report.bytes / 1e6:.1f} MB), {len(report.layers)} packed weights"
    )
    if worst := report.worst:
        _print(f"nearest to its limit: {worst}")
    for note in report.notes:
        _print(f"note: {note}")


@app.command()
def explain(
    model: Model, spec: SpecOption = "int8", calibrate: Calibrate = 0,
    json: Annotated[bool, typer.Option(help="Print JSON instead of a table")] = False,
) -> None:  # fmt: skip
    """Show what a spec does to every weight, and why; nothing is written.

    Example: `sparsefx explain antiberty --spec 2:4+int8`
    """
    import sparsefx

    found = sparsefx.explain(_sparsify(model, spec, calibrate)[0])
    print(found.to_json()) if json else _print(found)


@app.command()
def demo(
    models: Annotated[list[str] | None, typer.Argument(help="Which models; all by default")] = None,
    out: Out = Path("out"),
) -> None:
    """Compress three real models a few ways and print size, quality and time of each.

    Example: `sparsefx demo minilm --out out`
    """
    from sparsefx.models import MODELS
    from sparsefx.models.demo import demo as run

    for name in models or []:
        if name not in MODELS:
            raise SpecError(f"no bundled model {name!r}{nearest(name, MODELS)}")
    run(models or list(MODELS), out)


def _sparsify(model: str, spec: str, calibrate: int) -> tuple[Any, Any, Any]:
    """(compressed model, example inputs, dynamic shapes)."""
    import sparsefx

    bundle = _bundle(model)
    if bundle is not None:
        batches = bundle.calibration(calibrate) if calibrate else None
        dense, inputs, shapes = bundle.model, bundle.example_inputs, bundle.dynamic_shapes
    else:
        batches, (dense, inputs), shapes = None, _load(model), None
        if calibrate:
            raise SpecError(
                f"--calibrate needs a bundled model; call sparsefx.sparsify for {model}"
            )
    done = sparsefx.sparsify(dense, spec, example_inputs=inputs, calibration=batches)
    return done, inputs, shapes


def _bundle(name: str) -> Bundle | None:
    from sparsefx.models import MODELS

    return MODELS[name]() if name in MODELS else None


def _load(name: str) -> tuple[Any, Any]:
    """A model and example inputs from a Hugging Face folder or a `package.module:function`."""
    from sparsefx.models import MODELS

    if Path(name).is_dir():
        from sparsefx.models.folder import load_folder

        return load_folder(Path(name))
    module, colon, function = name.partition(":")
    if not colon:
        raise SpecError(f"no model {name!r}{nearest(name, MODELS)}")
    sys.path.insert(0, str(Path.cwd()))
    model, inputs = getattr(import_module(module), function)()
    return model.eval(), inputs


def _print(text: Any) -> None:
    from rich.console import Console

    Console().print(text)


def main() -> None:
    """Run the command line; errors raised on purpose are one line, not a traceback."""
    try:
        app()
    except SparsefxError as error:
        from rich.console import Console

        Console(stderr=True).print(f"[red]{type(error).__name__}[/]: ", end="")
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
