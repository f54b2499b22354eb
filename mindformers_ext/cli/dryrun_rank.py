# SPDX-License-Identifier: Apache-2.0
"""``python -m mindformers_ext.cli.dryrun_rank ORDER``: compile ranks; started by the dry run, not by users.

The environment puts MindSpore on stand-ins of CANN. Each rank's result goes beside its request.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mindformers_ext.jobs.dryrun.forks import Request, Tell, Work, serve


def main(argv: Sequence[str] | None = None) -> int:
    """Compile every rank of the order, each in a fork of this process."""
    (order,) = sys.argv[1:] if argv is None else argv
    serve(Path(order), _loaded)
    return 0


def _loaded() -> Work:
    """Import what all ranks need. Nothing of MindSpore may start before the fork: its threads would not be in it."""
    import mindformers_ext.mf.dryrun  # noqa: F401

    return compile_request


def compile_request(request: Request, tell: Tell) -> None:
    """Compile one rank and write its result, and ``tell`` each phase; an exception ends its process and stands in its
    log."""
    from mindformers_ext.jobs.dryrun.facts import prediction_facts, rank_facts
    from mindformers_ext.jobs.dryrun.ranks import GRAPHS, keep_result
    from mindformers_ext.jobs.predict.generate import Shape
    from mindformers_ext.mf.dryrun import compile_prediction, compile_step

    folder = Path(request["folder"])
    if request["shape"]:
        found = compile_prediction(request["config"], Shape(**request["shape"]), request["world"], tell)
        facts = prediction_facts(folder / GRAPHS, found.shapes, request["world"], found.graphs)
        keep_result(
            folder,
            request,
            facts,
            start_seconds=request["start_seconds"],
            build_seconds=found.build_seconds,
            compile_seconds=found.compile_seconds,
        )
        return
    step = compile_step(request["config"], request["rows"], folder, request["native"], tell)
    facts = rank_facts(folder / GRAPHS, step.shapes, step.trained)
    keep_result(
        folder,
        request,
        facts,
        batch=step.batch,
        start_seconds=request["start_seconds"],
        build_seconds=step.build_seconds,
        compile_seconds=step.compile_seconds,
    )


if __name__ == "__main__":
    raise SystemExit(main())
