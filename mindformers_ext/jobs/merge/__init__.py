# SPDX-License-Identifier: Apache-2.0
"""Several models into one: dense merges, and mixtures made of dense models."""
