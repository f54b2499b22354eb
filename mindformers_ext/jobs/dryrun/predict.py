# SPDX-License-Identifier: Apache-2.0
"""What a prediction's dry run compiles: the largest graphs that ``jobs.predict.predict`` would run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindformers_ext.core.cluster.tensor_parallel import check_tensor_parallel
from mindformers_ext.core.config.sampling import sampling_from_yaml
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.jobs.predict.generate import Shape, bucket
from mindformers_ext.jobs.predict.network import asked_batch, device_of, uses_cache
from mindformers_ext.jobs.run.checks import generates_here


def check_prediction(config: Mapping[str, Any], spec: NetworkSpec) -> list[str]:
    """Whether ``config`` is a prediction of ours, cut as it has to be; returns notes.

    Raises:
        UserError: MindFormers would answer, or another split than model_parallel over all devices.
    """
    if not generates_here(config):
        raise UserError(
            "a dry run compiles predictions of our networks alone: LlamaForCausalLM with experts, "
            "MixtralForCausalLM, PortableLlamaForCausalLM; without pet_config and adapter_id"
        )
    device_of(config)
    return check_tensor_parallel(spec)


def prediction_shape(config: Mapping[str, Any], spec: NetworkSpec) -> Shape:
    """The largest graphs that the configuration leads to: prompts so long that their answers just fit.

    Rows are ``predict_batch_size``, or ``model_config.batch_size``.
    """
    words, model = config["model"]["model_config"], spec.model
    sampling = sampling_from_yaml(words, (model.eos_token_id, *model.more_eos_token_ids), int(config.get("seed") or 0))
    new = min(sampling.max_new_tokens or 1, spec.seq_length - 1)
    longest = min(spec.seq_length, sampling.longest(spec.seq_length - new))
    positions = bucket(longest)
    rows = asked_batch(config) or spec.batch_size
    return Shape(rows, min(bucket(max(1, longest - new)), positions) if uses_cache(config) else positions, positions)
