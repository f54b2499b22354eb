# SPDX-License-Identifier: Apache-2.0
"""The decoder-only language model of all families, built from what its spec says of each layer.

Parameter names are MindFormers'; ``core.parameters`` lists them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import mindspore as ms
import mindspore.ops.operations as P
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Normal, initializer

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.layers import LAYERWISE, SWITCH
from mindformers_ext.core.spec import NetworkSpec
from mindformers_ext.ms.attention import Linear, rotary_tables
from mindformers_ext.ms.documents import CountedTokens, counted_shape, counted_type, table_shapes, table_types
from mindformers_ext.ms.kept_reports import kept_reports, name_reports
from mindformers_ext.ms.layer import Layer
from mindformers_ext.ms.loss import NextTokenLoss, ShiftedTokens, Targets, token_shape
from mindformers_ext.ms.moe.aux_loss import JointLoss
from mindformers_ext.ms.norm import RmsNorm
from mindformers_ext.ms.ops.dtypes import mindspore_dtype
from mindformers_ext.ms.ops.noise import StageNoise
from mindformers_ext.ms.ops.portable_documents import DocumentTables
from mindformers_ext.ms.ops.select import Operators, select_operators
from mindformers_ext.ms.strategies import Shards


class TokenEmbedding(nn.Cell):
    """Rows of the embedding table. Input (T) int32, output (T, D). Parameter ``embedding_weight`` (V, D)."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        model, dtype = spec.model, mindspore_dtype(spec.numerics.param_dtype)
        table = initializer(Normal(sigma=model.initializer_range), (model.vocab_size, model.hidden_size), dtype)
        self.embedding_weight = Parameter(table, name="embedding_weight")
        self.gather = Shards(spec).shard(P.Gather(), "embedding")

    def construct(self, ids_T: Tensor) -> Tensor:
        return self.gather(self.embedding_weight, ids_T, 0)


class AddLosses(nn.Cell):
    """Running sum over layers of the auxiliary loss (G), with each layer's part halved in a pipeline.

    It is a cell of one stage, since MindSpore puts a bare operator between two stages on either: on the earlier one the
    message goes backwards and the compiler never ends. And what one stage sends another has to come from an operator
    with one output, which multiplying by 0.5 is (exact, and not optimized away).
    """

    def __init__(self, shards: Shards) -> None:
        super().__init__(auto_prefix=False)
        self.add = shards.shard(P.Add(), "groups")
        self.halve = shards.shard(P.Mul(), "scaled groups")
        self.halves = shards.stages > 1

    def construct(self, total_G: Tensor | None, loss_G: Tensor) -> Tensor:
        if self.halves:
            loss_G = self.halve(loss_G, 0.5)
        if total_G is None:
            return loss_G
        return self.add(total_G, loss_G)


class PassLosses(nn.Cell):
    """In the place of ``AddLosses`` at a dense layer."""

    def construct(self, total_G: Tensor | None, loss_G: None) -> Tensor | None:
        return total_G


class MeanLoss(nn.Cell):
    """The auxiliary loss () of sums (G): their mean times ``scale``. A cell of the last stage for the same reason."""

    def __init__(self, shards: Shards, scale: float) -> None:
        super().__init__(auto_prefix=False)
        self.factor = scale
        self.mean = shards.shard(P.ReduceMean(), "group mean")
        self.scale = shards.shard(P.Mul(), "scalars")

    def construct(self, total_G: Tensor) -> Tensor:
        return self.scale(self.mean(total_G, 0), self.factor)


def _noises(spec: NetworkSpec, drawn: Mapping[int, list[int]], shards: Shards) -> list[nn.Cell]:
    """What draws the noise of the mixtures among the layers of each stage; nothing where no gate adds any."""
    shape, mixtures = spec.noise_shape, spec.model.moe_layers
    if shape is None:
        return []
    places = {stage: tuple(map(mixtures.index, layers)) for stage, layers in drawn.items() if layers}
    return [shards.stage(StageNoise(found, shape, shards), stage) for stage, found in places.items()]


class ReadReport(nn.Cell):
    """Reports summed over groups, (layers, E + 1), as load (layers, E) and dropped share (layers)."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = float(groups)

    def construct(self, report: Tensor) -> tuple[Tensor, Tensor]:
        return report[:, :-1], report[:, -1] / self.groups


def _report_shapes(report: list) -> tuple:
    return [report[0], report[1] - 1], [report[0]]


def _report_types(report: ms.Type) -> tuple:
    return report, report


class Decoder(nn.Cell):
    """Embedding, layers, final norm.

    Inputs (B, S) int32, the keys (B, 3) of the noise of gates that add it (``core.philox``), and the documents (B,
    S) of packed rows (``core.documents``), whose padding counts in no mixture's balance. Outputs: hidden (B*S, D),
    aux_loss (), load (mixtures, E) and dropped (mixtures), float32, a mixture being a layer with experts; a dense
    model has none and returns load (1, 1) and dropped (1) of zeros. In a pipeline no stage sees all layers, so load
    and dropped are not reported: aux_loss stands in their place.
    """

    def __init__(self, spec: NetworkSpec, operators: Operators) -> None:
        super().__init__()
        model, shards = spec.model, Shards(spec)
        self.mixtures, layers = model.moe_layers, model.num_hidden_layers
        self.compute_dtype = operators.dtype(spec.numerics.compute_dtype)
        aux_scale = 1.0 / len(self.mixtures) if model.moe and model.moe.aux_loss_reduce == "mean" else 1.0
        if shards.stages > 1:
            aux_scale *= 2.0  # see AddLosses
        self.seq_length = spec.seq_length
        self.tok_embeddings = shards.stage(TokenEmbedding(spec), 0)
        stages = [spec.layer_stage(index) for index in range(layers)]
        self.layers = nn.CellList(
            [shards.stage(Layer(spec, model.layer(index), operators), stage) for index, stage in enumerate(stages)]
        )
        self.norm_out = shards.stage(RmsNorm(spec, operators), shards.stages - 1)
        self.depth, self.has_experts = layers, bool(self.mixtures)
        self.add_losses = nn.CellList(
            [
                shards.stage(AddLosses(shards), stage) if index in self.mixtures else PassLosses()
                for index, stage in enumerate(stages)
            ]
        )
        drawn = {stage: [i for i in self.mixtures if stages[i] == stage] for stage in sorted(set(stages))}
        self.noises = nn.CellList(_noises(spec, drawn, shards))
        self.noise_order = [index for found in drawn.values() for index in found]
        self.mean_loss = shards.stage(MeanLoss(shards, aux_scale), shards.stages - 1)
        if model.moe and model.moe.joins_layers:
            if shards.active:
                raise UserError(f"aux_loss_type: {SWITCH} is not cut over devices on MindSpore: set {LAYERWISE}")
            self.mean_loss = JointLoss(model.gates, len(self.mixtures))
        self.stack = shards.shard_list(P.Stack(), "tok -", len(self.mixtures))
        self.total = shards.shard(P.ReduceSum(), "reports")
        self.read_report = shards.local(ReadReport(spec.parallel.groups), "report", _report_shapes, _report_types)
        if spec.packed:
            self.packed_tables = shards.local(DocumentTables(), "document tables", table_shapes, table_types)
            self.counted = shards.local(CountedTokens(), "counted", counted_shape, counted_type)
        self.reports, self.keeps = shards.stages == 1, False
        self.kept = nn.CellList([])
        self.cos_SP, self.sin_SP = rotary_tables(
            model.rope.tables(spec.seq_length), operators.dtype(spec.numerics.rotary_dtype)
        )

    def keep_reports(self, spec: NetworkSpec) -> None:
        """From now on every mixture's reports are added up in a parameter of its stage."""
        self.kept, self.keeps = kept_reports(spec), True
        name_reports(self.kept)

    def construct(
        self, ids_BS: Tensor, keys_B3: Tensor | None = None, documents_BS: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        _check_length(ids_BS.shape[1], self.seq_length)
        cos, sin, counted_T = self.cos_SP, self.sin_SP, None
        if documents_BS is not None:
            cos, sin = self.packed_tables(documents_BS, cos, sin)
            counted_T = self.counted(documents_BS)
        x_TD = ops.cast(self.tok_embeddings(ops.reshape(ids_BS, (-1,))), self.compute_dtype)
        aux_loss_G = None
        reports: tuple = ()
        noises = self._drawn(keys_B3)
        for index in range(self.depth):
            noise_TE = noises[self.noise_order.index(index)] if noises and index in self.noise_order else None
            x_TD, layer_aux_G, report_GE = self.layers[index](x_TD, cos, sin, noise_TE, documents_BS, counted_T)
            if self.keeps:
                x_TD = self.kept[index](x_TD, report_GE)
            aux_loss_G = self.add_losses[index](aux_loss_G, layer_aux_G)
            reports = reports + (report_GE,)
        if not self.has_experts:
            zeros = ops.zeros((1, 1), ms.float32)
            return self.norm_out(x_TD), ops.zeros((), ms.float32), zeros, ops.zeros((1,), ms.float32)
        aux_loss = self.mean_loss(aux_loss_G)
        if self.reports:
            load, dropped = self.read_report(self.total(self.stack(self._of_mixtures(reports)), 1))
            return self.norm_out(x_TD), aux_loss, load, dropped
        return self.norm_out(x_TD), aux_loss, aux_loss, aux_loss

    def _drawn(self, keys_B3: Tensor | None) -> tuple:
        """The noise of every mixture, in the order of ``noise_order``."""
        found: tuple = ()
        if keys_B3 is not None:
            for stage in self.noises:
                found = found + stage(keys_B3)
        return found

    def _of_mixtures(self, reports: tuple) -> tuple:
        """Without the None of dense layers. A tuple that leaves an ``if`` has no layout in MindSpore's cut graph."""
        found: tuple = ()
        for index in self.mixtures:
            found = found + (reports[index],)
        return found


def _check_length(length: int, seq_length: int) -> None:
    """Rotary tables, masks and the halves of attention are of one length; some others would pass unnoticed."""
    if length != seq_length:
        raise ValueError(
            f"rows of {length} tokens in a network built for seq_length={seq_length}: pad them, or build "
            "the network for their length"
        )


class CausalLM(nn.Cell):
    """Decoder and head.

    ``construct(ids (B, S)) -> logits (B, S, V)`` float32; ``losses(ids (B, S+1), labels=None, keys=None)`` -> (loss,
    lm_loss, aux_loss, load (mixtures, E), dropped (mixtures)) with loss = lm_loss + aux_loss, or lm_loss alone when
    ``return_extra_loss`` is off. ``keys``: (B, 3) int32, of the noise of gates that add it, in training. Both take the
    documents of packed rows, of the shape of ids, where the spec says ``packed``.
    """

    def __init__(self, spec: NetworkSpec, operators: Operators | None = None) -> None:
        super().__init__()
        operators = (operators or select_operators()).for_network(spec)
        spec = replace(spec, numerics=operators.numerics(spec.numerics))
        model = spec.model
        self.spec = spec
        self.vocab_size = model.vocab_size
        self.tied, self.add_aux_loss = model.tie_word_embeddings, spec.return_extra_loss
        self.model = Decoder(spec, operators)
        shards = Shards(spec)
        last = shards.stages - 1
        self.product = shards.shard(P.MatMul(transpose_b=True), "head")
        if not self.tied:
            dtype = mindspore_dtype(spec.numerics.param_dtype)
            head = Linear(model.hidden_size, model.vocab_size, model.initializer_range, dtype, shards, "head")
            self.lm_head = shards.stage(head, last)
        # both read the same ids, so that no pipeline stage has to send them to another
        self.tokens = shards.stage(shards.local(ShiftedTokens(), "tokens", token_shape), 0)
        self.targets = shards.stage(Targets(spec, shards), last)
        self.next_token_loss = shards.stage(NextTokenLoss(shards), last)
        self.add = shards.shard(P.Add(), "scalars")
        self.penalties = nn.CellList([])

    def add_penalty(self, penalty: nn.Cell) -> None:
        """A further loss () that follows from parameters alone, a part of aux_loss from now on (``ms.l0``)."""
        self.penalties = nn.CellList([*self.penalties, penalty])

    def keep_all_in_evaluation(self) -> None:
        """From now on tokens are dropped in training only."""
        for layer in self.model.layers:
            layer.feed_forward.keep_all_in_evaluation()

    def keep_reports(self) -> None:
        """In a pipeline: see ``ms.kept_reports``; before the network is compiled."""
        self.model.keep_reports(self.spec)

    def head(self, x_TD: Tensor) -> Tensor:
        """Logits (T, V) in the type of x."""
        if self.tied:
            return self.product(x_TD, ops.cast(self.model.tok_embeddings.embedding_weight, x_TD.dtype))
        return self.lm_head(x_TD)

    def construct(self, ids_BS: Tensor, documents_BS: Tensor | None = None) -> Tensor:
        x_TD, _, _, _ = self.model(ids_BS, None, documents_BS)
        logits = ops.cast(self.head(x_TD), ms.float32)
        return ops.reshape(logits, (ids_BS.shape[0], ids_BS.shape[1], self.vocab_size))

    def losses(
        self,
        ids_BT: Tensor,
        labels_BT: Tensor | None = None,
        keys_B3: Tensor | None = None,
        documents_BT: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """See the class; the shift by one token happens here. Tokens equal to the pad id do not count."""
        documents_BS = None if documents_BT is None else self.tokens(documents_BT)
        x_TD, aux_loss, load, dropped = self.model(self.tokens(ids_BT), keys_B3, documents_BS)
        for penalty in self.penalties:
            aux_loss = self.add(aux_loss, penalty())
        target_T, weight_T = self.targets(ids_BT, labels_BT)
        lm_loss = self.next_token_loss(self.head(x_TD), target_T, weight_T)
        loss = self.add(lm_loss, aux_loss) if self.add_aux_loss else lm_loss
        return loss, lm_loss, aux_loss, load, dropped


class RowLogProbabilities(nn.Cell):
    """The sum of the log-probabilities of each row's labels, of a ``CausalLM`` on one device. Parameter names stay.

    Inputs: ids and labels (B, S+1), and the keys of its noise. Outputs: (B) float32, then what ``losses`` has behind
    its first two.
    """

    def __init__(self, network: CausalLM) -> None:
        super().__init__(auto_prefix=False)
        self.network = network

    def construct(
        self, ids_BT: Tensor, labels_BT: Tensor, keys_B3: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x_TD, aux_loss, load, dropped = self.network.model(self.network.tokens(ids_BT), keys_B3)
        target_T, weight_T = self.network.targets(ids_BT, labels_BT)
        losses_T = self.network.next_token_loss.rows(self.network.head(x_TD), target_T, weight_T)
        return -ops.reshape(losses_T, (ids_BT.shape[0], -1)).sum(1), aux_loss, load, dropped


def build_causal_lm(spec: NetworkSpec) -> CausalLM:
    """The network of ``spec`` with fresh random weights."""
    return CausalLM(spec)
