# SPDX-License-Identifier: Apache-2.0
"""A dense LLaMA into a LLaMA-MoE v2: gates from hidden states, scores, splits of them, and the three styles."""
