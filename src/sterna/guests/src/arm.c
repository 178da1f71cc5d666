/* SPDX-License-Identifier: GPL-2.0-or-later */
/* ARMv7: exceptions, PSCI and the generic timer. */
#include "guest.h"

#define PSCI_CPU_ON 0x84000003u /* ARM DEN 0022: CPU_ON, 32-bit calls */
#define PSCI_ALREADY_ON -4

_Noreturn void exception_taken(u32 vector, u32 pc, u32 cpu);

/* Called from the vectors; nothing here expects an exception. */
_Noreturn void exception_taken(u32 vector, u32 pc, u32 cpu)
{
	u32 address, syndrome;

	if (vector == 0x0c) {
		__asm__ volatile("mrc p15, 0, %0, c6, c0, 2" : "=r"(address));
		__asm__ volatile("mrc p15, 0, %0, c5, c0, 1" : "=r"(syndrome));
	} else {
		__asm__ volatile("mrc p15, 0, %0, c6, c0, 0" : "=r"(address));
		__asm__ volatile("mrc p15, 0, %0, c5, c0, 0" : "=r"(syndrome));
	}
	fail_by_exception(cpu, vector, pc, address, syndrome);
}

static void wfi(void)
{
	__asm__ volatile("dsb\n\twfi" ::: "memory");
}

_Noreturn void halt(void)
{
	for (;;)
		wfi();
}

u32 counter_frequency(void)
{
	u32 frequency;

	__asm__ volatile("mrc p15, 0, %0, c14, c0, 0" : "=r"(frequency));
	return frequency;
}

void sleep_for(u32 cpu, u64 ticks)
{
	(void)cpu;
	/* CNTV_TVAL: Unicorn 2.1 takes a deadline from it, but drops what is written to CNTV_CVAL. */
	__asm__ volatile("mcr p15, 0, %0, c14, c3, 0" ::"r"((u32)ticks));
	__asm__ volatile("mcr p15, 0, %0, c14, c3, 1\n\tisb" ::"r"(1)); /* CNTV_CTL: enabled */
	wfi();
	__asm__ volatile("mcr p15, 0, %0, c14, c3, 1\n\tisb" ::"r"(0)); /* off: the interrupt line goes low */
}

u32 cpu_number(u32 cpu)
{
	u32 mpidr;

	(void)cpu;
	__asm__ volatile("mrc p15, 0, %0, c0, c0, 5" : "=r"(mpidr));
	return mpidr;
}

int start_cpus(u32 cpus)
{
	__asm__ volatile("dsb\n\tsev" ::: "memory");
#if HAVE_PSCI
	for (u32 cpu = 1; cpu < cpus; cpu++) {
		extern void _start(void);
		register u32 r0 __asm__("r0") = PSCI_CPU_ON;
		register u32 r1 __asm__("r1") = cpu; /* MPIDR affinity: all in cluster 0 */
		register u32 r2 __asm__("r2") = (u32)&_start;
		register u32 r3 __asm__("r3") = cpu;

		__asm__ volatile(".arch_extension virt\n\thvc #0"
				 : "+r"(r0), "+r"(r1), "+r"(r2), "+r"(r3)
				 :
				 : "r12", "memory");
		if (r0 != 0 && (int)r0 != PSCI_ALREADY_ON)
			return 0;
	}
#else
	(void)cpus;
#endif
	return 1;
}
