# SPDX-License-Identifier: Apache-2.0
"""Upcycling: a dense model's feed-forward copied into experts, or a mixture's experts copied into more of them."""
