"""Images that ship with scikit-learn: what they contain, and that parts do not overlap."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pyro_ext.datasets import Split, digits, images, natural_image_patches

datasets = pytest.importorskip("sklearn.datasets")

SMALL = {"num_train": 300, "num_validation": 50, "num_test": 100}


def test_digits_are_those_of_scikit_learn_shuffled() -> None:
    split = digits()
    assert split.labels is not None
    assert [len(part) for part in split[:3]] == [1257, 179, 361]
    assert [len(part) for part in split.labels[:3]] == [1257, 179, 361]
    assert split.train.shape[1:] == (1, 8, 8)
    assert split.train.dtype == split.labels.train.dtype == torch.int64
    ours = torch.cat(split[:3]).flatten(1)
    assert ours.min() == 0
    assert ours.max() == 16
    # the same images with the same labels, in another order
    bunch = datasets.load_digits()
    theirs = torch.from_numpy(bunch.data).long()
    with_labels = torch.column_stack([ours, torch.cat(split.labels[:3])])
    original = torch.column_stack([theirs, torch.from_numpy(bunch.target)])
    assert not torch.equal(ours, theirs)
    assert sorted(with_labels.tolist()) == sorted(original.tolist())


def test_flat_digits_are_the_same_ones() -> None:
    flat, images_of_digits = digits(flat=True), digits()
    assert flat.test.shape == (361, 64)
    assert torch.equal(flat.test, images_of_digits.test.flatten(1))


def test_fractions_of_digits_can_be_chosen() -> None:
    split = digits(fractions=(0.5, 0.25, 0.25))
    assert [len(part) for part in split[:3]] == [898, 449, 450]


@pytest.mark.parametrize(
    "load",
    [digits, lambda **seed: natural_image_patches(**SMALL, **seed)],
    ids=["digits", "patches"],
)
def test_data_depend_on_the_seed_alone(load: Callable[..., Split]) -> None:
    state = torch.get_rng_state()
    first, second, other = load(), load(), load(seed=1)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    assert torch.equal(first.train, second.train)
    assert torch.equal(first.test, second.test)
    assert not torch.equal(first.train, other.train)


@pytest.mark.parametrize("size", [2, 8, 12])
def test_patches_have_the_asked_shape(size: int) -> None:
    split = natural_image_patches(size, **SMALL)
    assert [tuple(part.shape) for part in split[:3]] == [
        (number, size**2 - 1) for number in SMALL.values()
    ]
    assert split.train.dtype == torch.get_default_dtype()
    assert split.labels is None


# integers that tell where each pixel is, so that a patch says where it was cut
PLACES = torch.arange(2 * 427 * 640, dtype=torch.float64).reshape(2, 427, 640)
BANDS = {"train": (0, 448), "validation": (448, 512), "test": (512, 640)}


def test_patches_lie_in_their_own_band_of_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_grey_photographs", lambda: PLACES)
    monkeypatch.setattr(images, "_prepared", lambda patches: patches)
    split = natural_image_patches(num_train=2000, num_validation=2000, num_test=2000)
    for part, (first, last) in BANDS.items():
        place = getattr(split, part).floor()
        columns, rows = place.remainder(640), place.div(640, rounding_mode="floor").remainder(427)
        # up to the edges, never over them; about as many of either photograph
        assert first == columns.min()
        assert columns.max() == last - 1
        assert rows.min() < 8
        assert rows.max() > 418
        assert 900 < int((place[:, 0, 0] >= PLACES[1, 0, 0]).sum()) < 1100
        # whole squares
        assert (place[:, :, 1:] - place[:, :, :-1] == 1).all()
        assert (place[:, 1:] - place[:, :-1] == 640).all()


def test_patches_are_dequantised_and_centred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put back the last pixel: neighbours differ by one place and the noise."""
    monkeypatch.setattr(images, "_grey_photographs", lambda: PLACES)
    centred = natural_image_patches(**SMALL).train * 256
    centred = torch.cat([centred, -centred.sum(1, keepdim=True)], 1).reshape(-1, 8, 8)
    noise = (centred[:, :, 1:] - centred[:, :, :-1] - 1).flatten()
    assert noise.abs().max() < 1
    assert float(noise.var()) == pytest.approx(2 / 12, rel=0.1)
    assert ((centred[:, 1:] - centred[:, :-1] - 640).abs() < 1).all()


def test_grey_is_the_rounded_mean_of_the_colours() -> None:
    grey = images._grey_photographs()
    assert grey.shape == (2, 427, 640)
    for ours, colours in zip(grey, datasets.load_sample_images().images, strict=True):
        # a third has no halves: one more before the division rounds to the nearest
        expected = (torch.tensor(colours).long().sum(-1) + 1) // 3
        assert torch.equal(ours.long(), expected)


def test_patches_have_zero_mean_and_the_spread_of_images() -> None:
    train = natural_image_patches(num_train=5000, num_validation=10, num_test=10).train
    last = -train.sum(1, keepdim=True)
    # the left-out pixel is one like the others
    assert 0.5 < float(last.std() / train[:, 0].std()) < 2
    assert train.abs().max() < 1
    # neighbours are alike, opposite corners are not
    assert torch.corrcoef(train[:, 27:29].T)[0, 1] > 0.2
    assert torch.corrcoef(train[:, [0, 62]].T)[0, 1] < 0


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "fractions", [(0.5, 0.5, 0.5), (1.0, 0.0, 0.0), (0.5, 0.5), (1.2, -0.1, -0.1)], ids=str
)
def test_fractions_that_do_not_add_up_are_refused(fractions: Any) -> None:
    with pytest.raises(ValueError, match="three positive numbers that add up to one"):
        digits(fractions=fractions)


@pytest.mark.parametrize("size", [1, 0, 65])
def test_sizes_that_do_not_fit_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"size must be between 2 and 64 pixels, got {size}"):
        natural_image_patches(size, **SMALL)


@pytest.mark.parametrize("part", SMALL)
def test_parts_without_patches_are_refused(part: str) -> None:
    with pytest.raises(ValueError, match="at least one patch"):
        natural_image_patches(**{**SMALL, part: 0})


@pytest.mark.parametrize("load", [digits, natural_image_patches])
def test_scikit_learn_is_named_where_it_is_missing(
    load: Callable[[], Split], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="needs scikit-learn: pip install scikit-learn"):
        load()


def test_pillow_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match="needs pillow: pip install pillow"):
        natural_image_patches()
