/* SPDX-License-Identifier: GPL-2.0-or-later */
/* AArch64: exceptions, PSCI and the generic timer. */
#include "guest.h"

#define PSCI_CPU_ON 0xc4000003ull /* ARM DEN 0022: CPU_ON, 64-bit calls */
#define PSCI_ALREADY_ON -4

_Noreturn void exception_taken(u32 vector, u64 pc, u32 cpu);

/* Called from the vectors; nothing here expects an exception. */
_Noreturn void exception_taken(u32 vector, u64 pc, u32 cpu)
{
	u64 address, syndrome;

	__asm__ volatile("mrs %0, far_el1" : "=r"(address));
	__asm__ volatile("mrs %0, esr_el1" : "=r"(syndrome));
	fail_by_exception(cpu, vector, (u32)pc, (u32)address, (u32)syndrome);
}

static void wfi(void)
{
	__asm__ volatile("dsb sy\n\twfi" ::: "memory");
}

_Noreturn void halt(void)
{
	for (;;)
		wfi();
}

u32 counter_frequency(void)
{
	u64 frequency;

	__asm__ volatile("mrs %0, cntfrq_el0" : "=r"(frequency));
	return (u32)frequency;
}

void sleep_for(u32 cpu, u64 ticks)
{
	(void)cpu;
	__asm__ volatile("msr cntv_cval_el0, %0" ::"r"(counter(cpu) + ticks));
	__asm__ volatile("msr cntv_ctl_el0, %0\n\tisb" ::"r"(1ull)); /* enabled */
	wfi();
	__asm__ volatile("msr cntv_ctl_el0, %0\n\tisb" ::"r"(0ull)); /* off: the interrupt line goes low */
}

u32 cpu_number(u32 cpu)
{
	u64 mpidr;

	(void)cpu;
	__asm__ volatile("mrs %0, mpidr_el1" : "=r"(mpidr));
	return (u32)mpidr;
}

int start_cpus(u32 cpus)
{
	for (u32 cpu = 1; cpu < cpus; cpu++) {
		extern void _start(void);
		register u64 x0 __asm__("x0") = PSCI_CPU_ON;
		register u64 x1 __asm__("x1") = cpu; /* MPIDR affinity: all in cluster 0 */
		register u64 x2 __asm__("x2") = (u64)(uintptr_t)&_start;
		register u64 x3 __asm__("x3") = cpu;

		__asm__ volatile("hvc #0"
				 : "+r"(x0), "+r"(x1), "+r"(x2), "+r"(x3)
				 :
				 : "x4", "x5", "x6", "x7", "x8", "x9", "x10", "x11", "x12", "x13", "x14", "x15", "x16", "x17", "memory");
		if (x0 != 0 && (int)x0 != PSCI_ALREADY_ON)
			return 0;
	}
	return 1;
}
