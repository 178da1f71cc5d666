/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What a program wants to know from the flattened device tree. */
#ifndef FDT_H
#define FDT_H

#include <stdint.h>

typedef uint32_t u32;
typedef uint64_t u64;

struct machine {
	u64 ram_bytes;   /* 0: not found */
	u32 cpus;        /* 0: not found */
	const char *bootargs; /* NULL: none; bootargs_length bytes without the terminator */
	u32 bootargs_length;
};

/* 1: read; 0: no device tree at `blob`; -1: one that is damaged. */
int fdt_read(const void *blob, u32 limit, u32 ram_base, struct machine *machine);

#endif
