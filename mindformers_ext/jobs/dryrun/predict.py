# SPDX-License-Identifier: Apache-2.0
"""What a prediction's dry run compiles: the largest graphs that ``jobs.predict.predict`` would run."""

from __future__ import annotations

from mindformers_ext.core.cluster.tensor_parallel import check_tensor_parallel
from mindformers_ext.core.config.run import Runner, RunSpec
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.families import FAMILIES, GENERIC_NAMES
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.jobs.predict.generate import Shape, bucket


def check_prediction(run: RunSpec, spec: NetworkSpec) -> list[str]:
    """Whether ``run`` is a prediction of ours, cut as it has to be; returns notes.

    Raises:
        UserError: MindFormers would answer, or another split than model_parallel over all devices.
    """
    if run.runner is not Runner.OWN_PREDICTION:
        names = ", ".join(name for row in FAMILIES.values() for _, name in row.yaml_names)
        raise UserError(
            f"a dry run compiles predictions of our networks alone: {GENERIC_NAMES[1]} with experts, {names}; without "
            "pet_config and adapter_id"
        )
    return check_tensor_parallel(spec)


def prediction_shape(run: RunSpec, spec: NetworkSpec) -> Shape:
    """The largest graphs that ``run`` leads to: prompts so long that their answers just fit.

    Rows are ``predict_batch_size``, or ``model_config.batch_size``.
    """
    assert run.sampling is not None
    new = min(run.sampling.max_new_tokens or 1, spec.seq_length - 1)
    longest = min(spec.seq_length, run.sampling.longest(spec.seq_length - new))
    positions = bucket(longest)
    rows = run.rows or spec.batch_size
    return Shape(rows, min(bucket(max(1, longest - new)), positions) if run.cached else positions, positions)
