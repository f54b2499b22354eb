# SPDX-License-Identifier: Apache-2.0
"""The stages of ``build_experts.py`` killed for ``tests.helpers.kills``, one by one, and all of them by ``run``.

A killed stage is started again with the same words, and ends with the bytes of an undisturbed one. Where it replaces
what another request has made, the next run either refuses what it finds or ends with these bytes, too.
"""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

from tests.helpers.kills import Campaign, Ended, Found, Job, Moment, contents

MODULES = (
    *(
        "torch",
        "torch._dynamo",
        "matplotlib.pyplot",
        "tokenizers",
        "mindformers_ext.pt.probe",
        "mindformers_ext.jobs.run.plot",
    ),
    *(f"mindformers_ext.jobs.experts.{name}" for name in ("select", "select_stream", "features", "importance")),
    *(f"mindformers_ext.jobs.experts.{name}" for name in ("convert", "quality", "report", "run_split", "parts")),
    *(f"mindformers_ext.surgery.experts.{name}" for name in ("gate_fit", "gate_layer", "text_clusters")),
)
FEW = 3
EXPERTS, MODEL, TEXT = 4, "llama", "text.txt"
WHOLE = ("convert", "report")  # they write a folder whole or not at all, and over one that is there with --overwrite
SPLIT, FEATURES = f"{MODEL}-{EXPERTS}Expert-Split-Random", f"{MODEL}-Hidden-Features"
GATES = f"{MODEL}-{EXPERTS}Expert-Select-Ridge"


def options(folder: Path, stage: str) -> dict[str, object]:
    """What a stage is called with, beside the model and the place of its output."""
    made, experts = folder / "made", {"num_experts": EXPERTS}
    text = {"text": folder / TEXT, "block_size": 16, "batch_size": 4}
    gate = {"split_file_path": made / SPLIT, **experts, "gate": "ridge"}
    mixture = {"split_file_path": made / SPLIT, "select_file_path": made / GATES, **experts}
    judged = {"eval_text": folder / TEXT, "block_size": 16, "eval_tokens": 100}
    return {
        "random": experts | {"method": "random", "workers": 1},
        "split": experts | {"method": "clustering", "starts": 1, "workers": 1},
        "features": text | {"max_tokens": 200},
        "importance": text | {"max_tokens": 200, "num_clusters": 2},
        "select": gate | {"hidden_features_path": made / FEATURES},
        "stream": gate | {"stream": True, **text},
        "convert": mixture | judged | {"to_mindspore": "moe.ckpt"},
        "report": mixture | judged,
    }[stage]


# what makes of a stage's options another request
OTHER = {
    **dict.fromkeys(("split", "importance"), {"seed": 1}),
    "features": {"save_interval": 2},
    **dict.fromkeys(("select", "stream"), {"ridge_lambda": 0.1}),
    **dict.fromkeys(WHOLE, {"num_selects": 1}),
}


def words(folder: Path, place: Path, stage: str, which: str) -> list[str]:
    """A stage's command line."""
    if stage == "run":
        return ["run", str(folder / f"{which}.yaml")]
    asked = options(folder, stage) | (OTHER[stage] if which == "old" else {})
    out = place / "out" if stage in WHOLE else place
    asked |= {"model_path": folder / MODEL, "save_path": out, "quiet": True}
    if "to_mindspore" in asked:
        asked["to_mindspore"] = place / str(asked["to_mindspore"])
    name = {"random": "split", "stream": "select"}.get(stage, stage)
    return [name, *(word for key, value in asked.items() for word in (f"--{key}", str(value)))]


def prepare(folder: Path) -> None:
    """A model, a text, what the stages read of each other, and YAMLs for all of them."""
    from mindformers_ext.cli.experts import main
    from tests.helpers.tiny_llama import make_llama, sentences

    make_llama(folder / MODEL)
    (folder / TEXT).write_text("\n".join(sentences(60, 5)), encoding="utf-8")
    for stage in ("random", "features", "select"):
        if main(words(folder, folder / "made", stage, "new")):
            raise RuntimeError(stage)
    place = folder / "place"
    for which, seed in (("old", 1), ("new", 0)):
        sections = {name: options(folder, name) for name in ("importance", "features", "select", *WHOLE)}
        for section in sections.values():
            for key in ("split_file_path", "select_file_path", "hidden_features_path", "to_mindspore"):
                section.pop(key, None)
        sections |= {"split": options(folder, "random") | {"seed": seed}}
        sections |= {name: sections[name] | {"save_path": place / name} for name in WHOLE}
        config = {"model_path": folder / MODEL, "save_path": place / "work", "quiet": True, **sections}
        (folder / f"{which}.yaml").write_text(json.dumps(config, default=str), encoding="utf-8")


def moments(whole: Ended, count: int, rng: random.Random) -> list[Moment]:
    """One in each of ``count`` parts of a run like ``whole``: every other one before a change, the rest at times."""
    parts = [(place + rng.random()) / count for place in range(count)]
    return [
        Moment(seconds=whole.seconds * part) if place % 2 else Moment(change=1 + int(part * whole.changes))
        for place, part in enumerate(parts)
    ]


class Stages(Campaign):
    """The kills of one stage, or of ``run``."""

    def __init__(self, stage: str, folder: Path) -> None:
        self.stage = stage
        is_made = (folder / "new.yaml").is_file()
        prepared = (lambda folder: None) if is_made else prepare
        super().__init__(Job("experts", MODULES, prepared, lambda *given: words(*given[:2], stage, given[2])), folder)

    def go(self, kills: int, chained: bool = False) -> Found:
        """Half of the kills into an empty folder, half over what another request has made; few into an empty one."""
        half = kills // 2 if kills > FEW else 0
        for over, count in ((None, kills - half), ("old", half)):
            ended, wanted = self.whole("new", over) if count else (None, {})
            for moment in moments(ended, count, random.Random(f"{self.stage} {over}")) if ended else ():
                where = f"{self.stage} over {over}, {moment}"
                self.killed(over, moment, where)
                self.found.kills += 1
                self.again(where, wanted, over)
        return self.found

    def killed(self, over: str | None, moment: Moment, where: str) -> None:
        """A run that was killed at ``moment``, or before, where it had ended by then."""
        self.start(over)
        while (died := self.run("new", moment, overwrite=over is not None)).code != -signal.SIGKILL:
            if died.code:
                raise RuntimeError(f"{where}: exit code {died.code}: {self.log.read_text()[-2000:]}")
            moment = Moment(max(moment.change - 1, 0), moment.seconds * 0.8)
            self.start(over)

    def again(self, where: str, wanted: dict[str, str], over: str | None = None) -> None:
        """The same words once more, and where they are refused with --overwrite."""
        left = contents(self.place)
        ended = self.run("new")
        refused = ended.code == 2 and (over is not None or (self.stage in WHOLE and self.is_there()))
        self.found.held["refused" if refused else "gone on"] += 1
        if refused:
            if self.stage not in (*WHOLE, "run"):  # which has gone on up to what is refused
                self.found.check(contents(self.place) == left, f"{where}: a refused run changed what was there")
            ended = self.run("new", overwrite=True)
        self.found.check(ended.code == 0, f"{where}: ended with {ended.code}: {self.log.read_text()[-400:]}")
        found = contents(self.place)
        differing = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        self.found.check(not differing, f"{where}: other than undisturbed: {differing[:6]}")


NAMES = ("split", "features", "importance", "select", "stream", "convert", "report", "run")


def experts(names: list[str], folder: Path, kills: int) -> Found:
    """The campaigns of the stages ``names``; without any of all of them."""
    found = Found()
    for name in names or NAMES:
        one = Stages(name, folder).go(kills)
        found.wrong += one.wrong
        found.kills += one.kills
        found.held.update(one.held)
    return found
