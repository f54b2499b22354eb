# SPDX-License-Identifier: Apache-2.0
"""What MindFormers sees of us: the only folder that imports mindformers."""

from mindformers_ext.mf.lean import import_mindformers

import_mindformers()
