# SPDX-License-Identifier: Apache-2.0
"""What is asked of a cut in one shot, and what can be refused before anything is read or written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mindformers_ext.core.config.file import load_yaml
from mindformers_ext.core.errors import Problems
from mindformers_ext.formats.atomic import refuse_existing
from mindformers_ext.jobs.experts.dense_model import model_name
from mindformers_ext.jobs.experts.texts import Texts
from mindformers_ext.jobs.merge.output import OutputRequest, check_output
from mindformers_ext.surgery.prune.importance import METHODS
from mindformers_ext.surgery.prune.least_squares import NONE, REFITS

INFLUENCE, PERPLEXITY = "bi", "ppl"
DEPTHS = (INFLUENCE, PERPLEXITY)


@dataclass(frozen=True, kw_only=True)
class OneShotRequest:
    """What ``shape`` and ``depth`` have in common.

    ``importance``: the file of what was measured, by default beside the output, called after the model; ``remake``:
    measure anew. ``seed``: of what is drawn at random to compare. ``train_yaml``: of the dense model's training, from
    which ``next_yaml`` is made.
    """

    model: Path
    output: OutputRequest
    texts: Texts
    method: str
    importance: Path | None = None
    remake: bool = False
    seed: int = 0
    train_yaml: Path | None = None
    next_yaml: Path | None = None

    @property
    def importance_path(self) -> Path:
        """The file of what was measured."""
        return self.importance or self.output.folder.absolute().parent / f"{model_name(self.model)}.importance.npz"

    @property
    def work(self) -> Path:
        """The output for which a scratch folder is made."""
        return self.output.folder.with_name(self.output.folder.name + ".work")

    def collect(self, problems: Problems) -> None:
        """Add every option that does not fit."""
        self.texts.collect(problems)
        if (self.train_yaml is None) != (self.next_yaml is None):
            problems.add("--next_yaml and --train_yaml belong together", "give both, or none")
        if self.train_yaml and not self.train_yaml.is_file():
            problems.add(f"--train_yaml '{self.train_yaml}' is no file", "give the YAML of a training run")
        if self.next_yaml and self.next_yaml.suffix not in (".yaml", ".yml"):
            problems.add(f"--next_yaml '{self.next_yaml}'", "give the name of a .yaml file")
        if self.next_yaml and self.train_yaml and self.next_yaml.resolve() == self.train_yaml.resolve():
            problems.add(f"--next_yaml '{self.next_yaml}' is the --train_yaml", "choose another name")
        out, path = self.output.folder.resolve(), self.importance_path
        if path.suffix != ".npz":
            problems.add(f"--importance '{path}'", "give the name of an .npz file")
        if out == path.resolve() or out in path.resolve().parents:
            problems.add(f"--importance '{path}' lies in the output", "choose another place")
        if self.seed < 0:
            problems.add(f"--seed {self.seed}", "give 0 or more")

    def check(self) -> None:
        """What can be judged before the model is read.

        Raises:
            UserError: options that do not fit, or outputs that exist.
        """
        problems = Problems("options")
        self.collect(problems)
        problems.raise_if_any()
        check_output(self.output, [self.model, *self.texts.calibration, *self.texts.held_out])
        if self.next_yaml:
            refuse_existing(self.next_yaml, self.output.overwrite)
        if self.train_yaml:
            load_yaml(self.train_yaml)


@dataclass(frozen=True, kw_only=True)
class ShapeRequest(OneShotRequest):
    """A cut to ``sizes``, or by ``fewer_parameters`` of the whole model along ``axes`` (None: the width of feed-forward
    parts). ``bias``: what is cut leaves its mean as a bias (FLAP)."""

    sizes: Mapping[str, int] = field(default_factory=dict)
    fewer_parameters: float | None = None
    axes: Sequence[str] | None = None
    refit: str = NONE
    bias: bool = False

    def collect(self, problems: Problems) -> None:
        """Add every option that does not fit."""
        super().collect(problems)
        problems.one_of("--method", self.method, tuple(METHODS))
        problems.one_of("--refit", self.refit, REFITS)
        if bool(self.sizes) == (self.fewer_parameters is not None):
            problems.add("the size comes from --target or from --fewer_parameters", "give one of the two")
        if self.axes is not None and self.fewer_parameters is None:
            problems.add("--axes without --fewer_parameters", "it says where that takes from: leave it out")
        if self.bias and self.method != "flap":
            problems.add(f"--bias with --method {self.method}", "it belongs to flap: leave it out")
        if self.bias and self.refit != NONE:
            problems.add(f"--bias beside --refit {self.refit}", "both make up for the same: give one")


@dataclass(frozen=True, kw_only=True)
class DepthRequest(OneShotRequest):
    """A cut to ``keep`` whole layers, or by ``fewer_parameters``. ``order_tokens``: of the calibration text, by which
    "ppl" tries to leave out each layer."""

    keep: int | None = None
    fewer_parameters: float | None = None
    order_tokens: int = 4096

    def collect(self, problems: Problems) -> None:
        """Add every option that does not fit."""
        super().collect(problems)
        problems.one_of("--method", self.method, DEPTHS)
        problems.positive("--order_tokens", self.order_tokens)
        if (self.keep is None) == (self.fewer_parameters is None):
            problems.add("the number of layers comes from --keep or from --fewer_parameters", "give one of the two")
        if self.keep is not None:
            problems.positive("--keep", self.keep)
