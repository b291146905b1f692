"""Ranks of a test: a prompt read by two ranks in turn against the same pieces on one. Started by run_ranks with a model folder
that each rank continues a prompt of.
"""

import sys

import torch
import torch.distributed as dist

from megatron_hylo.hf import HyloCache
from megatron_hylo.platform.distributed import session
from megatron_hylo.serve import generate
from megatron_hylo.serve.split_prefill import Ring, split_prefill
from tests.hf.conftest import ALIGNED, random_model, serve_config

CASES = {
    "G+M*K": (serve_config("G+M*K"), None, 16, 1),
    "batch, 8 bits, growing": (serve_config("+G"), "fp8", 11, 2),
    "q/k-norm, one piece": (serve_config("G+*+", **ALIGNED["G+*+ pairs, bias, aligned q/k-norm"]), None, 80, 1),
    "q/k-norm": (serve_config("G+*+", **ALIGNED["G+*+ pairs, bias, aligned q/k-norm"]), None, 20, 1),
}


def check(name: str, device: torch.device) -> None:
    config, latents, piece, batch = CASES[name]
    torch.manual_seed(0)
    model = random_model(config, torch.float32)
    ids = torch.randint(160, (batch, 75))
    room = None if "growing" in name else 90
    alone, cache = HyloCache(room, latents), HyloCache(room, latents)
    with torch.no_grad():
        for part in ids.split(piece, dim=1):
            model(part, past_key_values=alone)
        ring = Ring(device)
        for done in split_prefill(model, ids, cache, piece, ring):
            assert done % piece == 0 or done == 75
        ring.close()
        for layer, tensors in {**alone.tokens, **alone.states}.items():
            mine = cache.tokens[layer] if layer in cache.rows else cache.states[layer]
            for a, b in zip(tensors, mine, strict=True):
                assert a.dtype == b.dtype
                torch.testing.assert_close(b.float(), a.float(), rtol=0, atol=0, msg=f"{name}, layer {layer}")
        for token in torch.randint(160, (3, batch, 1)):
            expected, found = (model(token, past_key_values=each).logits for each in (alone, cache))
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


if __name__ == "__main__":
    with session() as device:
        for name in CASES:
            check(name, device)
        print("equal on", dist.get_world_size())
        generate.PREFILL_TOKENS = 5
        print("TEXT", generate.generate_text(sys.argv[1], "the quick brown fox", 20).text)
