# SPDX-License-Identifier: Apache-2.0
"""What a prepared corpus is asked for, checked before a byte is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.data.domains.documents import Block, find_domains, plan_blocks
from mindformers_ext.data.domains.duplicates import check_datasketch
from mindformers_ext.data.domains.filters import DUPLICATES, Filter, read_filters
from mindformers_ext.data.domains.manifest import EVAL, FOR_FT, FOR_PRUNE, TokenizerFacts
from mindformers_ext.data.domains.splits import Amount, read_shares, wanted_rows
from mindformers_ext.data.tokenizers import Tokenizer
from mindformers_ext.formats.atomic import refuse_existing
from mindformers_ext.jobs.items.ray_cluster import check_ray
from mindformers_ext.jobs.preprocess.domains.blocks import BlockSetup
from mindformers_ext.jobs.preprocess.request import PreprocessRequest, TokenFacts, open_checked

EVAL_ROWS = 2  # of each domain, where nothing is said; as the reference
BILLION = 1e9
SIZES = (EVAL, FOR_PRUNE, FOR_FT)


@dataclass(frozen=True, kw_only=True)
class DomainsRequest(PreprocessRequest):
    """A corpus by domain. ``eval_seq``: rows of each domain; ``for_prune`` and ``for_ft``: 1e9 tokens of all domains,
    shared out by ``proportion``; or shares of the documents."""

    domains: Sequence[str] = ()
    filter: Sequence[str] = ()
    proportion: Sequence[str] = ()
    eval_seq: int | None = None
    eval_share: float | None = None
    for_prune: float | None = None
    for_prune_share: float | None = None
    for_ft: float | None = None
    for_ft_share: float | None = None
    seed: int | None = None

    @property
    def parts(self) -> Path:
        """Where finished parts wait to be packed."""
        return self.output_file.absolute().with_name(f".{self.output_file.name}.parts")

    def check(self) -> None:
        """As for every data set, and sizes that make sense."""
        super().check()
        problems = Problems("llama_preprocess")
        for name, given, usual in (
            ("split", self.split, "train"),
            ("file_partition", self.file_partition, 1),
            ("summary", self.summary, None),
        ):
            if given != usual:
                problems.add(f"--{name} has no effect on {self.dataset_type}", "leave it out")
        if self.dataset_type == "mds":
            given_here = [name for name in DOMAIN_OPTIONS if getattr(self, name) not in (None, (), [])]
            given_here += [name for name in ("shard", "ray") if getattr(self, name) is not None]
            problems.add_names(
                "options", "have no effect on mds", [f"--{name}" for name in given_here], "leave them out"
            )
        if self.eval_seq is not None and not 0 <= self.eval_seq < 2**40:
            problems.add(f"--eval_seq {self.eval_seq}", "give rows of each domain, 0 or more")
        for name in ("for_prune", "for_ft"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1e9:
                problems.add(f"--{name} {value}", "give tokens in 1e9, 0 or more")
        shares = {name: getattr(self, f"{name}_share") for name in SIZES if getattr(self, f"{name}_share") is not None}
        for name, value in shares.items():
            other = "eval_seq" if name == EVAL else name
            if not 0 <= value <= 1:
                problems.add(f"--{name}_share {value}", "give a share of the documents, 0 to 1")
            if getattr(self, other) is not None:
                problems.add(f"--{other} and --{name}_share", "give one of the two")
        if sum(shares.values()) > 1 + 1e-9:
            problems.add(f"the shares sum to {sum(shares.values()):g}", "make them 1 at most; what is left is not used")
        if self.proportion and not self.for_prune and not self.for_ft:
            problems.add("--proportion has no effect", "it shares out --for_prune and --for_ft")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            problems.add(f"--seed {self.seed}", "give a whole number from 0 to 2**63 - 1")
        problems.raise_if_any()


DOMAIN_OPTIONS = (
    *("domains", "filter", "proportion", "eval_seq", "eval_share", "for_prune", "for_prune_share"),
    *("for_ft", "for_ft_share", "seed"),
)


@dataclass(frozen=True)
class CheckedDomains:
    """A request that can be done. ``left_out``: names in the input folder that are no domain."""

    request: DomainsRequest
    facts: TokenFacts
    tokenizer: TokenizerFacts
    setup: BlockSetup
    blocks: tuple[Block, ...]
    amounts: Mapping[str, Amount]
    left_out: tuple[str, ...]

    @property
    def likeness(self) -> float | None:
        """From which on documents are duplicates, if they are looked for."""
        return next((item.high for item in self.setup.filters if item.kind == DUPLICATES), None)

    def parts(self) -> dict[str, list[Path]]:
        """The part of every block, by domain."""
        found: dict[str, list[Path]] = {name: [] for name in self.setup.domains}
        for block in self.blocks:
            found[self.setup.domains[block.domain]].append(self.setup.part_of(block))
        return found


def tokenizer_facts(request: PreprocessRequest, tokenizer: Tokenizer, facts: TokenFacts) -> TokenizerFacts:
    """What the manifest says of the tokenizer."""
    digest = sha256(tokenizer.path.read_bytes()).hexdigest()
    return TokenizerFacts(digest, facts.vocab_size, facts.special.bos, facts.special.eos)


def check_output(request: DomainsRequest) -> None:
    """The prepared folder can be made."""
    if request.output_file.is_file():
        raise UserError(f"output '{request.output_file}' is a file: give a folder name")
    refuse_existing(request.output_file, request.overwrite)


def check_domains(request: DomainsRequest) -> CheckedDomains:
    """Look at inputs, outputs, tokenizer and options; nothing is written.

    Raises:
        UserError: something does not fit; what and where is said.
    """
    request.check()
    check_output(request)
    found, left = find_domains(request.input_glob, request.domains)
    names = tuple(found)
    filters = read_filters(request.filter, names)
    if any(item.kind == DUPLICATES for item in filters):
        check_datasketch()
    if request.ray is not None:
        check_ray(request.ray)
    tokenizer, facts = open_checked(request)
    described = tokenizer_facts(request, tokenizer, facts)
    setup = _setup(request, tokenizer, facts, described, names, filters)
    absolute = {name: [path.absolute() for path in files] for name, files in found.items()}
    blocks = tuple(plan_blocks(absolute))
    return CheckedDomains(request, facts, described, setup, blocks, _amounts(request, names, facts), tuple(left))


def _setup(
    request: DomainsRequest,
    tokenizer: Tokenizer,
    facts: TokenFacts,
    described: TokenizerFacts,
    names: tuple[str, ...],
    filters: tuple[Filter, ...],
) -> BlockSetup:
    return BlockSetup(
        tokenizer=tokenizer,
        tokenizer_sha256=described.sha256,
        special=facts.special,
        vocab_size=facts.vocab_size,
        domains=names,
        field=request.field,
        filters=filters,
        seed=SEED if request.seed is None else request.seed,
        parts=request.parts,
    )


SEED = 42


def _amounts(request: DomainsRequest, names: tuple[str, ...], facts: TokenFacts) -> dict[str, Amount]:
    shares = read_shares(request.proportion, names)

    def amount(split: str, value: float | None) -> Amount:
        share = getattr(request, f"{split}_share")
        if share is not None:
            return Amount(share=share)
        if value is None:
            return Amount(rest=True) if split == FOR_FT else Amount(rows=dict.fromkeys(names, 0))
        return Amount(rows=wanted_rows(split, value, BILLION, facts.seq_length, shares))

    eval_rows = EVAL_ROWS if request.eval_seq is None else request.eval_seq
    by_rows = Amount(rows=dict.fromkeys(names, eval_rows))
    return {
        EVAL: by_rows if request.eval_share is None else amount(EVAL, None),
        FOR_PRUNE: amount(FOR_PRUNE, request.for_prune),
        FOR_FT: amount(FOR_FT, request.for_ft),
    }
