# SPDX-License-Identifier: Apache-2.0
"""Several processes started on one machine, watched, and ended together."""
