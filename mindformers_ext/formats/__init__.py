# SPDX-License-Identifier: Apache-2.0
"""The files: safetensors, MindSpore checkpoints, strategies, MindRecord; docs/formats.md has their bytes."""
