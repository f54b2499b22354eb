# SPDX-License-Identifier: Apache-2.0
"""A cluster's job compiled on one machine: planned, run, measured, shown."""
