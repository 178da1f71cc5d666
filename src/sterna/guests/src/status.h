/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The status page: what a guest program tells the host, at 2 MiB above the start of RAM.
 *
 * Mirrored by sterna/guests/layout.py; a change here needs one there and a new STATUS_VERSION. All values are
 * little-endian. The host only reads. Every CPU writes its own record; the global part is written by CPU 0 before
 * the others start, and by whichever CPU fails.
 *
 * The host may look between any two instructions. The order of the stores is therefore part of the layout: a value
 * that counts work is stored after the work it counts, so that at most one piece of work is ahead of its count.
 */
#ifndef STATUS_H
#define STATUS_H

#include <stddef.h>
#include <stdint.h>

#define STATUS_OFFSET 0x200000u        /* of the status page, from the start of RAM */
#define WORK_OFFSET 0x400000u          /* of the first page that programs write, from the start of RAM */
#define STATUS_MAGIC 0x53455547414e5453ull /* "STNAGUES" as bytes in memory */
#define STATUS_VERSION 1u

#define MAX_CPUS 4u
#define MAX_ARGS 8u
#define GAP_RECORDS 8u
#define WORDS 16u
#define LONG_GAP_MS 5u                 /* gaps above this many milliseconds enter the ring */

enum program_id { PROGRAM_DIRTYRAM = 1, PROGRAM_CLOCK = 2, PROGRAM_RANDOM = 3, PROGRAM_NET = 4 };

enum board_id {
	BOARD_ID_VIRT = 1,
	BOARD_ID_VEXPRESS_A15 = 2,
	BOARD_ID_PC_MIN = 3,
	BOARD_ID_VIRT_ARM64 = 4,
	BOARD_ID_LINUX_ARM = 5, /* a process of Linux */
};

enum guest_state { STATE_STARTING = 0, STATE_RUNNING = 1, STATE_ERROR = 2 };

enum cpu_state { CPU_OFF = 0, CPU_RUNNING = 1, CPU_STOPPED = 2 };

enum error_code {
	ERROR_NONE = 0,
	ERROR_ARGUMENT_COUNT = 1,
	ERROR_ARGUMENT_NUMBER = 2, /* not a number, or one above 64 bits */
	ERROR_ARGUMENT_RANGE = 3,
	ERROR_MEMORY = 4,          /* more pages asked for than RAM has */
	ERROR_DEVICE_TREE = 5,
	ERROR_CPU_START = 6,
	ERROR_EXCEPTION = 7,       /* a CPU took an exception; see its fault_* fields */
	ERROR_DEVICE = 8,          /* a device that the program needs is not there, or refuses */
};

struct gap {
	uint64_t start; /* counter before the gap */
	uint64_t ticks; /* its length; 0: record never used */
};

struct cpu_record {
	uint32_t state;             /* 0x00 enum cpu_state */
	uint32_t mpidr;             /* 0x04 what the hardware calls it */
	uint64_t steps;             /* 0x08 heartbeat: steps of the program's main loop */
	uint64_t last_counter;      /* 0x10 the latest reading of the counter */
	uint64_t largest_gap;       /* 0x18 ticks between two consecutive readings */
	uint64_t largest_gap_start; /* 0x20 counter before that gap */
	uint64_t backward_steps;    /* 0x28 readings that were below the one before */
	uint64_t backward_ticks;    /* 0x30 size of the latest such step */
	uint64_t long_gaps;         /* 0x38 gaps above LONG_GAP_MS; the latest is in gaps[(long_gaps - 1) % GAP_RECORDS] */
	uint32_t fault_vector;      /* 0x40 offset into the vector table of the exception taken, 0: none */
	uint32_t fault_pc;          /* 0x44 link register at the exception */
	uint32_t fault_address;     /* 0x48 DFAR (IFAR for a prefetch abort), or FAR_EL1 */
	uint32_t fault_status;      /* 0x4c DFSR (IFSR for a prefetch abort), or ESR_EL1 */
	uint64_t reserved[6];       /* 0x50 */
	uint64_t words[WORDS];      /* 0x80 the program's own; see enum *_word */
	struct gap gaps[GAP_RECORDS]; /* 0x100 ring of the latest long gaps */
	uint64_t reserved2[48];     /* 0x180 */
};

struct status {
	uint64_t magic;             /* 0x00 */
	uint32_t version;           /* 0x08 */
	uint32_t program;           /* 0x0c enum program_id */
	uint32_t board;             /* 0x10 enum board_id */
	uint32_t state;             /* 0x14 enum guest_state */
	uint32_t error;             /* 0x18 enum error_code */
	uint32_t cpus;              /* 0x1c CPUs that take part */
	uint32_t frequency;         /* 0x20 of the counter, in Hz */
	uint32_t long_gap_ticks;    /* 0x24 LONG_GAP_MS in ticks */
	uint64_t ram_base;          /* 0x28 */
	uint64_t ram_bytes;         /* 0x30 */
	uint64_t work_base;         /* 0x38 first address that programs write */
	uint64_t work_pages;        /* 0x40 4 KiB pages from there to the end of RAM */
	uint32_t argument_count;    /* 0x48 given in the device tree; the rest of args[] are defaults */
	uint32_t device_tree_bytes; /* 0x4c 0: no device tree found */
	uint64_t args[MAX_ARGS];    /* 0x50 values in effect */
	uint64_t reserved[14];      /* 0x90 */
	char bootargs[256];         /* 0x100 as found, cut to 255 bytes, zero-terminated */
	uint64_t reserved2[64];     /* 0x200 */
	struct cpu_record cpu[MAX_CPUS]; /* 0x400 */
};

_Static_assert(offsetof(struct cpu_record, words) == 0x80, "layout of cpu_record");
_Static_assert(offsetof(struct cpu_record, gaps) == 0x100, "layout of cpu_record");
_Static_assert(sizeof(struct cpu_record) == 0x300, "layout of cpu_record");
_Static_assert(offsetof(struct status, args) == 0x50, "layout of status");
_Static_assert(offsetof(struct status, bootargs) == 0x100, "layout of status");
_Static_assert(offsetof(struct status, cpu) == 0x400, "layout of status");
_Static_assert(sizeof(struct status) == 0x1000, "the status fills one page");

/*
 * dirtyram: write number w (from 0) puts (uint32_t)(w + 1) at offset 0 of page first + w % pages of the work area, and then
 * args[3] random words, from offset 8 on: see dirtyram.c.
 */
enum dirtyram_word {
	DIRTYRAM_FIRST = 0,  /* first page of this CPU's share, counted from work_base */
	DIRTYRAM_PAGES = 1,  /* pages in the share */
	DIRTYRAM_PER_STEP = 2, /* pages written per step after the initial touch */
	DIRTYRAM_WRITES = 3, /* writes done; stored after each write */
	DIRTYRAM_NEXT = 4,   /* page of the share to be written next, updated once per batch */
	DIRTYRAM_PASSES = 5, /* times the share was written whole; the initial touch is the first */
};

enum clock_word {
	CLOCK_SEQUENCE = 0, /* lines printed (CPU 0) */
	CLOCK_PERIOD = 1,   /* ticks between lines */
};

/* net: what CPU 0 has answered; each count is stored before its answer is sent. DIRTYRAM words hold for the pages it writes. */
enum net_word {
	NET_ADDRESS = 6,    /* IPv4, as a number in host order */
	NET_RECEIVED = 7,   /* frames, whatever they were */
	NET_ARP = 8,        /* requests answered */
	NET_ICMP = 9,       /* echo requests answered */
	NET_UDP = 10,       /* datagrams sent back */
	NET_OTHER = 11,     /* frames that were not for it, or were damaged */
	NET_SEQUENCE = 12,  /* highest number that a datagram had, plus one */
	NET_LOST = 13,      /* numbers that were left out on the way up */
	NET_AGAIN = 14,     /* numbers that were not higher than the one before: late, or twice */
	NET_UNSENT = 15,    /* answers for which the device had no room */
};

/* random: see random.c for the generator. */
enum random_word {
	RANDOM_FIRST = 0,      /* first page of this CPU's share, counted from work_base: its table of tags */
	RANDOM_TABLE_PAGES = 1, /* pages of the table; data pages follow */
	RANDOM_PAGES = 2,      /* data pages in the share */
	RANDOM_SEED = 3,       /* this CPU's seed, made from the seed given */
	RANDOM_STEPS = 4,      /* page writes done; stored after each write and after the checksum */
	RANDOM_CHECKSUM = 5,   /* of all data pages */
	RANDOM_READY = 6,      /* data pages filled; the share is defined once this equals RANDOM_PAGES */
	RANDOM_SWEEPS = 7,     /* times all data pages were read back and compared with the checksum */
	RANDOM_ERRORS = 8,     /* errors found */
	RANDOM_ERROR_KIND = 9, /* of the latest: enum random_error */
	RANDOM_ERROR_PAGE = 10, /* of the latest: data page, ~0 when it cannot be told */
	RANDOM_ERROR_STEP = 11, /* of the latest: steps done when it was found */
};

enum random_error {
	RANDOM_STALE_PAGE = 1, /* a page's tag differs from the table's: the page or the table is not the latest */
	RANDOM_SUM = 2,        /* reading all pages back gave another checksum */
	RANDOM_REGISTERS = 3,  /* the vector registers differ from the status page */
};

#endif
