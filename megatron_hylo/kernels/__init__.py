"""Token-mixing and normalisation operations: plain torch for every device, faster ones on CUDA.

One file an operation. `registry` decides which implementation runs, logs the choice once and lets
tests force one. Nothing here knows Megatron; only torch is required.
"""
