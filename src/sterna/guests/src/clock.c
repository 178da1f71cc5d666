/* SPDX-License-Identifier: GPL-2.0-or-later */
/* clock [PERIOD_MS]: prints the time that the counter tells; all CPUs record the gaps between readings. */
#include "guest.h"

#define MAX_PERIOD_MS 3600000u

static void check(void)
{
	u64 period = get64(&status.args[0]);

	if (period < 1 || period > MAX_PERIOD_MS)
		fail(ERROR_ARGUMENT_RANGE, "PERIOD_MS must be 1 to 3600000");
}

static void print_time(u64 now)
{
#if defined(BOARD_LINUX_ARM)
	u64 ms = system_ms(); /* what the kernel makes of the counter */

	(void)now;
#else
	u64 rest, ms = divide(now, status.frequency / 1000, &rest);
#endif
	u64 seconds = divide(ms, 1000, &ms);
	u64 minutes = divide(seconds, 60, &seconds);
	u64 hours = divide(minutes, 60, &minutes);

	print_padded(hours, 2);
	print(":");
	print_padded(minutes, 2);
	print(":");
	print_padded(seconds, 2);
	print(".");
	print_padded(ms, 3);
}

static void run(u32 cpu)
{
	volatile struct cpu_record *record = &status.cpu[cpu];
	u64 period = milliseconds(get64(&status.args[0]));
	u64 next = read_counter(cpu);

	put64(&record->words[CLOCK_PERIOD], period);
	for (u64 sequence = 1;; sequence++) {
		u64 now = read_counter(cpu);

		if (cpu == 0) {
			print("clock: ");
			print_time(now);
			print(" seq ");
			print_number(sequence);
			print(" largest gap ");
			print_ms(get64(&record->largest_gap));
			print(" ms backward ");
			print_number(get64(&record->backward_steps));
			print("\n");
			put64(&record->words[CLOCK_SEQUENCE], sequence);
		}
		put64(&record->steps, sequence);
		next += period;
		/* After a long gap go on from now: no burst of lines to catch up. */
		if (next < now)
			next = now + period;
		sleep_until(cpu, next);
	}
}

const struct program program = {
	.id = PROGRAM_CLOCK,
	.name = "clock",
	.usage = "clock [PERIOD_MS]",
	.least_arguments = 0,
	.most_arguments = 1,
	.defaults = {1000},
	.check = check,
	.run = run,
};
