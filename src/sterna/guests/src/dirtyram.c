/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * dirtyram PAGES PAGES_PER_STEP SLEEP_MS: touches each page once, then each step writes the next PAGES_PER_STEP pages,
 * wraps at PAGES, and sleeps. What each write puts where is given with enum dirtyram_word: the count of writes alone
 * tells the content of every page.
 */
#include "guest.h"

#define MAX_SLEEP_MS 3600000u
#define PAGES_PER_READING 64u
#define REPORT_MS 2000u

static void check(void)
{
	u64 pages = get64(&status.args[0]), per_step = get64(&status.args[1]);

	if (pages > get64(&status.work_pages))
		fail(ERROR_MEMORY, "PAGES is more than RAM has above its first 4 MiB");
	if (pages < status.cpus)
		fail(ERROR_ARGUMENT_RANGE, "PAGES must be at least the number of CPUs");
	if (per_step < 1 || per_step > pages)
		fail(ERROR_ARGUMENT_RANGE, "PAGES_PER_STEP must be 1 to PAGES");
	if (get64(&status.args[2]) > MAX_SLEEP_MS)
		fail(ERROR_ARGUMENT_RANGE, "SLEEP_MS must be 0 to 3600000");
}

static int all_touched(void)
{
	for (u32 cpu = 0; cpu < status.cpus; cpu++)
		if (!get64(&status.cpu[cpu].words[DIRTYRAM_PASSES]))
			return 0;
	return 1;
}

static void print_progress(volatile struct cpu_record *record)
{
	print("dirtyram: step ");
	print_number(get64(&record->steps));
	print(", writes ");
	print_number(get64(&record->words[DIRTYRAM_WRITES]));
	print(", pass ");
	print_number(get64(&record->words[DIRTYRAM_PASSES]));
	print("\n");
}

static void run(u32 cpu)
{
	volatile struct cpu_record *record = &status.cpu[cpu];
	volatile u64 *words = record->words;
	u64 first, pages, per_step, unused, writes = 0, passes = 0, steps = 0, reported;
	u64 sleep = milliseconds(get64(&status.args[2]));
	u32 page = 0, base;
	int announced = 0;

	share(get64(&status.args[0]), cpu, &first, &pages);
	share(get64(&status.args[1]), cpu, &unused, &per_step);
	if (!per_step)
		per_step = 1; /* fewer pages per step than CPUs */
	put64(&words[DIRTYRAM_FIRST], first);
	put64(&words[DIRTYRAM_PAGES], pages);
	put64(&words[DIRTYRAM_PER_STEP], per_step);
	base = WORK_BASE + (u32)first * PAGE_SIZE;
	reported = read_counter(cpu);
	if (cpu == 0) {
		print("dirtyram: ");
		print_number(get64(&status.args[0]));
		print(" pages, ");
		print_number(get64(&status.args[1]));
		print(" per step, sleep ");
		print_number(get64(&status.args[2]));
		print(" ms, cpus ");
		print_number(status.cpus);
		print("\n");
	}
	for (;;) {
		u64 now, batch = passes ? per_step : pages;

		while (batch) {
			u32 count = batch < PAGES_PER_READING ? (u32)batch : PAGES_PER_READING;

			batch -= count;
			while (count--) {
				*mmio(base + page * PAGE_SIZE) = (u32)(writes + 1);
				put64(&words[DIRTYRAM_WRITES], ++writes);
				if (++page == (u32)pages) {
					page = 0;
					put64(&words[DIRTYRAM_PASSES], ++passes);
				}
			}
			put64(&words[DIRTYRAM_NEXT], page);
			read_counter(cpu);
		}
		put64(&record->steps, ++steps);
		now = read_counter(cpu);
		if (cpu == 0 && !announced && all_touched()) {
			print("dirtyram: touched all pages\n");
			announced = 1;
			reported = now;
		} else if (cpu == 0 && announced && now - reported >= milliseconds(REPORT_MS)) {
			print_progress(record);
			reported = now;
		}
		sleep_until(cpu, now + sleep);
	}
}

const struct program program = {
	.id = PROGRAM_DIRTYRAM,
	.name = "dirtyram",
	.usage = "dirtyram PAGES PAGES_PER_STEP SLEEP_MS",
	.least_arguments = 3,
	.most_arguments = 3,
	.defaults = {4096, 64, 10},
	.check = check,
	.run = run,
};
