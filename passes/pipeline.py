"""The whole way, as lists: read this file first.

A module is compressed (`runtime.sparsify`) in these steps:

    capture      ir.capture          three doors to graphs, and the Sites in them
    plan         passes.plan         a Format for every Site, or "dense, because …"; all checks
    compress     passes.compress     stream statistics block by block; prune, quantise, pack
                   calibration         what each Site's inputs look like
                   outliers            may '+a8' activations be int8, and how finely
                   sparsegpt           with data: prune and quantise jointly
                   round_to_nearest    without
                   lowrank             the branch '+r32'
    install      runtime.install     SparseLinear where nn.Linear was

A graph (`torch.compile`, `torch.export`) then goes through `PASSES`, each a function in a file of
its own with what it requires and ensures. A new pass is one file and one line here.
"""

from __future__ import annotations

from sparsefx.passes.clean_up import clean_up
from sparsefx.passes.fuse_unpack import fuse_unpack
from sparsefx.passes.manager import Pass
from sparsefx.passes.normalise import normalise
from sparsefx.passes.pack import pack

PASSES: tuple[Pass, ...] = (
    normalise,  # one spelling for every product with a weight
    pack,  # weights with a chosen Format, at compile time
    fuse_unpack,  # weights that were packed before, read through unpack
    clean_up,
)
