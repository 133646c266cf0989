"""The five tables that densities are compared on since Papamakarios et al. 2017.

The published numbers are only comparable on data that were prepared in the same way, oddities
included; each loader says what is odd.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ..optional import import_optional
from .split import Split

__all__ = ["load_tabular"]

_ARCHIVE = "https://zenodo.org/records/1161203"

_Table = NDArray[np.floating]
_Parts = tuple[_Table, _Table, _Table]


def load_tabular(name: str, root: str | os.PathLike[str]) -> Split:
    """
    Read one of the tables of the archive that Papamakarios et al. published, and prepare it.

    ============  ========  ==============================================================
    Name          Features  Rows
    ============  ========  ==============================================================
    POWER         6         electric power used by a household, minute by minute
    GAS           8         sensors in mixtures of gases
    HEPMASS       21        collisions that produce a new particle, simulated
    MINIBOONE     43        electron neutrinos in a detector
    BSDS300       63        patches of natural images, without their mean
    ============  ========  ==============================================================

    Nothing is downloaded: the files are those of the archive at
    https://zenodo.org/records/1161203 (``data.tar.gz``). The file of GAS is a pickle, which can
    run code when it is read; take it from that archive only.

    Reference: Papamakarios, Pavlakou and Murray 2017, "Masked autoregressive flow for density
    estimation", appendix D.

    :param str name: POWER, GAS, HEPMASS, MINIBOONE or BSDS300.
    :param root: folder that the archive was unpacked to, which contains ``power``, ``gas``,
        ``hepmass``, ``miniboone`` and ``BSDS300``.
    :returns: rows of dtype ``float32``, as published.
    :raises ValueError: for an unknown name.
    :raises FileNotFoundError: if a file is not there.
    :raises ImportError: without pandas (GAS, HEPMASS) or h5py (BSDS300).

    Example::

        >>> from pyro_ext.datasets import load_tabular
        >>> load_tabular("POWER", "data")
        Traceback (most recent call last):
        FileNotFoundError: POWER needs data/power/data.npy, ...
    """
    if name not in _TABLES:
        raise ValueError(f"name must be one of {', '.join(_TABLES)}, got {name!r}.")
    load, files = _TABLES[name]
    paths = [Path(root) / file for file in files]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(
                f"{name} needs {path}, which is not there. Unpack the archive published at "
                f"{_ARCHIVE} and give as root the folder that contains {path.parent.name}."
            )
    train, validation, test = (
        torch.from_numpy(np.ascontiguousarray(part, dtype=np.float32)) for part in load(*paths)
    )
    return Split(train, validation, test, name)


def _load_power(path: Path) -> _Parts:
    """
    Shuffle, drop global intensity and reactive power, and fill the gaps between digits.

    Uniform noise as wide as the last digit makes the measurements continuous (the time of day
    gets none). Rows and noise come from NumPy's old generator with the published seed: with
    torch's, these would be other data than everybody else's.
    """
    random = np.random.RandomState(42)
    table = np.load(path)
    table = table[random.permutation(len(table))]
    table = np.delete(table, [1, 3], axis=1)
    active_power, voltage, sub_metering = 0, 1, slice(2, 5)
    noise = np.zeros(table.shape)
    noise[:, voltage] = 0.01 * random.rand(len(table))
    noise[:, active_power] = 0.001 * random.rand(len(table))
    noise[:, sub_metering] = random.rand(len(table), 3)
    return _standardized(*_split(table + noise))


def _load_gas(path: Path) -> _Parts:
    """
    Drop the concentrations and the time, then sensors that nearly repeat others.

    The first sensor whose correlation with another one exceeds 0.98 goes, until none is left.
    Means and standard deviations are those of all rows, of the test rows too.
    """
    pandas = import_optional("pandas", "pandas", "GAS")
    frame = pandas.read_pickle(path).drop(columns=["Meth", "Eth", "Time"])
    repeats = frame.corr().to_numpy() > 0.98  # every sensor repeats itself
    kept = np.arange(len(repeats))
    while (is_repeated := repeats[np.ix_(kept, kept)].sum(1) > 1).any():
        kept = np.delete(kept, is_repeated.argmax())
    table = frame.to_numpy()[:, kept]
    return _split((table - table.mean(0)) / table.std(0, ddof=1))


def _load_hepmass(train_path: Path, test_path: Path) -> _Parts:
    """
    Keep the signal (class 1), and the features that look continuous.

    The file of test rows has a last column that the other one lacks. A feature counts as discrete
    when its smallest value occurs more than five times, and is dropped.
    """
    pandas = import_optional("pandas", "pandas", "HEPMASS")
    tables = []
    for path in (train_path, test_path):
        table = pandas.read_csv(path, index_col=False).to_numpy()
        tables.append(table[table[:, 0] == 1, 1:])
    table, test = tables[0], tables[1][:, : tables[0].shape[1]]
    is_continuous = (table == table.min(0)).sum(0) <= 5
    table, test = table[:, is_continuous], test[:, is_continuous]
    mean, deviation = table.mean(0), table.std(0, ddof=1)
    train, validation = _without_last_tenth((table - mean) / deviation)
    return train, validation, (test - mean) / deviation


def _load_miniboone(path: Path) -> _Parts:
    """Standardise: outliers and discrete features were dropped before the file was published."""
    return _standardized(*_split(np.load(path)))


def _load_bsds300(path: Path) -> _Parts:
    """As stored: dequantised, centred patches without their last pixel."""
    h5py = import_optional("h5py", "h5py", "BSDS300")
    with h5py.File(path, "r") as file:
        return file["train"][:], file["validation"][:], file["test"][:]


_TABLES: dict[str, tuple[Callable[..., _Parts], tuple[str, ...]]] = {
    "POWER": (_load_power, ("power/data.npy",)),
    "GAS": (_load_gas, ("gas/ethylene_CO.pickle",)),
    "HEPMASS": (_load_hepmass, ("hepmass/1000_train.csv", "hepmass/1000_test.csv")),
    "MINIBOONE": (_load_miniboone, ("miniboone/data.npy",)),
    "BSDS300": (_load_bsds300, ("BSDS300/BSDS300.hdf5",)),
}


def _split(table: _Table) -> _Parts:
    """The last tenth to test on, the last tenth of the rest to validate on."""
    rest, test = _without_last_tenth(table)
    return (*_without_last_tenth(rest), test)


def _without_last_tenth(table: _Table) -> tuple[_Table, _Table]:
    first = len(table) - int(0.1 * len(table))
    return table[:first], table[first:]


def _standardized(train: _Table, validation: _Table, test: _Table) -> _Parts:
    """Zero means and unit variances of the rows that are not for testing."""
    seen = np.concatenate([train, validation])
    mean, deviation = seen.mean(0), seen.std(0)
    return (train - mean) / deviation, (validation - mean) / deviation, (test - mean) / deviation
