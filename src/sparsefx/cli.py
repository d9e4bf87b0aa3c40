"""The command line: `sparsefx --help` lists the commands; all call the Python API."""

from __future__ import annotations

import sys
import time
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
        help="smollm2, minilm, antiberty or efficientnet; a Hugging Face folder on disk; for "
        "`compress` an .onnx file; or `package.module:function` that returns a model and its "
        "example inputs"
    ),
]
SpecOption = Annotated[str, typer.Option(help="Format text or a YAML/JSON file")]
Calibrate = Annotated[int, typer.Option(help="Calibration inputs (bundled models only)", min=0)]
Data = Annotated[
    Path | None,
    typer.Option(help="Calibration of an .onnx file: an .npz of its inputs, or a folder of them"),
]
Out = Annotated[Path, typer.Option(help="Where to write")]


@app.command()
def compress(
    model: Model, spec: SpecOption = "int8", calibrate: Calibrate = 0,
    out: Out = Path("compressed"), data: Data = None,
) -> None:  # fmt: skip
    """Compress a model and save it as a folder of safetensors and a manifest.

    A path that ends in .onnx is compressed to another such file, checked against the first.

    Example: `sparsefx compress minilm --spec bitmap@50%+int4g128 --calibrate 8 --out my-minilm`

    Example: `sparsefx compress model.onnx --spec int4g128 --data inputs.npz --out small.onnx`
    """
    import sparsefx

    if model.endswith(".onnx"):
        _compress_onnx(Path(model), spec, calibrate, out, data)
        return
    if data is not None:
        raise SpecError("--data is for .onnx files; bundled models take --calibrate")
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

    A causal language model gets key/value cache inputs and outputs and dynamic batch, sequence and
    past, for `sparsefx generate`; any other model is written as it is called.

    Example: `sparsefx export minilm --spec int4g128 --out minilm.onnx`
    """
    import sparsefx
    from sparsefx.models.causal_onnx import is_causal_lm, refusal

    compressed, inputs, shapes = _sparsify(model, spec, calibrate)
    why = refusal(compressed)
    if why is None:
        report = sparsefx.export_causal_lm(compressed, out)
    else:
        report = sparsefx.export_onnx(compressed, out, inputs, shapes)
    if why and is_causal_lm(compressed):
        _print(f"note: written without a key/value cache: {why}")
    _print(
        f"wrote {report.path} ({report.bytes / 1e6:.1f} MB), {len(report.layers)} packed weights"
    )
    if worst := report.worst:
        _print(f"nearest to its limit: {worst}")
    for note in report.notes:
        _print(f"note: {note}")


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="An ONNX file that `sparsefx export` wrote")],
    prompt: Annotated[str, typer.Option(help="Text to continue")],
    tokens: Annotated[int, typer.Option(help="How many tokens at most", min=1)] = 64,
    tokenizer: Annotated[
        Path | None, typer.Option(help="A folder with tokenizer.json; SmolLM2's by default")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token", min=0)] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many; 0: from all", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Of the drawing", min=0)] = 0,
    threads: Annotated[int, typer.Option(help="0: as ONNX Runtime likes", min=0)] = 0,
) -> None:
    """Continue a text with an exported language model in ONNX Runtime, printed as it comes.

    Example: `sparsefx generate smollm2.onnx --prompt "Once upon a time" --tokens 100`
    """
    from sparsefx.runtime.ort_generate import open_session, stream

    session, encoding = open_session(model, threads), _tokenizer(tokenizer)
    ids = encoding(prompt)["input_ids"]
    if not ids:
        raise SpecError("the prompt holds no token")
    steps = stream(session, [ids], tokens, temperature=temperature, top_k=top_k, seed=seed)
    times = [time.perf_counter()]
    found: list[int] = []
    shown = ""
    for token in steps:
        times.append(time.perf_counter())
        found.append(int(token[0]))
        text = encoding.decode(found, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # the bytes of one character may be several tokens
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(f"\n\nprefill: {len(ids)} tokens, {len(ids) / (times[1] - times[0]):.1f} tokens/s")
    if later := len(found) - 1:
        print(f"decode: {later} tokens, {later / (times[-1] - times[1]):.1f} tokens/s")


@app.command()
def explain(
    model: Model, spec: SpecOption = "int8", calibrate: Calibrate = 0,
    json: Annotated[bool, typer.Option(help="Print JSON instead of a table")] = False,
    steps: Annotated[bool, typer.Option(help="Show the output error after every step")] = False,
) -> None:  # fmt: skip
    """Show what a spec does to every weight, and why; nothing is written.

    Example: `sparsefx explain antiberty --spec 2:4+int8`
    """
    import sparsefx

    found = sparsefx.explain(_sparsify(model, spec, calibrate)[0], steps=steps)
    print(found.to_json()) if json else _print(found)


@app.command()
def frontier(
    model: Annotated[str, typer.Argument(help="smollm2, minilm or antiberty")],
    rows: Annotated[int, typer.Option(help="Tokens at a time: 1 is decoding", min=1)] = 128,
    calibrate: Annotated[int, typer.Option(help="Calibration inputs", min=2)] = 8,
    out: Out = Path("out"),
) -> None:
    """Draw quality against measured latency and size: dense, fixed specs, and what `auto` finds.

    Example: `sparsefx frontier minilm --rows 128 --out out`
    """
    from sparsefx.models.frontier import frontier as run
    from sparsefx.runtime.frontier import check_packages, describe, write

    check_packages()
    found, plans = run(model, rows=rows, calibrate=calibrate)
    out.mkdir(parents=True, exist_ok=True)
    for i, plan in enumerate(plans):
        plan.save(out / f"{model}-plan-{i}.yaml")
    written = write(found, out / f"{model}-frontier")
    print(describe(found.points))
    print(found.report())
    _print("wrote " + ", ".join(str(path) for path in written))


@app.command("extract-lora")
def extract_lora(
    base: Annotated[Path, typer.Argument(help="safetensors of the base: a file or a folder")],
    tuned: Annotated[Path, typer.Argument(help="The same, fine-tuned")],
    rank: Annotated[int, typer.Option(help="Rank of the LoRA", min=1)] = 16,
    out: Out = Path("lora"),
) -> None:
    """Write the LoRA that is the best low-rank part of what fine-tuning changed (PHLoRA).

    Example: `sparsefx extract-lora base tuned --rank 32 --out my-lora`
    """
    import sparsefx

    found = sparsefx.extract_lora(base, tuned, rank, out)
    for name, share in found.energy.items():
        _print(f"{name}: {share:.1%} of the difference kept")
    _print(f"wrote {out}, mean {found.mean_energy:.1%}")
    for name in found.left_out:
        _print(f"left out: {name}")


@app.command()
def demo(
    models: Annotated[list[str] | None, typer.Argument(help="Which models; all by default")] = None,
    out: Out = Path("out"),
) -> None:
    """Compress three real models a few ways and print size, quality and time of each.

    Example: `sparsefx demo minilm --out out`
    """
    from sparsefx.models.demo import RECIPES
    from sparsefx.models.demo import demo as run

    for name in models or []:
        if name not in RECIPES:
            raise SpecError(f"no model {name!r} in the demo{nearest(name, RECIPES)}")
    run(models or list(RECIPES), out)


def _compress_onnx(source: Path, spec: str, calibrate: int, out: Path, data: Path | None) -> None:
    import sparsefx

    if calibrate:
        raise SpecError("--calibrate counts inputs of bundled models; give an .onnx file --data")
    target = out.with_suffix(".onnx") if out == Path("compressed") else out
    batches = None if data is None else _batches(data)
    _print(sparsefx.compress_onnx(source, target, spec, calibration=batches))


def _batches(data: Path) -> list[dict[str, Any]]:
    """One calibration batch per .npz file: its arrays by input name."""
    import numpy as np

    files = sorted(data.glob("*.npz")) if data.is_dir() else [data]
    if not files:
        raise SpecError(f"--data: no .npz file in '{data}'")
    try:
        return [dict(np.load(file, allow_pickle=False)) for file in files]
    except (OSError, ValueError) as error:
        raise SpecError(f"--data: not an .npz of arrays: {error}") from None


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


def _tokenizer(folder: Path | None) -> Any:
    if folder is None:
        from sparsefx.models.smollm2 import tokenizer

        return tokenizer()
    from sparsefx.models.torchvision import usable_torchvision

    usable_torchvision()
    if not (folder / "tokenizer.json").is_file():
        raise SpecError(f"{folder} has no tokenizer.json")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


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
