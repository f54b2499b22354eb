# SPDX-License-Identifier: Apache-2.0
"""One file per job: the only place where files, engines and surgery meet."""
