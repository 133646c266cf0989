"""The table of posterior draws."""

from __future__ import annotations

import torch

from pyro_ext.infer.summary import summary_table


def test_small_values_keep_their_digits_and_every_element_has_a_row() -> None:
    draws = torch.randn(4, 500)
    table = summary_table({"tiny": 1e-3 + 1e-5 * draws, "pair": torch.randn(4, 500, 2)}, 0.9)
    lines = table.split("\n")
    names = ["mean", "std", "median", "5.0%", "95.0%", "n_eff", "r_hat"]
    assert lines[0].split() == names
    assert [line.split()[0] for line in lines[1:]] == ["tiny", "pair[0]", "pair[1]"]
    row = dict(zip(names, map(float, lines[1].split()[1:]), strict=True))
    assert abs(row["mean"] - float(1e-3 + 1e-5 * draws.mean())) < 1e-6
    assert abs(row["std"] - 1e-5 * float(draws.std())) < 1e-8
    assert row["n_eff"] > 500
    assert abs(row["r_hat"] - 1) < 0.05
