# SPDX-License-Identifier: Apache-2.0
"""``python -m mindformers_ext.cli.dryrun_rank REQUEST``: compile one rank; started by the dry run, not by users.

The environment names the rank and puts MindSpore on stand-ins of CANN. The result goes beside the request.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Compile and write the result; an exception ends the process and stands in its log."""
    started = time.time()
    (name,) = sys.argv[1:] if argv is None else argv
    request = json.loads(Path(name).read_text(encoding="utf-8"))
    folder = Path(request["folder"])
    from mindformers_ext.jobs.dryrun_facts import prediction_facts, rank_facts
    from mindformers_ext.jobs.dryrun_ranks import GRAPHS, keep_result
    from mindformers_ext.jobs.generate import Shape
    from mindformers_ext.mf.dryrun import compile_prediction, compile_step

    imported = time.time()
    if request["shape"]:
        found = compile_prediction(request["config"], Shape(**request["shape"]), request["world"])
        facts = prediction_facts(folder / GRAPHS, found.shapes, request["world"], found.graphs)
        keep_result(folder, request, facts, start_seconds=imported - started, build_seconds=found.build_seconds,
                    compile_seconds=found.compile_seconds)  # fmt: skip
        return 0
    step = compile_step(request["config"], request["rows"], folder, request["native"])

    facts = rank_facts(folder / GRAPHS, step.shapes, step.trained)
    keep_result(folder, request, facts, batch=step.batch, start_seconds=imported - started,
                build_seconds=step.build_seconds, compile_seconds=step.compile_seconds)  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
