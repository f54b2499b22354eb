# SPDX-License-Identifier: Apache-2.0
"""Mixtral and LLaMA-MoE on MindSpore. This file imports nothing: what a job needs to import decides where it lives."""

__version__ = "0.1.0"
