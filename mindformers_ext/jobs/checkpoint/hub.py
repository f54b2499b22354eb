# SPDX-License-Identifier: Apache-2.0
"""Models by their name on the hub, ``OWNER/NAME`` or ``OWNER/NAME@REVISION``: in the local cache, or fetched."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mindformers_ext.core.errors import UserError

CACHE = "~/.cache/huggingface"
NAME = re.compile(r"(?P<repo>\w[\w.\-]*/\w[\w.\-]*)(@(?P<revision>\w[\w.\-/]*))?", re.ASCII)
NOT_READ = (
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.ot",
    "*.gguf",
    "*.tflite",
    "original/*",
    "onnx/*",
    "*.pth",
    "consolidated*",
)
FILES = (".ckpt", ".safetensors", ".bin", ".pt", ".pth")  # of weights: a path, not a name
PICKLES = ("*.bin", "*.pt")  # only where there is nothing better


def find_folder(path: Path, download: bool = False) -> Path:
    """``path`` where it exists or cannot be a name on the hub; else the folder of that model.

    Raises:
        UserError: as ``from_hub``.
    """
    name = str(path)
    is_path = path.suffix in FILES or path.expanduser().exists() or not NAME.fullmatch(name)
    return path if is_path else from_hub(name, download)


def from_hub(name: str, download: bool = False) -> Path:
    """The folder that holds ``name`` in the cache of huggingface_hub.

    Args:
        name: ``OWNER/NAME``, or with ``@REVISION`` behind it (a branch, a tag or a commit).
        download: fetch what is missing; without it nothing is fetched.

    Raises:
        UserError: not downloaded before, or the hub does not give it.
    """
    match = NAME.fullmatch(name)
    if not match or ".." in name:
        raise UserError(
            f"'{name}' is no folder, and no name on the hub (OWNER/NAME or OWNER/NAME@REVISION): check the path"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repo, revision = match["repo"], match["revision"]
    root = os.environ.get("HF_HUB_CACHE") or str(Path(os.environ.get("HF_HOME") or CACHE) / "hub")
    wanted: dict[str, Any] = {"repo_id": repo, "revision": revision, "cache_dir": os.path.expanduser(root)}
    if not download:
        try:
            return Path(snapshot_download(**wanted, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError) as error:
            more = f" --revision {revision}" if revision else ""
            raise UserError(
                f"'{name}' is no folder here and was not downloaded before (nothing is fetched): add --download, or "
                f"fetch it yourself (hf download {repo}{more}), or check the path"
            ) from error
    try:
        return Path(snapshot_download(**wanted, ignore_patterns=_not_wanted(repo, revision)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"'{name}' cannot be fetched from the hub ({reason[:200]}): check the name and the connection; a gated "
            "model needs its licence accepted and a token (hf auth login)"
        ) from error


def _not_wanted(repo: str, revision: str | None) -> list[str]:
    """Patterns of files that nobody here reads; pickles too where the weights are there as safetensors."""
    from huggingface_hub import list_repo_files

    safe = any(name.endswith(".safetensors") for name in list_repo_files(repo, revision=revision))
    return [*NOT_READ, *(PICKLES if safe else ())]
