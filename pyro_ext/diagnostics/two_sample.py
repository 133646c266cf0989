"""Whether a classifier can tell two sets of draws apart."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..optional import import_optional

__all__ = ["ClassifierTest", "classifier_two_sample_test"]

_UNITS_PER_FEATURE = 10
_MAX_ITERATIONS = 1000


class ClassifierTest(NamedTuple):
    """How well a classifier tells two sets of draws apart."""

    accuracy: float
    """Fraction of held-out draws put into the right set: 1/2 if nothing tells them apart."""

    fold_accuracy: Tensor
    """The same of every fold, shape ``(num_folds,)``."""


def classifier_two_sample_test(
    first: Tensor | Mapping[str, Tensor],
    second: Tensor | Mapping[str, Tensor],
    *,
    num_folds: int = 5,
) -> ClassifierTest:
    r"""
    Cross-validated accuracy of a neural network that guesses which set a draw comes from (C2ST).

    The value depends on the classifier, so that only values of one and the same can be compared.
    This one is that of the literature on simulation-based inference (Lueckmann et al. 2021,
    appendix, and the package ``sbi``): scikit-learn's ``MLPClassifier`` with two hidden layers of
    10 units per dimension, rectified linear units, Adam and at most 1000 passes, on features that
    were standardised by mean and standard deviation of ``first``; five-fold cross-validation of
    shuffled draws. The seed is drawn from torch's generator.

    Two sets from one distribution have an accuracy of 1/2 within about
    :math:`1 / \sqrt{2 n}`, a little less on average, since what is left out of training pulls
    the other way. The accuracy of others grows with the number of draws: use the same number in
    every comparison. Where distributions differ in fine detail only, it also varies with the seed,
    because not every network learns to see it: take the mean, or the largest, of several calls.

    :param first: draws of the reference, shape ``(n, d)``, or by site, ``(n,) + site shape``.
    :param second: as many draws to compare, of the same shape or the same sites.
    :param int num_folds: parts, each of which is guessed by a network trained on the others.
    :returns: accuracies.
    :raises ImportError: without scikit-learn.
    :raises ValueError: if the two have different sites or shapes, too few draws for the folds,
        or values that are not finite.

    References: Lopez-Paz and Oquab 2017, "Revisiting classifier two-sample tests"; Lueckmann et
    al. 2021, "Benchmarking simulation-based inference".

    >>> from pyro_ext.diagnostics import classifier_two_sample_test
    >>> far_apart = classifier_two_sample_test(torch.randn(50, 2), 9 + torch.randn(50, 2))
    >>> far_apart.accuracy
    1.0
    """
    reference, other = _matrices(first, second)
    if len(reference) != len(other):
        raise ValueError(
            f"first has {len(reference)} draws, second {len(other)}: take as many of each, or "
            "guessing the larger set would already be right more often than not."
        )
    if not 2 <= num_folds <= len(reference):
        raise ValueError(
            f"num_folds={num_folds} must be at least 2, and at most the number of draws, "
            f"{len(reference)}."
        )
    purpose = "classifier_two_sample_test"
    neural = import_optional("sklearn.neural_network", "scikit-learn", purpose)
    selection = import_optional("sklearn.model_selection", "scikit-learn", purpose)
    scale = reference.std(0)
    # a constant is told apart by any difference at all
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    features = ((torch.cat([reference, other]) - reference.mean(0)) / scale).numpy()
    labels = (torch.arange(len(features)) >= len(reference)).long().numpy()
    seed = int(torch.randint(2**31 - 1, ()))
    units = _UNITS_PER_FEATURE * features.shape[1]
    network = neural.MLPClassifier(
        hidden_layer_sizes=(units, units), max_iter=_MAX_ITERATIONS, random_state=seed
    )
    folds = selection.KFold(num_folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # a network that still improves after all passes is as good a classifier
        warnings.simplefilter("ignore")
        scores = selection.cross_val_score(network, features, labels, cv=folds, n_jobs=1)
    accuracy = torch.from_numpy(scores)
    return ClassifierTest(float(accuracy.mean()), accuracy)


def _matrices(
    first: Tensor | Mapping[str, Tensor], second: Tensor | Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Both as matrices of the same columns, in double precision."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        if set(first) != set(second):
            raise ValueError(
                f"first has the sites {sorted(first)}, second {sorted(second)}: give the same."
            )
        names = sorted(first)
        if not names:
            raise ValueError("first and second hold no site.")
        columns = [_matrices(first[name], second[name]) for name in names]
        parts = zip(*columns, strict=True)
        for label, part in zip(("first", "second"), parts, strict=True):
            lengths = {len(each) for each in part}
            if len(lengths) > 1:
                raise ValueError(f"sites of {label} have different numbers of draws: {lengths}.")
        one, two = zip(*columns, strict=True)
        return torch.cat(one, 1), torch.cat(two, 1)
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)):
        raise TypeError("first and second must both be tensors, or both dictionaries by site.")
    if not (first.dim() and second.dim()) or first.shape[1:] != second.shape[1:]:
        raise ValueError(
            f"first has shape {tuple(first.shape)}, second {tuple(second.shape)}: all dimensions "
            "but the first one must agree."
        )
    pair = []
    for label, values in (("first", first), ("second", second)):
        matrix = values.detach().cpu().double().reshape(len(values), -1)
        if not torch.isfinite(matrix).all():
            raise ValueError(f"{label} has values that are not finite.")
        pair.append(matrix)
    return pair[0], pair[1]
