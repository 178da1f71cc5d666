/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Readings of the counter, with the record of gaps, and sleeping on it. */
#include "guest.h"

#define DEFAULT_FREQUENCY 62500000u

static u64 ticks_per_ms;

/* Every reading of the counter goes through here: it keeps the record of gaps. */
u64 read_counter(u32 cpu)
{
	volatile struct cpu_record *record = &status.cpu[cpu];
	u64 last = get64(&record->last_counter);
	u64 now = counter(cpu);

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
	u32 frequency = counter_frequency();

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
void sleep_until(u32 cpu, u64 until)
{
	u64 now = read_counter(cpu);

	while (now < until) {
		sleep_for(cpu, until - now > ticks_per_ms ? ticks_per_ms : until - now);
		now = read_counter(cpu);
	}
}
