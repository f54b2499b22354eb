# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in, checkpoints out: merge, experts, prune; torch tensors and no files."""
