/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The generic timer's virtual counter, sleeping on it, and the little of the GICv2 that lets wfi end. */
#include "guest.h"

#define DEFAULT_FREQUENCY 62500000u
#define VIRTUAL_TIMER_PPI 27

#define GICD_CTLR 0x000
#define GICD_ISENABLER0 0x100
#define GICC_CTLR 0x00
#define GICC_PMR 0x04

static u64 ticks_per_ms;

/* Every reading of the counter goes through here: it keeps the record of gaps. */
u64 read_counter(u32 cpu)
{
	volatile struct cpu_record *record = &status.cpu[cpu];
	u64 last = get64(&record->last_counter);
	u64 now;

	__asm__ volatile("isb\n\tmrrc p15, 1, %Q0, %R0, c14" : "=r"(now)::"memory");
	if (last != 0 && now < last) {
		put64(&record->backward_ticks, last - now);
		put64(&record->backward_steps, get64(&record->backward_steps) + 1);
	} else if (last != 0) {
		u64 gap = now - last;

		if (gap > get64(&record->largest_gap)) {
			put64(&record->largest_gap_start, last);
			put64(&record->largest_gap, gap);
		}
		if (gap > status.long_gap_ticks) {
			u64 count = get64(&record->long_gaps);
			volatile struct gap *slot = &record->gaps[count % GAP_RECORDS];

			put64(&slot->start, last);
			put64(&slot->ticks, gap);
			put64(&record->long_gaps, count + 1);
		}
	}
	put64(&record->last_counter, now);
	return now;
}

void counter_init(void)
{
	u32 frequency;

	__asm__ volatile("mrc p15, 0, %0, c14, c0, 0" : "=r"(frequency));
	if (frequency < 1000)
		frequency = DEFAULT_FREQUENCY;
	status.frequency = frequency;
	ticks_per_ms = frequency / 1000;
	status.long_gap_ticks = LONG_GAP_MS * (frequency / 1000);
}

u64 milliseconds(u64 ms)
{
	return ms * ticks_per_ms;
}

/* Sleeps in pieces of at most 1 ms, so that a larger gap between readings means the guest did not run. */
void sleep_until(u32 cpu, u64 counter)
{
	u64 now = read_counter(cpu);

	while (now < counter) {
		u32 ticks = (u32)(counter - now > ticks_per_ms ? ticks_per_ms : counter - now);

		/* CNTV_TVAL: Unicorn 2.1 takes a deadline from it, but drops what is written to CNTV_CVAL. */
		__asm__ volatile("mcr p15, 0, %0, c14, c3, 0" ::"r"(ticks));
		__asm__ volatile("mcr p15, 0, %0, c14, c3, 1\n\tisb" ::"r"(1)); /* CNTV_CTL: enabled */
		wfi();
		__asm__ volatile("mcr p15, 0, %0, c14, c3, 1\n\tisb" ::"r"(0)); /* off: the interrupt line goes low */
		now = read_counter(cpu);
	}
}

/* The timer's interrupt must reach the CPU for wfi to end; CPSR.I keeps it from being taken. */
void gic_init_distributor(void)
{
	*mmio(GIC_DISTRIBUTOR + GICD_CTLR) = 1;
}

void gic_init_cpu(void)
{
	*mmio(GIC_DISTRIBUTOR + GICD_ISENABLER0) = 1u << VIRTUAL_TIMER_PPI; /* banked per CPU */
	*mmio(GIC_CPU_INTERFACE + GICC_PMR) = 0xff;
	*mmio(GIC_CPU_INTERFACE + GICC_CTLR) = 1;
}
