"""Proximal training to convergence, against scikit-learn's own solvers on its own data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import pyreg

datasets = pytest.importorskip("sklearn.datasets")
linear_model = pytest.importorskip("sklearn.linear_model")


def diabetes() -> tuple[np.ndarray, np.ndarray]:
    """442 patients, 10 features; both centred, so that no intercept is needed."""
    x, y = datasets.load_diabetes(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    return x, (y - y.mean()) / y.std()


def breast_cancer() -> tuple[np.ndarray, np.ndarray]:
    """569 tumours, 30 features."""
    x, y = datasets.load_breast_cancer(return_X_y=True)
    return (x - x.mean(0)) / x.std(0), y.astype(float)


def train(loss, size: int, penalty, optimizer, steps: int, mode_metric="optimizer") -> np.ndarray:
    w = nn.Parameter(torch.zeros(size, dtype=torch.float64))
    optimizer = optimizer([w])
    pyreg.Regularizer({"w": w}, penalty).attach(optimizer, "prox", metric=mode_metric)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(w).backward()
        optimizer.step()
    return w.detach().numpy()


def check(ours: np.ndarray, theirs: np.ndarray) -> None:
    """The same coefficients to 1e-5 and the very same zeros, of which there are some."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    assert ((ours == 0) == (theirs == 0)).all()
    assert 0 < (theirs == 0).sum() < len(theirs)


SGD = pytest.param(lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9), id="sgd")
ADAGRAD = pytest.param(lambda p: torch.optim.Adagrad(p, lr=0.5), id="adagrad")


@pytest.mark.parametrize("optimizer", [SGD, ADAGRAD])
@pytest.mark.parametrize("alpha", [0.03, 0.2])
def test_lasso(backend, alpha, optimizer):
    """scikit-learn's loss is 1/(2n) ||y - Xw||^2, so its alpha is lam."""
    x, y = diabetes()
    expected = linear_model.Lasso(alpha=alpha, tol=1e-14, max_iter=10**6, fit_intercept=False)
    tx, ty = torch.from_numpy(x), torch.from_numpy(y)
    ours = train(lambda w: (ty - tx @ w).square().mean() / 2, 10, pyreg.L1(alpha), optimizer, 4000)
    check(ours, expected.fit(x, y).coef_)


@pytest.mark.parametrize("optimizer", [SGD, ADAGRAD])
def test_elastic_net(backend, optimizer):
    """l1 = alpha * l1_ratio, l2 = alpha * (1 - l1_ratio) / 2."""
    x, y = diabetes()
    alpha, ratio = 0.2, 0.6
    expected = linear_model.ElasticNet(
        alpha=alpha, l1_ratio=ratio, tol=1e-14, max_iter=10**6, fit_intercept=False
    )
    tx, ty = torch.from_numpy(x), torch.from_numpy(y)
    penalty = pyreg.ElasticNet(alpha * ratio, alpha * (1 - ratio) / 2)
    ours = train(lambda w: (ty - tx @ w).square().mean() / 2, 10, penalty, optimizer, 4000)
    check(ours, expected.fit(x, y).coef_)


def test_logistic_regression(backend):
    """C multiplies the sum of losses: lam = 1 / (C n) for the mean."""
    x, y = breast_cancer()
    c = 0.05
    expected = linear_model.LogisticRegression(
        penalty="l1", C=c, solver="saga", tol=1e-12, max_iter=10**5, fit_intercept=False
    )
    tx, ty = torch.from_numpy(x), torch.from_numpy(y)

    def loss(w):
        return nn.functional.binary_cross_entropy_with_logits(tx @ w, ty)

    ours = train(
        loss,
        30,
        pyreg.L1(1 / (c * len(y))),
        lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.98),
        6000,
    )
    check(ours, expected.fit(x, y).coef_[0])
