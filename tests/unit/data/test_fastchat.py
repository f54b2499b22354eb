# SPDX-License-Identifier: Apache-2.0
"""fschat, which is installed without its dependencies: the one module used must need none, and give the known text."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

# Run with -S (no site-packages) and one folder on the path that holds fastchat alone.
ALONE = """
import json, sys
sys.path.append(sys.argv[1])
from fastchat.conversation import get_conv_template
template = get_conv_template("vicuna_v1.1")
template.append_message(template.roles[0], "Hello?")
template.append_message(template.roles[1], "Hi!")
others = {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names) - {"__main__"}
print(json.dumps([sorted(others), template.get_prompt()]))
"""


def test_conversation_needs_no_other_package(tmp_path: Path) -> None:
    found = importlib.util.find_spec("fastchat")
    assert found and found.submodule_search_locations, "run scripts/setup_env.sh"
    (tmp_path / "fastchat").symlink_to(found.submodule_search_locations[0])
    command = [sys.executable, "-S", "-c", ALONE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    others, prompt = json.loads(done.stdout)
    assert others == ["fastchat"]
    assert prompt == (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
        "USER: Hello? ASSISTANT: Hi!</s>"
    )


def test_the_installed_version_is_the_one_of_the_lock(repo_root: Path) -> None:
    lock = (repo_root / "requirements.lock").read_text(encoding="utf-8")
    pinned = re.findall(r"^#no-deps (\S+)==(\S+)$", lock, re.M)
    assert [name for name, _ in pinned] == ["fschat"]
    assert importlib.metadata.version("fschat") == pinned[0][1]
    setup = (repo_root / "scripts" / "setup_env.sh").read_text(encoding="utf-8")
    assert "s/^#no-deps //p" in setup and "--no-deps" in setup
