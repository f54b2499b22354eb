# SPDX-License-Identifier: Apache-2.0
"""Our networks as MindFormers models: what its Trainer, evaluation metrics and text generation call."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindformers.models.modeling_utils import PreTrainedModel
from mindformers.tools.logger import logger
from mindformers.tools.utils import get_predict_run_mode, get_real_group_size
from mindspore import Tensor, ops

from mindformers_ext.core.config.train import ParameterGroup, group_of
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.families import implied_family
from mindformers_ext.mf.config import PortableLlamaConfig
from mindformers_ext.mf.generate import CachedGenerator, announce, can_answer, settled_config
from mindformers_ext.ms.causal_lm import build_causal_lm
from mindformers_ext.ms.l0 import add_masks
from mindformers_ext.ms.lora import add_lora
from mindformers_ext.ms.ops.select import select_operators
from mindformers_ext.ms.recompute import recompute_layers


class PortableLlamaForCausalLM(PreTrainedModel):
    """A network of a family of ours, of portable operators; MindFormers' own run on Ascend alone.

    ``mf.register`` names a class after each family (``core.families``).

    Parameter names are MindFormers' (``model.layers.0.attention.wq.weight``): this class adds no prefix.

    ``construct`` returns, by phase:

    - training: the scalar loss (LM loss plus routing losses), or all LossTerms once ``report_terms`` was called,
      as our train step does;
    - evaluation: (logits, tokens, mask) for ``PerplexityMetric``, whose result equals the LM loss of training;
      rows of ``seq_length`` and of ``seq_length + 1`` tokens both work;
    - prediction: logits (B*S, V), rows in order.

    Evaluation and prediction route without dropping tokens.
    """

    config_class = PortableLlamaConfig
    base_model_prefix = ""

    def __init__(self, config: PortableLlamaConfig) -> None:
        keeps_cache = bool(config.use_past)
        config.use_past = False  # MindFormers' own cache needs Ascend's paged attention
        super().__init__(config, auto_prefix=False)
        spec = config.network_spec(get_real_group_size())
        if config.family.has_experts and spec.model.moe is None:
            raise UserError(
                f"{type(self).__name__} needs experts, moe_config.expert_num is 1: set expert_num and "
                f"num_experts_chosen, or use {implied_family(has_experts=False).yaml_names[0][1]} for a dense network"
            )
        self.spec = spec
        self.causal_lm = build_causal_lm(spec)
        lora = config.lora()
        self.adapted = add_lora(self.causal_lm, lora, spec) if lora else []
        self.pruning = config.pruning()
        if self.pruning:
            add_masks(self.causal_lm, self.pruning)
            logger.info("Masks: %s", ", ".join(self.pruning.modules))
        if groups := config.groups():
            self._freeze(groups)
        if lora:
            logger.info(
                "LoRA: rank %d, scale %g, beside %d layers: %s ...",
                lora.rank,
                lora.scale,
                len(self.adapted),
                ", ".join(self.adapted[:4]),
            )
        self.generator = self._own_generator(lora is not None) if keeps_cache else None
        self.predicts = get_predict_run_mode()
        self._mark_recompute(config)
        self.returns_terms = False
        self.seq_length = spec.seq_length
        self.pad_token_id = spec.model.pad_token_id
        self.ignore_token_id = spec.model.ignore_token_id
        self.argmax = _argmax
        self.causal_lm.keep_all_in_evaluation()
        if spec.parallel.pipeline_stage > 1:  # otherwise every micro batch would be compiled anew
            select_operators().reuse(self)
        self.load_checkpoint(config)

    def _freeze(self, groups: tuple[ParameterGroup, ...]) -> None:
        """Leave untrained what ``groups`` do not train."""
        frozen = [item for item in self.causal_lm.get_parameters() if not group_of(item.name, groups).trained]
        for parameter in frozen:
            parameter.requires_grad = False
        logger.info("%d weights do not learn", len(frozen))

    def _mark_recompute(self, config: PortableLlamaConfig) -> None:
        """Mark the layers that compute their activations again; other devices than Ascend have memory to spare."""
        if self.predicts:
            return
        recompute = config.recompute_spec()
        if not recompute.is_on:
            return
        if not select_operators().lazy_inline:
            logger.info("recompute_config has no effect on this device, which keeps all activations")
        else:
            recompute_layers(self.causal_lm, recompute)
            parts = "".join(f", {part} of {len(layers - recompute.layers)}" for part, layers in recompute.selected)
            logger.info("Recompute: %d of %d layers%s", len(recompute.layers), self.spec.model.num_hidden_layers, parts)

    def _own_generator(self, adapted: bool) -> CachedGenerator | None:
        """For ``use_past``, where the network is one that ``ms.generate`` has graphs for."""
        grouped = self.spec.model.moe is not None and self.spec.model.moe.use_gmm
        if adapted or grouped or get_real_group_size() > 1:
            logger.info("use_past becomes False: generate() computes the whole text for every token")
            return None
        announce()
        return CachedGenerator(self.causal_lm, self.spec.seq_length)

    def generate(
        self,
        input_ids: Any,
        generation_config: Any = None,
        logits_processor: Any = None,
        streamer: Any = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """MindFormers' ``generate`` (see there), over a cache where the configuration has ``use_past``."""
        if self.generator is not None and not logits_processor:
            rows = np.array(input_ids)
            rows = rows.reshape(-1, rows.shape[-1])
            wanted, unknown = settled_config(self.config, generation_config, dict(kwargs))
            if not unknown and can_answer(wanted, len(rows), streamer):
                training = self.training
                found = self.generator.generate(rows, wanted, seed, streamer)
                self.set_train(training)
                return found
        return super().generate(input_ids, generation_config, logits_processor, streamer, seed, **kwargs)

    def report_terms(self) -> None:
        """From now on training returns (loss, lm_loss, aux_loss, expert_load, dropped) instead of the loss."""
        self.returns_terms = True

    def construct(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        noise_keys: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> Any:
        """See the class. ``input_ids``, ``labels`` and the ``document_ids`` of packed rows (B, T), int32;
        T = seq_length + 1 in training, which also has the keys of the noise where gates add it (``mf.noise``)."""
        if self.training:
            terms = self.causal_lm.losses(input_ids, labels, noise_keys, document_ids)
            if self.returns_terms:
                return terms
            return terms[0]
        if self.predicts:
            logits = ops.cast(self.causal_lm(input_ids), ms.float32)
            return logits.reshape((-1, logits.shape[-1]))
        return self.evaluated(input_ids, labels)

    def evaluated(self, input_ids: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(logits (B, T, V), tokens (B, T), mask (B, T)); the metric compares logits[:, :-1] with tokens[:, 1:]."""
        width = input_ids.shape[1]
        if width > self.seq_length:
            logits = ops.cast(self.causal_lm(input_ids[:, :-1]), ms.float32)
            logits = ops.cat((logits, logits[:, -1:]), 1)  # never read: there is no token after the last
        else:
            logits = ops.cast(self.causal_lm(input_ids), ms.float32)
        weight = ops.cast(input_ids[:, :-1] != self.pad_token_id, ms.float32)
        if labels is not None:
            weight = weight * ops.cast(labels[:, 1:] != self.ignore_token_id, ms.float32)
        mask = ops.cat((ops.zeros_like(weight[:, :1]), weight), 1)
        return logits, input_ids, mask

    def prepare_inputs_for_generation(self, input_ids: np.ndarray, **_: Any) -> dict[str, Tensor]:
        """The padded prompts (B, seq_length) as int32."""
        return {"input_ids": Tensor.from_numpy(input_ids.astype(np.int32))}

    def prepare_inputs_for_predict_layout(self, input_ids: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Inputs with which MindFormers compiles the network before it transforms a checkpoint."""
        labels = Tensor(kwargs["labels"], ms.int32) if "labels" in kwargs else None
        return Tensor(input_ids, ms.int32), labels

    def get_model_parameters(self, only_trainable: bool = True) -> set[Any]:
        """The network's parameters, as MindFormers lists them before training."""
        return set(self.trainable_params() if only_trainable else self.get_parameters())


def _argmax(logits: Tensor, axis: int) -> Tensor:
    """MindFormers' greedy choice takes ``mint.argmax``, which has no CPU kernel."""
    return ops.argmax(logits, axis)
