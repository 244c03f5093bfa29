"""PCGrad of two gradients, against the algorithm of the paper by hand in NumPy."""

import numpy as np
import pytest
import torch

from nemo_emmett.modules.gradient_projection import add_scaled, cosine_and_norms, products, projection_factors

CPU = torch.device("cpu")


def pcgrad(a: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Algorithm 1 of arXiv 2001.06782 for two tasks, before the projected gradients are added up."""
    projected_a, projected_t = a.copy(), t.copy()
    if projected_a @ t < 0:
        projected_a -= (projected_a @ t) / (t @ t) * t
    if projected_t @ a < 0:
        projected_t -= (projected_t @ a) / (a @ a) * a
    return projected_a, projected_t


def flat(gradients) -> np.ndarray:
    return np.concatenate([gradient.double().flatten().numpy() for gradient in gradients])


@pytest.mark.parametrize("seed", range(20))
def test_the_sum_is_that_of_the_projected_gradients_none_of_which_conflict(seed):
    rng = torch.Generator().manual_seed(seed)
    audio = [torch.randn(shape, generator=rng, dtype=torch.float64) for shape in [(3, 4), (5,), (1,)]]
    text = [torch.randn(gradient.shape, generator=rng, dtype=torch.float64) for gradient in audio]
    a, t = flat(audio), flat(text)
    projected_a, projected_t = pcgrad(a, t)
    assert projected_a @ projected_t >= -1e-12
    found = products(audio, text, CPU)
    np.testing.assert_allclose(found, [a @ t, a @ a, t @ t], rtol=1e-6, atol=1e-6)
    values = cosine_and_norms(found[None])[0]
    norms = np.linalg.norm(a), np.linalg.norm(t)
    np.testing.assert_allclose(values, [a @ t / norms[0] / norms[1], *norms], rtol=1e-6, atol=1e-6)
    factors = projection_factors(found[None])[0]
    assert (factors == 1).all() == (a @ t >= 0)
    np.testing.assert_allclose(flat(add_scaled(audio, text, factors)), projected_a + projected_t, rtol=1e-5, atol=1e-6)


def test_a_gradient_that_is_absent_is_a_zero():
    a, t = torch.tensor([3.0, 4.0]), torch.tensor([-1.0, 0.0])
    assert products([a, None, a], [t, t, None], CPU).tolist() == [-3.0, 50.0, 2.0]
    assert products([None], [None], CPU).tolist() == [0.0, 0.0, 0.0]
    assert cosine_and_norms(torch.zeros(1, 3)).tolist() == [[0.0, 0.0, 0.0]]
    assert projection_factors(torch.zeros(1, 3)).tolist() == [[1.0, 1.0]]
    summed = add_scaled(
        [a.clone(), None, a.clone(), None], [t.clone(), t.clone(), None, None], torch.tensor([2.0, 3.0])
    )
    assert [None if s is None else s.tolist() for s in summed] == [[3.0, 8.0], [-3.0, 0.0], [6.0, 8.0], None]


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_not_hidden(bad):
    for audio, text in (([1.0, bad], [-1.0, 1.0]), ([1.0, bad], [-1.0, -1.0]), ([1.0, -2.0], [bad, 1.0])):
        a, t = torch.tensor(audio), torch.tensor(text)
        factors = projection_factors(products([a], [t], CPU)[None])[0]
        (found,) = add_scaled([a], [t], factors)
        assert not found.isfinite().all()
