# SPDX-License-Identifier: Apache-2.0
"""PyTorch networks: GPU engine and test oracle."""
