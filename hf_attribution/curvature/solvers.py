"""Solvers of `A x = b` for a symmetric A that is only known by its products with vectors.

Each takes the product, which maps rows `[R, P]` to rows `[R, P]` (damping included), and a block of right-hand sides
`[R, P]`, and reports the relative residual that it reached.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from hf_attribution.errors import ConvergenceError, UnsupportedError

Matvec = Callable[[Tensor], Tensor]

# From 20,000 parameters on the matrix takes more than 3 GB, and its decomposition hours.
MAX_EXPLICIT = 20_000


@dataclasses.dataclass(frozen=True)
class Solution:
    """What a solver found.

    Args:
        values: x, `[R, P]`.
        residual: The largest of the right-hand sides' relative residuals, `‖A x - b‖ / ‖b‖`; 0 where b is.
        iterations: How many products with A it took to find x.
    """

    values: Tensor
    residual: float
    iterations: int


def explicit(matvec: Matvec, rhs: Tensor, block: int = 256) -> Solution:
    """Form the matrix, and solve in double precision. A may be indefinite.

    Args:
        matvec: The product with A.
        rhs: Right-hand sides `[R, P]`.
        block: Columns of A that are formed at once.

    Returns:
        The solution, exact up to rounding.

    Raises:
        UnsupportedError: If the matrix is too large to form.
        ConvergenceError: If it is singular.

    Example:
        >>> explicit(lambda rows: 2 * rows, torch.tensor([[1.0, 3.0]])).values
        tensor([[0.5000, 1.5000]])
    """
    size = rhs.shape[1]
    if size > MAX_EXPLICIT:
        raise UnsupportedError(
            f"The curvature of {size} parameters takes {8e-9 * size**2:.0f} GB as a matrix: use solver='cg', or fewer "
            "parameters with modules=[...] or last_layer=True."
        )
    identity = torch.eye(size, dtype=rhs.dtype, device=rhs.device)
    matrix = torch.cat([matvec(rows) for rows in identity.split(block)]).double()
    values, info = torch.linalg.solve_ex((matrix + matrix.T) / 2, rhs.double().T)
    if info or not values.isfinite().all():
        raise ConvergenceError("The damped curvature is singular: raise the damping.")
    values = values.T.to(rhs.dtype)
    return Solution(values, _largest_residual(matvec, values, rhs), size)


def cg(
    matvec: Matvec,
    rhs: Tensor,
    preconditioner: Matvec | None = None,
    tolerance: float = 1e-5,
    max_iterations: int = 1000,
) -> Solution:
    """Conjugate gradients, all right-hand sides at once, for a positive definite A (Hestenes & Stiefel 1952).

    Args:
        matvec: The product with A.
        rhs: Right-hand sides `[R, P]`.
        preconditioner: The product with a positive definite approximation of A's inverse.
        tolerance: Relative residual to reach, by every right-hand side.
        max_iterations: When to give up.

    Returns:
        The solution.

    Raises:
        UnsupportedError: If a direction of negative curvature is met: A is not positive definite.
        ConvergenceError: If the tolerance is not reached.

    Example:
        >>> cg(lambda rows: 2 * rows, torch.tensor([[1.0, 3.0]])).values
        tensor([[0.5000, 1.5000]])
    """
    precondition = preconditioner if preconditioner is not None else torch.clone
    goal = tolerance * rhs.norm(dim=1)
    values, residuals = torch.zeros_like(rhs), rhs.clone()
    directions, products = torch.zeros_like(rhs), torch.ones_like(goal)
    iterations, left, fresh = 0, residuals.norm(dim=1) > goal, True
    while left.any() and iterations < max_iterations:
        conditioned = precondition(residuals[left])
        before, products[left] = products[left], (residuals[left] * conditioned).sum(1)
        momentum = torch.zeros_like(before) if fresh else products[left] / before
        directions[left] = conditioned + momentum[:, None] * directions[left]
        images = matvec(directions[left])
        curvature = (directions[left] * images).sum(1)
        _refuse_indefinite(curvature, directions[left])
        step = (products[left] / curvature)[:, None]
        values[left] += step * directions[left]
        residuals[left] -= step * images
        iterations, fresh = iterations + 1, False
        left = residuals.norm(dim=1) > goal
        if not left.any():
            # The updated residual drifts from the true one by rounding: where it has, start again from here.
            residuals = rhs - matvec(values)
            left, fresh = residuals.norm(dim=1) > goal, True
    solution = Solution(values, _largest_residual(matvec, values, rhs), iterations)
    _refuse_unconverged("cg", solution, tolerance)
    return solution


def lissa(
    matvec: Matvec, rhs: Tensor, scale: float | None = None, tolerance: float = 1e-3, max_iterations: int = 10_000
) -> Solution:
    """The Neumann series `A⁻¹ b = Σ_k (I - A/s)ᵏ b / s` (Agarwal et al. 2017; Koh & Liang 2017), without sampling.

    Args:
        matvec: The product with A.
        rhs: Right-hand sides `[R, P]`.
        scale: s, above half the largest eigenvalue; by default 1.1 times a power iteration's estimate of that.
        tolerance: Relative residual to reach, by every right-hand side.
        max_iterations: When to give up.

    Returns:
        The solution.

    Raises:
        ConvergenceError: If the series diverges (s is too small, or A indefinite), or does not reach the tolerance.

    Example:
        >>> lissa(lambda rows: 2 * rows, torch.tensor([[1.0, 3.0]]), tolerance=1e-6).values
        tensor([[0.5000, 1.5000]])
    """
    scale = 1.1 * largest_eigenvalue(matvec, rhs) if scale is None else scale
    norms = rhs.norm(dim=1)
    values, residuals, iterations = torch.zeros_like(rhs), rhs.clone(), 0
    while (residuals.norm(dim=1) > tolerance * norms).any() and iterations < max_iterations:
        values += residuals / scale
        residuals = rhs - matvec(values)
        iterations += 1
        grown = _largest_ratio(residuals, rhs)
        # Where A is positive definite and the scale right, no residual ever exceeds its right-hand side.
        if not grown < 10:
            raise ConvergenceError(
                f"lissa diverges: after {iterations} terms with scale {scale:.3g} the residual is {grown:.3g} times "
                "the right-hand side. The scale is below half the largest eigenvalue (leave it to be estimated), or "
                "the curvature is indefinite: raise the damping, or use curvature='gauss_newton'."
            )
    solution = Solution(values, _largest_ratio(residuals, rhs), iterations)
    _refuse_unconverged("lissa", solution, tolerance)
    return solution


def arnoldi(matvec: Matvec, rhs: Tensor, rank: int = 100, seed: int = 0) -> Solution:
    """The inverse on the span of the dominant eigenvectors, found in a Krylov space; 0 outside (Schioppa et al. 2022).

    A is symmetric, so that Arnoldi's iteration is Lanczos' with full reorthogonalisation. With rank P it is exact.

    Args:
        matvec: The product with A.
        rhs: Right-hand sides `[R, P]`.
        rank: How many eigenvectors to keep, of a Krylov space twice as large.
        seed: Seed of the start vector.

    Returns:
        The solution; its residual is what lies outside of the span, and is no error.

    Raises:
        ConvergenceError: If an eigenvalue that is kept is zero.

    Example:
        >>> arnoldi(lambda rows: 2 * rows, torch.tensor([[1.0, 3.0]]), rank=2).values
        tensor([[0.5000, 1.5000]])
    """
    size = rhs.shape[1]
    generator = torch.Generator().manual_seed(seed)
    basis, images = rhs.new_zeros(0, size), rhs.new_zeros(0, size)
    vector = torch.randn(1, size, generator=generator).to(rhs)
    for _ in range(min(size, 2 * rank)):
        length = vector.norm()
        for _ in range(2):  # twice is enough (Kahan), and is needed
            vector = vector - vector @ basis.T @ basis
        if vector.norm() <= 1e-4 * length:
            # The space is invariant: go on in another one, which only random vectors point into.
            vector = torch.randn(1, size, generator=generator).to(rhs)
            for _ in range(2):
                vector = vector - vector @ basis.T @ basis
        basis = torch.cat([basis, vector / vector.norm()])
        vector = matvec(basis[-1:])
        images = torch.cat([images, vector])
    small = (basis @ images.T).double()
    eigenvalues, eigenvectors = torch.linalg.eigh((small + small.T) / 2)
    kept = eigenvalues.abs().argsort(descending=True)[:rank]
    if not eigenvalues[kept].abs().min() > torch.finfo(rhs.dtype).eps * eigenvalues.abs().max():
        raise ConvergenceError("The damped curvature is singular: raise the damping, or lower the rank.")
    span = eigenvectors[:, kept].T.to(rhs) @ basis
    values = rhs @ span.T / eigenvalues[kept].to(rhs) @ span
    return Solution(values, _largest_residual(matvec, values, rhs), len(basis))


def largest_eigenvalue(matvec: Matvec, like: Tensor, iterations: int = 30, seed: int = 0) -> float:
    """The largest eigenvalue in size, estimated from below by power iteration.

    Args:
        matvec: The product with A.
        like: Any `[R, P]`, for size, type and device.
        iterations: How many products.
        seed: Seed of the start vector.

    Returns:
        The estimate.
    """
    vector = torch.randn(1, like.shape[1], generator=torch.Generator().manual_seed(seed)).to(like)
    estimate = 0.0
    for _ in range(iterations):
        vector = matvec(vector / vector.norm())
        estimate = float(vector.norm())
        if estimate == 0:
            break
    return estimate


def _refuse_indefinite(curvature: Tensor, directions: Tensor) -> None:
    if not (curvature > 0).all():
        worst = int(curvature.argmin())
        value = float(curvature[worst] / directions[worst].square().sum())
        raise UnsupportedError(
            f"cg met a direction of curvature {value:.3g}: the damped curvature is not positive definite. Raise the "
            f"damping by more than {-value:.3g}, use curvature='gauss_newton', or solver='explicit'."
        )


def _refuse_unconverged(solver: str, solution: Solution, tolerance: float) -> None:
    if not solution.residual <= tolerance:
        raise ConvergenceError(
            f"{solver} reached a relative residual of {solution.residual:.2g} in {solution.iterations} iterations, "
            f"not {tolerance:.2g}: raise the damping, max_iterations or the tolerance."
        )


def _largest_residual(matvec: Matvec, values: Tensor, rhs: Tensor) -> float:
    return _largest_ratio(matvec(values) - rhs, rhs)


def _largest_ratio(residuals: Tensor, rhs: Tensor) -> float:
    tiny = torch.finfo(rhs.dtype).tiny
    return float((residuals.norm(dim=1) / rhs.norm(dim=1).clamp(min=tiny)).max())
