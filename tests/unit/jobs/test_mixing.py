# SPDX-License-Identifier: Apache-2.0
"""Runs on data mixtures, read for tools/mix.py: from metrics and from lines; what does not fit is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindformers_ext.core.errors import UserError
from mindformers_ext.data.mixture.law import Law
from mindformers_ext.jobs.mixing.fit import FitRequest, fit
from mindformers_ext.jobs.mixing.runs import outcomes, read_curves
from mindformers_ext.jobs.mixing.show import show
from tests.unit.jobs.test_run_metrics import record, write

LAW = Law(np.array([1.0, 1.5]), np.array([[-1.0, 0.5], [0.2, -2.0]]))


def run_folder(folder: Path, share: float) -> Path:
    """A run of four steps of ten rows, measured behind steps 2 and 4."""
    folder.mkdir()
    losses, records = LAW.losses(np.array([share, 1 - share])), []
    for step in range(1, 5):
        more = {"proportion.code": share, "proportion.wiki": 1 - share}
        more |= {"rows.code": 10 * step * share, "rows.wiki": 10 * step * (1 - share)}
        if step % 2 == 0:
            more |= {"domain_loss.code": losses[0] + (4 - step), "domain_loss.wiki": losses[1]}
        records.append(record(step, **more))
    write(folder, records)
    return folder


def lines(path: Path, *runs: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(run) + "\n" for run in runs), encoding="utf-8")
    return path


def of_law(share: float) -> dict[str, Any]:
    losses = LAW.losses(np.array([share, 1 - share]))
    return {
        "proportions": {"wiki": 1 - share, "code": share},
        "losses": {"code": float(losses[0]), "wiki": float(losses[1])},
    }


def test_a_run_is_what_it_drew_and_its_last_losses(tmp_path: Path) -> None:
    (found,) = outcomes([run_folder(tmp_path / "run", 0.25)])
    assert found.proportions == pytest.approx({"code": 0.25, "wiki": 0.75})
    assert list(found.losses.values()) == pytest.approx(LAW.losses(np.array([0.25, 0.75])))
    curves = read_curves(tmp_path / "run")
    assert curves.names == ("code", "wiki") and curves.evaluated.tolist() == [2, 4] and curves.rows[-1, 1] == 30
    assert show(tmp_path / "run").read_bytes()[:4] == b"\x89PNG"


def test_folders_and_lines_give_the_law_and_its_best_proportions(tmp_path: Path) -> None:
    given = [
        run_folder(tmp_path / "a", 0.1),
        run_folder(tmp_path / "b", 0.9),
        lines(tmp_path / "runs.jsonl", *map(of_law, (0.3, 0.5, 0.7))),
    ]
    found = fit(FitRequest(given, drawings=4, output=tmp_path / "fit.json"))
    grid = np.linspace(0, 1, 2001)
    sums = LAW.losses(np.stack([grid, 1 - grid], 1)).mean(1)
    assert found.best.proportions[0] == pytest.approx(grid[sums.argmin()], abs=1e-3) and found.missed < 1e-6
    assert found.objective[0] == pytest.approx(sums.min(), abs=1e-6)
    assert json.loads((tmp_path / "fit.json").read_text())["proportion"]["code"] == found.best.proportions[0]
    capped = fit(FitRequest(given, tokens=100, available={"code": 2}, repeat=5, drawings=0))
    assert capped.best.proportions[0] == pytest.approx(0.1) and "too few runs for error bars" in capped.notes


@pytest.mark.parametrize(
    ("runs", "more", "message"),
    [
        ([of_law(0.5)] * 2, {}, "2 runs, and the law of 2 domains has 3 numbers"),
        ([of_law(0.5)] * 3, {}, "do not tell the 2 domains apart"),
        ([of_law(0.5) | {"losses": {"code": 1.0}}], {}, "wiki in one of proportions and losses alone"),
        ([of_law(0.5) | {"losses": {"code": 1.0, "wiki": 0}}], {}, "a loss one above 0"),
        ([of_law(0.5) | {"proportions": {"code": 0.5, "wiki": 0.6}}], {}, "sum to 1.1"),
        ([of_law(0.5), {"proportions": {"a": 1}, "losses": {"a": 1}}], {}, "give runs on the same domains"),
        ([[]], {}, "line 1 does not describe a run"),
        (list(map(of_law, (0.2, 0.5, 0.7))), {"weights": {"cod": 1}}, "--weight"),
        (list(map(of_law, (0.2, 0.5, 0.7))), {"weights": {"code": -1}}, "weights are numbers from 0"),
        (list(map(of_law, (0.2, 0.5, 0.7))), {"tokens": 5}, "--tokens and --available belong together"),
        (
            list(map(of_law, (0.2, 0.5, 0.7))),
            {"tokens": 100, "available": {"code": 1, "wiki": 1}},
            "need 25 tokens of data, there are 2",
        ),
    ],
)
def test_what_does_not_fit_is_said(runs: list[Any], more: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        fit(FitRequest([lines(tmp_path / "runs.jsonl", *runs)], drawings=0, output=tmp_path / "out", **more))
    assert not (tmp_path / "out").exists()


def test_a_run_on_one_data_set_is_no_mixture(tmp_path: Path) -> None:
    write(tmp_path, [record(1)])
    with pytest.raises(UserError, match="MixtureDataset"):
        read_curves(tmp_path)
