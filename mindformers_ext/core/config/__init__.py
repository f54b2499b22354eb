# SPDX-License-Identifier: Apache-2.0
"""A run's YAML: its words, values, files and views, and the sections that are plain data."""
