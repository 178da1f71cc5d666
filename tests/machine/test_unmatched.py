"""Which devices of QEMU's a guest can do without, and in which state."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sterna.machine.unmatched import judge_ram_block, judge_section
from sterna.stream.unmatched import RamUse
from sterna.stream.vmstate import DeviceState

CONFIG = b"\x36\x1b\x08\x00" + bytes(252)
VIRTIO_PCI = b"\0\0\0\x02" + CONFIG + bytes(100)


def state(name, *subsections, **fields):
    return DeviceState(name, 0, 1, fields, subsections)


HARMLESS = [
    state("pflash_cfi01", wcycle=0, cmd=0, status=0x80, counter=0),
    state("pl031", tick_offset_vmstate=1795469084, mr=7, lr=9, cr=1, im=0, **{"is": 1}),
    state("pl061", data=8, dir=1, im=0, istate=8),
    state("gpio-key", timer=-1),
    state("fw_cfg", state("fw_cfg/dma", dma_addr=0), cur_entry=0, **{"cur_offset[1]": 0}),
    state("fw_cfg", cur_entry=0, **{"cur_offset[1]": 0}),
    state("PCIBUS", nirq=4, irq_count=[0, 0, 0, 0]),
    state("PCIHost", config_reg=0x8000_0000),
    state("virt_acpi_build", patched=True),
    state("slirp", data=bytes(131)),
    state("0000:00:00.0/gpex_root", parent_obj={"version_id": 2, "config[0]": CONFIG, "irq_state": [0] * 4}),
    state(
        "0000:00:02.0/e1000", parent_obj={"version_id": 2, "config[0]": CONFIG + bytes(3840)}, rxbuf_size=2048
    ),
    state("0000:00:01.0/virtio-net", virtio=VIRTIO_PCI),
    state("virtio-mmio@000000000a003e00/virtio-rng", virtio=bytes(81)),
]
MATTERS = [
    (state("pflash_cfi01", wcycle=1, cmd=0x40, status=0x80, counter=0), "field 'wcycle' is 1, not 0"),
    (state("pflash_cfi01", wcycle=0, cmd=0, status=0x90, counter=0), "field 'status' is 0x90, not 0x80"),
    (state("pl031", im=1), "field 'im' is 1, not 0: the clock's alarm interrupt is enabled"),
    (state("pl061", im=8), "field 'im' is 8, not 0: interrupts of the GPIO"),
    (state("gpio-key", timer=10**10), "field 'timer' is 0x2540be400, not -1"),
    (state("fw_cfg", cur_entry=0x19, **{"cur_offset[1]": 0}), "field 'cur_entry' is 0x19"),
    (
        state("fw_cfg", state("fw_cfg/dma", dma_addr=4096), cur_entry=0, **{"cur_offset[1]": 0}),
        "fw_cfg/dma.dma_addr",
    ),
    (state("PCIBUS", nirq=4, irq_count=[0, 1, 0, 0]), "field 'irq_count' is [0, 1, 0, 0]"),
    (state("pl031"), "field 'im' is missing"),
    (
        state("0000:00:00.0/gpex_root", parent_obj={"config[0]": CONFIG[:4] + b"\2" + CONFIG[5:]}),
        "register 0x0002",
    ),
    (state("0000:00:01.0/virtio-net", virtio=VIRTIO_PCI[:8] + b"\4" + VIRTIO_PCI[9:]), "register 0x0004"),
    (state("0000:00:01.0/virtio-net", virtio=b"\1" + VIRTIO_PCI), "no configuration space"),
    (state("0000:00:01.0/odd", x=1), "no configuration space"),
    (state("virtio-mmio@000000000a003e00/virtio-rng", virtio=bytes(12) + b"\x0f" + bytes(68)), "status 0x0f"),
    (state("virtio-mmio@000000000a003e00/virtio-rng", virtio=bytes(12)), "no device status"),
    (state("smmuv3", cr=[0]), "cannot be told"),
    (state("ram2"), "cannot be told"),
]


@pytest.mark.parametrize("section", HARMLESS, ids=lambda section: section.name)
def test_harmless(section):
    judgement = judge_section(section)
    assert judgement.harmless, judgement.reason
    assert judgement.reason


@pytest.mark.parametrize(("section", "reason"), MATTERS, ids=lambda value: getattr(value, "name", ""))
def test_what_matters_is_named(section, reason):
    judgement = judge_section(section)
    assert not judgement.harmless
    assert reason in judgement.reason


@given(
    st.sampled_from([section for section in HARMLESS if section.fields]),
    st.dictionaries(
        st.text(max_size=4), st.one_of(st.integers(), st.binary(max_size=300), st.none()), max_size=3
    ),
    st.data(),
)
def test_fields_of_any_kind_are_judged(section, others, data):
    """A source can describe its sections as it likes."""
    name = data.draw(st.sampled_from(sorted(section.fields)))
    value = data.draw(st.one_of(st.integers(), st.binary(max_size=300), st.lists(st.integers(), max_size=5)))
    judgement = judge_section(dataclasses.replace(section, fields=others | section.fields | {name: value}))
    assert isinstance(judgement.harmless, bool)


@pytest.mark.parametrize(
    ("name", "size", "use"),
    [
        ("virt.flash0", 64 << 20, RamUse.BLANK),
        ("virt.flash1", 64 << 20, RamUse.BLANK),
        ("virt.flash1", 64 << 30, None),
        ("/rom@etc/acpi/tables", 1 << 17, RamUse.UNSEEN),
        ("/rom@etc/acpi/rsdp", 4096, RamUse.UNSEEN),
        ("/rom@etc/table-loader", 1 << 16, RamUse.UNSEEN),
        ("/rom@etc/table-loader", 4 << 20, None),
        ("0000:00:01.0/virtio-net-pci.rom", 1 << 18, RamUse.UNSEEN),
        ("0000:00:01.0/vga.vram", 16 << 20, RamUse.UNSEEN),
        ("0000:00:01.0/vga.vram", 1 << 40, None),
        ("virt.secure-ram", 16 << 20, None),
        ("virt.flash2", 4096, None),
        ("pc.ram", 4096, None),
    ],
)
def test_ram(name, size, use):
    assert judge_ram_block(name, size) is use
