/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * dirtyram PAGES PAGES_PER_STEP SLEEP_MS [WORDS]: touches each page once, then each step writes the next PAGES_PER_STEP
 * pages, wraps at PAGES, and sleeps. What each write puts where is given with enum dirtyram_word: the count of writes
 * alone tells the content of every page.
 *
 * With WORDS each write also puts so many random words behind the page's first, and SLEEP_MS is the time from the begin of
 * a step to that of the next: the guest writes at a rate, however fast its CPU, unless that is too slow for it.
 */
#include "guest.h"

#define MAX_SLEEP_MS 3600000u
#define PAGES_PER_READING 64u
#define REPORT_MS 2000u
#define MOST_WORDS (PAGE_SIZE / 8 - 1)

enum { PAGES, PER_STEP, SLEEP_MS, RANDOM_WORDS };

static void check(void)
{
	u64 pages = get64(&status.args[PAGES]), per_step = get64(&status.args[PER_STEP]);

	if (pages > get64(&status.work_pages))
		fail(ERROR_MEMORY, "PAGES is more than RAM has above its first 4 MiB");
	if (pages < status.cpus)
		fail(ERROR_ARGUMENT_RANGE, "PAGES must be at least the number of CPUs");
	if (per_step < 1 || per_step > pages)
		fail(ERROR_ARGUMENT_RANGE, "PAGES_PER_STEP must be 1 to PAGES");
	if (get64(&status.args[SLEEP_MS]) > MAX_SLEEP_MS)
		fail(ERROR_ARGUMENT_RANGE, "SLEEP_MS must be 0 to 3600000");
	if (get64(&status.args[RANDOM_WORDS]) > MOST_WORDS)
		fail(ERROR_ARGUMENT_RANGE, "WORDS must be 0 to 511");
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

/* xorshift64 (Marsaglia 2003), started from the number of the write. */
static void put_random(u32 page, u64 number, u32 count)
{
	volatile u64 *words = at(page);
	u64 x = mix(number);

	for (u32 i = 1; i <= count; i++) {
		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
		put64(&words[i], x);
	}
}

static void run(u32 cpu)
{
	volatile struct cpu_record *record = &status.cpu[cpu];
	volatile u64 *words = record->words;
	u64 first, pages, per_step, unused, writes = 0, passes = 0, steps = 0, begun, reported;
	u64 sleep = milliseconds(get64(&status.args[SLEEP_MS]));
	u32 page = 0, base, random_words = (u32)get64(&status.args[RANDOM_WORDS]);
	int announced = 0;

	share(get64(&status.args[PAGES]), cpu, &first, &pages);
	share(get64(&status.args[PER_STEP]), cpu, &unused, &per_step);
	if (!per_step)
		per_step = 1; /* fewer pages per step than CPUs */
	put64(&words[DIRTYRAM_FIRST], first);
	put64(&words[DIRTYRAM_PAGES], pages);
	put64(&words[DIRTYRAM_PER_STEP], per_step);
	base = WORK_BASE + (u32)first * PAGE_SIZE;
	begun = reported = read_counter(cpu);
	if (cpu == 0) {
		print("dirtyram: ");
		print_number(get64(&status.args[PAGES]));
		print(" pages, ");
		print_number(get64(&status.args[PER_STEP]));
		print(" per step, sleep ");
		print_number(get64(&status.args[SLEEP_MS]));
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
				if (random_words)
					put_random(base + page * PAGE_SIZE, writes + 1, random_words);
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
		sleep_until(cpu, (random_words ? begun : now) + sleep);
		begun = read_counter(cpu);
	}
}

const struct program program = {
	.id = PROGRAM_DIRTYRAM,
	.name = "dirtyram",
	.usage = "dirtyram PAGES PAGES_PER_STEP SLEEP_MS [WORDS]",
	.least_arguments = 3,
	.most_arguments = 4,
	.defaults = {4096, 64, 10, 0},
	.check = check,
	.run = run,
};
