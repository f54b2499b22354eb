# SPDX-License-Identifier: Apache-2.0
"""MindFormers' ``generate`` over our own cache: the same call, the same kind of answer, without a pass over the whole
text for every token."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindformers.generation import GenerationConfig
from mindformers.tools.logger import logger

from mindformers_ext.core.config.sampling import SamplingSpec
from mindformers_ext.core.errors import Problems
from mindformers_ext.jobs.predict.generate import Generation
from mindformers_ext.ms.engine import MindSporeNetwork

SEEDS = 2**31  # without ``seed`` one is drawn from numpy's global generator, which MindFormers draws from
# What our loop does not do; MindFormers' own does, slowly.
OTHERWISE = ("return_dict_in_generate", "parallel_decoding", "renormalize_logits")


class CachedGenerator:
    """Answers to ``generate`` of one network. Its graphs stay compiled for later calls of the same size."""

    def __init__(self, causal_lm: ms.nn.Cell, seq_length: int) -> None:
        self._job = Generation(MindSporeNetwork(causal_lm), SamplingSpec(), seq_length, 1)
        self._seq_length = seq_length

    def generate(self, rows: np.ndarray, wanted: GenerationConfig, seed: int | None, streamer: Any) -> list[np.ndarray]:
        """Prompts and answers, each an int32 array, of ``rows`` (B, S) that are padded on the right.

        Raises:
            UserError: values out of range, an empty prompt, or one without room for an answer.
        """
        prompts = [_without_padding(row, wanted.pad_token_id) for row in rows]
        sampling = sampling_of(wanted, int(np.random.randint(SEEDS)) if seed is None else seed)
        self._check(prompts, sampling)
        if streamer is not None:
            streamer.put(rows)
        self._job.sampling, self._job.batch_size = sampling, len(prompts)

        def show(_: int, token: int) -> None:
            streamer.put(token)

        answers = list(self._job.answers(prompts, show if streamer is not None else None))
        if streamer is not None:
            streamer.end()
        return [np.array([*prompts[answer.prompt], *answer.tokens], np.int32) for answer in answers]

    def _check(self, prompts: Sequence[Sequence[int]], sampling: SamplingSpec) -> None:
        problems = Problems("generate")
        sampling.collect(problems)
        for number, prompt in enumerate(prompts, 1):
            limit = min(self._seq_length, sampling.longest(len(prompt)))
            if not prompt:
                problems.add(f"prompt {number} is empty", "give one token or more")
            elif len(prompt) >= limit:
                problems.add(
                    f"prompt {number} has {len(prompt)} tokens, prompt and answer may have {limit}",
                    "shorten it, or raise max_length and seq_length",
                )
        problems.raise_if_any()


def settled_config(model_config: Any, given: GenerationConfig | None, words: dict[str, Any]) -> tuple[Any, dict]:
    """The configuration of a call as MindFormers settles it, and the words it does not know."""
    wanted = copy.deepcopy(given if given is not None else GenerationConfig.from_model_config(model_config))
    unknown = wanted.update(**words)
    if wanted.pad_token_id is None:
        wanted.pad_token_id = 0
    return wanted, unknown


def can_answer(wanted: GenerationConfig, rows: int, streamer: Any) -> bool:
    """Whether ``CachedGenerator`` does all that is wanted; MindFormers streams several rows step by step."""
    return not any(getattr(wanted, name, False) for name in OTHERWISE) and (streamer is None or rows == 1)


def sampling_of(wanted: GenerationConfig, seed: int) -> SamplingSpec:
    """Our words for MindFormers' configuration; its ``top_p`` above 1 and ``top_k`` None mean off."""
    ends = wanted.eos_token_id if isinstance(wanted.eos_token_id, (list, tuple)) else [wanted.eos_token_id]
    return SamplingSpec(
        do_sample=bool(wanted.do_sample),
        temperature=float(wanted.temperature or 1.0),
        top_k=int(wanted.top_k or 0),
        top_p=min(float(1.0 if wanted.top_p is None else wanted.top_p), 1.0),
        repetition_penalty=float(wanted.repetition_penalty or 1.0),
        max_length=int(wanted.max_length),
        max_new_tokens=wanted.max_new_tokens,
        min_length=int(wanted.min_length or 0),
        min_new_tokens=wanted.min_new_tokens,
        seed=seed,
        eos_token_ids=tuple(int(token) for token in ends if token is not None and token >= 0),
    )


def _without_padding(row: np.ndarray, pad: int) -> list[int]:
    """The tokens up to the last that is no padding, as MindFormers counts them."""
    real = np.flatnonzero(row != pad)
    return [int(token) for token in row[: real[-1] + 1]] if len(real) else []


def announce() -> None:
    """What a user of ``use_past`` should know."""
    logger.info("use_past: generate() keeps keys and values in a cache of its own size; block tables are not used")
