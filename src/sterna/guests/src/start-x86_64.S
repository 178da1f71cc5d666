/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Entry of every CPU: edi has its number, rsi its time record. And the SSE registers as storage. */
	.section .text.start, "ax"
	.global _start
_start:
	cmpl	$4, %edi			/* MAX_CPUS */
	jae	1f
	movl	%edi, %eax
	movq	%rsi, time_records(,%rax,8)
	shll	$14, %eax			/* 16 KiB each */
	leaq	stacks_top(%rip), %rsp
	subq	%rax, %rsp
	xorl	%ebp, %ebp
	call	guest_main
1:	call	halt

	/* void registers_store(const u64 values[32]): xmm0-xmm15 from memory */
	.section .text.registers, "ax"
	.global registers_store
registers_store:
	.irp	n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
	movups	16 * \n(%rdi), %xmm\n
	.endr
	ret

	/* void registers_fetch(u64 values[32]): xmm0-xmm15 to memory */
	.global registers_fetch
registers_fetch:
	.irp	n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
	movups	%xmm\n, 16 * \n(%rdi)
	.endr
	ret

	.section .bss.stacks, "aw", @nobits
	.balign	64
stacks:
	.space	4 * 16384
stacks_top:
