/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A reader for flattened device trees (Devicetree Specification 0.4, chapter 5): RAM size, number of CPUs, bootargs.
 * Reads bytes, as the blob may be unaligned in a property and the MMU is off; checks every offset against the blob.
 */
#include "fdt.h"

#include <stddef.h>

#define FDT_MAGIC 0xd00dfeedu
#define FDT_BEGIN_NODE 1u
#define FDT_END_NODE 2u
#define FDT_PROP 3u
#define FDT_NOP 4u
#define FDT_END 9u

#define HEADER_BYTES 40u
#define MAX_DEPTH 32u

struct blob {
	const unsigned char *bytes;
	u32 size;
	u32 struct_at, struct_end;
	u32 strings_at, strings_size;
};

static u32 be32(const struct blob *blob, u32 at)
{
	const unsigned char *p = blob->bytes + at;

	return (u32)p[0] << 24 | (u32)p[1] << 16 | (u32)p[2] << 8 | p[3];
}

static u64 cells(const struct blob *blob, u32 at, u32 count)
{
	u64 value = 0;

	while (count--) {
		value = value << 32 | be32(blob, at);
		at += 4;
	}
	return value;
}

/* Length of the string at `at` that must end before `end`; -1 when it does not. */
static int length_within(const struct blob *blob, u32 at, u32 end)
{
	for (u32 i = at; i < end; i++)
		if (!blob->bytes[i])
			return (int)(i - at);
	return -1;
}

static int equal(const unsigned char *text, u32 length, const char *word)
{
	u32 i = 0;

	for (; i < length && word[i]; i++)
		if (text[i] != (unsigned char)word[i])
			return 0;
	return i == length && !word[i];
}

/* "memory" and "memory@40000000" both have the base name "memory". */
static int base_name(const unsigned char *text, u32 length, const char *word)
{
	u32 base = 0;

	while (base < length && text[base] != '@')
		base++;
	return equal(text, base, word);
}

static int is_property(const struct blob *blob, u32 name, const char *word)
{
	int length;

	if (name >= blob->strings_size)
		return 0;
	length = length_within(blob, blob->strings_at + name, blob->strings_at + blob->strings_size);
	return length >= 0 && equal(blob->bytes + blob->strings_at + name, (u32)length, word);
}

static int open_blob(struct blob *blob, u32 limit)
{
	u32 struct_size;

	if (be32(blob, 0) != FDT_MAGIC)
		return 0;
	blob->size = be32(blob, 4);
	blob->struct_at = be32(blob, 8);
	blob->strings_at = be32(blob, 12);
	blob->strings_size = be32(blob, 32);
	struct_size = be32(blob, 36);
	if (blob->size < HEADER_BYTES || blob->size > limit)
		return -1;
	if (blob->struct_at > blob->size || struct_size > blob->size - blob->struct_at || blob->struct_at % 4)
		return -1;
	if (blob->strings_at > blob->size || blob->strings_size > blob->size - blob->strings_at)
		return -1;
	blob->struct_end = blob->struct_at + struct_size;
	return 1;
}

enum node { NODE_OTHER, NODE_ROOT, NODE_CHOSEN, NODE_MEMORY, NODE_CPUS };

/* The size of the region that starts at `ram_base` in a `reg` property. */
static void read_memory(const struct blob *blob, u32 at, u32 length, u32 address_cells, u32 size_cells, u32 ram_base,
			struct machine *machine)
{
	u32 entry = 4 * (address_cells + size_cells);

	if (!address_cells || !size_cells || address_cells > 2 || size_cells > 2)
		return;
	for (; length >= entry; at += entry, length -= entry)
		if (cells(blob, at, address_cells) == ram_base)
			machine->ram_bytes = cells(blob, at + 4 * address_cells, size_cells);
}

int fdt_read(const void *bytes, u32 limit, u32 ram_base, struct machine *machine)
{
	struct blob blob = {.bytes = bytes};
	enum node kind = NODE_OTHER;
	u32 depth = 0, at, address_cells = 2, size_cells = 1;
	int opened = open_blob(&blob, limit);

	if (opened <= 0)
		return opened;
	for (at = blob.struct_at; blob.struct_end - at >= 4;) {
		u32 token = be32(&blob, at);

		at += 4;
		if (token == FDT_BEGIN_NODE) {
			int length = length_within(&blob, at, blob.struct_end);
			const unsigned char *name = blob.bytes + at;

			if (length < 0 || ++depth > MAX_DEPTH)
				return -1;
			if (depth == 1)
				kind = NODE_ROOT;
			else if (depth == 2 && equal(name, (u32)length, "chosen"))
				kind = NODE_CHOSEN;
			else if (depth == 2 && base_name(name, (u32)length, "memory"))
				kind = NODE_MEMORY;
			else if (depth == 2 && equal(name, (u32)length, "cpus"))
				kind = NODE_CPUS;
			else if (depth == 3 && kind == NODE_CPUS && base_name(name, (u32)length, "cpu"))
				machine->cpus++;
			else if (depth == 2)
				kind = NODE_OTHER;
			at += ((u32)length + 4) & ~3u;
		} else if (token == FDT_END_NODE) {
			if (!depth--)
				return -1;
			if (depth == 1)
				kind = NODE_OTHER;
		} else if (token == FDT_PROP) {
			u32 length, name;

			if (blob.struct_end - at < 8)
				return -1;
			length = be32(&blob, at);
			name = be32(&blob, at + 4);
			at += 8;
			if (length > blob.struct_end - at)
				return -1;
			if (kind == NODE_ROOT && depth == 1 && length == 4 && is_property(&blob, name, "#address-cells"))
				address_cells = be32(&blob, at);
			else if (kind == NODE_ROOT && depth == 1 && length == 4 && is_property(&blob, name, "#size-cells"))
				size_cells = be32(&blob, at);
			else if (kind == NODE_MEMORY && depth == 2 && is_property(&blob, name, "reg"))
				read_memory(&blob, at, length, address_cells, size_cells, ram_base, machine);
			else if (kind == NODE_CHOSEN && depth == 2 && is_property(&blob, name, "bootargs")) {
				int text = length_within(&blob, at, at + length);

				if (text < 0)
					return -1;
				machine->bootargs = (const char *)blob.bytes + at;
				machine->bootargs_length = (u32)text;
			}
			if (((length + 3) & ~3u) > blob.struct_end - at)
				return -1;
			at += (length + 3) & ~3u;
		} else if (token == FDT_END) {
			return depth ? -1 : 1;
		} else if (token != FDT_NOP) {
			return -1;
		}
		if (at > blob.struct_end)
			return -1;
	}
	return -1;
}
