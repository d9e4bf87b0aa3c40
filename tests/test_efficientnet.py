"""The bundled image classifier: what it recognises, what it is judged on, what it needs."""

from __future__ import annotations

import copy
import sys
from functools import partial

import pytest
import torch

import sparsefx
from sparsefx.models import MODELS, Bundle, efficientnet
from sparsefx.models.assets import MissingAsset
from sparsefx.runtime.install import packed_modules


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    try:
        return MODELS["efficientnet"]()
    except MissingAsset as missing:
        pytest.skip(str(missing))


@pytest.mark.zoo
@pytest.mark.parametrize("number", [5, 8])
def test_photographs_are_recognised(bundle: Bundle, number: int) -> None:
    photograph = efficientnet.PHOTOGRAPHS[number]
    label = int(photograph.path.removesuffix(".jpg").split("_")[-1])
    with torch.no_grad():
        logits = bundle.model(efficientnet.crops([photograph])[:1])
    assert logits.shape == (1, 1000)
    assert int(logits.argmax()) == label


@pytest.mark.zoo
def test_metric_is_deterministic_and_dense_agrees_with_itself(bundle: Bundle) -> None:
    first, second = (bundle.metric(bundle.model) for _ in range(2))
    assert first == second
    assert first["agreement"] == 1
    assert first["cosine"] == pytest.approx(1, abs=1e-12)  # of float64, on the same logits
    assert first.keys() == {bundle.headline, "cosine"}


@pytest.mark.zoo
def test_calibration_sees_no_evaluated_photograph(bundle: Bundle) -> None:
    assert len(efficientnet.CALIBRATION) == len(efficientnet.EVALUATION) == 10
    together = {p.sha256 for p in efficientnet.CALIBRATION + efficientnet.EVALUATION}
    assert len(together) == 20
    batches = bundle.calibration(10)
    seen = {crop.numpy().tobytes() for batch in batches for crop in batch["x"]}
    evaluated = {crop.numpy().tobytes() for crop in efficientnet.crops(efficientnet.EVALUATION)}
    assert len(seen) == len(evaluated) == 150
    assert not seen & evaluated
    with pytest.raises(ValueError, match=r"11 batches asked, there are 1 to 10"):
        bundle.calibration(11)


@pytest.mark.zoo
def test_channels_that_died_in_training_do_not_stop_compression(bundle: Bundle) -> None:
    model = copy.deepcopy(bundle.model)
    sparsefx.sparsify(model, "2:4+int8", example_inputs=bundle.example_inputs, progress=False)
    packed = packed_modules(model)
    assert len(packed) == 33  # 32 convolutions of 1x1 and the classifier


def test_agreement_counts_the_first_class_and_cosine_all() -> None:
    answers = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    found = torch.tensor([[4.0, 3.0], [2.0, 0.0]])
    expected = {"agreement": 0.5, "cosine": (24 / 25 + 1) / 2}
    assert efficientnet.compare(found, answers) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("missing", ["timm", "PIL"])
def test_what_is_not_installed_is_named_with_the_command(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    load = MODELS["efficientnet"] if missing == "timm" else partial(efficientnet.crops, [])
    with pytest.raises(MissingAsset, match=rf"{missing}.*: pip install --no-deps timm==1\.0\.29"):
        load()
