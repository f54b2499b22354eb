# SPDX-License-Identifier: Apache-2.0
"""What a preprocessing run is asked for, and whether it can be done: all is checked before a byte is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mindformers_ext.core.documents import DOCUMENT_IDS
from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.preferences import PAIR_COLUMNS
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.data.chat_template import ChatTemplate
from mindformers_ext.data.conversations import Specials
from mindformers_ext.data.documents import STRATEGIES
from mindformers_ext.data.readers import SEPARATORS, find_files
from mindformers_ext.data.tokenizers import Tokenizer, open_tokenizer
from mindformers_ext.formats.atomic import refuse_existing
from mindformers_ext.jobs.checkpoint.tiny_model import spec_from_yaml_file
from mindformers_ext.jobs.items.ray_cluster import check_ray


@dataclass(frozen=True)
class DatasetKind:
    """A word of --dataset_type: which files of a folder it takes, and which options only it knows."""

    suffixes: tuple[str, ...]
    fields: tuple[str, ...] = ("input_ids",)
    options: tuple[str, ...] = ("repeat",)


KINDS: Mapping[str, DatasetKind] = {
    "wiki": DatasetKind((".tokens", ".txt", ".raw")),
    "wikipedia": DatasetKind((".parquet",), options=("field", "samples_num")),
    "qa": DatasetKind((".json", ".jsonl"), ("input_ids", "labels"), options=("skip_masked", "pack_strategy", "chat")),
    "text": DatasetKind((".txt", ".text", ".md"), options=("repeat", "document")),
    "jsonl": DatasetKind((".jsonl", ".json"), options=("repeat", "field")),
    "dpo": DatasetKind((".json", ".jsonl"), PAIR_COLUMNS, options=("chat", "max_prompt_length")),
    "domains": DatasetKind((".jsonl", ".json", ".parquet"), options=("field",)),
    "mds": DatasetKind((), options=()),
}
FOLDERS = ("domains", "mds")  # what they write is a folder; jobs/preprocess/domains/ does so
SPLITS = ("train", "eval")
SHORTEST, MOST_SHARDS, MOST_WORKERS, MOST_PARTS = 8, 1000, 256, 100_000
JOIN = "join"  # --shard: put together what the shards have made
OPTIONS = (
    "repeat",
    "field",
    "document",
    "samples_num",
    "skip_masked",
    "pack_strategy",
    "chat",
    "max_prompt_length",
)
PROMPT = 128  # tokens, as the recipe of LLaMA-MoE-v2 has it
SAMPLES = 10000  # of wikipedia, as MindFormers' script has it


@dataclass(frozen=True, kw_only=True)
class PreprocessRequest:
    """What to write. None stands for an option that was not given."""

    dataset_type: str
    output_file: Path
    model_file: Path
    input_glob: str | None = None
    seq_length: int | None = None
    split: str = "train"
    config: Path | None = None
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    repeat: int | None = None
    field: str | None = None
    document: str | None = None
    samples_num: int | None = None
    skip_masked: bool | None = None
    pack_strategy: str | None = None
    chat: bool | None = None
    max_prompt_length: int | None = None
    file_partition: int = 1
    workers: int = 1
    ray: str | None = None
    shard: str | None = None
    overwrite: bool = False
    summary: Path | None = None

    @property
    def kind(self) -> DatasetKind:
        """The rules of this data set type."""
        return KINDS[self.dataset_type]

    @property
    def fields(self) -> tuple[str, ...]:
        """The columns that are written."""
        return (*self.kind.fields, DOCUMENT_IDS) if self.pack_strategy else self.kind.fields

    @property
    def is_pairs(self) -> bool:
        """Whether records are pairs of answers to a prompt."""
        return self.dataset_type == "dpo"

    @property
    def is_padded(self) -> bool:
        """Whether rows hold padding."""
        return len(self.kind.fields) > 1

    @property
    def by_document(self) -> bool:
        """Whether conversations are kept whole, or dropped, instead of cut at a row's end."""
        return self.is_pairs or bool(self.pack_strategy)

    @property
    def prompt_length(self) -> int:
        """Tokens that the prompt of a pair keeps where it is too long."""
        return self.max_prompt_length or PROMPT

    @property
    def summary_file(self) -> Path:
        """Where the summary goes."""
        return self.summary or self.output_file.with_name(self.output_file.name + ".summary.json")

    def check(self) -> None:
        """Options have sensible values and belong to the data set type, or one ``UserError`` lists what is wrong."""
        problems = Problems("llama_preprocess")
        problems.one_of("dataset_type", self.dataset_type, tuple(KINDS))
        problems.one_of("split", self.split, SPLITS)
        problems.one_of("document", self.document or "file", tuple(SEPARATORS))
        if self.seq_length is not None and self.seq_length < SHORTEST:
            problems.add(f"seq_length={self.seq_length}", f"give at least {SHORTEST} tokens")
        for name, most in (("file_partition", MOST_SHARDS), ("workers", MOST_WORKERS)):
            if not 1 <= getattr(self, name) <= most:
                problems.add(f"{name}={getattr(self, name)}", f"give 1 to {most}")
        if self.pack_strategy is not None:
            problems.one_of("pack_strategy", self.pack_strategy, STRATEGIES)
        elif self.chat and self.dataset_type == "qa":
            problems.add("--chat without --pack_strategy", f"give --pack_strategy, one of {', '.join(STRATEGIES)}")
        for name in ("repeat", "samples_num", "max_prompt_length"):
            if getattr(self, name) is not None:
                problems.positive(name, getattr(self, name))
        problems.raise_if_any()
        for name in OPTIONS:
            # MindFormers' own commands may spell out the values that change nothing
            if getattr(self, name) not in (None, 1, False, SAMPLES) and name not in self.kind.options:
                types = ", ".join(word for word, kind in KINDS.items() if name in kind.options)
                problems.add(f"--{name} has no effect on {self.dataset_type}", f"leave it out; it is for {types}")
        if self.input_glob is None and self.dataset_type != "domains":
            problems.add("--input_glob is missing", "give a file, a folder or a glob pattern in quotes")
        if self.shard is not None:
            read_shard(self.shard, problems)
        problems.raise_if_any()

    @property
    def own_shard(self) -> tuple[int, int] | None:
        """(i, n) of ``--shard i/n``, None for all of the work."""
        return read_shard(self.shard, Problems("")) if self.shard else None

    @property
    def is_join(self) -> bool:
        """Whether the shards are joined."""
        return self.shard == JOIN

    def shard_files(self) -> list[Path]:
        """The files of the data set, as MindRecord names them."""
        if self.file_partition == 1:
            return [self.output_file]
        width = len(str(self.file_partition - 1))
        return [
            self.output_file.with_name(f"{self.output_file.name}{number:0{width}}")
            for number in range(self.file_partition)
        ]


def read_shard(word: str, problems: Problems) -> tuple[int, int] | None:
    """(i, n) of "i/n" with i from 0; None for "join"."""
    own, slash, count = word.partition("/")
    if word == JOIN:
        return None
    numbers = (int(own), int(count)) if own.isdecimal() and count.isdecimal() and len(word) < 20 else (0, 0)
    if not slash or not 0 <= numbers[0] < numbers[1] <= MOST_PARTS:
        problems.add(
            f"--shard {word[:40]}", f"give i/n with i from 0 to n - 1 and n up to {MOST_PARTS}, and last --shard {JOIN}"
        )
    return numbers


@dataclass(frozen=True)
class Checked:
    """A request that can be done: its files, ids and sizes."""

    request: PreprocessRequest
    files: list[Path]
    special: Specials
    unknown: int
    tokenizer_vocab: int
    vocab_size: int
    seq_length: int
    loss_pad: int

    @property
    def row_length(self) -> int:
        """Tokens of a row: a network in training shifts inside and needs one more than it has positions."""
        return self.seq_length + (self.request.split == "train")


def check_request(request: PreprocessRequest) -> tuple[Checked, Tokenizer]:
    """Look at inputs, outputs, tokenizer and configuration.

    Raises:
        UserError: something does not fit; what and where is said.
    """
    request.check()
    files = find_files(request.input_glob or "", request.kind.suffixes)
    for path in request.shard_files():
        if path.is_dir():
            raise UserError(f"output '{path}' is a folder: give a file name")
        for output in (path, path.with_name(path.name + ".db")):
            refuse_existing(output, request.overwrite)
    refuse_existing(request.summary_file, request.overwrite)
    if request.ray is not None:
        check_ray(request.ray)
    tokenizer, found = open_checked(request)
    if request.chat:
        ChatTemplate(tokenizer.path.parent)  # is there one
    checked = Checked(
        request=request,
        files=files,
        special=found.special,
        unknown=tokenizer.special_ids["unk_id"],
        tokenizer_vocab=tokenizer.vocab_size,
        vocab_size=found.vocab_size,
        seq_length=found.seq_length,
        loss_pad=found.spec.model.pad_token_id if found.spec else found.special.pad,
    )
    return checked, tokenizer


class TokenFacts(NamedTuple):
    """What ids there are, and how long rows are: ``seq_length`` and, but for folders, one token more for training.
    ``spec`` of --config."""

    special: Specials
    vocab_size: int
    seq_length: int
    spec: NetworkSpec | None


def open_checked(request: PreprocessRequest) -> tuple[Tokenizer, TokenFacts]:
    """The tokenizer, and what follows from it, the options and --config; they must agree.

    Raises:
        UserError: something does not fit.
    """
    tokenizer = open_tokenizer(request.model_file)
    spec = spec_from_yaml_file(request.config) if request.config else None
    special = _specials(request, tokenizer)
    usual = spec.seq_length + (request.dataset_type in FOLDERS) if spec else 2048
    seq_length = request.seq_length or usual
    vocab_size = spec.model.vocab_size if spec else tokenizer.vocab_size
    _check_ids(request, special, vocab_size, tokenizer)
    if spec:
        _check_config(request, spec, special, seq_length, tokenizer)
    return tokenizer, TokenFacts(special, vocab_size, seq_length, spec)


def _specials(request: PreprocessRequest, tokenizer: Tokenizer) -> Specials:
    """The ids by flag, else the tokenizer's; without a padding token the unknown one pads, as in MindFormers."""
    own = tokenizer.special_ids
    own["pad_id"] = own["pad_id"] if own["pad_id"] >= 0 else own["unk_id"]
    if own["pad_id"] < 0:
        own["pad_id"] = own["eos_id"]
    given = {name: getattr(request, name) for name in ("bos_id", "eos_id", "pad_id")}
    chosen = {name: own[name] if value is None else value for name, value in given.items()}
    missing = [name for name, value in chosen.items() if value < 0 and given[name] is None]
    if missing:
        flags = ", ".join(f"--{name}" for name in missing)
        raise UserError(f"{tokenizer.path} names no {' and no '.join(missing)}: give {flags}")
    return Specials(chosen["bos_id"], chosen["eos_id"], chosen["pad_id"])


def _check_ids(request: PreprocessRequest, special: Specials, vocab_size: int, tokenizer: Tokenizer) -> None:
    problems = Problems("special tokens")
    for name, value in (("bos_id", special.bos), ("eos_id", special.eos), ("pad_id", special.pad)):
        unpadded = name == "pad_id" and value == -1 and not request.is_padded
        if not 0 <= value < vocab_size and not unpadded:
            problems.add(f"{name}={value}", f"the vocabulary of {tokenizer.path.name} has ids 0 to {vocab_size - 1}")
    problems.raise_if_any()


def _check_config(
    request: PreprocessRequest, spec: NetworkSpec, special: Specials, seq_length: int, tokenizer: Tokenizer
) -> None:
    model = spec.model
    problems = Problems(f"{request.config} and the data to be written")
    if tokenizer.base_size > model.vocab_size:
        problems.add(
            f"ids up to {tokenizer.base_size - 1} from the tokenizer, vocab_size={model.vocab_size}",
            f"set vocab_size to at least {tokenizer.base_size}, or use the tokenizer the model was made for",
        )
    if request.dataset_type in FOLDERS and seq_length != spec.seq_length + 1:
        problems.add(
            f"--seq_length {seq_length}, but a network with seq_length: {spec.seq_length} in the YAML trains on rows "
            f"of {spec.seq_length + 1} tokens",
            f"give --seq_length {spec.seq_length + 1}, or leave it out",
        )
    elif request.dataset_type not in FOLDERS and seq_length != spec.seq_length:
        problems.add(f"--seq_length {seq_length}, seq_length: {spec.seq_length} in the YAML", "make them equal")
    if special.bos != model.bos_token_id:
        problems.add(
            f"bos_id {special.bos}, bos_token_id: {model.bos_token_id} in the YAML", "make them equal, or give --bos_id"
        )
    eos_ids = (model.eos_token_id, *model.more_eos_token_ids)
    if special.eos not in eos_ids:
        problems.add(
            f"eos_id {special.eos}, eos_token_id: {', '.join(map(str, eos_ids))} in the YAML",
            "make them equal, or give --eos_id",
        )
    padded = request.is_padded  # rows of running text hold no padding, a YAML may say -1 or -100 there
    if special.pad != model.pad_token_id and (padded or model.pad_token_id >= 0):
        problems.add(
            f"pad_id {special.pad}, pad_token_id: {model.pad_token_id} in the YAML", "make them equal, or give --pad_id"
        )
    problems.raise_if_any()
