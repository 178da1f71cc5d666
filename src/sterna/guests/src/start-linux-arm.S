/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Entry of the process, threads, system calls, and the VFP registers as storage. */
	.syntax unified
	.arch armv7-a
	.fpu vfpv4
	.arm

	.section .text.start, "ax"
	.global _start
_start:
	mov	r0, sp				@ argc, argv
	bic	sp, sp, #7
	b	process_main

	@ int system_call(u32 number, u32 a, u32 b, u32 c, u32 d, u32 e, u32 f)
	.global system_call
system_call:
	push	{r4, r5, r7, lr}
	mov	r7, r0
	mov	r0, r1
	mov	r1, r2
	mov	r2, r3
	ldr	r3, [sp, #16]
	ldr	r4, [sp, #20]
	ldr	r5, [sp, #24]
	svc	#0
	pop	{r4, r5, r7, pc}

	@ int start_thread(u32 flags, void *stack, u32 cpu): a new thread begins in guest_main
	.global start_thread
start_thread:
	push	{r4, r5, r7, lr}
	mov	r5, r2
	mov	r2, #0
	mov	r3, #0
	mov	r4, #0
	mov	r7, #120			@ clone
	svc	#0
	cmp	r0, #0
	popne	{r4, r5, r7, pc}
	mov	r0, r5
	b	guest_main

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
