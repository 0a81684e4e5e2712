import math

import pytest
import torch

from sara_core.optimizer import low_rank
from sara_core.optimizer.low_rank import nuclear_norm_gradient, polar_factor


@pytest.fixture(params=["decomposition", "products"], autouse=True)
def way(request, monkeypatch):
    """Both ways to the factor: the one for processors, and the one for other devices."""
    if request.param == "products":
        monkeypatch.setattr(low_rank, "_by_decomposition", low_rank._by_products)
    return request.param


def masked_gaussian(rows, columns, density, seed):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator)
    return 1e-3 * matrix * (torch.rand(rows, columns, generator=generator) < density)


def exact_factor(matrix):
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    kept = s > s[0] * 1e-7
    return u[:, kept] @ vh[kept], s.sum()


@pytest.mark.parametrize(
    ("rows", "columns", "density", "bound"),
    [(80, 80, 0.1, 0.05), (320, 320, 0.1, 0.05), (64, 300, 0.05, 1e-4), (300, 64, 0.05, 1e-4),
     (320, 36, 0.1, 1e-4), (1, 50, 0.5, 1e-4), (64, 512, 0.1, 1e-5), (512, 64, 0.1, 1e-5),
     (100, 200, 0.1, 1e-4), (100, 199, 0.1, 1e-4)],
)  # fmt: skip
def test_polar_factor_is_near_the_svd(rows, columns, density, bound, way):
    bound = bound if way == "products" else min(bound, 1e-3)
    for seed in range(3):
        matrix = masked_gaussian(rows, columns, density, seed)
        expected, _ = exact_factor(matrix)
        error = (polar_factor(matrix).double() - expected).norm() / expected.norm()
        assert error < bound


def raise_error(matrix, **options):
    raise torch.linalg.LinAlgError("the algorithm failed to converge")


def return_nan(matrix, **options):
    nan, rows = torch.full_like(matrix, torch.nan), len(matrix)
    is_svd = "full_matrices" in options
    return (nan[:, :rows], nan[0, :rows], nan) if is_svd else (nan[0], nan)


@pytest.mark.parametrize("give_up", [raise_error, return_nan])
@pytest.mark.parametrize("shape", [(20, 24), (20, 60)])
def test_a_matrix_that_lapack_gives_up_on_has_its_factor_all_the_same(monkeypatch, shape, give_up):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    for name in ("svd", "eigh"):
        monkeypatch.setattr(torch.linalg, name, give_up)
    torch.testing.assert_close(polar_factor(matrix), u @ vh, rtol=0, atol=1e-3)


def test_rank_deficient_and_zero_matrices_stay_finite():
    vector = torch.arange(1.0, 41.0)
    matrix = torch.outer(vector, vector)
    expected = matrix / matrix.norm()
    assert torch.allclose(polar_factor(matrix), expected, atol=1e-3)
    assert torch.equal(polar_factor(torch.zeros(5, 7)), torch.zeros(5, 7))
    elongated = torch.outer(vector[:8], vector)
    assert torch.allclose(polar_factor(elongated), elongated / elongated.norm(), atol=1e-3)
    assert torch.equal(polar_factor(torch.zeros(5, 70)), torch.zeros(5, 70))


def test_weights_that_are_not_finite_give_a_norm_that_is_not():
    for columns in (20, 200):
        values = torch.tensor([1.0, math.nan, 2.0])
        norm, gradient = nuclear_norm_gradient(values, torch.tensor([0, 5, 9]), (20, columns))
        assert norm.isnan()
        assert gradient.isnan().any()


def test_gradient_and_norm_agree_with_torchs_nuclear_norm():
    matrix = masked_gaussian(48, 96, 0.2, 0).view(48, 24, 2, 2)  # a conv kernel
    index = torch.nonzero(matrix.flatten())[:, 0]
    values = matrix.flatten()[index].double().requires_grad_()
    dense = torch.zeros(48 * 96, dtype=torch.float64).index_copy(0, index, values).view(48, 96)
    norm = torch.linalg.matrix_norm(dense, ord="nuc")
    norm.backward()
    found, gradient = nuclear_norm_gradient(values.detach().float(), index.int(), matrix.shape)
    assert found.item() == pytest.approx(norm.item(), rel=1e-4)
    assert torch.allclose(gradient.double(), values.grad, atol=1e-3)


def test_a_large_elongated_matrix_has_the_factor_that_defines_its_polar_decomposition():
    matrix = masked_gaussian(1030, 2100, 0.1, 0)
    factor = polar_factor(matrix).double()
    assert (factor @ factor.T - torch.eye(1030, dtype=torch.float64)).norm() / 1030**0.5 < 1e-5
    symmetric = matrix.double() @ factor.T
    assert (symmetric - symmetric.T).norm() / symmetric.norm() < 1e-5
    torch.linalg.cholesky((symmetric + symmetric.T) / 2)  # fails unless it is positive definite
