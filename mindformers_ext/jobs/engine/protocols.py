# SPDX-License-Identifier: Apache-2.0
"""What a job may ask of a framework. An engine's classes fit these shapes without knowing them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mindformers_ext.core.figures import StepFigures
from mindformers_ext.core.spec import DeviceSpec, NetworkSpec


class Network(Protocol):
    """A causal language model of an engine, weights included. ``rank``: of this process among those that hold it."""

    rank: int

    def load(self, weights: Mapping[str, np.ndarray]) -> None:
        """Fill every parameter from ``weights`` (MindFormers' names).

        Raises:
            UserError: a name is missing or not wanted, or a shape differs; all of them are listed.
        """
        ...

    def fill(self, weights: Iterable[tuple[str, np.ndarray]]) -> None:
        """As ``load``, one tensor at a time: each replaces its parameter, and no second copy of the model is held."""
        ...

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """float32 logits of shape (B, S, V) for int32 token ids of shape (B, S)."""
        ...

    def agree(self, digest: bytes) -> bool:
        """Whether all processes that hold the network have the same ``digest``; each has to ask."""
        ...

    def session(self, rows: int, length: int, positions: int, use_cache: bool = True) -> Session:
        """Generation for up to ``rows`` prompts of up to ``length`` tokens, up to ``positions`` with their answers.

        Compiled when this returns, as far as the engine compiles; without ``use_cache`` only ``prompt`` is.
        """
        ...


class Session(Protocol):
    """Generation with a cache of keys and values; rows do not see each other."""

    def prompt(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """float32 logits (B, V) behind the last token of each row of ``ids`` (B, S), padded on the right."""
        ...

    def token(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """float32 logits (B, V) behind one more token per row, which stands at its position from then on."""
        ...


class Engine(Protocol):
    """A framework that can build networks."""

    name: str

    def use(self, device: DeviceSpec) -> None:
        """Run there from now on; networks are held by all processes of the job where they are ``together``."""
        ...

    def build(self, spec: NetworkSpec, empty: bool = False) -> Network:
        """A causal language model with fresh random weights, or with none until they are filled in (``empty``)."""
        ...


class RecordStore(Protocol):
    """Reads and writes files of token rows."""

    def write(self, path: Path, rows: Iterable[Mapping[str, np.ndarray]], fields: tuple[str, ...]) -> int:
        """Write int32 rows that have ``fields``; returns how many. The file appears whole or not at all."""
        ...

    def read(self, path: Path, fields: tuple[str, ...]) -> Iterator[dict[str, np.ndarray]]:
        """The rows of a file, in file order."""
        ...


class RecordWriter(Protocol):
    """Writes one data set of token rows in a process of its own, block by block."""

    def write(self, block: Mapping[str, np.ndarray]) -> None:
        """Append rows: one int32 array of shape (rows, length) per field, one of shape (rows,) per number. Returns
        before they are on the disk."""
        ...

    def finish(self) -> int:
        """Finish the files, and keep the process for another; returns how many rows they hold."""
        ...

    def begin(self, path: Path) -> None:
        """Another file like the finished one."""
        ...

    def close(self) -> int:
        """Finish the files; returns how many rows they hold."""
        ...

    def abort(self) -> None:
        """End the process; what was written is incomplete."""
        ...


class Reference(Protocol):
    """Somebody else's implementation of the same model: what ours is judged by."""

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """float32 logits of shape (B, S, V) for token ids of shape (B, S)."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text`` as the reference's own tokenizer gives them, BOS included."""
        ...


class TensorFile(Protocol):
    """A framework's own weight file, opened without running anything in it."""

    @property
    def infos(self) -> Mapping[str, tuple[tuple[int, ...], str]]:
        """Shape and type ("float32", "bfloat16", ...) by name."""
        ...

    def read(self, name: str, index: tuple[int | slice, ...]) -> np.ndarray:
        """A copy of a part of a tensor; bfloat16 as its bits."""
        ...


class Ranks(Protocol):
    """The processes of a job."""

    rank: int
    size: int

    def share(self, rows: int) -> slice:
        """This process's rows among those of a step."""
        ...

    def sum(self, values: np.ndarray) -> np.ndarray:
        """float64 ``values`` of all processes added up; each has to ask, and gets the same bits."""
        ...

    def close(self) -> None:
        """Leave the job."""
        ...


class NetworkValues(Protocol):
    """A network whose parameters and buffers are read and set by name."""

    def values(self, ending: str) -> dict[str, np.ndarray]:
        """The network's parameters (and buffers) whose name ends in ``ending``, in its order."""
        ...

    def set_values(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Replace such parameters by name."""
        ...


class Trainer(NetworkValues, Protocol):
    """A network that learns; see ``pt.trainer``. Weights are filled in before ``open``, moments restored and
    values read after it."""

    @property
    def ranks(self) -> Ranks:
        """The processes of the job."""
        ...

    def fill(self, weights: Iterable[tuple[str, np.ndarray]], partly: bool = False) -> None:
        """Weights by MindFormers' names; adapters need not come, with ``partly`` no weight need: others stay first
        ones."""
        ...

    def open(self) -> None:
        """Make the optimizer; no weight may be filled in afterwards."""
        ...

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Moments and counters of a checkpoint."""
        ...

    def step(self, columns: tuple[np.ndarray, ...]) -> StepFigures:
        """One update from this rank's rows; all ranks return the same figures. Of pairs of answers
        (``core.preferences``) the last column is the reference's, float32."""
        ...

    def evaluate(self, columns: tuple[np.ndarray, ...]) -> float:
        """The mean loss over the tokens that count of this rank's rows, ids, labels and of packed rows their documents
        (R, S+1), as the network stands; 0 where none counts. Every rank has to ask, for as many rows."""
        ...

    def row_log_probabilities(self, ids: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Sum (R) of the log-probabilities of the labels that count of ids and labels (R, S+1), as the network stands.
        Every rank has to ask, for as many rows."""
        ...

    def state(self, adapters: bool) -> Iterator[tuple[str, np.ndarray]]:
        """All that a checkpoint holds; with ``adapters`` LoRA's weights alone."""
        ...


class LayerStates(Protocol):
    """A dense model that tells the states entering each of its layers, with one layer in memory at a time."""

    def states(self, embeddings: np.ndarray, mask: np.ndarray) -> Sequence[Any]:
        """Per layer a torch tensor (B, S, D), from the bfloat16 bits of embeddings (B, S, D) and a mask (B, S)."""
        ...


class LayerProbe(Protocol):
    """What a decoder computes inside, with one layer in memory. Points are those of ``core.layers.POINTS``; a mixture
    has those of width D, drops no token and has no way back; on PyTorch it has ``MIXTURE_POINTS`` besides.

    Rows do not see each other, and a token none behind it: padding on the right changes nothing before it. S is the
    spec's ``seq_length``; PyTorch takes any.
    """

    def fill(self, layer: int, weights: Iterable[tuple[str, np.ndarray]]) -> None:
        """The layer in memory is number ``layer`` from now on; names are those below ``model.layers.N.``."""
        ...

    def fill_head(self, norm: np.ndarray, blocks: Iterable[np.ndarray]) -> None:
        """The final norm (D) and the head in blocks of rows, (V, D) in all, take the layer's place."""
        ...

    def forward(self, x: np.ndarray, points: Sequence[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The layer's output (B, S, D) for its input, and float32 (B*S, width) at each of ``points``."""
        ...

    def backward(
        self, x: np.ndarray, dy: np.ndarray, values: Sequence[str], gradients: Sequence[str]
    ) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]:
        """The gradient at the layer's input from that at its output, both (B, S, D); values and gradients by point."""
        ...

    def loss(self, x: np.ndarray, target: np.ndarray, counted: np.ndarray) -> tuple[float, np.ndarray]:
        """Sum of the cross entropy over counted targets (B, S), and its gradient at ``x``, the last layer's output."""
        ...

    def loss_alone(self, x: np.ndarray, target: np.ndarray, counted: np.ndarray) -> float:
        """The same without the gradient."""
        ...
