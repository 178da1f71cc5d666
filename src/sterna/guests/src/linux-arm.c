/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A process of ARM Linux instead of a board: CPUs are threads, each kept to one CPU, and the UART is standard output. No
 * libc: what is needed of the kernel are a few system calls.
 *
 * The program's RAM is a range of virtual addresses that is laid out as RAM is on a board. The status page is locked, and
 * its physical address is printed: it can be looked at from outside.
 */
#include "guest.h"

/* System calls of the EABI. */
enum {
	SYS_write = 4,
	SYS_open = 5,
	SYS_mlock = 150,
	SYS_nanosleep = 162,
	SYS_rt_sigaction = 174,
	SYS_pread64 = 180,
	SYS_mmap2 = 192,
	SYS_sched_setaffinity = 241,
	SYS_sched_getaffinity = 242,
	SYS_clock_gettime = 263,
};

#define PROT_READ_WRITE 3u
#define MAP_PRIVATE_FIXED_ANONYMOUS_NORESERVE 0x4032u
#define THREAD_FLAGS 0x50f00u /* VM, FS, FILES, SIGHAND, THREAD, SYSVSEM */
#define STACK_BYTES 16384u
#define SIGILL 4u
#define SA_SIGINFO 4u
#define PC_IN_UCONTEXT 23u /* in words: flags, link, stack (3), trap, error, mask, r0-r15 */
#define CLOCK_MONOTONIC 1u
#define NS_PER_S 1000000000u
#define PAGEMAP_PRESENT (1ull << 63)
#define PAGEMAP_FRAME ((1ull << 55) - 1)
#define LINE_BYTES 160u

/* Where the work pages may be: below the kernel's mappings for libraries and stack. */
#define WORK_LIMIT 0xa0000000u

int system_call(u32 number, u32 a, u32 b, u32 c, u32 d, u32 e, u32 f);
int start_thread(u32 flags, void *stack, u32 cpu);
_Noreturn void process_main(u32 *stack);
_Noreturn void guest_main(u32 cpu);

static unsigned char stacks[MAX_CPUS][STACK_BYTES] __attribute__((aligned(64)));
static char arguments[256];
static u32 arguments_length;
static volatile int no_counter;

/* The virtual counter is closed to processes: go on behind the instruction that read it. */
static void illegal(int number, void *information, u32 *context)
{
	(void)number;
	(void)information;
	no_counter = 1;
	context[PC_IN_UCONTEXT] += 4;
}

/* Seconds and nanoseconds since boot. */
static void read_clock(u32 now[2])
{
	now[0] = now[1] = 0;
	system_call(SYS_clock_gettime, CLOCK_MONOTONIC, (u32)now, 0, 0, 0, 0);
}

u64 counter(u32 cpu)
{
	(void)cpu;
	if (!no_counter) {
		u64 now;

		__asm__ volatile("isb\n\tmrrc p15, 1, %Q0, %R0, c14" : "=r"(now)::"memory");
		return now;
	} else {
		u32 now[2];

		read_clock(now);
		return now[0] * (u64)NS_PER_S + now[1];
	}
}

u64 system_ms(void)
{
	u32 now[2];

	read_clock(now);
	return now[0] * 1000ull + now[1] / 1000000u;
}

u32 counter_frequency(void)
{
	struct {
		u32 handler, flags, restorer, mask[2];
	} action = {.handler = (u32)illegal, .flags = SA_SIGINFO};
	u32 frequency = 0;
	u64 now;

	system_call(SYS_rt_sigaction, SIGILL, (u32)&action, 0, 8, 0, 0);
	__asm__ volatile("mrc p15, 0, %0, c14, c0, 0" : "+r"(frequency));
	__asm__ volatile("mrrc p15, 1, %Q0, %R0, c14" : "=r"(now)::"memory");
	return no_counter ? NS_PER_S : frequency;
}

void sleep_for(u32 cpu, u64 ticks)
{
	u64 rest;
	/* At most 1 ms, by sleep_until. */
	u32 time[2] = {0, (u32)divide(ticks * 1000, status.frequency / 1000, &rest) * 1000};

	(void)cpu;
	if (time[1] >= NS_PER_S)
		time[1] = NS_PER_S - 1;
	system_call(SYS_nanosleep, (u32)time, 0, 0, 0, 0, 0);
}

/* Each thread calls this for itself, once: it is kept to the CPU of its number. */
u32 cpu_number(u32 cpu)
{
	u32 mask = 1u << cpu;

	system_call(SYS_sched_setaffinity, 0, sizeof(mask), (u32)&mask, 0, 0, 0);
	return cpu;
}

void cpu_init(void)
{
}

int start_cpus(u32 cpus)
{
	for (u32 cpu = 1; cpu < cpus; cpu++)
		if (start_thread(THREAD_FLAGS, stacks[cpu] + STACK_BYTES, cpu) < 0)
			return 0;
	return 1;
}

_Noreturn void halt(void)
{
	for (;;) {
		u32 time[2] = {3600, 0};

		system_call(SYS_nanosleep, (u32)time, 0, 0, 0, 0, 0);
	}
}

void uart_init(void)
{
}

/* By lines: one that is printed while the guest moves is on both sides' consoles in parts, but no other comes between. */
void put(char character)
{
	static char line[LINE_BYTES];
	static u32 length;

	if (character == '\r')
		return; /* the terminal adds it */
	line[length++] = character;
	if (character == '\n' || length == LINE_BYTES) {
		system_call(SYS_write, 1, (u32)line, length, 0, 0, 0);
		length = 0;
	}
}

/* Which physical page the status is in; 0 when the kernel does not tell. */
static u64 status_address(void)
{
	int file = system_call(SYS_open, (u32)"/proc/self/pagemap", 0, 0, 0, 0, 0);
	u64 entry = 0;

	if (file < 0)
		return 0;
	/* A 64-bit offset is in an even register and the next. */
	if (system_call(SYS_pread64, (u32)file, (u32)&entry, 8, 0, (u32)&status / PAGE_SIZE * 8, 0) != 8)
		return 0;
	return entry & PAGEMAP_PRESENT ? (entry & PAGEMAP_FRAME) * PAGE_SIZE : 0;
}

void machine_init(void)
{
	u64 where;

	if (system_call(SYS_mmap2, WORK_BASE, WORK_LIMIT - WORK_BASE, PROT_READ_WRITE,
			MAP_PRIVATE_FIXED_ANONYMOUS_NORESERVE, (u32)-1, 0) != (int)WORK_BASE)
		fail(ERROR_MEMORY, "the kernel gives no room for the pages");
	/* Written before, so that it is this process's own page and not the file's. */
	if (system_call(SYS_mlock, (u32)&status, PAGE_SIZE, 0, 0, 0, 0) < 0)
		fail(ERROR_MEMORY, "the status page cannot be locked");
	where = status_address();
	if (!where)
		fail(ERROR_MEMORY, "the kernel does not tell where the status page is (root?)");
	print("status page at ");
	print_hex((u32)(where >> 32));
	print(" ");
	print_hex((u32)where);
	print("\n");
	if (no_counter)
		print("the counter is closed to processes: CLOCK_MONOTONIC instead\n");
}

/* In the device tree's place: arguments of the process, CPUs that it may use. */
int fdt_read(const void *blob, u32 limit, u32 ram_base, struct machine *machine)
{
	u32 mask[32];
	int bytes = system_call(SYS_sched_getaffinity, 0, sizeof(mask), (u32)mask, 0, 0, 0);

	(void)blob;
	(void)limit;
	machine->ram_bytes = WORK_LIMIT - ram_base;
	for (int i = 0; i < bytes / 4; i++)
		machine->cpus += (u32)__builtin_popcount(mask[i]);
	machine->bootargs = arguments;
	machine->bootargs_length = arguments_length;
	return 0;
}

_Noreturn void process_main(u32 *stack)
{
	u32 count = stack[0];

	for (u32 i = 1; i < count; i++) {
		const char *text = (const char *)stack[1 + i];

		for (; *text && arguments_length < sizeof(arguments) - 1; text++)
			arguments[arguments_length++] = *text;
		if (arguments_length < sizeof(arguments) - 1)
			arguments[arguments_length++] = ' ';
	}
	guest_main(0);
}
