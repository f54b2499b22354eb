# SPDX-License-Identifier: Apache-2.0
"""A dense feed-forward part cut into experts: which neuron goes where, and gates that choose. No files here."""
