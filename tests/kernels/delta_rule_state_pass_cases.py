"""The small kernels beside the state pass, in Triton's interpreter, against their formulas.

Started by test_delta_rule_state_pass.py.

Prints a line a result: "ERROR name relative-error".
"""

import torch

from megatron_hylo.kernels import delta_rule_state_pass
from megatron_hylo.kernels.delta_rule_states import CHUNK
from megatron_hylo.kernels.gluon_delta_rule_state_pass import decayed_queries
from tests.kernels.compare import relative_error

if __name__ == "__main__":
    torch.set_num_threads(1)
    b, t, h, dk, chunk, scale = 2, 150, 3, 128, CHUNK, 0.3
    since = -torch.rand(b, t, h).double()
    found = delta_rule_state_pass._factors(since.float())
    for name, row in (("to-end", 0), ("whole", 1)):
        expected = torch.zeros(b, h, 3, chunk, dtype=torch.float64)
        for i, part in enumerate(since.split(chunk, 1)):
            whole = part[:, -1:].transpose(1, 2)  # [b, h, 1]
            expected[:, :, i, : part.shape[1]] = 2 ** (whole - part.transpose(1, 2) if row == 0 else whole)
        there = expected != 0  # past the last token any number does, where keys are zeros
        print("ERROR", name, relative_error(found[:, :, :, row][there], expected[there]))
    q = torch.randn(b, t, h, dk)
    out, rows = torch.empty_like(q), b * t * h
    decayed_queries[(-(-rows // 16),)](q, since.float(), out, scale, rows, DK=dk, ROWS=16)
    print("ERROR", "queries", relative_error(out, q.double() * scale * 2 ** since[..., None]))
