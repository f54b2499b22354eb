# SPDX-License-Identifier: Apache-2.0
"""Models by their name on the hub, ``OWNER/NAME`` or ``OWNER/NAME@REVISION``: in the local cache, or fetched. Old
models of Hugging Face itself have no owner."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mindformers_ext.core.errors import UserError

PACKAGE = "huggingface_hub"
NAME = re.compile(r"(?P<repo>(\w[\w.\-]*/)?\w[\w.\-]*)(@(?P<revision>\w[\w.\-/]*))?", re.ASCII)
NOT_READ = ("*.h5", "*.msgpack", "*.onnx", "*.ot", "*.gguf", "*.tflite", "original/*", "onnx/*")
FILES = (".ckpt", ".safetensors", ".bin", ".pt", ".pth")  # of weights: a path, not a name
PICKLES = ("*.bin", "*.pt")  # only where there is nothing better
RELEASED = ("consolidated*", "*.pth")  # of Meta's and Mistral's own, only where there is nothing else


def find_folder(path: Path, download: bool = False) -> Path:
    """``path`` where it exists or cannot be a name on the hub; else the folder of that model.

    Raises:
        UserError: as ``from_hub``.
    """
    name = str(path)
    is_path = path.suffix in FILES or path.expanduser().exists() or not NAME.fullmatch(name)
    return path if is_path else from_hub(name, download)


def from_hub(name: str, download: bool = False) -> Path:
    """The folder that holds ``name`` in the cache of huggingface_hub, wherever its variables put that.

    Args:
        name: ``OWNER/NAME``, ``NAME``, or with ``@REVISION`` behind it (a branch, a tag or a commit).
        download: fetch what is missing; without it nothing is fetched.

    Raises:
        UserError: not downloaded before, the hub does not give it, or huggingface_hub is not installed.
    """
    match = NAME.fullmatch(name)
    if not match or ".." in name:
        raise UserError(
            f"'{name}' is no folder, and no name on the hub (OWNER/NAME or OWNER/NAME@REVISION): check the path"
        )
    if importlib.util.find_spec(PACKAGE) is None:
        raise UserError(
            f"'{name}' does not exist here; names on the hub are looked up by {PACKAGE}, which is not installed: check "
            f"the path, or pip install {PACKAGE}"
        )
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repo, revision = match["repo"], match["revision"]
    wanted: dict[str, Any] = {"repo_id": repo, "revision": revision}
    if not download:
        try:
            return Path(snapshot_download(**wanted, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError) as error:
            more = f" --revision {revision}" if revision else ""
            raise UserError(
                f"'{name}' does not exist here and was not downloaded before (nothing is fetched): add --download, or "
                f"fetch it yourself (hf download {repo}{more}), or check the path"
            ) from error
    try:
        return Path(snapshot_download(**wanted, ignore_patterns=not_wanted(list_repo_files(repo, revision=revision))))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"'{name}' cannot be fetched from the hub ({reason[:200]}): check the name and the connection; a gated "
            "model needs its licence accepted and a token (hf auth login)"
        ) from error


def not_wanted(files: Sequence[str]) -> list[str]:
    """Patterns of those of a model's ``files`` that nobody here reads, since there are better ones: safetensors, then
    pickles, then a release of another form."""
    own = [name for name in files if "/" not in name and not name.startswith(("consolidated", "adapter_"))]
    safe = any(name.endswith(".safetensors") for name in own)
    pickled = any(name.endswith((".bin", ".pt")) and name.startswith("pytorch_model") for name in own)
    return [*NOT_READ, *(PICKLES if safe else ()), *(RELEASED if safe or pickled else ())]
