/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the parts of a guest program share. Interrupts masked, no libc; each CPU has its own stack and record. */
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
#define VIRTIO_BASE 0x0a000000u
#define VIRTIO_SLOTS 32u
#define HAVE_PSCI 1
#elif defined(BOARD_VEXPRESS_A15)
#define BOARD_ID BOARD_ID_VEXPRESS_A15
#define RAM_BASE 0x80000000u
#define UART_BASE 0x1c090000u
#define GIC_DISTRIBUTOR 0x2c001000u
#define GIC_CPU_INTERFACE 0x2c002000u
#define VIRTIO_BASE 0x1c130000u
#define VIRTIO_SLOTS 4u
#define HAVE_PSCI 0 /* all CPUs start at the entry point */
#elif defined(BOARD_VIRT_ARM64)
#define BOARD_ID BOARD_ID_VIRT_ARM64
#define RAM_BASE 0x40000000u
#define UART_BASE 0x09000000u
#define GIC_DISTRIBUTOR 0x08000000u
#define GIC_CPU_INTERFACE 0x08010000u
#define VIRTIO_BASE 0x0a000000u
#define VIRTIO_SLOTS 32u
#elif defined(BOARD_PC_MIN)
#define BOARD_ID BOARD_ID_PC_MIN
#define RAM_BASE 0x40000000u
#define UART_BASE 0x09000000u
#define SLEEP_TIMER 0x09010000u
#define VIRTIO_BASE 0x0a000000u
#define VIRTIO_SLOTS 32u
#elif defined(BOARD_LINUX_ARM)
#define BOARD_ID BOARD_ID_LINUX_ARM
#define RAM_BASE 0x10000000u /* virtual: linux-arm.c */
#else
#error "define BOARD_VIRT, BOARD_VEXPRESS_A15, BOARD_VIRT_ARM64, BOARD_PC_MIN or BOARD_LINUX_ARM"
#endif

#define PAGE_SIZE 4096u
#define WORK_BASE (RAM_BASE + WORK_OFFSET)
#define DEFAULT_RAM_BYTES (128u << 20)

extern volatile struct status status;

/* All addresses that a program uses are below 4 GiB. */
static inline volatile void *at(u32 address)
{
	return (volatile void *)(uintptr_t)address;
}

static inline volatile u32 *mmio(u32 address)
{
	return at(address);
}

/*
 * What the architecture's header and source add:
 *
 * put64, get64     one instruction, so that the host never sees half of a value
 * relax            in a loop that waits for another CPU
 * counter          the latest value of this CPU's counter
 * counter_frequency
 * sleep_for        stand still for so many ticks, or less
 * cpu_number       what the hardware calls this CPU
 * start_cpus       let the others come to the entry point, if they are not there; 0: one cannot
 * machine_init     on CPU 0, before others start
 * cpu_init         on each
 */
#if defined(__arm__)
#include "arm.h"
#elif defined(__aarch64__)
#include "arm64.h"
#elif defined(__x86_64__)
#include "x86_64.h"
#else
#error "no header for this architecture"
#endif

/* The finaliser of SplitMix64 (Steele, Lea, Flood 2014). */
static inline u64 mix(u64 z)
{
	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ z >> 27) * 0x94d049bb133111ebull;
	return z ^ z >> 31;
}

u32 counter_frequency(void);
void sleep_for(u32 cpu, u64 ticks);
u32 cpu_number(u32 cpu);
int start_cpus(u32 cpus);
void machine_init(void);
void cpu_init(void);

/* A program: one per image. */
struct program {
	u32 id;
	const char *name;
	const char *usage;
	u32 least_arguments; /* unless none are given at all */
	u32 most_arguments;
	u32 addresses; /* of the arguments, counted from the first, those that are IPv4 addresses: a.b.c.d */
	u64 defaults[MAX_ARGS];
	void (*check)(void);  /* on CPU 0, before others start: status.args in, fail() when they cannot be met */
	void (*run)(u32 cpu); /* on each CPU */
};

extern const struct program program;

/* Stop this CPU for good: message on the UART, code in the status page. */
_Noreturn void fail(enum error_code code, const char *message);
_Noreturn void halt(void);

/* The same for an exception, with what the CPU's record is to say of it. */
_Noreturn void fail_by_exception(u32 cpu, u32 vector, u32 pc, u32 address, u32 syndrome);

/* The share [*first, *first + *count) of `total` things that falls to `cpu`. */
void share(u64 total, u32 cpu, u64 *first, u64 *count);

/* Unsigned division; the compiler's own would need a run-time library. */
u64 divide(u64 dividend, u64 divisor, u64 *remainder);

/* counter.c */
u64 read_counter(u32 cpu);
u64 milliseconds(u64 ms); /* in ticks */
void sleep_until(u32 cpu, u64 until);
void counter_init(void);

#if defined(BOARD_LINUX_ARM)
u64 system_ms(void); /* the system's clock */
#endif

/* uart.c: each print reads the counter now and then, as a slow UART would look like a gap. */
void uart_init(void);
void print(const char *text);
void print_number(u64 value);
void print_hex(u32 value);
void print_padded(u64 value, u32 digits);
void print_ms(u64 ticks); /* as milliseconds with three decimals */

#endif
