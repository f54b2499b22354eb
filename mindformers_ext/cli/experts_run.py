# SPDX-License-Identifier: Apache-2.0
"""``run``: all stages from one YAML, each with its own options; what is finished is not done again.

A section has the name of a stage and its options as keys. Keys outside the sections go to every stage that has such an
option, where it counts; what one stage writes is where the next one reads. What the split's method reads is made before
it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from mindformers_ext.cli.command import add_switch
from mindformers_ext.cli.experts_effects import without_effect
from mindformers_ext.core.config.file import load_yaml
from mindformers_ext.core.errors import Problems, UserError

FILES = ("gates", "grads", "distribution")  # stages of a LLaMA-MoE v2, which write a file
ORDER = (*FILES, "split", "importance", "features", "select", "convert", "align", "report")
BEFORE_SPLIT = {"gradient": "importance", "graph": "features"}  # method -> the stage whose output it reads
# what a stage reads: option, and the stage that writes it; the last that is there
READS = (
    *(("score_file_path", "importance"), ("score_file_path", "grads"), ("hidden_features_path", "features")),
    *(("split_file_path", "split"), ("select_file_path", "select")),
    *(("gate_weights_file", "gates"), ("neuron_indices_file", "split"), ("distribution_file", "distribution")),
)
SKIPS = ("convert", "align", "report")  # stages that write a whole once, where they are told to


def configure(parser: argparse.ArgumentParser) -> None:
    """The stage's options."""
    parser.add_argument("config", type=Path, metavar="YAML", help="for example configs/experts/tiny.yaml")
    add_switch(parser, "--overwrite", text="do every stage again")
    add_switch(parser, "--dry_run", "--dry-run", text="show the stages' commands and stop")


def run(words: argparse.Namespace) -> int:
    """Run the stages in their order."""
    for stage in read_stages(words.config):
        print("+ build_experts.py " + " ".join(stage.argv), flush=True)
        if words.dry_run:
            continue
        code = _done(stage) if not words.overwrite else None
        if code is None:
            code = _carry_out(stage, words.overwrite)
        if code:
            return code
    return 0


@dataclass(frozen=True)
class Stage:
    """One stage as a command line. ``output``: what it writes; ``place``: the folder that all stages share; ``before``:
    the digest of the stage before it, on whose output it stands."""

    name: str
    options: Mapping[str, Any]
    output: Path
    place: Path
    before: str

    @property
    def whole(self) -> bool:
        """Whether it writes a whole once, and does not look itself at what is there."""
        return self.name in (*SKIPS, *FILES) or (self.name == "split" and _is_plus(self.options))

    @property
    def argv(self) -> list[str]:
        """Its words, its name first."""
        return [self.name, *(word for name, value in self.options.items() for word in _option(name, value))]

    @property
    def digest(self) -> str:
        """A name for its options and those of all stages before it."""
        return sha256(json.dumps([self.before, self.argv]).encode()).hexdigest()


def read_stages(path: Path) -> Iterator[Stage]:
    """The stages of a YAML; each is made when the one before it has run, as it reads what that has written.

    Raises:
        UserError: an unknown key of any section, or one that is missing; all of them are listed.
    """
    config = load_yaml(path)
    problems = Problems(f"'{path}'")
    shared = {key: value for key, value in config.items() if key not in ORDER}
    known = {name: _known(name) for name in ORDER}
    for key in shared:
        if not any(key in options for options in known.values()):
            problems.add(f"{key} is an option of no stage", f"sections are {', '.join(ORDER)}")
    for name in ("model_path", "save_path"):
        if not isinstance(shared.get(name), str):
            problems.add(f"{name} is missing", "give the folder")
    sections = {name: config[name] or {} for name in ORDER if name in config}
    for name, section in sections.items():
        if not isinstance(section, Mapping):
            problems.add(f"{name} is no table of options", "write them below it, one a line")
            continue
        for key in section:
            if key not in known[name]:
                problems.add(f"{name}.{key} is no option of this stage", f"see build_experts.py {name} --help")
    problems.raise_if_any()
    return _stages(sections, shared, known)


def _stages(
    sections: Mapping[str, Mapping[str, Any]], shared: Mapping[str, Any], known: Mapping[str, frozenset[str]]
) -> Iterator[Stage]:
    made: dict[str, Stage] = {}
    for name in _order(sections, shared):
        if name in sections:
            made[name] = _stage(name, sections[name], shared, known[name], made)
            yield made[name]


def _order(sections: Mapping[str, Mapping[str, Any]], shared: Mapping[str, Any]) -> tuple[str, ...]:
    """All stages; the one that the split's method reads comes first."""
    method = sections.get("split", {}).get("method", shared.get("method"))
    first = tuple(stage for name, stage in BEFORE_SPLIT.items() if name == method)
    return (*first, *(name for name in ORDER if name not in first))


def _stage(
    name: str,
    section: Mapping[str, Any],
    shared: Mapping[str, Any],
    known: frozenset[str],
    made: Mapping[str, Stage],
) -> Stage:
    options = {key: value for key, value in shared.items() if key in known}
    options |= {key: str(made[stage].output) for key, stage in READS if key in known and stage in made}
    if name == "align" and "convert" in made:
        options["model_path"] = str(made["convert"].output)
    if name == "split" and "importance" in made:  # an expert for each data cluster, also before these are there
        of = _parsed("importance", made["importance"].options)
        same = {key: getattr(of, key) for key in ("kernel", "accumulate_level", "importance_type")}
        options = {"num_experts": of.num_clusters, **same} | options
    idle = without_effect(_parsed(name, {**options, **section}), _module(name))
    options = {key: value for key, value in options.items() if key not in idle}
    options |= section
    if name in SKIPS and "save_path" not in section:
        raise UserError(f"{name}.save_path is missing: give the folder that it writes")
    before = list(made.values())[-1].digest if made else ""
    return Stage(name, options, _output(name, options), Path(shared["save_path"]), before)


def _is_plus(options: Mapping[str, Any]) -> bool:
    from mindformers_ext.cli.experts_split import is_plus

    return is_plus(_parsed("split", options))


def _output(name: str, options: Mapping[str, Any]) -> Path:
    """The folder that a stage with these options writes."""
    if name in SKIPS:
        return Path(str(options["save_path"]))
    words = _parsed(name, options)
    if name in FILES:
        path: Path = _module(name).request_of(words).path
        return path
    if name == "split" and _is_plus(options):
        from mindformers_ext.cli.experts_split import plus_request_of

        return plus_request_of(words).path
    if name == "split":
        from mindformers_ext.cli.experts_split import request_of
        from mindformers_ext.jobs.experts.run_split import split_folder

        return split_folder(request_of(words))
    from mindformers_ext.jobs.experts.dense_model import model_name

    model = model_name(words.model_path)
    if name == "importance":
        from mindformers_ext.cli.experts_importance import request_of as importance_of
        from mindformers_ext.jobs.experts.importance import importance_folder

        return importance_folder(importance_of(words), model)
    if name == "features":
        from mindformers_ext.jobs.experts.feature_files import features_folder

        return features_folder(words.save_path, model)
    from mindformers_ext.jobs.experts.gate_files import gates_folder

    return gates_folder(words.save_path, model, words.num_experts, words.gate)


def _carry_out(stage: Stage, overwrite: bool) -> int:
    if stage.whole:
        return _write_whole(stage, overwrite)
    return _call(stage, overwrite)


def _call(stage: Stage, overwrite: bool) -> int:
    options = dict(stage.options) | ({"overwrite": True} if overwrite else {})
    code: int = _module(stage.name).run(_parsed(stage.name, options))
    return code


def _write_whole(stage: Stage, overwrite: bool) -> int:
    """A stage whose output this run, or a killed one of the same options, has begun is done again over it."""
    from mindformers_ext.jobs.experts.finished import has_begun, note_begun, note_done, note_ended

    place = (stage.place, stage.name, stage.digest)
    again = has_begun(*place)
    if not stage.output.exists():
        note_begun(*place)
    code = 1
    try:
        code = _call(stage, overwrite or again)
    finally:
        if code and not stage.output.exists():
            note_ended(stage.place)
    if not code:
        note_done(*place)
    return code


def _done(stage: Stage) -> int | None:
    """0 where an earlier run of the same options has finished this stage, else None."""
    from mindformers_ext.jobs.experts.finished import is_done

    if not stage.whole or not stage.output.exists() or not is_done(stage.place, stage.name, stage.digest):
        return None
    print(f"{stage.output} is there already")
    return 0


def _parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"build_experts.py {name}", allow_abbrev=False)
    _module(name).configure(parser)
    return parser


def _known(name: str) -> frozenset[str]:
    """The long options of a stage, as keys."""
    names = (word for action in _parser(name)._actions for word in action.option_strings)
    return frozenset(word[2:].replace("-", "_") for word in names if word.startswith("--")) - {"help"}


def _parsed(name: str, options: Mapping[str, Any]) -> argparse.Namespace:
    return _parser(name).parse_args([word for key, value in options.items() for word in _option(key, value)])


def _option(name: str, value: object) -> Iterator[str]:
    """``--name value`` as a command line has it; null leaves it out."""
    if value is None:
        return
    yield f"--{name}"
    if isinstance(value, Mapping):
        yield ",".join(f"{key}={item}" for key, item in value.items())
    else:
        yield from map(str, value if isinstance(value, list) else [value])


def _module(name: str) -> Any:
    from mindformers_ext.cli.experts import stage_module

    return stage_module(name)
