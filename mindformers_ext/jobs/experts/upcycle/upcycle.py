# SPDX-License-Identifier: Apache-2.0
"""An upcycling, as a Hugging Face folder or as a MindSpore checkpoint."""

from __future__ import annotations

from dataclasses import replace

from mindformers_ext.core.errors import UserError
from mindformers_ext.formats.atomic import refuse_existing, scratch_folder
from mindformers_ext.formats.ms_file import check_suffix
from mindformers_ext.jobs.checkpoint.convert import ConvertRequest, convert
from mindformers_ext.jobs.experts.upcycle.dense import upcycle_dense
from mindformers_ext.jobs.experts.upcycle.mixture import upcycle_mixture
from mindformers_ext.jobs.experts.upcycle.request import DROP, EXPERT, MINDSPORE, Upcycled, UpcycleRequest
from mindformers_ext.jobs.experts.writing import THREADS
from mindformers_ext.jobs.merge.output import OutputRequest

SCRATCH = ".upcycled"  # after the name of a checkpoint: the folder it is converted from


def upcycle(request: UpcycleRequest, write: bool = True) -> Upcycled:
    """Write the mixture, or with ``write`` false only check everything.

    A MindSpore checkpoint is converted from a folder that lies beside it meanwhile, so it takes the disk twice.

    Raises:
        UserError: anything wrong with options, model or output; nothing is left half-written.
    """
    path, out = request.output.folder, request.output
    if not request.model.is_dir():
        raise UserError(f"'{request.model}' is no folder: give the Hugging Face folder of a dense model or a mixture")
    if request.method == DROP:  # each thread holds a whole matrix and what is made of it
        out = replace(out, threads=THREADS)
    if request.form != MINDSPORE:
        return _written(request, out, write)
    check_suffix(path)
    if path.is_dir():
        raise UserError(f"output '{path}' is a folder: give a file name")
    if path.suffix == ".safetensors" and path.parent.resolve() == request.model.resolve():
        raise UserError(f"output '{path}' lies among the weights of the input folder: choose another folder")
    refuse_existing(path, out.overwrite)
    beside = path.with_name(path.name + SCRATCH)
    if not write:
        return _written(request, replace(out, folder=beside), write)
    with scratch_folder(beside) as scratch:
        folder = scratch / "mixture"
        made = _written(request, replace(out, folder=folder, model_card=False, copy_tokenizer=False), write)
        found = convert(ConvertRequest(input_path=folder, output_path=path, overwrite=out.overwrite))
    seconds = (made.report.seconds or 0.0) + found.seconds
    report = replace(made.report, tensors=found.tensors, nbytes=found.nbytes, seconds=seconds)
    notes = (*report.notes, *found.notes, f"the tokenizer stays in '{request.model}'")
    return replace(made, report=replace(report, notes=notes))


def _written(request: UpcycleRequest, out: OutputRequest, write: bool) -> Upcycled:
    return (upcycle_mixture if request.method == EXPERT else upcycle_dense)(request, out, write)
