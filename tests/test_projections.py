"""Random projections: unbiased, linear, the same from factors as from formed gradients, the same in every pass."""

import numpy as np
import pytest
import torch

from hf_attribution.gradients import projections
from hf_attribution.gradients.per_example import Gradients
from hf_attribution.gradients.projections import _KINDS, Projection
from hf_attribution.gradients.terms import Dense, Lookup, Outer, dense

B, T = 4, 5
SHAPES = {"linear": (12, 9), "table": (20, 6), "bias": (12,), "scale": (1, 7, 3), "conv": (6, 4, 3, 3)}


def make(seed=0, positions=T):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator)

    terms = {
        "linear": [Outer(draw(B, positions, 12), draw(B, positions, 9))],
        "table": [
            Lookup(torch.randint(0, 20, (B, positions), generator=generator), draw(B, positions, 6), 20),
            Outer(draw(B, positions, 20), draw(B, positions, 6)),
        ],
        "bias": [Dense(draw(B, 12))],
        "scale": [Dense(draw(B, 1, 7, 3))],
        "conv": [Outer(draw(B, positions, 6), draw(B, positions, 36))],
    }
    return Gradients(torch.arange(B), torch.zeros(B), terms)


def project(gradients, kind="two_sided", dim=16, seed=0, names=SHAPES):
    kept = Gradients(gradients.indices, gradients.values, {name: gradients.terms[name] for name in names})
    return Projection(dim, seed, kind)(kept, {name: torch.Size(shape) for name, shape in SHAPES.items()})


def formed(gradients):
    terms = {name: [Dense(dense(t).unflatten(1, SHAPES[name]))] for name, t in gradients.terms.items()}
    return Gradients(gradients.indices, gradients.values, terms)


@pytest.fixture(autouse=True, params=[0, 2**15], ids=["two sides", "small"])
def small(request, monkeypatch):
    """The matrices here are small: most tests are there for what happens to larger ones, too."""
    monkeypatch.setattr(projections, "_SMALL", request.param)


@pytest.mark.parametrize("kind", _KINDS)
def test_inner_products_are_unbiased(kind):
    left, right = make(0), make(1)
    exact = sum(dense(left.terms[name]) @ dense(right.terms[name]).T for name in SHAPES)
    draws = torch.stack([project(left, kind, 16, s) @ project(right, kind, 16, s).T for s in range(600)])
    error = (draws.mean(0) - exact) / (draws.std(0) / np.sqrt(len(draws)))
    assert error.abs().max() < 4
    # And the spread is that of a projection to 16 dimensions, about |g||g'|/4, not a multiple of it.
    norms = [sum(dense(g.terms[name]).square().sum(1) for name in SHAPES).sqrt() for g in (left, right)]
    assert (draws.std(0) / (norms[0][:, None] * norms[1] / 4)).mean() < 1.5


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("dim", [3, 16, 200, 5000])
def test_factors_and_formed_gradients_have_one_projection(kind, dim):
    # With one position the factors are multiplied, with many the gradient is formed first: one definition.
    for positions in (1, 40):
        gradients = make(0, positions)
        torch.testing.assert_close(
            project(gradients, kind, dim), project(formed(gradients), kind, dim), rtol=1e-4, atol=1e-3
        )


@pytest.mark.parametrize("kind", _KINDS)
def test_the_projections_of_parameters_add_up(kind):
    gradients = make()
    alone = sum(project(gradients, kind, names=[name]) for name in SHAPES)
    torch.testing.assert_close(project(gradients, kind), alone)


def test_the_seed_alone_decides():
    gradients = make()
    torch.manual_seed(1)
    first = project(gradients)
    torch.manual_seed(2)
    torch.testing.assert_close(project(gradients), first, rtol=0, atol=0)
    assert not torch.allclose(project(gradients, seed=1), first)
    state = torch.get_rng_state()
    project(gradients, seed=12345)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_projection_to_enough_dimensions_loses_nothing():
    gradients = make()
    for name, shape in SHAPES.items():
        size = int(np.prod(shape))
        found = project(gradients, "two_sided", size, names=[name])
        exact = dense(gradients.terms[name])
        torch.testing.assert_close(found @ found.T, exact @ exact.T, rtol=1e-4, atol=1e-3)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="choose one of two_sided"):
        Projection(kind="dense")
    with pytest.raises(ValueError, match="must be positive"):
        Projection(dim=0)
