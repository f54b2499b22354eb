# SPDX-License-Identifier: Apache-2.0
"""Hugging Face transformers as the judge of a folder, also of one that transformers 4 does not read by itself."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np

from mindformers_ext.core.config.hf import model_spec_from_hf
from mindformers_ext.jobs.checkpoint.fused import unfused
from mindformers_ext.jobs.checkpoint.hf_code import own_code
from mindformers_ext.jobs.checkpoint.renamed import notes_of
from mindformers_ext.jobs.checkpoint.source import open_hf, read_config
from mindformers_ext.jobs.engine.door import open_reference
from mindformers_ext.jobs.engine.protocols import Reference


def open_judge(folder: Path) -> Reference:
    """transformers' network with the weights of ``folder``, float32 on the CPU.

    Where the folder's experts are fused or its names are not Hugging Face's, transformers is handed the tensors under
    the names it reads; so it is where the network is ours (LLaMA-MoE), of which our code is run and none of the
    folder's. Any other folder it reads itself.

    Raises:
        UserError: no model there, or weights missing or left over.
    """
    config = read_config(folder)
    family = model_spec_from_hf(config).model_type
    with closing(open_hf(folder)) as reader, own_code(config) as code:
        view = unfused(reader, family)
        if code is None and view is reader and not notes_of(reader):
            return open_reference(folder)
        return open_reference(folder, ((name, view.read(name).astype(np.float32)) for name in view.infos), code)
