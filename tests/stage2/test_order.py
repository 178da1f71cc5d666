"""What compiled code promises about the order of its stores, which x86 keeps anyway and other processors do not."""

import re

import pytest

from sterna.jit.compiler import _dispatcher, _types_of
from sterna.stage2.change import dissolve, table_at


@pytest.mark.parametrize("kernel", [table_at, dissolve])
def test_a_table_is_published_after_its_entries(kernel):
    """Another CPU may see two plain stores the other way round (ARM DDI 0406C.c, A3.8.2)."""
    dispatcher = _dispatcher(kernel)
    signature = tuple(_types_of(kernel.expected))
    dispatcher.compile(signature)
    code = dispatcher.overloads[signature].library.get_llvm_str()
    assert len(re.findall(r"store atomic i64 .* release", code)) == 1
