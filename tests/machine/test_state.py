"""Device state in QEMU's layout: round trips, what is refused, and sections that a real QEMU wrote."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.machine.parts import KNOWN, MachineState, Parts, cpu, load, save

from sterna.arch.armv7.cortexa15 import reset_values
from sterna.arch.armv7.cp15 import CNTV_CTL, CNTV_CVAL, SCTLR
from sterna.arch.armv7.state import ArmVcpuState
from sterna.arch.armv7.wire import NON_SECURE_BANK, from_wire, to_wire
from sterna.boards.vexpress_a15 import BOARD as VEXPRESS_A15
from sterna.boards.virt import BOARD as VIRT
from sterna.machine.devices.gic.controller import Gic, GicCpuInterface, GicDistributor
from sterna.machine.devices.gic.registers import CpuInterface, Distributor, GicRegisters, Irq
from sterna.machine.devices.gic.section import ARM_GIC, load_gic, save_gic
from sterna.machine.devices.pl011 import PL011, Pl011, Pl011Registers, load_pl011, save_pl011
from sterna.machine.runstate import RunState
from sterna.machine.serial import MemorySerial
from sterna.stream.vmstate import DeviceState, StreamError

U8, U32, U64 = st.integers(0, 0xFF), st.integers(0, 0xFFFF_FFFF), st.integers(0, (1 << 64) - 1)
BANK_OF_MODE = {0x10: "usr", 0x11: "fiq", 0x12: "irq", 0x13: "svc", 0x17: "abt", 0x1B: "und", 0x1F: "usr"}


def is_wide(register):
    return register >> 52 & 0xF == 3


@st.composite
def cpu_states(draw, counter=0):
    mode = draw(st.sampled_from(sorted(BANK_OF_MODE)))
    bank = BANK_OF_MODE[mode]
    regs = draw(st.lists(U32, min_size=16, max_size=16))
    names = [f"{kind}_{name}" for name in sorted(set(BANK_OF_MODE.values())) for kind in ("sp", "lr", "spsr")]
    names.remove("spsr_usr")
    names += [f"r{i}_{name}" for i in range(8, 13) for name in ("usr", "fiq")]
    banked = {name: draw(U32) for name in names}
    # The bank of the current mode repeats the registers.
    banked[f"sp_{bank}"], banked[f"lr_{bank}"] = regs[13], regs[14]
    for i in range(8, 13):
        banked[f"r{i}_{'fiq' if bank == 'fiq' else 'usr'}"] = regs[i]
    return ArmVcpuState(
        regs=regs,
        cpsr=draw(U32) & ~0x1F | mode,
        banked=banked,
        cp15={register: draw(U64 if is_wide(register) else U32) for register in sorted(KNOWN)},
        vfp=draw(st.lists(U64, min_size=32, max_size=32)),
        fpscr=draw(U32),
        fpexc=draw(U32),
        counter=counter,
        powered_off=draw(st.booleans()),
    )


@st.composite
def gics(draw):
    registers = GicRegisters.reset(4)
    for irq in draw(st.sets(st.integers(0, 1019), max_size=8)):
        registers.irqs[irq] = Irq(
            *(draw(U8) for _ in range(4)), draw(st.booleans()), draw(st.booleans()), draw(U8)
        )
        registers.target[irq] = draw(U8)
    for name, top in (
        ("priority_mask", 0xFF),
        ("running_priority", 0x100),
        ("bpr", 7),
        ("abpr", 7),
        ("cpu_ctlr", 0x1F),
    ):
        setattr(registers, name, [draw(st.integers(0, top)) for _ in range(8)])
    for name in ("private_priority", "sgi_sources"):
        getattr(registers, name)[3][5] = draw(U8)
    registers.apr[2][1], registers.nsapr[3][7] = draw(U32), draw(U32)
    registers.priority[987] = draw(U8)
    registers.ctlr = draw(st.integers(0, 3))
    return registers


@st.composite
def uarts(draw):
    registers = Pl011Registers(lcr=draw(U8), fifo=draw(st.lists(U32, min_size=16, max_size=16)))
    for name in ("rsr", "cr", "dmacr", "imsc", "ris", "ilpr", "ibrd", "fbrd", "ifls", "clock_period"):
        setattr(registers, name, draw(U32))
    registers.read_pos = draw(st.integers(0, 15))
    registers.read_count = draw(st.integers(0, registers.depth))
    return registers


@st.composite
def machine_states(draw):
    counter = draw(st.integers(0, (1 << 59) - 1))
    return MachineState(
        counter=counter,
        cpus=tuple(draw(cpu_states(counter)) for _ in range(draw(st.integers(1, 2)))),
        gic=draw(gics()),
        uarts=(draw(uarts()),),
        run_state=draw(st.sampled_from([None, RunState.RUNNING, RunState.PAUSED, RunState.SHUTDOWN])),
    )


DESCRIPTIONS = Parts([cpu()]).descriptions


def through_bytes(section):
    description = DESCRIPTIONS[section.name]
    return description.decode(description.encode(section), instance_id=section.instance_id)


def example(smp=1, uarts=1):
    return MachineState(
        counter=1000,
        cpus=tuple(cpu() for _ in range(smp)),
        gic=GicRegisters.reset(smp),
        uarts=tuple(Pl011Registers() for _ in range(uarts)),
        run_state=RunState.RUNNING,
    )


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(machine_states())
def test_a_machine_survives_the_wire(state):
    loaded = load([through_bytes(section) for section in save(state)], len(state.cpus))
    if len(state.cpus) == 1:
        state.gic.target = [0] * len(state.gic.target)  # as they read
    assert loaded == state


def test_sections_come_in_qemus_order():
    names = [(section.name, section.instance_id) for section in save(example(2))]
    assert names == [
        *(("timer", 0), ("cpu_common", 0), ("cpu", 0), ("cpu_common", 1), ("cpu", 1)),
        *(("arm_gic", 0), ("pl011", 0), ("globalstate", 0)),
    ]


def test_the_counter_is_the_clock_in_ns():
    assert save(example())[0].fields["cpu_clock_offset"] == 1000 * 16


@pytest.mark.parametrize(
    ("control", "compare", "expiry", "line"),
    [
        (0, 500, -1, False),
        (1, 500, (1 << 63) - 1, True),
        (1, 2000, 32000, False),
        (3, 500, (1 << 63) - 1, False),
    ],
)
def test_the_virtual_timer(control, compare, expiry, line):
    state = example()
    state.cpus[0].cp15 |= {CNTV_CTL: control, CNTV_CVAL: compare}
    assert save(state)[2].fields["gt_timer[1]"] == expiry
    assert state.cpus[0].timer_line is line


def changed(section, **fields):
    return dataclasses.replace(section, fields=section.fields | fields)


def without_subsections(section):
    return dataclasses.replace(section, subsections=())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("timer", lambda s: changed(s, cpu_clock_offset=-1), r"'timer'.*cpu_clock_offset"),
        ("cpu", lambda s: changed(s, cpsr=0x1DA), r"'cpu 0'.*'cpsr'.*0x1a"),
        ("cpu", lambda s: changed(s, power_state=3), "'cpu 0'.*'power_state'"),
        ("cpu", without_subsections, "'cpu 0'.*cpu/vfp"),
        (
            "cpu",
            lambda s: changed(
                s, cpreg_vmstate_array_len=0, cpreg_vmstate_indexes=[], cpreg_vmstate_values=[]
            ),
            "'cpu 0'.*system register .* is missing",
        ),
        ("arm_gic", lambda s: changed(s, bpr=[0, 9, 0, 0, 0, 0, 0, 0]), r"'arm_gic'.*'bpr\[1\]'"),
        ("arm_gic", lambda s: changed(s, ctlr=4), "'arm_gic'.*'ctlr'.*0x4 is beyond 0x3"),
        ("arm_gic", lambda s: changed(s, ctlr=0x100), "'arm_gic'.*'ctlr'.*0x100 is beyond 0x3"),
        ("pl011", lambda s: changed(s, read_pos=16), "'pl011'.*'read_pos'"),
        ("pl011", lambda s: changed(s, read_pos=-1), "'pl011'.*'read_pos'"),
        ("pl011", lambda s: changed(s, read_count=2), "'pl011'.*'read_count'"),
        (
            "globalstate",
            lambda s: changed(s, runstate=b"dancing".ljust(100, b"\0")),
            "'globalstate'.*dancing",
        ),
        ("globalstate", lambda s: changed(s, runstate=b"\xff" * 100), "'globalstate'"),
        (
            "globalstate",
            lambda s: changed(s, runstate=b"inmigrate".ljust(100, b"\0")),
            "'globalstate'.*inmigrate",
        ),
    ],
)
def test_values_that_a_device_cannot_have(name, change, message):
    states = [change(section) if section.name == name else section for section in save(example())]
    with pytest.raises(StreamError, match=message):
        load(states)


class Cpu:
    """What the GIC signals to a CPU does not matter."""

    def set_interrupt(self, level):
        pass

    def set_timer_wakes(self, enabled):
        pass


def use_gic(registers):
    gic = Gic(VIRT.gic, [Cpu(), Cpu()])
    gic.restore(registers)
    distributor, interface = GicDistributor(gic), GicCpuInterface(gic)
    for register in (0, *map(int, CpuInterface)):  # acknowledged and ended, too
        interface.mmio_write(register, 4, interface.mmio_read(register, 4, 0), 0)
    for offset in range(0, 0x1000, 4):
        distributor.mmio_read(offset, 4, 0)
    for offset in Distributor:
        distributor.mmio_write(offset, 4, distributor.mmio_read(offset, 4, 0), 0)
    return save_gic(*gic.snapshot([False, True]))


def use_uart(registers):
    uart = Pl011(VIRT.uarts[0], MemorySerial(), lambda level: None)
    uart.restore(registers)
    uart.receive(b"received")
    for offset in range(0, 0x1000, 4):
        uart.mmio_write(offset, 4, uart.mmio_read(offset, 4, 0), 0)
    return save_pl011(uart.snapshot(), 0)


@pytest.mark.parametrize(
    ("description", "load", "use", "field"),
    [
        pytest.param(description, load, use, field.name, id=f"{description.name} {field.name}")
        for description, load, use in (
            (ARM_GIC, lambda state: load_gic(state, 2), use_gic),
            (PL011, load_pl011, use_uart),
        )
        for field in description.fields
    ],
)
def test_a_field_of_ones_is_refused_or_the_device_works_with_it(description, load, use, field):
    section = next(section for section in save(example(2)) if section.name == description.name)
    before, values = bytearray(), bytearray()
    for part in description.fields:
        if part.name == field:
            part.write(values, section.fields[field], section.fields)
            break
        part.write(before, section.fields[part.name], section.fields)
    body = bytearray(description.encode(section))
    body[len(before) : len(before) + len(values)] = b"\xff" * len(values)
    try:
        registers = load(description.decode(body))
    except StreamError:
        return
    description.encode(use(registers))


@pytest.mark.parametrize("left_out", ["timer", "cpu_common", "cpu", "arm_gic", "pl011"])
def test_a_missing_section_is_named(left_out):
    states = [section for section in save(example()) if section.name != left_out]
    with pytest.raises(StreamError, match=f"'{left_out} 0'.*missing"):
        load(states)


def test_globalstate_may_be_missing():
    states = [section for section in save(example()) if section.name != "globalstate"]
    assert load(states).run_state is None


def test_other_machines_are_refused():
    with pytest.raises(StreamError, match=r"'cpu_common 1'.*this machine has 1"):
        load(save(example(2)))
    with pytest.raises(StreamError, match=r"'cpu 1'.*missing"):
        load(save(example(1)), 2)
    with pytest.raises(StreamError, match=r"'pl011 1'.*missing"):
        load(save(example()), board=VEXPRESS_A15)
    with pytest.raises(StreamError, match=r"'pl031 0'.*no such device"):
        load([*save(example()), DeviceState("pl031", 0, 1, {})])
    with pytest.raises(StreamError, match=r"'timer 0'.*twice"):
        load([*save(example()), save(example())[0]])


def test_registers_that_nobody_keeps():
    register = SCTLR & ~0xFFFF | 15 << 11 | 1
    wire = register | NON_SECURE_BANK
    kept, left_out = from_wire({wire: 5}, {register}, {})
    assert (kept, left_out) == ({register: 5}, {})
    kept, left_out = from_wire({wire: 5}, set(), {})
    assert (kept, left_out) == ({}, {wire: 5})
    assert from_wire({wire: 5}, set(), {wire: 5}) == ({}, {})
    assert from_wire({wire: 0}, set(), {}) == ({}, {})


def test_a_reset_cpu_leaves_nothing_out():
    others = reset_values(4, 0x0800_0000)
    assert from_wire(to_wire(dict.fromkeys(KNOWN, 0), others), KNOWN, others)[1] == {}


def with_register(section, wire, value):
    registers = dict(
        zip(section.fields["cpreg_vmstate_indexes"], section.fields["cpreg_vmstate_values"], strict=True)
    )
    registers[wire] = value
    return changed(
        section,
        cpreg_vmstate_array_len=len(registers),
        cpreg_vmstate_indexes=list(registers.keys()),
        cpreg_vmstate_values=list(registers.values()),
    )


def with_thumb2ee(section):
    parts = [
        changed(part, **{"env.teecr": 1}) if part.name == "cpu/thumb2ee" else part
        for part in section.subsections
    ]
    return dataclasses.replace(section, subsections=tuple(parts))


CNTP_CTL = 0x6030_0000_0013_0000 | 3 << 14 | 3 << 11 | 14 << 7 | 2 << 3 | 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: with_register(s, CNTP_CTL, 1), r"S3_3_C14_C2_1 is 0x1, and always 0x0 here"),
        (
            lambda s: with_register(s, 0x4020_0000_200F_0000, 0x410F_C075),
            r"p15, 0, c0, c0, 0 is 0x410fc075, and",
        ),
        (lambda s: with_register(s, 0x4030_0000_000F_0380, 7), r"p15, 0, c7 \(secure\) is 0x7"),
        (lambda s: changed(s, **{"env.elr_el": [0, 0, 9, 0]}), r"'env.elr_el'.*0x9: EL2 or EL3"),
        (lambda s: changed(s, **{"env.pc": 64}), r"'env.pc'.*AArch64"),
        (lambda s: changed(s, **{"env.banked_r13": [0] * 7 + [3]}), r"'env.banked_r13\[7\]'.*0x3"),
        (with_thumb2ee, r"'<cpu/thumb2ee>.env.teecr'.*ThumbEE"),
        (lambda s: changed(s, power_state=2), r"'power_state'.*just being started"),
    ],
)
def test_what_a_cpu_here_has_not_is_refused(change, message):
    """Unless its user says that it does not matter."""
    states = [change(section) if section.name == "cpu" else section for section in save(example())]
    with pytest.raises(StreamError, match=f"'cpu 0'.*{message}"):
        load(states)
    if "power_state" not in message:
        assert load(states, ignored={"cpu"}) == dataclasses.replace(
            example(), cpus=load(save(example())).cpus
        )


def test_a_single_cpu_is_the_target_of_all_interrupts_on_the_wire():
    gic = next(section for section in save(example()) if section.name == "arm_gic")
    assert gic.fields["irq_target"] == [1] * 1020, "QEMU delivers an interrupt to its targets only"
    assert not any(load(save(example())).gic.target), "they read as zero"
    both = next(section for section in save(example(2)) if section.name == "arm_gic")
    assert both.fields["irq_target"] == [0] * 1020
