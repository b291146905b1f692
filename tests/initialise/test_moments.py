"""Linear algebra on second moments against optima written another way, in float64."""

import pytest
import torch
from torch import Tensor

from megatron_hylo.initialise.moments import damped, factor_outputs, leading_eigenvectors, square_roots, unit_functional


def spread_moment(n: int, seed: int, condition: float = 1e3) -> Tensor:
    """A positive definite [n, n] with eigenvalues over three decades."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0]
    return basis * torch.logspace(0, -torch.tensor(condition).log10().item(), n, dtype=torch.float64) @ basis.T


def cost(weight: Tensor, made: Tensor, moment: Tensor, metric: Tensor) -> Tensor:
    """E |B^.5 (W - made) x|^2."""
    lost = weight - made
    return torch.trace(metric @ lost @ moment @ lost.T)


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(14, 20, dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 5, 13])
def test_unit_metric_gives_care_and_svd_llm(weight, rank):
    """CARE: truncate the SVD of W C^.5, then undo C^.5."""
    moment, unit = spread_moment(20, 1), torch.eye(14, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(moment)
    root = vectors * values.sqrt() @ vectors.T
    u, s, v = torch.linalg.svd(weight @ root, full_matrices=False)
    care = (u[:, :rank] * s[:rank]) @ v[:rank] @ torch.linalg.inv(root)
    down, up = factor_outputs(weight, moment, [unit], rank)
    assert down.shape == (rank, 20) and up.shape == (14, rank)
    torch.testing.assert_close(up @ down, care, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(cost(weight, up @ down, moment, unit), s[rank:].square().sum(), rtol=1e-8, atol=0)


@pytest.mark.parametrize("rank", [1, 5, 13])
def test_error_in_a_metric_is_the_tail_of_two_sided_singular_values(weight, rank):
    moment, metric = spread_moment(20, 1), spread_moment(14, 2)
    tail = torch.linalg.svdvals(torch.linalg.cholesky(metric).T @ weight @ torch.linalg.cholesky(moment))[rank:]
    down, up = factor_outputs(weight, moment, [metric], rank)
    two_sided = cost(weight, up @ down, moment, metric)
    torch.testing.assert_close(two_sided, tail.square().sum(), rtol=1e-7, atol=0)
    down, up = factor_outputs(weight, moment, [torch.eye(14, dtype=torch.float64)], rank)
    assert two_sided < 0.9 * cost(weight, up @ down, moment, metric)


def test_full_rank_is_exact_and_factors_are_balanced(weight):
    down, up = factor_outputs(weight, spread_moment(20, 1), [spread_moment(14, 2)], 14)
    torch.testing.assert_close(up @ down, weight, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1), rtol=1e-9, atol=0)


def test_rank_of_the_weight_is_enough_though_metric_and_moment_are_not_aligned_with_it(weight):
    low = weight[:, :3] @ torch.randn(3, 20, dtype=torch.float64)
    down, up = factor_outputs(low, spread_moment(20, 1), [spread_moment(14, 2)], 3)
    torch.testing.assert_close(up @ down, low, rtol=1e-6, atol=1e-6)
    down, up = factor_outputs(low, spread_moment(20, 1), [spread_moment(14, 2)], 6)  # latents that are not needed
    assert down.isfinite().all() and up.isfinite().all()
    torch.testing.assert_close(up @ down, low, rtol=1e-6, atol=1e-6)


def test_blocks_of_a_metric_equal_the_whole_metric(weight):
    """Eigenvectors of the blocks alone: a fraction of the work of the whole matrix's."""
    moment, blocks = spread_moment(20, 1), [spread_moment(9, 2), 3 * spread_moment(5, 3)]
    by_blocks, whole = (factor_outputs(weight, moment, metric, 5) for metric in (blocks, [torch.block_diag(*blocks)]))
    torch.testing.assert_close(by_blocks[1] @ by_blocks[0], whole[1] @ whole[0], rtol=1e-8, atol=1e-9)


def test_square_roots_multiply_to_the_moment_and_cancel():
    moments = torch.stack([spread_moment(6, 1), 7 * spread_moment(6, 2)])
    root, inverse = square_roots(moments)
    torch.testing.assert_close(root @ root, moments)
    torch.testing.assert_close(root @ inverse, torch.eye(6, dtype=torch.float64).expand(2, -1, -1))
    torch.testing.assert_close(root, root.mT)


def test_inverse_root_of_a_singular_moment_is_its_pseudoinverse():
    rows = torch.randn(2, 5, dtype=torch.float64)
    _, inverse = square_roots(rows.T @ rows)
    torch.testing.assert_close(inverse @ inverse, torch.linalg.pinv(rows.T @ rows), rtol=1e-9, atol=1e-9)


def test_damping_is_a_share_of_the_mean_diagonal():
    moments = torch.stack([spread_moment(6, 1), 7 * spread_moment(6, 2)])
    added = damped(moments, 0.1) - moments
    for one, extra in zip(moments, added):
        torch.testing.assert_close(extra, 0.1 * one.trace() / 6 * torch.eye(6, dtype=torch.float64))


def test_leading_eigenvectors_fall():
    moment = spread_moment(6, 1)
    leading = leading_eigenvectors(moment, 3)
    expected = torch.logspace(0, -3, 6, dtype=torch.float64)[:3]
    torch.testing.assert_close(leading.T @ moment @ leading, torch.diag(expected))


def test_unit_functional_has_mean_one_and_least_variance():
    x = torch.randn(4000, 6, dtype=torch.float64) * torch.logspace(0, -1, 6, dtype=torch.float64)
    x = x + torch.randn(6, dtype=torch.float64)
    found = x @ unit_functional(x.mean(0), x.T @ x / len(x))
    torch.testing.assert_close(found.mean(), torch.ones_like(found[0]), rtol=1e-9, atol=0)
    along_mean = x @ x.mean(0) / x.mean(0).square().sum()
    fitted = torch.linalg.lstsq(x, torch.ones(len(x), 1, dtype=torch.float64)).solution  # no damping, mean not exactly 1
    fitted = (x @ fitted).flatten() / (x @ fitted).mean()
    assert found.var() < 0.5 * along_mean.var()
    assert fitted.var() <= found.var() < 1.2 * fitted.var()
