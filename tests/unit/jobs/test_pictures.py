# SPDX-License-Identifier: Apache-2.0
"""Pictures show what a mean would hide: a router that collapses for one step, an expert unlike the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mindformers_ext.jobs.merge.cosines import CHANGES, RANGES, WEIGHTS, Line, rows_of, write_picture
from mindformers_ext.jobs.run.metrics import RunMetrics
from mindformers_ext.jobs.run.plot import open_pyplot
from mindformers_ext.jobs.run.plot_load import COLUMNS, load_figure, worst_columns

COLLAPSED = [0, 2048, 0, 126, 1922, 0, 0, 0]


def run(steps: int, layers: int = 2) -> RunMetrics:
    """Even loads but for layer 1 at step 20."""
    load = np.random.default_rng(0).normal(512, 40, (steps, layers, 8))
    load[19, 1] = COLLAPSED
    one = np.ones(steps)
    return RunMetrics(np.arange(1, steps + 1), one, one, one, one, one, np.zeros((steps, layers)), load)


def test_a_collapsed_step_is_seen_in_the_picture() -> None:
    for steps in (20, 40, 5000):
        figure = load_figure(run(steps))
        images = [image for axes in figure.axes for image in axes.images]
        first, last, worst, over_steps = (np.asarray(image.get_array()) for image in images[:4])
        assert max(first.max(), last.max()) < 30  # the means of many steps hide it
        np.testing.assert_allclose(worst[1], 100 * np.array(COLLAPSED) / sum(COLLAPSED))
        assert worst[0].max() < 20 and over_steps.shape == (8, min(steps, COLUMNS)) and over_steps.max() == worst.max()
        assert "step 20" in [label.get_text() for axes in figure.axes for label in axes.get_yticklabels()]
        fullest = next(axes for axes in figure.axes if "fullest" in axes.get_title())
        assert fullest.lines[0].get_ydata().max() == worst.max()
        assert all(image.get_clim() == images[0].get_clim() for image in images[:4])
        open_pyplot().close(figure)


def test_columns_keep_the_worst_of_their_steps() -> None:
    shares = np.full((10, 2), 0.5)
    shares[4] = 0.9, 0.1
    assert worst_columns(shares, 3).tolist() == [0, 4, 7] and worst_columns(shares[:2], 3).tolist() == [0, 1]


def lines(what: str = WEIGHTS, experts: int = 8) -> list[Line]:
    found = [Line(what, kind, None, "one", "two", 0.5, True) for kind in ("model.embed_tokens", "lm_head")]
    for layer in range(3):
        found.append(Line(what, "q_proj", layer, "one", "two", 0.75, True))
        for expert in range(experts):
            cosine = -0.25 if expert == 3 else 0.75
            found += [
                Line(what, f"experts.{expert}.{w}", layer, "one", "two", cosine, True) for w in ("w1", "w2", "w3")
            ]
    return found


def test_experts_are_two_rows_a_matrix_and_head_and_embeddings_have_theirs() -> None:
    rows = {row.name: row for row in rows_of(lines(), 3)}
    expected = ["embed_tokens", "q_proj"]
    expected += [f"experts.{w}, {how} of 8" for w in ("w1", "w2", "w3") for how in ("mean", "lowest")]
    assert list(rows) == [*expected, "lm_head"]
    assert rows["experts.w2, mean of 8"].values.tolist() == [0.625] * 3
    assert rows["experts.w2, lowest of 8"].values.tolist() == [-0.25] * 3
    assert rows["lm_head"].whole and rows["lm_head"].values.tolist() == [0.5] * 3


def test_colours_mean_the_same_in_every_picture(tmp_path: Path, monkeypatch) -> None:
    pyplot, seen = open_pyplot(), []
    monkeypatch.setattr(pyplot, "close", seen.append)
    write_picture([*lines(), *lines(CHANGES)], tmp_path / "cosines.png")
    (figure,) = seen
    images = [image for axes in figure.axes for image in axes.images]
    assert [image.get_clim() for image in images] == [RANGES[what][:2] for what in (WEIGHTS, CHANGES)]
    assert "one, two" in figure.get_suptitle() and (tmp_path / "cosines.png").stat().st_size > 10_000
    monkeypatch.undo()
    pyplot.close(figure)
