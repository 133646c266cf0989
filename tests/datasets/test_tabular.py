"""Every step of the preparation, on small files in the layout of the published archive."""

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from pyro_ext.datasets import Split, load_tabular

NAMES = ["POWER", "GAS", "HEPMASS", "MINIBOONE", "BSDS300"]


def parts(split: Split) -> Iterator[Tensor]:
    yield from (split.train, split.validation, split.test)


def assert_parts(split: Split, *expected: np.ndarray) -> None:
    for part, table in zip(parts(split), expected, strict=True):
        assert part.dtype == torch.float32
        torch.testing.assert_close(part, torch.tensor(table, dtype=torch.float32))


def by_hand(table: np.ndarray, ddof: int, rows: slice) -> np.ndarray:
    """Standardised column by column with the statistics of some rows."""
    columns = []
    for column in table.T:
        seen = column[rows]
        mean = sum(seen) / len(seen)
        variance = sum((value - mean) ** 2 for value in seen) / (len(seen) - ddof)
        columns.append((column - mean) / variance**0.5)
    return np.stack(columns, 1)


def save(root: Path, name: str, table: np.ndarray) -> None:
    path = root / name
    path.parent.mkdir(exist_ok=True)
    np.save(path, table)


# ------------------------------------------------------------------------------------------ POWER


def power_table(num_rows: int = 50) -> np.ndarray:
    """Columns: active and reactive power, voltage, intensity, three meters, time."""
    random = np.random.RandomState(0)
    steps = np.array([0.001, 0.002, 0.01, 0.2, 1.0, 1.0, 1.0, 1.0])
    return random.randint(1000, 1050, (num_rows, 8)) * steps


def test_power_is_shuffled_and_blurred_as_published(tmp_path: Path) -> None:
    table = power_table()
    save(tmp_path, "power/data.npy", table)
    # the sequence of random numbers of the published preparation, row by row
    random = np.random.RandomState(42)
    shuffled = table.copy()
    random.shuffle(shuffled)
    voltage = random.rand(50, 1)
    active_power = random.rand(50, 1)
    meters = random.rand(50, 3)
    expected = np.stack(
        [
            shuffled[:, 0] + 0.001 * active_power[:, 0],
            shuffled[:, 2] + 0.01 * voltage[:, 0],
            *(shuffled[:, 4:7] + meters).T,
            shuffled[:, 7],
        ],
        axis=1,
    )
    # 50 rows: 5 to test on, 4 of the other 45 to validate on
    expected = by_hand(expected, 0, slice(0, 45))
    split = load_tabular("POWER", tmp_path)
    assert split.name == "POWER"
    assert_parts(split, expected[:41], expected[41:45], expected[45:])


def test_power_is_the_same_every_time(tmp_path: Path) -> None:
    save(tmp_path, "power/data.npy", power_table())
    state = np.random.get_state()[1].copy()
    first, second = load_tabular("POWER", tmp_path), load_tabular("POWER", str(tmp_path))
    for one, other in zip(parts(first), parts(second), strict=True):
        assert torch.equal(one, other)
    assert np.array_equal(np.random.get_state()[1], state), "NumPy's global generator was used"


# -------------------------------------------------------------------------------------------- GAS


def test_gas_drops_sensors_that_repeat_others(tmp_path: Path) -> None:
    """Of a pair the first goes; of a chain a~b~c, with a and c apart, both a and b go."""
    random = np.random.RandomState(1)
    a, b, c, alone = random.randn(4, 200)
    near = a + 0.05 * b  # repeats a
    chain = [a, a + 0.15 * b, a + 0.3 * b]  # neighbours correlate by 0.989, the ends by 0.958
    frame = pd.DataFrame(
        {
            "Time": np.arange(200.0),
            "Meth": random.rand(200),
            "Eth": random.rand(200),
            "pair 1": c,
            "alone": alone,
            "pair 2": 3 * c + 0.1 * near + 7,
            "chain 1": chain[0],
            "chain 2": chain[1],
            "chain 3": chain[2],
            "opposite": -alone + 0.01 * b,  # a correlation of -1 is kept
        }
    )
    correlations = frame.corr()
    assert correlations["chain 1"]["chain 2"] > 0.98 > correlations["chain 1"]["chain 3"]
    assert correlations["chain 2"]["chain 3"] > 0.98
    (tmp_path / "gas").mkdir()
    frame.to_pickle(tmp_path / "gas/ethylene_CO.pickle")
    kept = frame[["alone", "pair 2", "chain 3", "opposite"]].to_numpy()
    # statistics of all rows, with n - 1
    expected = by_hand(kept, 1, slice(None))
    assert_parts(load_tabular("GAS", tmp_path), expected[:162], expected[162:180], expected[180:])


# ---------------------------------------------------------------------------------------- HEPMASS


def write_hepmass(root: Path) -> tuple[np.ndarray, np.ndarray]:
    """Signal and background rows, of four features of which two have repeated values."""
    random = np.random.RandomState(2)
    names = ["# label", "f0", "f1", "f2", "f3"]

    def table(num_rows: int) -> np.ndarray:
        features = random.randn(num_rows, 4)
        features[:, 1] = random.randint(0, 3, num_rows)  # its smallest value occurs often
        features[: num_rows // 2, 2] = 9.0  # only its largest value does: it stays
        return np.column_stack([np.arange(num_rows) % 2, features])

    train, test = table(80), table(40)
    # the smallest value of the last feature, five times among the signal
    signal = np.flatnonzero(train[:, 0] == 1)
    train[signal[:5], 4] = -10.0
    (root / "hepmass").mkdir()
    pd.DataFrame(train, columns=names).to_csv(root / "hepmass/1000_train.csv", index=False)
    extra = pd.DataFrame(test, columns=names).assign(mass=1000.0)
    extra.to_csv(root / "hepmass/1000_test.csv", index=False)
    return train, test


def test_hepmass_keeps_signal_and_continuous_features(tmp_path: Path) -> None:
    train, test = write_hepmass(tmp_path)
    signal, test_signal = train[train[:, 0] == 1, 1:], test[test[:, 0] == 1, 1:]
    counts = [Counter(column)[min(column)] for column in signal.T]
    assert counts[1] > 5
    assert [counts[i] for i in (0, 2, 3)] == [1, 1, 5]
    kept = [0, 2, 3]
    together = by_hand(np.concatenate([signal, test_signal])[:, kept], 1, slice(0, 40))
    # 40 signal rows: the last 4 to validate on, which count in the statistics
    assert_parts(load_tabular("HEPMASS", tmp_path), together[:36], together[36:40], together[40:])


def test_six_equal_values_make_a_feature_discrete(tmp_path: Path) -> None:
    train, _ = write_hepmass(tmp_path)
    path = tmp_path / "hepmass/1000_train.csv"
    frame = pd.read_csv(path)
    frame.loc[np.flatnonzero(train[:, 0] == 1)[:6], "f3"] = -10.0
    frame.to_csv(path, index=False)
    assert load_tabular("HEPMASS", tmp_path).train.shape == (36, 2)


# ---------------------------------------------------------------------------- MINIBOONE, BSDS300


def test_miniboone_is_standardized_without_the_test_rows(tmp_path: Path) -> None:
    table = np.random.RandomState(3).randn(100, 5) * 7 + 3
    save(tmp_path, "miniboone/data.npy", table)
    expected = by_hand(table, 0, slice(0, 90))
    split = load_tabular("MINIBOONE", tmp_path)
    assert_parts(split, expected[:81], expected[81:90], expected[90:])
    seen = torch.cat([split.train, split.validation]).double()
    torch.testing.assert_close(seen.mean(0), torch.zeros(5), rtol=0, atol=1e-6)
    torch.testing.assert_close(seen.std(0, correction=0), torch.ones(5), rtol=0, atol=1e-6)


def test_bsds300_is_taken_as_it_is(tmp_path: Path) -> None:
    random = np.random.RandomState(4)
    tables = {part: random.randn(n, 63) for part, n in (("train", 9), ("validation", 3))}
    tables["test"] = random.randn(4, 63)
    (tmp_path / "BSDS300").mkdir()
    with h5py.File(tmp_path / "BSDS300/BSDS300.hdf5", "w") as file:
        for part, table in tables.items():
            file[part] = table
    assert_parts(load_tabular("BSDS300", tmp_path), *tables.values())


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", ["power", "MNIST", ""])
def test_an_unknown_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"POWER, GAS, HEPMASS, MINIBOONE, BSDS300, got '{name}'"):
        load_tabular(name, tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{name} needs {tmp_path}/.*zenodo.*1161203"):
        load_tabular(name, tmp_path)


def test_the_second_of_two_files_may_be_missing_too(tmp_path: Path) -> None:
    write_hepmass(tmp_path)
    (tmp_path / "hepmass/1000_test.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"1000_test\.csv"):
        load_tabular("HEPMASS", tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "package"),
    [("GAS", "gas/ethylene_CO.pickle", "pandas"), ("BSDS300", "BSDS300/BSDS300.hdf5", "h5py")],
)
def test_missing_packages_are_named(
    name: str, file: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / file
    path.parent.mkdir()
    path.touch()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"{name} needs {package}: pip install {package}"):
        load_tabular(name, tmp_path)
