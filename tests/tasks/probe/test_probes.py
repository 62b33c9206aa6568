"""Nearest neighbours and linear classifiers, held against scikit-learn and the slow way."""

import math
import warnings

import numpy as np
import pytest
import torch

from beit_fast.tasks.probe import probes
from beit_fast.tasks.probe.probes import knn_accuracy, linear_probes


def vote(bank, bank_labels, query, k):
    """The class k neighbours vote for, one at a time in Python."""
    unit = [x / x.norm() for x in bank.double()]
    near = sorted(
        (-float(x @ query.double() / query.double().norm()), i) for i, x in enumerate(unit)
    )
    votes = {}
    for cosine, i in near[:k]:
        label = int(bank_labels[i])
        votes[label] = votes.get(label, 0.0) + math.exp((-cosine - 1) / 0.07)
    return max(sorted(votes), key=votes.get)


@pytest.mark.parametrize("chunk", [7, 64])
def test_nearest_neighbours_vote_as_one_by_one_whatever_the_chunks(chunk, monkeypatch):
    monkeypatch.setattr(probes, "BANK", chunk)
    monkeypatch.setattr(probes, "QUERIES", chunk - 2)
    bank, queries = torch.randn(50, 6) * 3, torch.randn(20, 6)
    bank_labels, labels = torch.randint(4, (50,)), torch.randint(4, (20,))
    result = knn_accuracy(bank, bank_labels, queries, labels, (1, 5, 50))
    for k, accuracy in result.items():
        hits = [vote(bank, bank_labels, q, k) == y for q, y in zip(queries, labels, strict=True)]
        assert accuracy == sum(hits) / 20


@pytest.mark.parametrize("chunk", [3, 64])
def test_of_equally_near_neighbours_the_first_counts_and_of_equal_votes_the_smallest_label(
    chunk, monkeypatch
):
    monkeypatch.setattr(probes, "BANK", chunk)
    bank = torch.tensor([[1.0, 0.0]]).repeat(8, 1)
    bank_labels = torch.tensor([2, 1, 0, 0, 1, 2, 0, 0])
    query = torch.tensor([[2.0, 0.0]])
    for label, right in ((2, {1}), (1, set()), (0, {3, 8})):
        result = knn_accuracy(bank, bank_labels, query, torch.tensor([label]), (1, 3, 8))
        assert {k for k, accuracy in result.items() if accuracy == 1} == right


def test_one_neighbour_agrees_with_scikit_learn():
    from sklearn.neighbors import KNeighborsClassifier

    bank, queries = torch.randn(300, 8), torch.randn(100, 8)
    bank_labels = (bank[:, 0] > 0).long()
    labels = (queries[:, 0] > 0).long()
    oracle = KNeighborsClassifier(1, metric="cosine").fit(bank.numpy(), bank_labels.numpy())
    wanted = oracle.score(queries.numpy(), labels.numpy())
    assert knn_accuracy(bank, bank_labels, queries, labels, [1]) == {1: pytest.approx(wanted)}


@pytest.mark.parametrize("ks", [(), (0,), (1, 4)])
def test_neighbours_that_are_not_there_are_refused(ks):
    with pytest.raises(ValueError, match="pass 1 to 3"):
        knn_accuracy(
            torch.randn(3, 2), torch.zeros(3).long(), torch.randn(1, 2), torch.zeros(1), ks
        )


def test_no_image_has_no_accuracy():
    with pytest.raises(ValueError, match="at least one"):
        knn_accuracy(
            torch.randn(3, 2), torch.zeros(3).long(), torch.randn(0, 2), torch.zeros(0), [1]
        )


def test_separable_layers_are_separated_and_noise_is_not():
    labels = torch.arange(240) % 3
    noise = torch.randn(240, 10)
    signal = torch.nn.functional.one_hot(labels, 10) * 4.0 + torch.randn(240, 10) * 0.3
    features = torch.stack([noise, signal], dim=1).numpy()
    rows, rest = np.arange(160), np.arange(160, 240)
    trained = linear_probes(
        features, labels, 3, rates=(1e-2, 5e-2), epochs=20, batch_size=32, rows=rows
    )
    accuracy = trained.accuracy(features[rest], labels[rest], batch_size=33)
    assert accuracy.shape == (2, 2)
    assert (accuracy[:, 1] == 1).all()
    assert (accuracy[:, 0] < 0.6).all()


def test_a_probe_is_the_logistic_regression_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    x = torch.randn(400, 5)
    labels = (x @ torch.randn(5, 3) + 1.5 * torch.randn(400, 3)).argmax(1)
    trained = linear_probes(
        x[:, None].numpy(),
        labels,
        3,
        rates=(0.05,),
        epochs=500,
        batch_size=400,
        weight_decay=0.0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its options have other names in other versions
        oracle = LogisticRegression(C=1e9, tol=1e-10, max_iter=2000).fit(x.numpy(), labels.numpy())
    ours = (x @ trained.weight[0, 0] + trained.bias[0, 0]).softmax(1)
    wanted = torch.from_numpy(oracle.predict_proba(x.numpy())).float()
    torch.testing.assert_close(ours, wanted, atol=2e-3, rtol=0)


def test_layers_and_rates_trained_together_are_those_trained_alone():
    features, labels = np.random.default_rng(0).normal(size=(60, 3, 7)), torch.arange(60) % 4
    options = {"epochs": 5, "batch_size": 16}
    both = linear_probes(features, labels, 4, rates=(1e-3, 1e-1), **options)
    for number, rate in enumerate(both.rates):
        alone = linear_probes(features, labels, 4, rates=(rate,), **options)
        torch.testing.assert_close(both.weight[number], alone.weight[0])
    half = linear_probes(features * [[[1], [1], [0]]], labels, 4, rates=(1e-3,), **options)
    torch.testing.assert_close(both.weight[0, :2], half.weight[0, :2])
