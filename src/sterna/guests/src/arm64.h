/* SPDX-License-Identifier: GPL-2.0-or-later */
/* AArch64 at EL1: the MMU is off. */
#ifndef ARM64_H
#define ARM64_H

static inline void put64(volatile u64 *where, u64 value)
{
	__asm__ volatile("str %1, %0" : "=Q"(*where) : "r"(value) : "memory");
}

static inline u64 get64(const volatile u64 *where)
{
	u64 value;

	__asm__ volatile("ldr %0, %1" : "=r"(value) : "Q"(*where) : "memory");
	return value;
}

static inline void relax(void)
{
	__asm__ volatile("yield");
}

/* The generic timer's virtual counter. */
static inline u64 counter(u32 cpu)
{
	u64 now;

	(void)cpu;
	__asm__ volatile("isb\n\tmrs %0, cntvct_el0" : "=r"(now)::"memory");
	return now;
}

#endif
