# SPDX-License-Identifier: Apache-2.0
"""The words: specs, YAML views, dtypes, capacity arithmetic, errors, log."""
