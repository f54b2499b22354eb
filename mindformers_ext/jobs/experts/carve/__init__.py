# SPDX-License-Identifier: Apache-2.0
"""A dense model carved into a mixture without training, and its loss beside that of simpler cuts."""
