/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Entry of every CPU, exception vectors, and the FP registers as storage. */
	.arch	armv8-a+fp+simd

	.section .text.start, "ax"
	.global _start
_start:
	msr	daifset, #0xf
	mrs	x4, mpidr_el1
	and	x4, x4, #0xff			/* affinity level 0: the CPU's number */
	cmp	x4, #4				/* MAX_CPUS */
	b.hs	1f
	bl	set_stack
	ldr	x0, =vectors
	msr	vbar_el1, x0
	mov	x0, #3 << 20			/* CPACR_EL1.FPEN: FP registers at EL1 */
	msr	cpacr_el1, x0
	isb
	mov	w0, w4
	bl	guest_main
1:	wfi
	b	1b

	/* CPU x4's stack, from the top; x0 is lost */
set_stack:
	ldr	x0, =stacks_top
	sub	x0, x0, x4, lsl #14		/* 16 KiB each */
	mov	sp, x0
	ret

	.balign	2048
vectors:
	.irp	n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
	.balign	128
	mov	x5, #0x80 * \n
	b	exception
	.endr
	.balign	128

	/* No exception is returned from: take this CPU's stack from the top. */
exception:
	mrs	x4, mpidr_el1
	and	x4, x4, #3
	bl	set_stack
	mov	w0, w5
	mrs	x1, elr_el1
	mov	w2, w4
	b	exception_taken

	/* void registers_store(const u64 values[32]): d0-d31 from memory */
	.section .text.registers, "ax"
	.global registers_store
registers_store:
	.irp	n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31
	ldr	d\n, [x0, #8 * \n]
	.endr
	ret

	/* void registers_fetch(u64 values[32]): d0-d31 to memory */
	.global registers_fetch
registers_fetch:
	.irp	n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31
	str	d\n, [x0, #8 * \n]
	.endr
	ret

	.section .bss.stacks, "aw", %nobits
	.balign	64
stacks:
	.space	4 * 16384
stacks_top:
