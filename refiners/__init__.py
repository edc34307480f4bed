"""Models as trees of layers, adapters as edits of the tree, and the proof that a port equals its upstream.

    import refiners.fluxion.layers as fl     the layers, and the trees they make
    from refiners.fluxion import adapters    LoRA and the other adapters that suit any tree
    from refiners import conversion          weights and configurations of upstream, turned into ours and back
    from refiners import parity              the verifier

This module imports nothing, so `refiners --help` does not wait for torch.
"""

__version__ = "0.1.0"
