# SPDX-License-Identifier: Apache-2.0
"""Several processes: weights and optimizer state cut over all of them (FSDP2), experts over a part (expert parallel).

Ranks form a grid (outer, ep). Experts are spread over ep and cut over outer; everything else is cut over all ranks.
Every element of a gradient lies on one rank, so norms are sums over ranks.
"""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mindformers_ext.core.errors import UserError
from mindformers_ext.core.spec import ModelSpec, NetworkSpec, ParallelSpec
from mindformers_ext.pt.causal_lm import CausalLM, Terms
from mindformers_ext.pt.loss import targets
from mindformers_ext.pt.moe.exchange import ExpertExchange
from mindformers_ext.pt.moe.layer import MoE
from mindformers_ext.pt.ranks import Ranks

EXPERT = (".ffn.gate_up", ".ffn.down", ".ffn.bias")


def open_ranks(parallel: ParallelSpec, device: str) -> Ranks:
    """The processes that torchrun started, or this one alone.

    Raises:
        UserError: the environment of torchrun is incomplete, or its sizes are not those of the configuration.
    """
    if parallel.parallel_mode == "stand_alone":
        return Ranks()
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"several devices but {', '.join(missing)} is not set: start with scripts/torchrun_launcher.sh")
    return ShardedRanks(parallel, device)


class ShardedRanks(Ranks):
    """This process among those of torchrun."""

    def __init__(self, parallel: ParallelSpec, device: str) -> None:
        kind = "cuda" if device == "GPU" else "cpu"
        if kind == "cuda":
            torch.cuda.set_device(self.device_id(0))
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.ep, self.kind = parallel.expert_parallel, kind
        self.counts_all = parallel.parallel_mode != "data_parallel"
        self.mesh = init_device_mesh(kind, (self.size,))
        self.grid: DeviceMesh | None = None
        if self.ep > 1:
            self.grid = init_device_mesh(kind, (self.size // self.ep, self.ep), mesh_dim_names=("outer", "ep"))

    def device_id(self, asked: int) -> int:
        return int(os.environ.get("LOCAL_RANK", asked))

    def share(self, rows: int) -> slice:
        part = rows // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def sum(self, values: np.ndarray) -> np.ndarray:
        total = torch.from_numpy(np.array(values, np.float64)).to(self.kind)
        dist.all_reduce(total)
        return np.asarray(total.cpu().numpy())

    def rest(self, network: nn.Module) -> None:
        for module in network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def close(self) -> None:
        if dist.is_initialized():
            dist.barrier()  # a rank that leaves early breaks the connections of those that still work
            dist.destroy_process_group()

    def local(self, spec: NetworkSpec) -> NetworkSpec:
        groups = max(1, spec.parallel.data_parallel // self.size)
        return replace(spec, parallel=replace(spec.parallel, data_parallel=groups))

    def cut(self, network: CausalLM, device: torch.device) -> CausalLM:
        for layer in network.model.layers:
            ignored: set[nn.Parameter] = set()
            if self.grid is not None:
                for mixture in layer.feed_forward.mixtures():
                    ignored |= self._spread(mixture, self.grid, device)
            fully_shard(layer, mesh=self.mesh, ignored_params=ignored or None)
        ignored = {p for n, p in network.named_parameters() if n.endswith(EXPERT) and not isinstance(p, DTensor)}
        fully_shard(network, mesh=self.mesh, ignored_params=ignored if self.grid is not None else None)
        for buffer in network.buffers():
            buffer.data = buffer.data.to(device)
        return network

    def _spread(self, moe: MoE, grid: DeviceMesh, device: torch.device) -> set[nn.Parameter]:
        """Keep this rank's experts; returns parameters that no FSDP group may take."""
        part = grid["ep"].get_local_rank()
        for name, parameter in list(moe.ffn.named_parameters()):
            kept = parameter.detach().chunk(self.ep)[part].clone().to(device)
            setattr(moe.ffn, name, nn.Parameter(kept, parameter.requires_grad))
        moe.exchange = ExpertExchange(grid["ep"].get_group())
        if grid["outer"].size() == 1:
            return set(moe.ffn.parameters())
        fully_shard(moe.ffn, mesh=grid["outer"])
        return set()

    def own(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def gradient(self, name: str, gradient: Tensor) -> Tensor:
        """FSDP averages experts over outer alone, while their rows come from all ranks: 1/ep is left."""
        local = self.own(gradient)
        return local / self.ep if self.ep > 1 and name.endswith(EXPERT) else local

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if self.grid is None or not name.endswith(EXPERT):
            return full
        parts = [torch.empty_like(full) for _ in range(self.ep)]
        dist.all_gather(parts, full.contiguous(), group=self.grid["ep"].get_group())
        return torch.cat(parts)

    def like(self, tensor: Tensor, parameter: Tensor) -> Tensor:
        if not isinstance(parameter, DTensor):
            return tensor
        return DTensor.from_local(
            tensor,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )

    def blank(self, name: str, parameter: Tensor) -> Tensor:
        spread = self.grid is not None and name.endswith(EXPERT)
        shape = (parameter.shape[0] * (self.ep if spread else 1), *parameter.shape[1:])
        return torch.empty(shape, dtype=torch.float32)

    def take(self, moment: Tensor, whole: Tensor, name: str, parameter: Tensor) -> None:
        if self.grid is not None and name.endswith(EXPERT):
            whole = whole.chunk(self.ep)[self.grid["ep"].get_local_rank()]
        whole = whole.to(moment.device)
        if isinstance(parameter, DTensor):
            whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
        moment.copy_(whole)

    def last_micro_batch(self, network: nn.Module, last: bool) -> None:
        if isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(last)

    def counted(self, ids_BT: Tensor, labels_BT: Tensor | None, model: ModelSpec) -> Tensor | None:
        if not self.counts_all:  # as in MindSpore's data parallel, where every rank weighs the same
            return None
        _, counted_T = targets(ids_BT, labels_BT, model.pad_token_id, model.ignore_token_id)
        count = counted_T.sum().float()
        dist.all_reduce(count)
        return count / self.size

    def norm(self, gradients: list[Tensor]) -> float:
        filled = [g for g in gradients if g.numel()]
        total = torch.zeros((), device=gradients[0].device)
        if filled:
            total += torch.stack(torch._foreach_norm(filled)).square().sum()
        dist.all_reduce(total)
        return float(total.sqrt())

    def average(self, terms: list[Terms]) -> tuple[float, float, float, np.ndarray, np.ndarray]:
        packed = torch.cat([torch.cat([part.reshape(-1).float() for part in term])[None] for term in terms]).sum(0)
        dist.all_reduce(packed)
        found = packed.cpu().numpy()
        shape, layers = tuple(terms[0].expert_load.shape), terms[0].dropped.numel()
        share = self.size * len(terms)
        loss, lm_loss, aux_loss = (float(value) / share for value in found[:3])
        return loss, lm_loss, aux_loss, found[3:-layers].reshape(shape), found[-layers:] / share
