# SPDX-License-Identifier: Apache-2.0
"""``CheckpointMonitor`` whose files are whole or absent, and whose names continue where a resumed run started."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import mindspore as ms
from mindformers.core.callback.callback import CheckpointMonitor
from mindformers.tools.logger import logger
from mindspore import nn

from mindformers_ext.core.errors import UserError
from mindformers_ext.jobs.checkpoint.saved import note_size
from mindformers_ext.jobs.run.keep import WEIGHTS, is_finite, last_good, surplus
from mindformers_ext.jobs.run.mixture_checks import DATA
from mindformers_ext.jobs.train.hooks import hook_state
from mindformers_ext.mf.hooks import HOOKS, figures_at
from mindformers_ext.mf.mixture import SOURCE
from mindformers_ext.ms.kept_reports import KEPT
from mindformers_ext.ms.lora import adapter_parameters


class WholeCheckpointMonitor(CheckpointMonitor):
    """Saves as MindFormers' monitor does, with five differences.

    - The new file is on the disk (flushed, renamed, its size noted), and a further step has shown its weights to be
      good, before an old one is removed; MindFormers removes first, so with ``keep_checkpoint_max: 1`` a crash or
      a NaN leaves nothing. For a while there is one file more than that.
    - Weights that are not finite are never saved: training stops, and the last file stays the last good one.
    - ``save_checkpoint_steps`` counts the run's steps, also after a resume in the middle of an epoch.
    - With LoRA adapters a file holds them and the optimizer's state, not the base weights.
    - File names carry the run's true epoch and step; MindFormers counts them anew after a resume.

    Arguments: MindFormers' ``CheckpointMonitor``'s.
    """

    _has_adapters = False
    _frozen: frozenset[str] = frozenset()
    _newest: Path | None = None  # written last, and not yet followed by a step that shows it is good

    def step_end(self, run_context: Any) -> None:
        """Save when it is time; old files go once a later step has shown that the newest one is good."""
        self._prune()
        super().step_end(run_context)

    def end(self, run_context: Any) -> None:
        """Save the last step, then remove what is too old."""
        super().end(run_context)
        self._prune()

    def _filter_ckpt_not_save(self, x: str, filter_list: list[str]) -> bool:
        """With LoRA only what is trained: the base weights stay in their own file. Never what counts a step's load."""
        kept = bool(super()._filter_ckpt_not_save(x, filter_list))
        return kept and not x.endswith(KEPT) and (not self._has_adapters or x not in self._frozen)

    @property
    def first_step(self) -> int:
        """Steps done before this process started."""
        return int(self._append_step_num or 0)

    def _check_save_ckpt(self, cb_params: Any, force_to_save: bool) -> bool:
        every = self._config.save_checkpoint_steps
        if force_to_save or not every:
            return bool(super()._check_save_ckpt(cb_params, force_to_save))
        step = self.first_step + int(cb_params.cur_step_num)
        last = self.first_step + int(self._last_triggered_step)
        return step // every > last // every

    def save_checkpoint(self, cb_params: Any) -> None:
        """Write one checkpoint for resuming and evaluation."""
        started = time.time()
        step = self.first_step + int(cb_params.cur_step_num)
        per_epoch = self._steps_per_epoch(cb_params)
        epoch, in_epoch = (step - 1) // per_epoch + 1, (step - 1) % per_epoch + 1
        name = f"{self._prefix}-{epoch}_{in_epoch}.{self._config.format}"
        path = Path(self._directory) / name
        network = self._config.saved_network or cb_params.train_network
        wrong = not_finite(network)
        if wrong:
            found = last_good(Path(self._directory), f".{self._config.format}")
            raise UserError(
                f"step {step}: the weights {', '.join(wrong[:5])} are not finite, nothing was saved and training "
                f"stops. {found} Lower the learning rate or warm up longer."
            )
        self.save_info_list[cb_params.cur_step_num]["ckpt"]["save_start_time"] = started
        self._last_triggered_step = cb_params.cur_step_num
        self._last_time_for_keep = started
        self._fill_append(cb_params, epoch, step)
        self._has_adapters = bool(adapter_parameters(network))
        self._frozen = frozenset(
            item.name for item in network.get_parameters() if not item.requires_grad and item.name.startswith(WEIGHTS)
        )
        self.remove_redundancy(network, str(path), self._append_dict, None)
        self._latest_ckpt_file_name = str(path)
        self.save_info_list[cb_params.cur_step_num]["ckpt"]["ckpt_file_path"] = str(path)
        if self._config.async_save:
            self.last_epoch_num, self.last_step_num_in_epoch = epoch, in_epoch
            self.last_ckpoint_file, self.meta_updated = name, False
        else:
            note_size(path)
            self.record_last_ckpt_to_json(epoch, in_epoch, name)
        self._newest = path
        logger.info("Checkpoint of step %d: %s (%.1f s)", step, path, time.time() - started)

    def _steps_per_epoch(self, cb_params: Any) -> int:
        """Steps of one pass over the data; in sink mode ``batch_num`` is the sink size."""
        dataset = cb_params.train_dataset
        return int(dataset.get_dataset_size()) if cb_params.dataset_sink_mode and dataset else int(cb_params.batch_num)

    def _fill_append(self, cb_params: Any, epoch: int, step: int) -> None:
        """What a resume reads besides the parameters."""
        owner = cb_params if cb_params.optimizer is not None else cb_params.network
        values = {"epoch_num": epoch, "step_num": step, "global_step": owner.optimizer.global_step}
        if isinstance(cb_params.net_outputs, (tuple, list)):
            values["loss_scale"] = ms.Tensor(figures_at(cb_params).loss_scale, ms.float32)
        values |= {name: ms.Tensor(array) for name, array in hook_state(cb_params.get(HOOKS, [])).items()}
        if SOURCE in cb_params:
            values |= {f"{DATA}{name}": ms.Tensor(array) for name, array in cb_params[SOURCE].state(step).items()}
        if self.global_batch_size is not None:
            values["global_batch_size"] = self.global_batch_size
        self._append_dict.update(values)

    def _prune(self) -> None:
        """Remove the oldest files above ``keep_checkpoint_max``, never the newest."""
        newest, self._newest = self._newest, None
        if newest is None:
            return
        self._manager.update_ckpoint_filelist(self._directory, self._prefix)
        files = map(Path, self._manager.ckpoint_filelist)
        for path in surplus(files, self._config.keep_checkpoint_max or 0, newest):
            self._manager.remove_ckpoint_file(str(path))
            self.need_remove_extra_ckpt = True


def not_finite(network: nn.Cell) -> list[str]:
    """Names of trainable parameters that hold an infinity or a NaN."""
    wrong = []
    for parameter in network.trainable_params():
        if parameter.has_init:
            continue
        values = parameter.astype(ms.float32) if parameter.dtype == ms.bfloat16 else parameter
        if not is_finite(values.asnumpy()):
            wrong.append(parameter.name)
    return wrong
