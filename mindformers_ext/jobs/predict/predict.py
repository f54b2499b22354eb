# SPDX-License-Identifier: Apache-2.0
"""``--run_mode predict`` of our networks: prompts in, answers out as they come, and files of them at the end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mindformers_ext.core.config.run import RunSpec
from mindformers_ext.core.config.sampling import SamplingSpec
from mindformers_ext.core.errors import Problems, UserError
from mindformers_ext.core.spec import ModelSpec, NetworkSpec
from mindformers_ext.data.chat_template import ChatTemplate
from mindformers_ext.data.packing import check_ids
from mindformers_ext.data.tokenizers import Tokenizer, encode_framed, open_tokenizer, stands_for_folder
from mindformers_ext.formats.atomic import fresh_file
from mindformers_ext.jobs.predict.end_ids import end_ids
from mindformers_ext.jobs.predict.generate import Answer, Generation, Timing, bucket
from mindformers_ext.jobs.predict.network import asked_weights, check_memory, open_network

COMPILING = "compiling the graphs that answer"
ANSWERS, TEXTS = "predictions.jsonl", "sample.txt"
OnText = Callable[[int, str], None]  # prompt, more text of it
BLANK = "blank"  # how the answer to a blank line ends
UNFINISHED = "\ufffd"  # what a cut UTF-8 character decodes to


@dataclass(frozen=True)
class Prompt:
    """One prompt as given, and its tokens as the tokenizer frames a text (for chat, as the template writes it). A blank
    line among prompts has no tokens, and its answer is blank."""

    text: str
    tokens: tuple[int, ...]
    unknown: int


@dataclass(frozen=True)
class Written:
    """One answer: a line of predictions.jsonl."""

    prompt: str
    answer: str
    prompt_tokens: int
    new_tokens: int
    finish: str


@dataclass
class Predictor:
    """A checked job. ``notes`` are for the user; nothing has been loaded yet but the tokenizer and headers."""

    run: RunSpec
    spec: NetworkSpec
    tokenizer: Tokenizer
    template: ChatTemplate | None
    sampling: SamplingSpec
    notes: list[str] = field(default_factory=list)
    _generation: Generation | None = None

    @property
    def timing(self) -> Timing:
        """What all runs so far took."""
        return self._generation.timing if self._generation else Timing()

    @property
    def rank(self) -> int:
        """Of this process among those that answer together; the first one tells and keeps the answers."""
        return self._generation.network.rank if self._generation else 0

    def load(self) -> None:
        """Check the weights, build the network and stream them in."""
        weights, note = asked_weights(self.run, self.spec.model)
        if self.run.auto_transform:
            self.notes.append("auto_trans_ckpt is not needed here: every process reads its own part of any checkpoint")
        self.notes.append(note)
        network = open_network(self.run.engine, self.run.device, self.spec, weights)
        if not self.run.cached:
            self.notes.append(
                "use_past is False: the whole text is computed anew for every token; True gives the same answer sooner"
            )
        announce = COMPILING if self.run.compiles else ""
        self._generation = Generation(network, self.sampling, self.spec.seq_length, 1, self.run.cached, announce)

    def prompts(self, texts: Sequence[str], history: Sequence[Mapping[str, str]] = ()) -> list[Prompt]:
        """Tokens of each text; with a chat template each is a user's message behind ``history``.

        Raises:
            UserError: lists the prompts that are too long.
        """
        problems = Problems("prompts")
        found = []
        limit = (
            self.spec.seq_length
            if self.sampling.max_new_tokens
            else min(self.spec.seq_length, self.sampling.max_length)
        )
        for number, text in enumerate(texts, 1):
            prompt = self._encoded(text, history) if text.strip() else Prompt(text, (), 0)
            check_ids(prompt.tokens, self.spec.model.vocab_size, f"prompt {number}")
            if len(prompt.tokens) >= limit:
                problems.add(
                    f"prompt {number} has {len(prompt.tokens)} tokens, prompt and answer may have {limit}",
                    "shorten it, or raise model_config.seq_length and max_decode_length",
                )
            if prompt.unknown:
                self.notes.append(f"prompt {number} holds {prompt.unknown} tokens that the tokenizer does not know")
            found.append(prompt)
        problems.raise_if_any()
        return found

    def _encoded(self, text: str, history: Sequence[Mapping[str, str]]) -> Prompt:
        if self.template:
            whole = self.template.render([*history, {"role": "user", "content": text}])
            tokens = [int(token) for token in self.tokenizer.encode_batch([whole])[0]]
        else:
            tokens = encode_framed(self.tokenizer, text)
        return Prompt(text, tuple(tokens), tokens.count(self.tokenizer.special_ids["unk_id"]))

    def answers(self, prompts: Sequence[Prompt], on_text: OnText | None = None) -> Iterator[Written]:
        """Answers in the order of ``prompts``, blank ones to blank prompts; ``on_text`` gets their text as tokens come.

        Raises:
            UserError: the cache for a batch does not fit this machine's memory.
        """
        if self._generation is None:
            self.load()
        generation = self._generation
        assert generation is not None
        places = [place for place, prompt in enumerate(prompts) if prompt.tokens]
        texts = [prompts[place].tokens for place in places]
        generation.batch_size = min(self.run.rows or len(texts), len(texts))
        longest = max(min(self.spec.seq_length, self.sampling.longest(len(tokens))) for tokens in texts)
        check_memory(self.spec, generation.batch_size, bucket(longest))
        asked = repr((texts, self.sampling, generation.batch_size, self.spec.seq_length))
        if not generation.network.agree(hashlib.sha256(asked.encode()).digest()):
            raise UserError(
                "the processes that answer together have different prompts, tokenizers or settings: give "
                "every machine the same files and options"
            )
        show = (lambda number, text: on_text(places[number], text)) if on_text else None
        stream = TextStream(self.tokenizer, texts, show, self.sampling.eos_token_ids) if show else None
        bounds = [*places, len(prompts)]
        yield from _blanks(prompts[: bounds[0]])
        for answer in generation.answers(texts, stream.take if stream else None):
            place, following = bounds[answer.prompt], bounds[answer.prompt + 1]
            if stream:
                stream.end()
            yield self._written(prompts[place], answer)
            yield from _blanks(prompts[place + 1 : following])
            if stream:
                stream.go_on()

    def _written(self, prompt: Prompt, answer: Answer) -> Written:
        text = answer_text(self.tokenizer, prompt.tokens, answer.tokens, self.sampling.eos_token_ids)
        return Written(prompt.text, text, len(prompt.tokens), len(answer.tokens), answer.finish)


def _blanks(prompts: Sequence[Prompt]) -> Iterator[Written]:
    """The answers to blank prompts."""
    return (Written(prompt.text, "", 0, 0, BLANK) for prompt in prompts)


class TextStream:
    """Text of several answers that grow at once, shown one after the other: the first open one live, the rest kept."""

    def __init__(
        self, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], on_text: OnText, ends: Sequence[int] = ()
    ) -> None:
        self._tokenizer, self._prompts, self._on_text, self._ends = tokenizer, prompts, on_text, ends
        self._tokens: list[list[int]] = [[] for _ in prompts]
        self._shown = [0] * len(prompts)
        self._live = 0

    def take(self, prompt: int, token: int) -> None:
        """One more token of a prompt's answer."""
        self._tokens[prompt].append(token)
        if prompt == self._live:
            self._show(whole=False)

    def end(self) -> None:
        """The live answer is complete: show the rest of it."""
        self._show(whole=True)

    def go_on(self) -> None:
        """The next answer is the live one."""
        self._live += 1
        if self._live < len(self._prompts) and self._tokens[self._live]:
            self._show(whole=False)

    def _show(self, whole: bool) -> None:
        tokens = self._tokens[self._live]
        if not whole and tokens and tokens[-1] in self._tokenizer.byte_ids:
            return
        text = answer_text(self._tokenizer, self._prompts[self._live], tokens, self._ends)
        if whole or not text.endswith(UNFINISHED):
            self._on_text(self._live, text[self._shown[self._live] :])
            self._shown[self._live] = len(text)


def answer_text(tokenizer: Tokenizer, prompt: Sequence[int], answer: Sequence[int], ends: Sequence[int] = ()) -> str:
    """The answer's text as it follows the prompt's: a tokenizer may drop a blank at the start of a text. The token that
    ended it, if it is one of ``ends``, is no part of it."""
    size = tokenizer.vocab_size  # a network may have more rows than the tokenizer pieces
    said = answer[:-1] if answer and answer[-1] in ends else answer
    before = tokenizer.decode(token for token in prompt if token < size)
    return tokenizer.decode([token for token in (*prompt, *said) if token < size])[len(before) :]


def open_predictor(run: RunSpec, spec: NetworkSpec, chat: bool = False) -> Predictor:
    """The job of a checked run.

    Raises:
        UserError: no tokenizer, or one that does not fit the network or has no template.
    """
    model = spec.model
    assert run.sampling is not None
    tokenizer, path = open_own_tokenizer(run, model)
    folder = path if path.is_dir() else path.parent
    template = ChatTemplate(folder) if chat else None
    folders = [*([Path(run.load)] if run.load else []), *([folder] if stands_for_folder(path) else [])]
    own, notes = end_ids(dict.fromkeys(folders), model.vocab_size)
    turn = (tokenizer.special_ids["eos_id"],) if chat else ()  # of an instruct model often another one than a text's
    ends = dict.fromkeys((model.eos_token_id, *model.more_eos_token_ids, *own, *turn))
    return Predictor(run, spec, tokenizer, template, run.sampling.ended_by(*ends), notes)


def open_own_tokenizer(run: RunSpec, model: ModelSpec) -> tuple[Tokenizer, Path]:
    """The tokenizer of ``tokenizer_path``, whose pieces must all be rows of the embedding, and where it lies. Added
    tokens without a row are refused where a text uses them."""
    path = tokenizer_path(run)
    tokenizer = open_tokenizer(path)
    if tokenizer.base_size > model.vocab_size:
        raise UserError(
            f"the tokenizer {path} has {tokenizer.base_size} pieces, model_config.vocab_size is "
            f"{model.vocab_size}: give the model's own tokenizer, or set vocab_size"
        )
    return tokenizer, path


def tokenizer_path(run: RunSpec) -> Path:
    """The configured tokenizer, or the one in the Hugging Face folder that the weights come from."""
    name, folder = run.tokenizer, Path(run.load or "")
    if name and Path(name).exists():
        return Path(name)
    if any((folder / file).is_file() for file in ("tokenizer.model", "tokenizer.json")):
        return folder
    if name:
        raise UserError(f"processor.tokenizer.vocab_file {name} does not exist: give the model's tokenizer")
    raise UserError(
        "text needs a tokenizer: set processor.tokenizer.vocab_file to the .model file "
        "(--processor.tokenizer.vocab_file)"
    )


def write_results(written: Sequence[Written], run: RunSpec, timing: Timing) -> Path:
    """Write the answers: predictions.jsonl, sample.txt (texts with their prompts) and MindFormers' result file.

    The last line of predictions.jsonl holds the run's token counts and seconds. Returns its path.
    """
    folder = Path(run.output_dir)
    path = folder / ANSWERS
    summary = {"summary": asdict(timing) | {"tokens_per_second": timing.tokens_per_second}}
    lines = [json.dumps(line, ensure_ascii=False) for line in [*map(asdict, written), summary]]
    texts = [item.prompt + item.answer for item in written]
    contents = {path: "\n".join(lines) + "\n", folder / TEXTS: "".join(f"{text}\n" for text in texts)}
    if run.save_file:
        contents[Path(run.save_file)] = str([{"text_generation_text": [text]} for text in texts])
    for target, content in contents.items():
        with fresh_file(target, overwrite=True) as beside:
            beside.write_text(content, encoding="utf-8")
    return path
