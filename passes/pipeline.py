"""The whole way, as lists: read this file first.

A module is compressed (`runtime.sparsify`) in these steps:

    capture      ir.capture          three doors to graphs, and the Sites in them
    plan         passes.plan         a Format for every Site, or "dense, because …"; all checks
    compress     passes.compress     stream statistics block by block; prune, quantise, pack
                   calibration         what each Site's inputs look like
                   outliers            may '+a8' activations be int8, and how finely
                   share               how much each layer loses (passes.ratios)
                   follow              make up for what the blocks before lost
                   criteria/           what every weight is worth
                   sparsegpt           with data: prune and quantise jointly
                   round_to_nearest    without
                   descend, refit, …   try to do better (passes.solvers)
                   lowrank             the branch '+r32'
                   recover, distill    train what is kept, block by block or all together
    install      runtime.install     SparseLinear where nn.Linear was

A graph (`torch.compile`, `torch.export`) then goes through `PASSES`, each a function in a file of
its own with what it requires and ensures. A new pass is one file and one line here.
"""

from __future__ import annotations

from sparsefx.passes.clean_up import clean_up
from sparsefx.passes.dead_ranks import dead_ranks
from sparsefx.passes.fold import fold
from sparsefx.passes.fuse_branches import fuse_branches
from sparsefx.passes.fuse_epilogues import fuse_epilogues
from sparsefx.passes.fuse_norms import fuse_norms
from sparsefx.passes.fuse_rotary import fuse_rotary
from sparsefx.passes.fuse_unpack import fuse_unpack
from sparsefx.passes.group_heads import group_heads
from sparsefx.passes.manager import with_plugins
from sparsefx.passes.merge_siblings import merge_siblings
from sparsefx.passes.normalise import normalise
from sparsefx.passes.pack import pack
from sparsefx.passes.release import release

PASSES = with_plugins(
    (
        normalise,  # one spelling for every product with a weight
        fold,  # norm scales, batch norms and constants go into weights that are to be packed
        pack,  # weights with a chosen Format, at compile time
        fuse_unpack,  # weights that were packed before, read through unpack
        fuse_branches,  # W x + s · B (A x) becomes one product with a branch
        dead_ranks,  # what a branch multiplies by zero
        merge_siblings,  # products of one x become one call
        fuse_epilogues,  # bias, activation, gate and residual go into the product
        fuse_norms,  # root mean square norms that are written out, and additions before norms
        fuse_rotary,  # rotary embeddings that are written out, queries with keys
        group_heads,  # attention reads keys and values once for all heads that share them
    ),
    (
        clean_up,  # what changes nothing, is computed twice, or is not read
        release,  # dense weights that only packing read
    ),
)
"""In order; passes of other packages run before `clean_up`."""
