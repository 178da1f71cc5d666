/* SPDX-License-Identifier: GPL-2.0-or-later */
/* From the entry point to the program: what machine this is, the arguments, the other CPUs. */
#include "guest.h"

#define PSCI_CPU_ON 0x84000003u /* ARM DEN 0022: CPU_ON, 32-bit calls */
#define PSCI_ALREADY_ON -4

volatile struct status status __attribute__((section(".status"))) = {
	.magic = STATUS_MAGIC,
	.version = STATUS_VERSION,
	.board = BOARD_ID,
};

void *memset(void *where, int value, size_t length);

void *memset(void *where, int value, size_t length)
{
	volatile unsigned char *p = where;

	while (length--)
		*p++ = (unsigned char)value;
	return where;
}

_Noreturn void halt(void)
{
	for (;;)
		wfi();
}

_Noreturn void fail(enum error_code code, const char *message)
{
	status.error = code;
	status.state = STATE_ERROR;
	print(program.name);
	print(": error: ");
	print(message);
	print("\nusage: ");
	print(program.usage);
	print("\n");
	halt();
}

/* Called from the vectors; nothing here expects an exception. */
_Noreturn void exception_taken(u32 vector, u32 pc, u32 cpu)
{
	volatile struct cpu_record *record = &status.cpu[cpu];
	u32 address, syndrome;

	if (vector == 0x0c) {
		__asm__ volatile("mrc p15, 0, %0, c6, c0, 2" : "=r"(address));
		__asm__ volatile("mrc p15, 0, %0, c5, c0, 1" : "=r"(syndrome));
	} else {
		__asm__ volatile("mrc p15, 0, %0, c6, c0, 0" : "=r"(address));
		__asm__ volatile("mrc p15, 0, %0, c5, c0, 0" : "=r"(syndrome));
	}
	record->fault_pc = pc;
	record->fault_address = address;
	record->fault_status = syndrome;
	record->fault_vector = vector;
	record->state = CPU_STOPPED;
	status.error = ERROR_EXCEPTION;
	status.state = STATE_ERROR;
	print(program.name);
	print(": error: exception at vector ");
	print_hex(vector);
	print(", cpu ");
	print_number(cpu);
	print(", pc ");
	print_hex(pc);
	print(", address ");
	print_hex(address);
	print(", status ");
	print_hex(syndrome);
	print("\n");
	halt();
}

u64 divide(u64 dividend, u64 divisor, u64 *remainder)
{
	u64 quotient = 0, rest = 0;

	if (!(dividend >> 32) && !(divisor >> 32)) {
		u32 short_quotient = (u32)dividend / (u32)divisor;

		*remainder = (u32)dividend - short_quotient * (u32)divisor;
		return short_quotient;
	}
	for (int bit = 63; bit >= 0; bit--) {
		rest = rest << 1 | (dividend >> bit & 1);
		if (rest >= divisor) {
			rest -= divisor;
			quotient |= 1ull << bit;
		}
	}
	*remainder = rest;
	return quotient;
}

void share(u64 total, u32 cpu, u64 *first, u64 *count)
{
	u64 rest;
	u64 start = divide(total * cpu, status.cpus, &rest);

	*first = start;
	*count = divide(total * (cpu + 1), status.cpus, &rest) - start;
}

/* Decimal or 0x-hexadecimal numbers, parted by blanks. */
static void read_arguments(const char *text, u32 length)
{
	u32 count = 0, at = 0;

	for (;;) {
		u64 value = 0;
		u32 base = 10, digits = 0;

		while (at < length && (text[at] == ' ' || text[at] == '\t'))
			at++;
		if (at == length)
			break;
		if (count == program.most_arguments)
			fail(ERROR_ARGUMENT_COUNT, "too many arguments");
		if (length - at > 2 && text[at] == '0' && (text[at + 1] | 32) == 'x') {
			base = 16;
			at += 2;
		}
		for (; at < length && text[at] != ' ' && text[at] != '\t'; at++, digits++) {
			char c = text[at];
			u32 digit = 16;

			if (c >= '0' && c <= '9')
				digit = (u32)(c - '0');
			else if ((c | 32) >= 'a' && (c | 32) <= 'f')
				digit = (u32)((c | 32) - 'a') + 10;
			if (digit >= base)
				fail(ERROR_ARGUMENT_NUMBER, "an argument is not a number");
			/* 16 or 19 digits always fit in 64 bits; no program needs more. */
			if (digits == (base == 16 ? 16u : 19u))
				fail(ERROR_ARGUMENT_NUMBER, "an argument has too many digits");
			value = value * base + digit;
		}
		if (!digits)
			fail(ERROR_ARGUMENT_NUMBER, "an argument is not a number");
		put64(&status.args[count++], value);
	}
	status.argument_count = count;
	if (count && count < program.least_arguments)
		fail(ERROR_ARGUMENT_COUNT, "too few arguments");
}

static void start_others(void)
{
	status.state = STATE_RUNNING; /* on boards without PSCI this releases them */
	__asm__ volatile("dsb\n\tsev" ::: "memory");
#if HAVE_PSCI
	for (u32 cpu = 1; cpu < status.cpus; cpu++) {
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
			fail(ERROR_CPU_START, "a CPU of the device tree cannot be started by PSCI");
	}
#endif
}

static void boot(void)
{
	struct machine machine = {0};
	int tree;

	uart_init();
	counter_init();
	status.program = program.id;
	tree = fdt_read((const void *)RAM_BASE, STATUS_OFFSET, RAM_BASE, &machine);
	if (tree < 0)
		fail(ERROR_DEVICE_TREE, "the device tree at the start of RAM is damaged");
	if (tree > 0)
		status.device_tree_bytes = __builtin_bswap32(*(const u32 *)(RAM_BASE + 4));
	if (!machine.ram_bytes)
		machine.ram_bytes = DEFAULT_RAM_BYTES;
	/* Physical addresses above 4 GiB are out of reach with the MMU off. */
	if (machine.ram_bytes > 0 - RAM_BASE)
		machine.ram_bytes = 0 - RAM_BASE;
	if (!machine.cpus)
		machine.cpus = 1;
	if (machine.cpus > MAX_CPUS)
		machine.cpus = MAX_CPUS;
	if (machine.ram_bytes <= WORK_OFFSET)
		fail(ERROR_MEMORY, "RAM is smaller than 4 MiB and a page");
	status.cpus = machine.cpus;
	put64(&status.ram_base, RAM_BASE);
	put64(&status.ram_bytes, machine.ram_bytes);
	put64(&status.work_base, WORK_BASE);
	put64(&status.work_pages, (machine.ram_bytes - WORK_OFFSET) / PAGE_SIZE);
	for (u32 i = 0; i < machine.bootargs_length && i < sizeof(status.bootargs) - 1; i++)
		status.bootargs[i] = machine.bootargs[i];
	for (u32 i = 0; i < MAX_ARGS; i++)
		put64(&status.args[i], program.defaults[i]);
	read_arguments(machine.bootargs, machine.bootargs_length);
	program.check();
	gic_init_distributor();
	start_others();
}

_Noreturn void guest_main(u32 cpu)
{
	volatile struct cpu_record *record = &status.cpu[cpu];
	u32 mpidr;

	if (cpu == 0)
		boot();
	else
		while (status.state == STATE_STARTING)
			__asm__ volatile("yield");
	if (status.state == STATE_ERROR || cpu >= status.cpus)
		halt();
	__asm__ volatile("mrc p15, 0, %0, c0, c0, 5" : "=r"(mpidr));
	gic_init_cpu();
	record->mpidr = mpidr;
	record->state = CPU_RUNNING;
	program.run(cpu);
	halt();
}
