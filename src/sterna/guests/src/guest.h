/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the parts of a guest program share. MMU off, IRQs masked, no libc; each CPU has its own stack and record. */
#ifndef GUEST_H
#define GUEST_H

#include "fdt.h"
#include "status.h"

#if defined(BOARD_VIRT)
#define BOARD_ID BOARD_ID_VIRT
#define RAM_BASE 0x40000000u
#define UART_BASE 0x09000000u
#define GIC_DISTRIBUTOR 0x08000000u
#define GIC_CPU_INTERFACE 0x08010000u
#define HAVE_PSCI 1
#elif defined(BOARD_VEXPRESS_A15)
#define BOARD_ID BOARD_ID_VEXPRESS_A15
#define RAM_BASE 0x80000000u
#define UART_BASE 0x1c090000u
#define GIC_DISTRIBUTOR 0x2c001000u
#define GIC_CPU_INTERFACE 0x2c002000u
#define HAVE_PSCI 0 /* all CPUs start at the entry point */
#else
#error "define BOARD_VIRT or BOARD_VEXPRESS_A15"
#endif

#define PAGE_SIZE 4096u
#define WORK_BASE (RAM_BASE + WORK_OFFSET)
#define DEFAULT_RAM_BYTES (128u << 20)

extern volatile struct status status;

static inline volatile u32 *mmio(u32 address)
{
	return (volatile u32 *)address;
}

/* One instruction, so that the host never sees half of a 64-bit value (ARM ARM A3.5.3: with LPAE, single-copy atomic). */
static inline void put64(volatile u64 *where, u64 value)
{
	__asm__ volatile("strd %Q1, %R1, %0" : "=Q"(*where) : "r"(value) : "memory");
}

static inline u64 get64(const volatile u64 *where)
{
	u64 value;

	__asm__ volatile("ldrd %Q0, %R0, %1" : "=r"(value) : "Q"(*where) : "memory");
	return value;
}

static inline void wfi(void)
{
	__asm__ volatile("dsb\n\twfi" ::: "memory");
}

/* A program: one per image. */
struct program {
	u32 id;
	const char *name;
	const char *usage;
	u32 least_arguments; /* unless none are given at all */
	u32 most_arguments;
	u64 defaults[MAX_ARGS];
	void (*check)(void);  /* on CPU 0, before others start: status.args in, fail() when they cannot be met */
	void (*run)(u32 cpu); /* on each CPU */
};

extern const struct program program;

/* Stop this CPU for good: message on the UART, code in the status page. */
_Noreturn void fail(enum error_code code, const char *message);
_Noreturn void halt(void);

/* The share [*first, *first + *count) of `total` things that falls to `cpu`. */
void share(u64 total, u32 cpu, u64 *first, u64 *count);

/* Unsigned division; the compiler's own would need a run-time library. */
u64 divide(u64 dividend, u64 divisor, u64 *remainder);

/* counter.c */
u64 read_counter(u32 cpu);
u64 milliseconds(u64 ms); /* in ticks */
void sleep_until(u32 cpu, u64 counter);
void counter_init(void);
void gic_init_distributor(void);
void gic_init_cpu(void);

/* uart.c: each print reads the counter now and then, as a slow UART would look like a gap. */
void uart_init(void);
void print(const char *text);
void print_number(u64 value);
void print_hex(u32 value);
void print_padded(u64 value, u32 digits);
void print_ms(u64 ticks); /* as milliseconds with three decimals */

#endif
