"""Small ARM programs, as instruction words. Parameters come in registers."""

import struct

from sterna.memory.address import Ipa

RAM = Ipa(0x4000_0000)
CODE = RAM + 0x8000

POWER_OFF = [
    0xE3000008,  # movw r0, #8
    0xE3480400,  # movt r0, #0x8400: PSCI SYSTEM_OFF
    0xE1400070,  # hvc #0
    0xEAFFFFFE,  # b .
]

TOUCH = [
    0xE5802000,  # str r2, [r0]
    0xE2800A01,  # add r0, r0, #4096
    0xE2511001,  # subs r1, r1, #1
    0x1AFFFFFB,  # bne TOUCH
    *POWER_OFF,
]
"""Write r2 to the first word of r1 pages from r0, then power off."""

TOUCH_FOREVER = [
    0xE1A03000,  # mov r3, r0
    0xE1A04001,  # mov r4, r1
    0xE2822001,  # add r2, r2, #1
    0xE5832000,  # str r2, [r3]
    0xE2833A01,  # add r3, r3, #4096
    0xE2544001,  # subs r4, r4, #1
    0x1AFFFFFB,  # bne (str)
    0xEAFFFFF7,  # b TOUCH_FOREVER
]
"""Write a growing number, a sweep over r1 pages from r0 each, for ever. The numbers differ from page to page by one."""

SPIN = [0xE2811001, 0xEAFFFFFD]  # add r1, r1, #1; b SPIN
LOAD = [0xE5901000, *POWER_OFF]  # ldr r1, [r0]
STORE = [0xE5801000, *POWER_OFF]  # str r1, [r0]
JUMP = [0xE12FFF10]  # bx r0
UNDEFINED = [0xE7F000F0]  # udf #0
SVC = [0xEF000000]  # svc #0
WFI = [0xE320F003, *POWER_OFF]
WFE_LOOP = [0xE320F002, 0xE2811001, 0xEAFFFFFC]  # wfe; add r1, r1, #1; b WFE_LOOP
WFE_UNDEFINED = [0xE320F002, 0xE7F000F0]
SLEEP = [
    0xEC51EF1E,  # mrrc p15, 1, lr, r1, c14: CNTVCT
    0xEE0E0F13,  # mcr p15, 0, r0, c14, c3, 0: CNTV_TVAL
    0xE320F003,  # wfi
    0xEC576F1E,  # mrrc p15, 1, r6, r7, c14: CNTVCT
    0xE056800E,  # subs r8, r6, lr
    *POWER_OFF,
]
"""Sleep for r0 ticks of the virtual timer; r8 is how many passed."""
LOAD_DOUBLE = [
    0xE2855001,  # add r5, r5, #1
    0xE1A02000,  # mov r2, r0
    0xE1C220D0,  # ldrd r2, r3, [r2]
    0xEAFFFFFB,  # b LOAD_DOUBLE
]
"""For ever load two words from r0 into r2 and r3, with r2 as the base: not to be executed a second time."""
OUTPUT = [
    0xE2811001,  # add r1, r1, #1
    0xE5801000,  # str r1, [r0]
    0xEAFFFFFC,  # b OUTPUT
]
"""For ever write growing numbers to r0."""
SET_REGISTERS = [
    0xEE0D0F50,  # mcr p15, 0, r0, c13, c0, 2: TPIDRURW
    0xEE020F10,  # mcr p15, 0, r0, c2, c0, 0: TTBR0
    0xEE0C0F10,  # mcr p15, 0, r0, c12, c0, 0: VBAR
    *POWER_OFF,
]
"""Write r0 to three system registers that exist once for each security state."""
ENABLE_VFP = [
    0xEE010F50,  # mcr p15, 0, r0, c1, c0, 2: CPACR
    0xEE111F50,  # mrc p15, 0, r1, c1, c0, 2
    *POWER_OFF,
]
"""Write r0 to CPACR, and read it into r1."""
CPU_ON = [
    0xE3A01001,  # mov r1, #1
    0xE1A02004,  # mov r2, r4
    0xE3000003,  # movw r0, #3
    0xE3480400,  # movt r0, #0x8400: PSCI CPU_ON
    0xE3A03055,  # mov r3, #0x55
    0xE1400070,  # hvc #0
    0xE1A05000,  # mov r5, r0
    0xEAFFFFFE,  # b .
]
"""Start CPU 1 at r4 with context 0x55; r5 is the result."""
STORE_CONTEXT = [
    0xE3041000,  # movw r1, #0x4000
    0xE3441000,  # movt r1, #0x4000
    0xE5810000,  # str r0, [r1]
    0xEE106FB0,  # mrc p15, 0, r6, c0, c0, 5: MPIDR
    0xE5816004,  # str r6, [r1, #4]
    0xEAFFFFFE,  # b .
]
"""Write r0 and MPIDR to 0x40004000."""


def load(block, words, at=CODE):
    """Put a program into the RAM block that starts at `RAM`."""
    code = struct.pack(f"<{len(words)}I", *words)
    block.view[at - RAM : at - RAM + len(code)] = code


def word(block, ipa):
    return struct.unpack_from("<I", block.view, ipa - RAM)[0]
