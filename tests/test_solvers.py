"""Solvers against dense brute force, over one table of matrices."""

import pytest
import torch

from hf_attribution.curvature.solvers import arnoldi, cg, explicit, largest_eigenvalue, lissa
from hf_attribution.errors import ConvergenceError, UnsupportedError

SIZE, RIGHT_HAND_SIDES = 12, 5


def matrix(eigenvalues, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64))[0]
    return (basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T).to(dtype)


# Name, matrix, relative error allowed.
CASES = {
    "well conditioned": (matrix([1 + i / SIZE for i in range(SIZE)]), 1e-7),
    "spread": (matrix([10 ** (-i / 5) for i in range(SIZE)]), 1e-6),
    "low rank and damping": (matrix([5.0, 3.0, 1.0] + [0.1] * (SIZE - 3)), 1e-7),
    "multiple of the identity": (0.3 * torch.eye(SIZE, dtype=torch.float64), 1e-7),
    "tiny": (1e-12 * matrix([1 + i / SIZE for i in range(SIZE)]), 1e-7),
    "float32": (matrix([1 + i / SIZE for i in range(SIZE)], torch.float32), 1e-4),
}
SOLVERS = {
    "explicit": explicit,
    "cg": lambda a, b: cg(a, b, tolerance=1e-9 if b.dtype == torch.float64 else 1e-6),
    "lissa": lambda a, b: lissa(a, b, tolerance=1e-9 if b.dtype == torch.float64 else 1e-6),
    "arnoldi": lambda a, b: arnoldi(a, b, rank=SIZE),
}


def right_hand_sides(like):
    rhs = torch.randn(RIGHT_HAND_SIDES, SIZE, generator=torch.Generator().manual_seed(2)).to(like)
    rhs[1] *= 1e-6
    rhs[3] = 0
    return rhs


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("case", CASES)
def test_every_solver_equals_a_dense_solve(solver, case):
    a, allowed = CASES[case]
    rhs = right_hand_sides(a)
    expected = torch.linalg.solve(a.double(), rhs.double().T).T
    found = SOLVERS[solver](lambda rows: rows @ a, rhs)
    assert found.values.dtype == a.dtype
    error = (found.values - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-300)
    assert error.max() < allowed
    assert not found.values[3].any()
    residuals, rhs = found.values.double() @ a.double() - rhs, rhs.double()
    true = (residuals.norm(dim=1) / rhs.norm(dim=1).clamp(min=1e-300)).max()
    assert found.residual == pytest.approx(float(true), rel=0.5, abs=1e-6 if a.dtype == torch.float32 else 1e-13)


def test_explicit_solves_an_indefinite_system_and_refuses_a_singular_or_large_one():
    a = matrix([-1.0, *range(1, SIZE)])
    rhs = right_hand_sides(a)
    torch.testing.assert_close(explicit(lambda rows: rows @ a, rhs).values @ a, rhs)
    with pytest.raises(ConvergenceError, match="singular"):
        explicit(lambda rows: 0 * rows, rhs)
    with pytest.raises(UnsupportedError, match="3 GB as a matrix"):
        explicit(lambda rows: rows, torch.zeros(1, 20_001))


def test_a_preconditioner_saves_iterations_and_changes_nothing_else():
    a = torch.diag(torch.logspace(0, 6, SIZE, dtype=torch.float64)) + 0.1
    rhs = right_hand_sides(a)
    plain = cg(lambda rows: rows @ a, rhs, tolerance=1e-8)
    helped = cg(lambda rows: rows @ a, rhs, preconditioner=lambda rows: rows / a.diagonal(), tolerance=1e-8)
    torch.testing.assert_close(helped.values, torch.linalg.solve(a, rhs.T).T, rtol=1e-5, atol=1e-12)
    assert helped.iterations < plain.iterations / 2


def test_cg_names_negative_curvature():
    a = matrix([-0.5, *range(1, SIZE)])
    with pytest.raises(UnsupportedError, match=r"curvature -0\.\d+.*not positive definite"):
        cg(lambda rows: rows @ a, right_hand_sides(a))


def test_what_does_not_converge_names_its_residual():
    a = torch.diag(torch.logspace(0, 6, SIZE, dtype=torch.float64))
    for solver in (cg, lissa):
        with pytest.raises(ConvergenceError, match=r"relative residual of [\d.]+ in 4 iterations"):
            solver(lambda rows: rows @ a, right_hand_sides(a), max_iterations=4)


def test_lissa_notices_divergence():
    for a, scale in ((matrix(range(1, SIZE + 1)), 5.0), (matrix([-2.0, *range(1, SIZE)]), None)):
        with pytest.raises(ConvergenceError, match="diverges"):
            lissa(lambda rows, a=a: rows @ a, right_hand_sides(a), scale=scale)


def test_arnoldi_of_low_rank_is_the_inverse_on_the_dominant_eigenvectors():
    eigenvalues = [50.0, 30.0, 20.0] + [0.01 * i for i in range(1, SIZE - 2)]
    a = matrix(eigenvalues)
    rhs = right_hand_sides(a)
    values, vectors = torch.linalg.eigh(a)
    top = vectors[:, -3:]
    expected = rhs @ top / values[-3:] @ top.T
    found = arnoldi(lambda rows: rows @ a, rhs, rank=3)
    torch.testing.assert_close(found.values, expected, rtol=1e-6, atol=1e-9)
    assert found.residual > 0.1
    with pytest.raises(ConvergenceError, match="singular"):
        arnoldi(lambda rows: 0 * rows, rhs)


def test_largest_eigenvalue_is_estimated_from_below():
    a = matrix([10 ** (-i / 5) for i in range(SIZE)])
    found = largest_eigenvalue(lambda rows: rows @ a, right_hand_sides(a))
    assert 0.9 < found <= 1 + 1e-12
    assert largest_eigenvalue(lambda rows: 0 * rows, right_hand_sides(a)) == 0
