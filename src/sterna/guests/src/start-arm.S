/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Entry of every CPU, exception vectors, and the VFP registers as storage. */
	.syntax unified
	.arch armv7-a
	.fpu vfpv4
	.arm

	.section .text.start, "ax"
	.global _start
_start:
	cpsid	aif
	mrc	p15, 0, r4, c0, c0, 5		@ MPIDR
	and	r4, r4, #0xff			@ affinity level 0: the CPU's number
	cmp	r4, #4				@ MAX_CPUS
	bhs	3f
	ldr	r0, =stacks_top
	sub	sp, r0, r4, lsl #14		@ 16 KiB each
	ldr	r0, =vectors
	mcr	p15, 0, r0, c12, c0, 0		@ VBAR
	mrc	p15, 0, r0, c1, c0, 2		@ CPACR
	orr	r0, r0, #0xf00000		@ full access to CP10 and CP11
	mcr	p15, 0, r0, c1, c0, 2
	isb
	mov	r0, #0x40000000			@ FPEXC.EN
	vmsr	fpexc, r0
	mov	r0, r4
	bl	guest_main
3:	wfi
	b	3b

	.balign	32
vectors:
	b	.				@ reset: never taken through VBAR
	b	undefined
	b	supervisor
	b	prefetch
	b	data
	b	.				@ HYP trap: not in this mode
	b	irq
	b	fiq

	@ The banked stack pointers are not set up: take this CPU's stack from the top, it never returns.
	.macro	handler name vector adjust
\name:
	sub	r1, lr, #\adjust
	mov	r0, #\vector
	b	exception
	.endm
	handler	undefined 0x04 4
	handler	supervisor 0x08 4
	handler	prefetch 0x0c 4
	handler	data 0x10 8
	handler	irq 0x18 4
	handler	fiq 0x1c 4
exception:
	mrc	p15, 0, r4, c0, c0, 5
	and	r4, r4, #3
	ldr	r2, =stacks_top
	sub	sp, r2, r4, lsl #14
	mov	r2, r4
	b	exception_taken

	@ void registers_store(const u64 values[32]): d0-d31 from memory
	.section .text.vfp, "ax"
	.global registers_store
registers_store:
	vldmia	r0!, {d0-d15}
	vldmia	r0, {d16-d31}
	bx	lr

	@ void registers_fetch(u64 values[32]): d0-d31 to memory
	.global registers_fetch
registers_fetch:
	vstmia	r0!, {d0-d15}
	vstmia	r0, {d16-d31}
	bx	lr

	.section .bss.stacks, "aw", %nobits
	.balign	64
stacks:
	.space	4 * 16384
stacks_top:
