# SPDX-License-Identifier: Apache-2.0
"""A network over many devices: what each holds, sends and computes, and which splits are allowed."""
