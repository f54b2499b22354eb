# SPDX-License-Identifier: Apache-2.0
"""The words: families, specs, YAML views, the table of weights, arithmetic of clusters, errors, log."""
