# SPDX-License-Identifier: Apache-2.0
"""A layer's neurons carved into shared and routed experts, with a router and a refit, from one pass over some text."""
