# SPDX-License-Identifier: Apache-2.0
"""The files: safetensors folders, MindSpore checkpoints, strategy files, artifacts."""
