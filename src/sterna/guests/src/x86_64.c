/* SPDX-License-Identifier: GPL-2.0-or-later */
/* x86_64: the machine's clock and the timer that a CPU sleeps by. No interrupts, no exceptions: one ends the machine. */
#include "guest.h"

#define CLOCK_HZ 1000000000u
#define ONE_SECOND 1000000000ull

volatile struct time_record *time_records[MAX_CPUS];

_Noreturn void halt(void)
{
	for (;;)
		sleep_for(0, ONE_SECOND);
}

u32 counter_frequency(void)
{
	return CLOCK_HZ;
}

/* The write returns when the time is over, or before. */
void sleep_for(u32 cpu, u64 ticks)
{
	(void)cpu;
	put64(at(SLEEP_TIMER), ticks);
}

u32 cpu_number(u32 cpu)
{
	return cpu;
}

/* They come by themselves. */
int start_cpus(u32 cpus)
{
	(void)cpus;
	return 1;
}

void machine_init(void)
{
}

void cpu_init(void)
{
}
