/* SPDX-License-Identifier: GPL-2.0-or-later */
/* From the entry point to the program: what machine this is, the arguments, the other CPUs. */
#include "guest.h"

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

/* The rest of an IPv4 address, whose first number has been read. */
static u32 read_address(const char *text, u32 length, u32 *at, u64 value)
{
	for (u32 part = 1; part < 4; part++) {
		u32 number = 0, digits = 0;

		if (value > 0xffffffu || *at == length || text[*at] != '.')
			fail(ERROR_ARGUMENT_NUMBER, "an address is not four numbers up to 255");
		for (++*at; *at < length && text[*at] >= '0' && text[*at] <= '9' && digits < 3; ++*at, digits++)
			number = number * 10 + (u32)(text[*at] - '0');
		if (!digits || number > 255)
			fail(ERROR_ARGUMENT_NUMBER, "an address is not four numbers up to 255");
		value = value << 8 | number;
	}
	return (u32)value;
}

/* Decimal or 0x-hexadecimal numbers and IPv4 addresses, parted by blanks. */
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

			if (c == '.' && base == 10 && digits && (program.addresses >> count & 1)) {
				if (value > 255)
					fail(ERROR_ARGUMENT_NUMBER, "an address is not four numbers up to 255");
				value = read_address(text, length, &at, value);
				break;
			}
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
		if (at < length && text[at] != ' ' && text[at] != '\t')
			fail(ERROR_ARGUMENT_NUMBER, "an argument is not a number");
		put64(&status.args[count++], value);
	}
	status.argument_count = count;
	if (count && count < program.least_arguments)
		fail(ERROR_ARGUMENT_COUNT, "too few arguments");
}

static void boot(void)
{
	struct machine machine = {0};
	int tree;

	uart_init();
	counter_init();
	status.program = program.id;
	tree = fdt_read((const void *)at(RAM_BASE), STATUS_OFFSET, RAM_BASE, &machine);
	if (tree < 0)
		fail(ERROR_DEVICE_TREE, "the device tree at the start of RAM is damaged");
	if (tree > 0)
		status.device_tree_bytes = __builtin_bswap32(*mmio(RAM_BASE + 4));
	if (!machine.ram_bytes)
		machine.ram_bytes = DEFAULT_RAM_BYTES;
	/* Addresses above 4 GiB are out of reach. */
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
	machine_init();
	status.state = STATE_RUNNING; /* on boards where all CPUs start at once this releases the others */
	if (!start_cpus(status.cpus))
		fail(ERROR_CPU_START, "a CPU of the device tree cannot be started");
}

_Noreturn void guest_main(u32 cpu)
{
	volatile struct cpu_record *record = &status.cpu[cpu];

	if (cpu == 0)
		boot();
	else
		while (status.state == STATE_STARTING)
			relax();
	if (status.state == STATE_ERROR || cpu >= status.cpus)
		halt();
	cpu_init();
	record->mpidr = cpu_number(cpu);
	record->state = CPU_RUNNING;
	program.run(cpu);
	halt();
}
