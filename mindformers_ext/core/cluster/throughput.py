# SPDX-License-Identifier: Apache-2.0
"""Tokens a second that one device may reach: an estimate from a published share of a device's peak, no measurement.

tokens/s = MFU * peak * (1 - bubble) / (F * (1 + repeated)), with F the operations of the model per token: 6 per weight
that a token passes (Kaplan et al. 2020, arXiv:2001.08361, section 2.1) and causal attention (Chowdhery et al. 2022,
arXiv:2204.02311, appendix B, of which a causal row sees half); ``repeated`` and ``bubble`` as in
``core.cluster.split_cost``. The published share holds what its own job repeated, waited and sent, which is not told:
the first two make the estimate low, and a split that sends more than that job reaches less.
"""

from __future__ import annotations

from dataclasses import replace

from mindformers_ext.core.cluster.anchors import ANCHORS, Anchor
from mindformers_ext.core.cluster.memory import StepSettings
from mindformers_ext.core.cluster.placement import WIDTH
from mindformers_ext.core.cluster.split_cost import head_operations, layer_operations, pipeline_bubble
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.spec import NetworkSpec, ParallelSpec


def model_operations(spec: NetworkSpec) -> float:
    """Operations of a training step's products per token, whatever the split: of the experts that a token chooses, as
    if each had exactly its tokens; nothing repeated, nothing padded."""
    model = spec.model
    if model.moe:
        model = replace(model, moe=replace(model.moe, capacity_factor=0.0))
    whole = replace(spec, model=model, batch_size=1, parallel=ParallelSpec())
    forward = sum(layer_operations(whole, layer=layer) for layer in range(model.num_hidden_layers))
    return 3 * (forward + head_operations(whole)) / spec.seq_length  # backward takes two


def anchor_for(spec: NetworkSpec, settings: StepSettings, device: str) -> Anchor:
    """The figure published for ``device`` (whatever its spaces, hyphens and capitals), as far as it tells of this job.

    Raises:
        UserError: it does not, with what keeps it from that.
    """
    found = next((anchor for anchor in ANCHORS if _bare(anchor.device) == _bare(device)), None)
    if found is None:
        known = ", ".join(anchor.device for anchor in ANCHORS)
        raise UserError(f"nothing published for --device {device!r} is known here, only for {known}")
    if spec.model.moe is None:
        raise UserError("the published figure is of a mixture of experts, and none is read in this file")
    if WIDTH[spec.numerics.compute_dtype] != 2:
        raise UserError(
            f"the peak is that of 16 bits, and compute_dtype is {spec.numerics.compute_dtype}: set bfloat16 or float16"
        )
    if settings.lora:
        raise UserError("the published figure is of training all weights, and pet_config trains adapters")
    return found


def _bare(name: str) -> str:
    return "".join(sign for sign in name.lower() if sign.isalnum())


def estimated_tokens(spec: NetworkSpec, settings: StepSettings, repeated: float, anchor: Anchor) -> float:
    """Tokens a second of one device, by the formula of this file."""
    reached = anchor.mfu * anchor.peak * (1 - pipeline_bubble(spec, settings))
    return reached / (model_operations(spec) * (1 + repeated))
