"""Windows of a batch lie end to end in the model: as if each went through it alone, or in Megatron's [sequence, batch, c]."""

import pytest
import torch

from megatron_hylo.parallel.documents import EqualWindows, batch_first, sequence_first
from tests.conftest import gradients, uneven_model
from tests.kernels.compare import relative_error

TOLERANCE = 1e-12  # float64


@pytest.mark.parametrize("pattern", ["G-G-", "M-M-", "+-+-", "*-*-", "W-W-", "G-+-M-*-"])
@pytest.mark.parametrize("qk_layernorm", [False, True])
def test_windows_do_not_see_each_other(pattern, qk_layernorm, one_rank):
    model, ids = uneven_model(pattern, qk_layernorm=qk_layernorm), torch.randint(160, (3, 21))
    upstream = torch.randn(21, 3, 48, dtype=torch.float64)
    alone = torch.cat([model(window[None]) for window in ids], dim=1)
    (alone * upstream).sum().backward()
    wanted = gradients(model)
    together = model(ids)
    (together * upstream).sum().backward()
    found = gradients(model)
    # Megatron's order, layer by layer
    hidden = model.embedding(input_ids=ids, position_ids=None)
    hidden = model.decoder(hidden_states=hidden, attention_mask=None)
    assert together.shape == (21, 3, 48)
    for ours in (together, hidden):
        assert relative_error(ours, alone) < TOLERANCE
    assert found.keys() == wanted.keys()
    worst = {name: relative_error(found[name], g) for name, g in wanted.items()}
    assert max(worst.values()) < 1e-6, worst  # norms are fp32


def test_one_window_is_megatrons_order(one_rank):
    model = uneven_model("*-G-")
    assert model.embed(torch.zeros(1, 5, dtype=torch.int64))[1] is None
    assert model.embed(torch.zeros(2, 5, dtype=torch.int64))[1] == EqualWindows(2)


def test_views_and_back():
    x = torch.randn(12, 1, 5)
    windows = batch_first(x, EqualWindows(3))
    assert windows.shape == (3, 4, 5) and windows.data_ptr() == x.data_ptr()
    assert torch.equal(windows[1, 2], x[6, 0]) and torch.equal(sequence_first(windows, EqualWindows(3)), x)
    y = torch.randn(4, 3, 5)
    assert torch.equal(sequence_first(batch_first(y, None), None), y) and torch.equal(batch_first(y, None)[1], y[:, 1])
