# SPDX-License-Identifier: Apache-2.0
"""A dense model cut to a smaller shape by trained masks."""
