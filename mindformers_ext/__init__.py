# SPDX-License-Identifier: Apache-2.0
"""Decoders of the LLaMA kind on MindSpore and PyTorch. Imports nothing: what code imports decides where it lives."""

__version__ = "0.1.0"
