# SPDX-License-Identifier: Apache-2.0
"""A dense LLaMA becomes a mixture of experts: split, features, select, convert, and the way back."""
