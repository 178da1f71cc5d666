/* SPDX-License-Identifier: GPL-2.0-or-later */
/* ARMv7: the MMU is off. */
#ifndef ARM_H
#define ARM_H

/* ARM ARM A3.5.3: with LPAE, single-copy atomic. */
static inline void put64(volatile u64 *where, u64 value)
{
	__asm__ volatile("strd %Q1, %R1, %0" : "=Q"(*where) : "r"(value) : "memory");
}

static inline u64 get64(const volatile u64 *where)
{
	u64 value;

	__asm__ volatile("ldrd %Q0, %R0, %1" : "=r"(value) : "Q"(*where) : "memory");
	return value;
}

static inline void relax(void)
{
	__asm__ volatile("yield");
}

#if defined(BOARD_LINUX_ARM)
u64 counter(u32 cpu);
#else
/* The generic timer's virtual counter. */
static inline u64 counter(u32 cpu)
{
	u64 now;

	(void)cpu;
	__asm__ volatile("isb\n\tmrrc p15, 1, %Q0, %R0, c14" : "=r"(now)::"memory");
	return now;
}
#endif

#endif
