# SPDX-License-Identifier: Apache-2.0
"""One trained job for all tests of this folder: importing MindFormers and compiling cost more than the steps."""

import os
from types import SimpleNamespace

import pytest

from tests.helpers.tiny_run import config_of, make_job, rows_of


@pytest.fixture(scope="session")
def job(tmp_path_factory):
    """Folder and YAML of a job nobody has run."""
    folder = tmp_path_factory.mktemp("job")
    os.environ.setdefault("LOCAL_DEFAULT_PATH", str(folder / "mindformers"))  # where its logger writes on import
    return SimpleNamespace(folder=folder, yaml=make_job(folder))


@pytest.fixture(scope="session")
def trained(job):
    """The job trained for its two epochs: output folder and metrics."""
    from mindformers_ext.mf.run import run

    output = job.folder / "trained"
    run(config_of(job.yaml, f"output_dir={output}"))
    checkpoints = output / "checkpoint" / "rank_0"
    return SimpleNamespace(output=output, rows=rows_of(output), checkpoints=checkpoints, **vars(job))
