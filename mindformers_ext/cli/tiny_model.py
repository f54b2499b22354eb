# SPDX-License-Identifier: Apache-2.0
"""``python tools/make_tiny_model.py``: a Hugging Face folder with random weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mindformers_ext.cli.command import Command
from mindformers_ext.core.errors import UserError
from mindformers_ext.core.families import FAMILIES, MIXTRAL, Family, own_families
from mindformers_ext.core.layers import MoESpec, SharedExpertSpec
from mindformers_ext.core.spec import ModelSpec

SIZES = {
    "vocab_size": 2000,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}


def _options(parser: argparse.ArgumentParser) -> None:
    """The command's options. Sizes default to None, so that ``--config`` beside a size can be refused."""
    parser.add_argument("--output_dir", type=Path, required=True, help="the model folder to write")
    parser.add_argument(
        "--config", type=Path, help="a MindFormers YAML, for example configs/tiny/mixtral_pretrain.yaml"
    )
    parser.add_argument(
        "--model", choices=own_families(), help=f"without --config: which model (default {MIXTRAL.name})"
    )
    for name, value in {**SIZES, **EXPERTS}.items():
        parser.add_argument(f"--{name}", type=int, help=f"without --config (default {value})")
    parser.add_argument("--tokenizer", type=Path, help="a SentencePiece model (tokenizer.model) to add to the folder")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that exists")


def _run(arguments: argparse.Namespace) -> int:
    from mindformers_ext.jobs.checkpoint.tiny_model import TinyModelRequest, make_tiny_model

    request = TinyModelRequest(
        output_dir=arguments.output_dir,
        spec=_spec(arguments),
        tokenizer=arguments.tokenizer,
        seed=arguments.seed,
        overwrite=arguments.overwrite,
    )
    summary = make_tiny_model(request)
    print(
        f"wrote {arguments.output_dir}: {summary.model_type}, {summary.parameters:,} parameters in "
        f"{summary.tensors} tensors"
    )
    return 0


def _spec(arguments: argparse.Namespace) -> ModelSpec:
    from mindformers_ext.jobs.checkpoint.tiny_model import spec_from_yaml_file

    given = [name for name in ("model", *SIZES, *EXPERTS) if getattr(arguments, name) is not None]
    if arguments.config:
        if given:
            raise UserError(f"--config already says {', '.join(given)}: give the sizes in one place")
        return spec_from_yaml_file(arguments.config).model
    sizes: dict[str, Any] = {name: _chosen(arguments, name, value) for name, value in SIZES.items()}
    routing: dict[str, Any] = {name: _chosen(arguments, name, value) for name, value in EXPERTS.items()}
    row = FAMILIES[arguments.model or MIXTRAL.name]
    if not row.has_experts and any(getattr(arguments, name) is not None for name in EXPERTS):
        raise UserError(f"a {row.name} has no experts: leave out --num_local_experts and --num_experts_per_tok")
    shared = _shared(row, sizes["intermediate_size"], routing["num_local_experts"], sizes["num_hidden_layers"])
    told = {name: word.default for word in row.words if word.part == "model" for name in word.fields}
    return ModelSpec(
        **sizes,
        **told,
        **row.model,
        head_dim=sizes["hidden_size"] // max(1, sizes["num_attention_heads"]),
        pad_token_id=3,
        moe=MoESpec(**{"gate": row.gate, **row.moe, **routing}, shared_expert=shared) if row.has_experts else None,
        family="" if row.implied else row.name,
    )


def _shared(row: Family, width: int, experts: int, layers: int) -> SharedExpertSpec | None:
    """A family's shared experts, as wide as ``width``; where routed ones share it, about as wide as these, each."""
    if row.shared is None or not row.shares_width:
        return SharedExpertSpec(intermediate_size=width, **row.shared) if row.shared is not None else None
    (count,) = (word.default for word in row.words if (word.part, word.field) == ("shared", "num_experts"))
    own = width - experts * (width // max(experts + count, 1))
    sizes = tuple(own // count + (place < own % count) for place in range(count))
    unlike = (sizes,) * layers if len(set(sizes)) > 1 else None
    return SharedExpertSpec(intermediate_size=own, num_experts=count, expert_sizes=unlike, **row.shared)


def _chosen(arguments: argparse.Namespace, name: str, default: int) -> int:
    value = getattr(arguments, name)
    return default if value is None else value


COMMAND = Command(
    prog="make_tiny_model.py",
    description="Write a Hugging Face folder of random weights that transformers loads, a Mixtral or another family. "
    "Sizes come from a training YAML (--config) or from the options below.",
    options=_options,
    run=_run,
)
parser, main = COMMAND.parser, COMMAND.main
