# SPDX-License-Identifier: Apache-2.0
"""The table of tensors inside a file of torch.save, looked through before it is unpickled.

``weights_only`` runs none of the code that a pickle names, but builds what it asks for: ``bytearray(4000000000)`` is
allowed, and so is a storage of any size. A state dict needs dictionaries, tuples, numbers, texts and the few names
below.
"""

from __future__ import annotations

import pickletools
import re

from mindformers_ext.core.errors import UserError

MAX_TABLE = 2**25  # bytes of names and shapes; Mixtral-8x22B has under one million
MAX_OPCODES = 3_000_000  # about 25 for a tensor
NAMES = re.compile(
    r"collections OrderedDict"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)"
    r"|torch (\w+Storage|Size|device|(b?float|u?int|complex)\d\w*|bool)"
)
# Opcodes that say how to build something (a name, a call, a reference to stored data), or only collect values.
ALLOWED = frozenset(
    """PROTO FRAME STOP MARK POP POP_MARK MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET
    NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT
    UNICODE BINUNICODE SHORT_BINUNICODE STRING BINSTRING SHORT_BINSTRING
    EMPTY_DICT DICT SETITEM SETITEMS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS
    GLOBAL REDUCE BUILD BINPERSID""".split()
)


def check_table(data: bytes, where: str) -> None:
    """Look through the pickle ``data`` of the file ``where``; nothing of it is built.

    Raises:
        UserError: not a pickle, too long, or one that asks for more than tensors by name.
    """
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if count >= MAX_OPCODES:
                raise UserError(f"'{where}' has a table of more than {MAX_OPCODES} instructions: {_ADVICE}")
            if opcode.name == "GLOBAL" and not NAMES.fullmatch(str(argument)):
                raise UserError(f"'{where}' asks to run {str(argument)[:80]!r}, which is refused: {_ADVICE}")
            if opcode.name not in ALLOWED:
                raise UserError(f"'{where}' holds more than tensors by name ({opcode.name} in its table): {_ADVICE}")
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 damaged bytes make pickletools fail in many ways
        raise UserError(f"'{where}' has a damaged table of tensors ({error}): copy it again") from error


_ADVICE = "save the model as safetensors, or its state_dict() with torch.save"
