# SPDX-License-Identifier: Apache-2.0
"""What a carving is asked for, and what of it can be judged before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from pathlib import Path

from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.families import MIXTRAL, QWEN2_MOE, THRESHOLD
from mindformers_ext.core.spec import ModelSpec
from mindformers_ext.formats.dtypes import float_dtype
from mindformers_ext.jobs.experts.carve.losses import LADDERS, NO_LADDER
from mindformers_ext.jobs.experts.texts import Texts
from mindformers_ext.jobs.experts.v2.forms import PLAIN, SHARED, Form
from mindformers_ext.jobs.merge.output import OutputRequest
from mindformers_ext.surgery.experts.carve.recipes import (
    MEAN_GATE,
    METHODS,
    RIDGE,
    ROUTERS,
    STATIC,
    Recipe,
)
from mindformers_ext.surgery.prune.least_squares import LEAST_SQUARES, REFITS

OURS, MEASURED_ONLY = "ours", "none"
FORMS: dict[str, Form] = {QWEN2_MOE.name: SHARED, MIXTRAL.name: PLAIN}  # stock ones
FORMATS = (*FORMS, OURS, MEASURED_ONLY)
IN_FILES = (RIDGE, MEAN_GATE)  # routers of one matrix
OURS_ALONE = (THRESHOLD,)  # and those that files of ours can hold besides
CHOICES = ("emp", "cmoe", "expertweaver", "static")  # of METHODS, and a static cut
KEPT_STATIC = "rel"  # what the latter keeps
AUTO, LEAST_ACTIVE = "auto", 3  # a word of --shared; with less of --active there is nothing to try


def recipe_of(method: str, router: str | None, refit: str | None, sizes: tuple[int, int, int], seed: int) -> Recipe:
    """The recipe of a word of CHOICES; router and refit are the method's where they are None. ``sizes``: experts,
    shared, active.

    Raises:
        UserError: no such method, or a router of a static cut.
    """
    problems = Problems("options")
    problems.one_of("--method", method, CHOICES)
    known = METHODS.get(method)
    if known is None and router is not None:
        problems.add(f"--router {router} with --method {method}", "nothing is chosen: leave it out")
    problems.raise_if_any()
    return Recipe(
        method=method if known else KEPT_STATIC,
        router=router or (known.router if known else RIDGE),
        refit=refit or (known.refit if known else LEAST_SQUARES),
        experts=sizes[0],
        shared=sizes[1],
        active=sizes[2],
        seed=seed,
    )


@dataclass(frozen=True, kw_only=True)
class CarveRequest:
    """A dense folder to carve. ``form``: a word of FORMATS; with MEASURED_ONLY the output holds the losses alone.
    ``dtype`` None keeps types, routers being float32. ``auto``: S is to be found, of the recipe's shared + active."""

    model: Path
    output: OutputRequest
    texts: Texts
    recipe: Recipe
    form: str = QWEN2_MOE.name
    ladder: str = LADDERS[0]
    dtype: str | None = None
    auto: bool = False

    @property
    def work(self) -> Path:
        """Where a killed run leaves what it has done."""
        place = self.output.folder.absolute()
        return place.with_name(f"{place.name}.carving")

    def check(self) -> None:
        """``UserError`` lists what can be judged without reading anything."""
        recipe, problems = self.recipe, Problems("options")
        problems.one_of("--router", recipe.router, tuple(ROUTERS))
        problems.one_of("--refit", recipe.refit, REFITS)
        problems.one_of("--format", self.form, FORMATS)
        problems.one_of("--ladder", self.ladder, LADDERS)
        if recipe.seed < 0:
            problems.add(f"--seed {recipe.seed}", "seeds are 0 or more")
        self._check_sizes(problems)
        if self.form != MEASURED_ONLY and recipe.method in STATIC:
            problems.add(
                f"--method static with --format {self.form}",
                f"a static cut is no mixture: give --format {MEASURED_ONLY}, or write it with tools/prune.py shape",
            )
        elif self.form in FORMS and recipe.router in OURS_ALONE:
            problems.add(
                f"--router {recipe.router} with --format {self.form}",
                f"no stock file holds such a router: give --format {OURS}, or --router {' or '.join(IN_FILES)}",
            )
        elif self.form != MEASURED_ONLY and recipe.router not in (*IN_FILES, *OURS_ALONE):
            problems.add(
                f"--router {recipe.router} with --format {self.form}",
                f"no file holds such a router: give --router {' or '.join(IN_FILES)}, or --format {MEASURED_ONLY}",
            )
        if self.form == MEASURED_ONLY and (self.dtype or self.output.to_mindspore):
            problems.add(f"--dtype or --to_mindspore with --format {MEASURED_ONLY}", "leave them out")
        problems.raise_if_any()
        if self.dtype:
            float_dtype(self.dtype)
        self.texts.check()

    def _check_sizes(self, problems: Problems) -> None:
        recipe = self.recipe
        problems.positive("--experts", recipe.experts)
        if self.auto:
            self._check_auto(problems)
            return
        problems.positive("--active", recipe.active)
        if recipe.shared < 0:
            problems.add(f"--shared {recipe.shared}", "give 0 or more")
        elif recipe.shared + recipe.active > recipe.experts:
            problems.add(
                f"--shared {recipe.shared} and --active {recipe.active} of --experts {recipe.experts}",
                "both together are at most all",
            )
        self._check_cut(problems)
        if self.form == QWEN2_MOE.name and recipe.shared < 1:
            problems.add(
                f"--format {self.form} with --shared 0", f"give --format {MIXTRAL.name}, or --shared 1 or more"
            )
        if self.form == MIXTRAL.name and recipe.shared > 0:
            problems.add(
                f"--format {self.form} with --shared {recipe.shared}",
                f"a {MIXTRAL.name} has no shared expert: give --format {QWEN2_MOE.name}, or --shared 0",
            )

    def _check_cut(self, problems: Problems) -> None:
        """A static cut keeps as many neurons as a token passes, and must leave some out."""
        recipe = self.recipe
        if 0 < recipe.experts == recipe.shared + recipe.active and (
            recipe.method in STATIC or self.ladder != NO_LADDER
        ):
            beside = f", or --ladder {NO_LADDER}" if recipe.method not in STATIC else ""
            problems.add(
                f"all of --experts {recipe.experts} are active", f"a static cut would be no cut: give fewer{beside}"
            )

    def _check_auto(self, problems: Problems) -> None:
        recipe = self.recipe
        total = recipe.shared + recipe.active
        if not LEAST_ACTIVE <= total <= recipe.experts:
            problems.add(
                f"--shared {AUTO} with --active {total} of --experts {recipe.experts}",
                f"--active counts the shared groups too: give {LEAST_ACTIVE} or more, and at most all",
            )
        self._check_cut(problems)
        if recipe.method in STATIC:
            problems.add(f"--shared {AUTO} with --method static", "nothing is chosen: give a number")
        if self.form == MIXTRAL.name:
            problems.add(f"--shared {AUTO} with --format {self.form}", "it has no shared expert: give --shared 0")

    def check_model(self, spec: ModelSpec) -> None:
        """``UserError``: the model's neurons do not make so many experts."""
        width, experts = spec.intermediate_size, self.recipe.experts
        if width % experts:
            near = sorted(divisors(width), key=lambda number: abs(number - experts))[:4]
            raise UserError(
                f"--experts {experts}: intermediate_size={width} is not a multiple of it: give a divisor, such as "
                f"{', '.join(map(str, sorted(near)))}"
            )


def divisors(number: int) -> set[int]:
    """All of them."""
    small = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return {*small, *(number // n for n in small)}


LOSSES = "ladder.json"
