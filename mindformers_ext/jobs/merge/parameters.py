# SPDX-License-Identifier: Apache-2.0
"""The parameters of one tensor of a merge, found through the scopes in their order, checked against the method.

A model's own parameters, then the slice's, the module's, the file's, the method's default. Parameters that a method has
once for all models are not looked for among a model's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mindformers_ext.core.errors import Problems, nearest
from mindformers_ext.jobs.merge.config import LayerSource, MergeConfig, Scope, Slice
from mindformers_ext.jobs.merge.values import Scalar, lookup, numbers_of
from mindformers_ext.surgery.merge.settings import Method, Parameter, Settings

# Words of mergekit's methods: with another method they mean nothing, but they are no typo either.
FAMILIAR = frozenset(
    "weight density gamma epsilon scale t normalize int8_mask rescale lambda filter_wise select_topk "
    "nuslerp_flatten nuslerp_row_wise max_iter tol normalize_weights eps r alpha".split()
)


class Resolver:
    """Finds parameters; what is missing or out of range goes to ``problems``, each fault once."""

    def __init__(self, config: MergeConfig, method: Method, seed: int, problems: Problems) -> None:
        """Check every value given, then wait for tensors."""
        self._config, self._method, self._seed, self._problems = config, method, seed, problems
        self._known = {parameter.name: parameter for parameter in method.parameters}
        self._told: set[tuple[str, str]] = set()
        self._notes: list[str] = []
        self._strange: list[str] = []
        for where, scope, own in self._places():
            for name, setting in scope.items():
                self._check(name, where, own, numbers_of(setting))

    def settings(
        self, out: str, part: Slice, sources: Sequence[LayerSource], names: Mapping[str, str], t: float
    ) -> Settings:
        """All parameters of output tensor ``out``; ``names`` are the tensors of the sources by model."""
        outer = [part.parameters, *self._config.parameters]
        shared = {
            p.name: self._find(p, [(scope, out) for scope in outer], t, out, "")
            for p in self._method.parameters
            if not p.per_input
        }
        each = []
        for source in sources:
            scopes = [(scope, names[source.model]) for scope in (source.parameters, *outer)]
            each.append(
                {p.name: self._find(p, scopes, t, out, source.model) for p in self._method.parameters if p.per_input}
            )
        for source, values in zip(sources, each, strict=True):
            self._check_band(source.model, out, values)
        mode: Any = self._config.compat["rescale_mode"]
        return Settings(shared, tuple(each), self._seed, mode)

    def report(self, notes: list[str], problems: Problems, strict: bool) -> None:
        """Say what parameters mean nothing; with ``strict`` as problems."""
        notes += self._notes
        for line in self._strange:
            if strict:
                problems.add(line, "remove it (--strict)")
            else:
                notes.append(f"{line}: it has no effect")

    def _places(self) -> list[tuple[str, Scope, bool]]:
        """Every scope of the file: its name, its settings, whether it is a model's own."""
        module, top = self._config.parameters
        places = [("parameters", top, False), ("modules.default.parameters", module, False)]
        for number, part in enumerate(self._config.slices):
            places.append((f"slices[{number}].parameters", part.parameters, False))
            places += [(f"the parameters of '{source.model}'", source.parameters, True) for source in part.sources]
        return places

    def _check(self, name: str, where: str, own: bool, values: list[Scalar]) -> None:
        parameter = self._known.get(name)
        if parameter is None:
            known = sorted(self._known)
            why = f"does not belong to {self._method.name}" if name in FAMILIAR else "is unknown"
            advice = "" if name in FAMILIAR else f" ({nearest(name, known)})" if known else ""
            self._strange.append(f"parameter '{name}' in {where} {why}{advice}")
            return
        if own and not parameter.per_input:
            self._strange.append(
                f"parameter '{name}' in {where} is not read there, only in parameters of the file or a slice"
            )
        for value in values:
            fault = _fault(parameter, value)
            if fault:
                self._problems.add(f"{name} in {where} is {value!r}", fault)

    def _find(self, parameter: Parameter, scopes: list[tuple[Scope, str]], t: float, out: str, model: str) -> Scalar:
        value = lookup(scopes, parameter.name, t)
        if value is None:
            value = parameter.default
        if value is None:
            if (parameter.name, model) not in self._told:
                self._told.add((parameter.name, model))
                whose, where = (f" for '{model}'", " of that model") if model else ("", "")
                found = f"{self._method.name} needs {parameter.name}{whose}, and none is given for '{out}'"
                self._problems.add(found, f"write {parameter.name} under parameters{where}")
            return 0.0
        return bool(value) if parameter.is_bool else value

    def _check_band(self, model: str, out: str, values: Mapping[str, Scalar]) -> None:
        """della: density +- epsilon must be probabilities."""
        if "epsilon" not in values or ("epsilon", model) in self._told or values["density"] in (0.0, 1.0):
            return
        density, epsilon = values["density"], values["epsilon"]
        if density - epsilon < 0 or density + epsilon > 1:
            self._told.add(("epsilon", model))
            self._problems.add(
                f"density {density} and epsilon {epsilon} of '{model}' for '{out}'",
                "density - epsilon and density + epsilon must lie between 0 and 1",
            )


def _fault(parameter: Parameter, value: Scalar) -> str | None:
    if parameter.is_bool:
        return None if value in (0, 1) else "write true or false"
    if isinstance(value, bool):
        return "write a number"
    if value != value or abs(value) == float("inf"):
        return "write a finite number"
    low, high = parameter.low, parameter.high
    if (low is not None and value < low) or (high is not None and value > high):
        return f"write a number from {low:g}" + (f" to {high:g}" if high is not None else " on")
    if parameter.whole and value != int(value):
        return "write a whole number"
    return None
