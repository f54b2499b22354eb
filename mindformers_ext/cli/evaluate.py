# SPDX-License-Identifier: Apache-2.0
"""``run_mindformer.py --run_mode eval`` on the terminal: perplexity, how it was taken, and transformers' beside it."""

from __future__ import annotations

import sys
from pathlib import Path

from mindformers_ext.core.config.run import RunSpec
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.jobs.predict.evaluate import Perplexity, open_evaluation, write_results


def evaluate(run: RunSpec, spec: NetworkSpec, stride: int | None, folder: str | None) -> int:
    """Score the data of ``run``; 0 when done."""
    job = open_evaluation(run, spec, stride, Path(folder) if folder else None)
    ours = job.run()
    for note in job.notes:
        print(f"note: {note}", file=sys.stderr)
    print(_line("perplexity", ours), flush=True)
    print(
        f"{job.what}: {ours.tokens} tokens predicted in {ours.windows} windows of up to {job.window} tokens, stride "
        f"{job.stride}; {ours.tokens / ours.seconds:.0f} tokens/s"
    )
    reference = job.reference() if folder else None
    if reference:
        print(_line("transformers", reference))
        difference = abs(ours.perplexity / reference.perplexity - 1)
        print(f"relative difference of the perplexities: {difference:.1e}")
    print(f"note: kept in {write_results(job, ours, reference)}", file=sys.stderr)
    return 0


def _line(name: str, found: Perplexity) -> str:
    return f"{name}: {found.perplexity:.6g} (loss {found.loss:.6f})"
