"""Nuclear-norm pull toward low rank, without differentiating a singular value decomposition.

SaRA adds `lambda * ||P * M||_*`, the sum of singular values of the trained weights on their mask,
to the loss. Its subgradient is `U V^T` (Watson 1992), the orthogonal polar factor of `P * M`, which
needs matrix products only: a sequence of odd quintic polynomials drives every singular value to 1.
Where nothing waits for the device, on the processor itself, LAPACK's decompositions are faster.
Source: Hu et al. 2024, arXiv:2409.06633, eq. 4-5.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import sqrt

import torch
from torch import Tensor

from ..weights.parameters import as_matrix_shape
from ..weights.to_device import send
from .sparse_weight import SparseWeight

NUM_ITERATIONS = 8
SMALLEST_SINGULAR_VALUE = 1e-4  # of the bound on the largest; smaller ones are not fully raised
SMALLEST_OF_DECOMPOSED = 5e-6
ELONGATED = 2  # sides' ratio from which the cheaper way is exact enough
SMALLEST_OF_ELONGATED, ITERATIONS_OF_ELONGATED = 1e-2, 5
LARGE, PARTS = 1024, 4  # side from which the triangle of a symmetric product is made in parts
MARGIN = 1.01  # the polynomials are steep at the upper end, so rounding must not cross it


@lru_cache
def quintic_coefficients(
    smallest: float = SMALLEST_SINGULAR_VALUE, num_iterations: int = NUM_ITERATIONS
) -> tuple[tuple[float, float, float], ...]:
    """Compute the polynomials `a x + b x^3 + c x^5` that take `[smallest, 1]` to 1 fastest.

    Each is the best uniform approximation of 1 on the interval the ones before it leave. The best
    one touches the same error at four points, with alternating sign; the two inner ones are found
    by exchange (Remez). Once the interval is narrow, the Newton-Schulz quintic (15, -10, 3) / 8
    takes over, which keeps 1 fixed. Each interval gets a margin of 1 % at its upper end.

    Args:
        smallest: Lower end of the first interval, in `(0, 1)`.
        num_iterations: Number of polynomials.

    Source: greedy composition as in Amsel et al. 2025, arXiv:2505.16932, section 3; own derivation.
    """
    lower, upper = smallest, 1.0
    found = []
    for _ in range(num_iterations):
        if lower > 0.99:
            found.append((15 / 8, -10 / 8, 3 / 8))
            continue
        a, b, c, error = _best_quintic(lower, upper * MARGIN)
        found.append((a, b, c))
        lower, upper = 1 - error, 1 + error
    return tuple(found)


def _best_quintic(lower: float, upper: float) -> tuple[float, float, float, float]:
    inner = ((3 * lower + upper) / 4, (lower + 3 * upper) / 4)
    for _ in range(50):
        points = torch.tensor([lower, *inner, upper], dtype=torch.float64)
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
        system = torch.stack([points, points**3, points**5, signs], dim=1)
        a, b, c, error = torch.linalg.solve(system, torch.ones(4, dtype=torch.float64)).tolist()
        root = sqrt(9 * b * b - 20 * a * c)  # extrema of a x + b x^3 + c x^5
        moved = (sqrt((-3 * b - root) / (10 * c)), sqrt((-3 * b + root) / (10 * c)))
        if max(abs(m - i) for m, i in zip(moved, inner, strict=True)) < 1e-12 * upper:
            break
        inner = moved
    return a, b, c, abs(error)


def polar_factor(matrix: Tensor) -> Tensor:
    """Approximate the orthogonal polar factor `U V^T` of `matrix = U S V^T`.

    Singular values become 1, but small ones land between 0 and 1, so a rank-deficient matrix gets the
    subgradient with nothing in its null space. Small is below 5e-6 of the largest, or 1e-2 for
    elongated matrices; on other devices than the CPU, where the factor comes of matrix products
    alone, below 1e-4 or 1e-2 of a bound on the largest. Relative Frobenius error of the products
    against the SVD on Gaussian matrices of which 1-10 % is kept: 1e-5 on elongated ones, up to 0.05
    on square ones (sides 64 to 1280), all of it in the one or two singular values below that bound;
    the nuclear norm they yield is right to 1e-4.

    Args:
        matrix: Shape `(m, n)`, float32. Not modified. All zeros give zeros, NaN gives NaN.

    Returns:
        Shape `(m, n)`, float32, on the same device; no host synchronisation.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T  # (r, n), r <= n
    x = _on_processor(x) if x.device.type == "cpu" else _by_products(x)
    return x if wide else x.T


def _on_processor(x: Tensor) -> Tensor:
    """Find the factor by LAPACK, in half to four fifths of the time of the products.

    LAPACK gives up on a few finite matrices, by an error or by NaN; products don't.
    """
    if not x.sum().isfinite():
        return torch.full_like(x, torch.nan)
    try:
        found = _by_decomposition(x)
    except torch.linalg.LinAlgError:
        return _by_products(x)
    return found if found.sum().isfinite() else _by_products(x)


def _by_decomposition(x: Tensor) -> Tensor:
    if not _is_elongated(x):
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        return (u * (s > SMALLEST_OF_DECOMPOSED * s[0])) @ vh
    squares, vectors = torch.linalg.eigh(_symmetric_product(x, x.T))  # ascending
    smallest = (SMALLEST_OF_ELONGATED**2 * squares[-1]).clamp_min(torch.finfo(x.dtype).tiny)
    return ((vectors * squares.clamp_min(smallest).rsqrt()) @ vectors.T) @ x


def _is_elongated(x: Tensor) -> bool:
    return x.shape[1] >= ELONGATED * x.shape[0]


def _by_products(x: Tensor) -> Tensor:
    return _by_gram(x) if _is_elongated(x) else _by_iterating(x)


def _by_iterating(x: Tensor) -> Tensor:
    x = x / _spectral_norm_bound(x).clamp_min(torch.finfo(x.dtype).tiny)
    for a, b, c in quintic_coefficients():
        gram = x @ x.T  # (r, r)
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _by_gram(x: Tensor) -> Tensor:
    """Find the factor as a polynomial of `x x^T` times x, which touches the long side twice only.

    Squaring loses singular values below 1e-3, but an elongated matrix hardly has such.
    """
    gram = _symmetric_product(x, x.T)  # (r, r)
    bound = torch.minimum(torch.linalg.matrix_norm(gram), gram.abs().sum(0).max())  # of its norm
    bound = bound.clamp_min(torch.finfo(x.dtype).tiny)
    gram = gram / bound
    first, *others = quintic_coefficients(SMALLEST_OF_ELONGATED, ITERATIONS_OF_ELONGATED)
    product = factor = _polynomial(gram, first)
    for coefficients in others:
        gram = _symmetric_product(_symmetric_product(factor, gram), factor)
        factor = _polynomial(gram, coefficients)
        product = _symmetric_product(factor, product)
    return (product @ x) / bound.sqrt()


def _polynomial(gram: Tensor, coefficients: tuple[float, float, float]) -> Tensor:
    a, b, c = coefficients
    factor = _symmetric_product(gram, gram).mul_(c).add_(gram, alpha=b)
    factor.diagonal().add_(a)
    return factor


def _symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply matrices whose product is symmetric; of a large one only a triangle is computed."""
    size = left.shape[0]
    if size < LARGE:
        return left @ right
    product = left.new_empty(size, size)
    ends = [size * part // PARTS for part in range(PARTS + 1)]
    for start, end in zip(ends, ends[1:], strict=False):
        product[start:end, :end] = left[start:end] @ right[:, :end]
        product[:start, start:end] = product[start:end, :start].T
    return product


def _spectral_norm_bound(matrix: Tensor) -> Tensor:
    size = matrix.abs()
    mixed = (size.sum(0).max() * size.sum(1).max()).sqrt()
    return torch.minimum(torch.linalg.matrix_norm(matrix), mixed)


def nuclear_norm_gradient(
    values: Tensor, index: Tensor, shape: torch.Size | tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Return the nuclear norm of a sparse matrix and its subgradient at the stored positions.

    Args:
        values: Shape `(k,)`, float32: the trained weights `P` on their mask `M`.
        index: Shape `(k,)`, flat row-major positions of `values`.
        shape: Shape of the weight; dimensions after the first are flattened into columns.

    Returns:
        Norm, scalar tensor, and subgradient `(U V^T)[M]`, shape `(k,)`.
    """
    rows, columns = as_matrix_shape(shape)
    positions = index.long()
    if (
        rows > columns
    ):  # the transpose's factor is the transpose, and needs no transposing on the way
        positions = (positions % columns) * rows + positions // columns
        rows, columns = columns, rows
    matrix = values.new_zeros(rows * columns).scatter_(0, positions, values)
    gradient = polar_factor(matrix.view(rows, columns)).view(-1).gather(0, positions)
    return torch.dot(values, gradient), gradient


def add_gradient_(
    weights: Sequence[SparseWeight], factor: float, num_matrices: int, generator: torch.Generator
) -> Tensor | None:
    """Add the term's gradient to those of matrices drawn among the weights that have a gradient.

    Args:
        weights: Their leaves' gradients are changed in place.
        factor: Weight of the term.
        num_matrices: Number to draw, without replacement.
        generator: On the CPU.

    Returns:
        The term's value, a scalar, or None if there is no matrix to draw.
    """
    eligible = [
        weight
        for weight in weights
        if min(as_matrix_shape(weight.parameter.shape)) > 1 and weight.leaf.grad is not None
    ]
    order = torch.randperm(len(eligible), generator=generator).tolist()
    norms = []
    for i in order[:num_matrices]:
        weight, index = eligible[i], eligible[i].index
        values, own = weight.shard.whole(weight.read(index))
        positions, _ = weight.shard.whole(weight.shard.in_whole(index))
        device = weight.parameter.device  # where the numbers are, if trained values are not
        norm, gradient = nuclear_norm_gradient(
            send(values, device), send(positions, device), weight.parameter.shape
        )
        if (sum_so_far := weight.gradient) is not None:
            sum_so_far.add_(gradient[own].to(sum_so_far.device), alpha=factor)
        norms.append(norm * factor)
    return torch.stack(norms).sum() if norms else None
