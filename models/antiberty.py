"""AntiBERTy, an antibody language model, judged by guessing masked residues of germline genes."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx.models.assets import Asset
from sparsefx.models.bundle import Bundle, on_device_of
from sparsefx.models.torchvision import usable_torchvision

WEIGHTS = Asset(
    requirement="antiberty==0.1.3",
    package="antiberty",
    path="trained_models/AntiBERTy_md_smooth/pytorch_model.bin",
    sha256="f1ae33eac8cc8784a7d4be5a600141d2fa7bc7d8d5b3f5324d64a6a63bd0f137",
)
GERMLINES = Asset(
    requirement="anarci==2026.2.13.2",
    package="anarci",
    path="germlines.py",
    sha256="95a13463e2620b8037bf7ea67ecdf9ec6f8a8f973c5658f3c54126e9e36f3452",
)
_EVALUATED, _BATCH, _MASKED = 128, 16, 0.15
_MASKINGS = 4
"""How often a sequence may be calibrated on, with other residues masked each time."""


def load() -> Bundle:
    """Return AntiBERTy with masked-residue accuracy on 128 human germline sequences."""
    folder = WEIGHTS.locate().parent
    vocabulary = Vocabulary((folder.parent / "vocab.txt").read_text().split())
    evaluated, human, animals = _germlines(vocabulary)
    batches = list(_masked_batches(vocabulary, evaluated))

    def calibration(count: int) -> list[dict[str, Tensor]]:
        others = human if count * _BATCH <= len(human) else human + animals
        most = len(others) // _BATCH
        if not 0 < count <= most * _MASKINGS:
            raise ValueError(f"{count} batches asked, there are 1 to {most * _MASKINGS}")
        each = -(-count // -(-count // most))  # batches of one masking
        parts = [(others[i % each :: each][:_BATCH], i // each) for i in range(count)]
        return [inputs for part in parts for inputs, _ in _masked_batches(vocabulary, *part)]

    axes = {0: "batch", 1: "length"}
    example = {name: value[:2, :32] for name, value in batches[0][0].items()}
    return Bundle(
        name="antiberty",
        model=_masked_lm(folder),
        example_inputs=example,
        calibration=calibration,
        metric=lambda model: {"accuracy": _accuracy(model, batches)},
        headline="accuracy",
        better="higher",
        dynamic_shapes=dict.fromkeys(example, axes),
    )


def _masked_lm(folder: Path) -> nn.Module:
    """Return the BertForMaskedLM inside the checkpoint; its two classifiers are left out."""
    usable_torchvision()
    from transformers import BertConfig, BertForMaskedLM

    state = torch.load(WEIGHTS.locate(), map_location="cpu", weights_only=True)
    model: nn.Module = BertForMaskedLM(BertConfig.from_pretrained(str(folder)))
    missing = set(model.load_state_dict(state, strict=False).missing_keys)
    if missing:
        raise RuntimeError(f"the checkpoint lacks {sorted(missing)}")
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of the model: 20 amino acids and a few marks."""

    tokens: list[str]

    @cached_property
    def index(self) -> dict[str, int]:
        """Return each token's number."""
        return {token: index for index, token in enumerate(self.tokens)}

    def encode(self, sequence: str) -> Tensor:
        """Return the numbers of a sequence between its start and end marks."""
        return torch.tensor([self.index[token] for token in ("[CLS]", *sequence, "[SEP]")])


def _germlines(vocabulary: Vocabulary) -> tuple[list[str], list[str], list[str]]:
    """Return (evaluated, other) human variable regions, of which neither genes nor sequences are
    on both sides, and those of other animals."""
    tree = ast.parse(GERMLINES.locate().read_text())  # a table: read as data, never run
    [assignment] = tree.body
    assert isinstance(assignment, ast.Assign)
    table: dict[str, Any] = ast.literal_eval(assignment.value)
    sides: tuple[list[str], list[str]] = ([], [])
    genes: dict[str, int] = {}
    for allele, sequence in _regions(table, "human"):
        gene = genes.setdefault(allele.split("*")[0], len(genes))
        if set(sequence) <= vocabulary.index.keys():
            sides[gene % 2].append(sequence)
    evaluated = sides[0][:_EVALUATED]
    others = [sequence for sequence in sides[1] if sequence not in evaluated]  # of doubled genes
    animals = [
        sequence
        for species in sorted({kind for chain in "HKL" for kind in table["V"][chain]} - {"human"})
        for _, sequence in _regions(table, species)
        if set(sequence) <= vocabulary.index.keys() and sequence not in evaluated
    ]
    return evaluated, others, animals


def _regions(table: Mapping[str, Any], species: str) -> Iterator[tuple[str, str]]:
    """Yield every allele of a species and its variable region, heavy ones with a J gene behind."""
    joins = [join.replace("-", "") for join in table["J"]["H"].get(species, {"": ""}).values()]
    variables = [item for chain in "HKL" for item in table["V"][chain].get(species, {}).items()]
    for position, (allele, aligned) in enumerate(variables):
        join = joins[position % len(joins)] if allele.startswith("IGHV") else ""
        yield allele, aligned.replace("-", "") + join


def _masked_batches(
    vocabulary: Vocabulary, sequences: list[str], seed: int = 0
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield (inputs with 15% of the residues masked, the residues there or -1 elsewhere)."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, len(sequences), _BATCH):
        rows = [vocabulary.encode(sequence) for sequence in sequences[start : start + _BATCH]]
        true = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        special = (true == vocabulary.index["[CLS]"]) | (true == vocabulary.index["[SEP]"])
        hidden = torch.rand(true.shape, generator=generator) < _MASKED
        hidden &= (true >= 0) & ~special
        ids = true.masked_fill(hidden, vocabulary.index["[MASK]"])
        inputs = {
            "input_ids": ids.masked_fill(true < 0, vocabulary.index["[PAD]"]),
            "attention_mask": (true >= 0).long(),
        }
        yield inputs, true.masked_fill(~hidden, -1)


@torch.no_grad()
def _accuracy(model: nn.Module, batches: list[tuple[dict[str, Tensor], Tensor]]) -> float:
    """Return the share of masked residues that the model ranks first."""
    right = asked = 0
    for inputs, residues in batches:
        guesses = model(**on_device_of(model, inputs)).logits.argmax(-1).cpu()
        right += int((guesses == residues).sum())  # -1 equals no guess
        asked += int((residues >= 0).sum())
    return right / asked
