/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * random [SEED [PAGES [STEPS_PER_MS [LOSE]]]]: writes pseudo-random words to pseudo-random pages and checks itself.
 *
 * Each CPU has a share of PAGES; its first pages are a table with one u32 tag per data page. With mix() of SplitMix64 and
 * G its increment:
 *
 *   seed of a CPU           s = mix(SEED + (cpu + 1) * G)
 *   data page p at first    word 0 (the tag) = 0, word i = mix(s ^ (p + 1)) + i * G; its table entry 0
 *   step k (from 0)         r = mix(s + (k + 1) * G); page = high 32 bits of r scaled to the data pages;
 *                           word = 1 + low 16 bits of r scaled to 511; value = mix(r)
 *                           writes that word, then the page's tag = k + 1, then its table entry = (u32)(k + 1)
 *   checksum                sum over data pages of (2 * p + 1) * (sum of the page's 512 words), modulo 2^64
 *
 * The checksum is kept up with every write from the value written and the value found, so a page that was replaced by an
 * older copy of itself makes it differ from the sum of all pages for ever. All pages are read back little by little to
 * see that; a stale page that is written before then shows by its tag. All vector registers (32 of VFP, 16 of SSE) hold
 * values derived from the step count and the checksum, so that a lost status page or lost registers show as well.
 *
 * LOSE (for tests): the page write of step number LOSE (from 1) is left out, as if the page had been lost.
 */
#include "guest.h"

#define G 0x9e3779b97f4a7c15ull
#define PAGE_WORDS 512u
#define TAGS_PER_PAGE 1024u
#define MAX_STEPS_PER_MS 4096u
#define STEPS_PER_READING 256u
#define SWEEP_PAGES_PER_TICK 4u
#define REPORT_MS 2000u

enum { SEED, PAGES, STEPS_PER_MS, LOSE };

void registers_store(const u64 values[32]);
void registers_fetch(u64 values[32]);

struct generator {
	u32 cpu;
	volatile struct cpu_record *record;
	volatile u32 *table;
	u32 data;   /* address of the first data page */
	u32 pages;
	u64 seed;
	u64 steps;
	u64 checksum;
	u64 lose;
	u32 sweep_page;
	u64 sweep_sum;
};

static volatile u64 *page_words(const struct generator *g, u32 page)
{
	return at(g->data + page * PAGE_SIZE);
}

static void report(struct generator *g, enum random_error kind, u64 page)
{
	volatile u64 *words = g->record->words;

	put64(&words[RANDOM_ERROR_KIND], kind);
	put64(&words[RANDOM_ERROR_PAGE], page);
	put64(&words[RANDOM_ERROR_STEP], g->steps);
	put64(&words[RANDOM_ERRORS], get64(&words[RANDOM_ERRORS]) + 1);
}

/* Once READY tells all pages, the checksum is that of all pages. */
static void fill(struct generator *g)
{
	for (u32 page = 0; page < g->pages; page++) {
		volatile u64 *words = page_words(g, page);
		u64 value = mix(g->seed ^ (page + 1)), sum = 0;

		put64(&words[0], 0);
		for (u32 i = 1; i < PAGE_WORDS; i++) {
			value += G;
			sum += value;
			put64(&words[i], value);
		}
		g->table[page] = 0;
		g->checksum += sum * (2ull * page + 1);
		put64(&g->record->words[RANDOM_CHECKSUM], g->checksum);
		put64(&g->record->words[RANDOM_READY], page + 1);
		read_counter(g->cpu);
	}
}

static void step(struct generator *g)
{
	u64 r = mix(g->seed + (g->steps + 1) * G);
	u32 page = (u32)((r >> 32) * g->pages >> 32);
	u32 word = 1 + ((u32)(r & 0xffff) * (PAGE_WORDS - 1) >> 16);
	u64 value = mix(r), tag = g->steps + 1;
	volatile u64 *words = page_words(g, page);
	u64 old_value = get64(&words[word]), old_tag = get64(&words[0]), change;

	if ((u32)old_tag != g->table[page])
		report(g, RANDOM_STALE_PAGE, page);
	if (tag != g->lose) {
		put64(&words[word], value);
		put64(&words[0], tag);
	}
	g->table[page] = (u32)tag;
	change = (value - old_value + tag - old_tag) * (2ull * page + 1);
	g->checksum += change;
	if (page < g->sweep_page)
		g->sweep_sum += change;
	put64(&g->record->words[RANDOM_CHECKSUM], g->checksum);
	put64(&g->record->words[RANDOM_STEPS], ++g->steps);
}

static void sweep(struct generator *g)
{
	volatile u64 *words = page_words(g, g->sweep_page);
	u64 sum = 0;

	for (u32 i = 0; i < PAGE_WORDS; i += 4)
		sum += get64(&words[i]) + get64(&words[i + 1]) + get64(&words[i + 2]) + get64(&words[i + 3]);
	g->sweep_sum += sum * (2ull * g->sweep_page + 1);
	if (++g->sweep_page < g->pages)
		return;
	if (g->sweep_sum != g->checksum) {
		report(g, RANDOM_SUM, ~0ull);
		/* Go on from what is there: each loss is to be counted once. */
		g->checksum = g->sweep_sum;
		put64(&g->record->words[RANDOM_CHECKSUM], g->checksum);
	}
	put64(&g->record->words[RANDOM_SWEEPS], get64(&g->record->words[RANDOM_SWEEPS]) + 1);
	g->sweep_page = 0;
	g->sweep_sum = 0;
}

/* What 64 bits of register storage, number i, must hold, from the values in the status page. */
static u64 register_value(const struct generator *g, u32 i)
{
	u64 steps = get64(&g->record->words[RANDOM_STEPS]), checksum = get64(&g->record->words[RANDOM_CHECKSUM]);

	return i & 1 ? checksum + i * G : mix(steps ^ g->seed) + i * G;
}

static void keep_registers(const struct generator *g)
{
	u64 values[32];

	for (u32 i = 0; i < 32; i++)
		values[i] = register_value(g, i);
	registers_store(values);
}

static void check_registers(struct generator *g)
{
	u64 values[32];

	registers_fetch(values);
	for (u32 i = 0; i < 32; i++)
		if (values[i] != register_value(g, i)) {
			report(g, RANDOM_REGISTERS, ~0ull);
			return;
		}
}

static u32 table_pages(u32 pages)
{
	/* t table pages serve TAGS_PER_PAGE * t data pages. */
	return (pages + TAGS_PER_PAGE) / (TAGS_PER_PAGE + 1);
}

static void check(void)
{
	u64 pages = get64(&status.args[PAGES]), rate = get64(&status.args[STEPS_PER_MS]);

	if (pages > get64(&status.work_pages))
		fail(ERROR_MEMORY, "PAGES is more than RAM has above its first 4 MiB");
	if (pages < 2 * status.cpus)
		fail(ERROR_ARGUMENT_RANGE, "PAGES must be at least twice the number of CPUs");
	if (rate < 1 || rate > MAX_STEPS_PER_MS)
		fail(ERROR_ARGUMENT_RANGE, "STEPS_PER_MS must be 1 to 4096");
}

static void print_progress(const char *what)
{
	u64 steps = 0, errors = 0, sweeps = 0;

	for (u32 cpu = 0; cpu < status.cpus; cpu++) {
		steps += get64(&status.cpu[cpu].words[RANDOM_STEPS]);
		errors += get64(&status.cpu[cpu].words[RANDOM_ERRORS]);
		sweeps += get64(&status.cpu[cpu].words[RANDOM_SWEEPS]);
	}
	print(what);
	print_number(steps);
	print(", sweeps ");
	print_number(sweeps);
	print(", errors ");
	print_number(errors);
	print("\n");
}

static u64 errors_so_far(void)
{
	u64 errors = 0;

	for (u32 cpu = 0; cpu < status.cpus; cpu++)
		errors += get64(&status.cpu[cpu].words[RANDOM_ERRORS]);
	return errors;
}

static void run(u32 cpu)
{
	struct generator generator = {.cpu = cpu, .record = &status.cpu[cpu]}, *g = &generator;
	volatile u64 *words = g->record->words;
	u64 first, pages, tables, rate = get64(&status.args[STEPS_PER_MS]), ticks = 0, reported, errors_reported = 0;

	share(get64(&status.args[PAGES]), cpu, &first, &pages);
	tables = table_pages((u32)pages);
	g->pages = (u32)(pages - tables);
	g->table = at(WORK_BASE + (u32)first * PAGE_SIZE);
	g->data = WORK_BASE + (u32)(first + tables) * PAGE_SIZE;
	g->seed = mix(get64(&status.args[SEED]) + (cpu + 1) * G);
	g->lose = get64(&status.args[LOSE]);
	put64(&words[RANDOM_FIRST], first);
	put64(&words[RANDOM_TABLE_PAGES], tables);
	put64(&words[RANDOM_PAGES], g->pages);
	put64(&words[RANDOM_SEED], g->seed);
	reported = read_counter(cpu);
	if (cpu == 0) {
		print("random: seed ");
		print_number(get64(&status.args[SEED]));
		print(", ");
		print_number(get64(&status.args[PAGES]));
		print(" pages, cpus ");
		print_number(status.cpus);
		print("\n");
	}
	fill(g);
	if (cpu == 0)
		print("random: filled\n");
	keep_registers(g);
	for (;;) {
		u64 now;

		check_registers(g);
		for (u64 left = rate; left; left--) {
			step(g);
			if (left % STEPS_PER_READING == 0)
				read_counter(cpu);
		}
		for (u32 i = 0; i < SWEEP_PAGES_PER_TICK; i++)
			sweep(g);
		keep_registers(g);
		put64(&g->record->steps, ++ticks);
		now = read_counter(cpu);
		if (cpu == 0 && errors_so_far() != errors_reported) {
			errors_reported = errors_so_far();
			print_progress("random: ERROR: steps ");
		} else if (cpu == 0 && now - reported >= milliseconds(REPORT_MS)) {
			print_progress("random: steps ");
			reported = now;
		}
		sleep_until(cpu, now + milliseconds(1));
	}
}

const struct program program = {
	.id = PROGRAM_RANDOM,
	.name = "random",
	.usage = "random [SEED [PAGES [STEPS_PER_MS]]]",
	.least_arguments = 0,
	.most_arguments = 4,
	.defaults = {1, 4096, 16, 0},
	.check = check,
	.run = run,
};
