/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * net ADDRESS [PAGES [PAGES_PER_MS]]: answers ARP, ICMP echo and UDP echo (port 7) at an IPv4 address, and counts what it
 * answered. Meanwhile it writes pages as dirtyram does, so that there is something to migrate. CPU 0 alone has the network.
 */
#include "virtionet.h"

#define ETHER_BYTES 14u
#define ARP_BYTES 28u
#define IP_BYTES 20u
#define ICMP_BYTES 8u
#define UDP_BYTES 8u
#define TYPE_IP 0x0800u
#define TYPE_ARP 0x0806u
#define PROTOCOL_ICMP 1u
#define PROTOCOL_UDP 17u
#define ARP_REQUEST 1u
#define ARP_REPLY 2u
#define ECHO_REQUEST 8u
#define ECHO_PORT 7u
#define TIME_TO_LIVE 64u
#define PAGES_PER_READING 64u
#define MAX_PAGES_PER_MS 4096u
#define REPORT_MS 2000u

static volatile u64 *words; /* of CPU 0 */

static void check(void)
{
	u64 address = get64(&status.args[0]), pages = get64(&status.args[1]), per_ms = get64(&status.args[2]);

	if (!address || address > 0xffffffffu)
		fail(ERROR_ARGUMENT_RANGE, "ADDRESS must be an IPv4 address");
	if (pages > get64(&status.work_pages))
		fail(ERROR_MEMORY, "PAGES is more than RAM has above its first 4 MiB");
	if (pages && pages < status.cpus)
		fail(ERROR_ARGUMENT_RANGE, "PAGES must be 0, or at least the number of CPUs");
	if (per_ms < 1 || per_ms > MAX_PAGES_PER_MS)
		fail(ERROR_ARGUMENT_RANGE, "PAGES_PER_MS must be 1 to 4096");
	net_init();
}

static void count(enum net_word word)
{
	put64(&words[word], get64(&words[word]) + 1);
}

/* Frames may lie anywhere: bytes only. */
static u32 get16(const u8 *from)
{
	return (u32)from[0] << 8 | from[1];
}

static u32 get32(const u8 *from)
{
	return get16(from) << 16 | get16(from + 2);
}

static void put16(u8 *to, u32 value)
{
	to[0] = (u8)(value >> 8);
	to[1] = (u8)value;
}

static void copy(u8 *to, const u8 *from, u32 length)
{
	volatile u8 *out = to; /* or the compiler makes a call of memcpy of it */

	while (length--)
		*out++ = *from++;
}

static int equal(const u8 *a, const u8 *b, u32 length)
{
	while (length--)
		if (*a++ != *b++)
			return 0;
	return 1;
}

/* The sum that checksums are made of (RFC 1071), folded to 16 bits. */
static u32 sum(u32 start, const u8 *from, u32 length)
{
	for (; length > 1; length -= 2, from += 2)
		start += get16(from);
	if (length)
		start += (u32)from[0] << 8;
	while (start >> 16)
		start = (start & 0xffff) + (start >> 16);
	return start;
}

static int is_mine(const u8 *address)
{
	return get32(address) == (u32)get64(&words[NET_ADDRESS]);
}

/* To whoever sent `frame`. */
static void answer_ether(u8 *reply, const u8 *frame)
{
	copy(reply, frame + MAC_BYTES, MAC_BYTES);
	copy(reply + MAC_BYTES, net_mac, MAC_BYTES);
	copy(reply + 2 * MAC_BYTES, frame + 2 * MAC_BYTES, 2);
}

static void answer_arp(const u8 *frame, u32 length)
{
	static const u8 ether_ip[] = {0, 1, 8, 0, 6, 4, 0, ARP_REQUEST};
	const u8 *arp = frame + ETHER_BYTES;
	u8 *reply;

	if (length < ETHER_BYTES + ARP_BYTES || !equal(arp, ether_ip, sizeof(ether_ip)) || !is_mine(arp + 24)) {
		count(NET_OTHER);
		return;
	}
	reply = net_buffer();
	if (!reply) {
		count(NET_UNSENT);
		return;
	}
	count(NET_ARP);
	answer_ether(reply, frame);
	reply += ETHER_BYTES;
	copy(reply, arp, 6);
	put16(reply + 6, ARP_REPLY);
	copy(reply + 8, net_mac, MAC_BYTES);
	copy(reply + 14, arp + 24, 4);
	copy(reply + 18, arp + 8, 10);
	net_send(ETHER_BYTES + ARP_BYTES);
}

/* A datagram's number is its first four bytes. */
static void take_number(const u8 *data, u32 length)
{
	u64 number, expected = get64(&words[NET_SEQUENCE]);

	if (length < 4)
		return;
	number = get32(data);
	if (number < expected) {
		count(NET_AGAIN);
		return;
	}
	put64(&words[NET_LOST], get64(&words[NET_LOST]) + (number - expected));
	put64(&words[NET_SEQUENCE], number + 1);
}

static void answer_ip(const u8 *frame, u32 length)
{
	const u8 *ip = frame + ETHER_BYTES, *inner = ip + IP_BYTES;
	u32 total, size, protocol;
	u8 *reply;

	if (length < ETHER_BYTES + IP_BYTES || !equal(frame, net_mac, MAC_BYTES))
		goto other;
	total = get16(ip + 2);
	protocol = ip[9];
	/* No options, no fragments. */
	if (ip[0] != 0x45 || total < IP_BYTES || total > length - ETHER_BYTES || (get16(ip + 6) & 0x3fff))
		goto other;
	if (sum(0, ip, IP_BYTES) != 0xffff || !is_mine(ip + 16))
		goto other;
	size = total - IP_BYTES;
	if (protocol == PROTOCOL_ICMP) {
		if (size < ICMP_BYTES || inner[0] != ECHO_REQUEST || inner[1] || sum(0, inner, size) != 0xffff)
			goto other;
	} else if (protocol == PROTOCOL_UDP) {
		/* The checksum covers addresses, protocol and length as well; 0 is none. */
		if (size < UDP_BYTES || get16(inner + 2) != ECHO_PORT || get16(inner + 4) != size)
			goto other;
		if (get16(inner + 6) && sum(sum(PROTOCOL_UDP + size, ip + 12, 8), inner, size) != 0xffff)
			goto other;
	} else {
		goto other;
	}
	reply = net_buffer();
	if (!reply) {
		count(NET_UNSENT);
		return;
	}
	answer_ether(reply, frame);
	reply += ETHER_BYTES;
	copy(reply, ip, total);
	copy(reply + 12, ip + 16, 4);
	copy(reply + 16, ip + 12, 4);
	put16(reply + 6, 0);
	reply[8] = TIME_TO_LIVE;
	put16(reply + 10, 0);
	put16(reply + 10, ~sum(0, reply, IP_BYTES));
	reply += IP_BYTES;
	if (protocol == PROTOCOL_ICMP) {
		reply[0] = 0;
		put16(reply + 2, 0);
		put16(reply + 2, ~sum(0, reply, size));
		count(NET_ICMP);
	} else {
		/* Its checksum stays right: what is summed has changed places only. */
		copy(reply, inner + 2, 2);
		copy(reply + 2, inner, 2);
		take_number(inner + UDP_BYTES, size - UDP_BYTES);
		count(NET_UDP);
	}
	net_send(ETHER_BYTES + total);
	return;
other:
	count(NET_OTHER);
}

static void serve(void)
{
	u32 length;

	for (const u8 *frame; (frame = net_receive(&length)); net_done()) {
		u32 type = length < ETHER_BYTES ? 0 : get16(frame + 2 * MAC_BYTES);

		count(NET_RECEIVED);
		if (type == TYPE_ARP)
			answer_arp(frame, length);
		else if (type == TYPE_IP)
			answer_ip(frame, length);
		else
			count(NET_OTHER);
	}
}

static void print_counts(void)
{
	print("net: received ");
	print_number(get64(&words[NET_RECEIVED]));
	print(", answered arp ");
	print_number(get64(&words[NET_ARP]));
	print(" icmp ");
	print_number(get64(&words[NET_ICMP]));
	print(" udp ");
	print_number(get64(&words[NET_UDP]));
	print(", numbers lost ");
	print_number(get64(&words[NET_LOST]));
	print(" again ");
	print_number(get64(&words[NET_AGAIN]));
	print("\n");
}

static void print_address(u64 address)
{
	print("net: ");
	for (int shift = 24; shift >= 0; shift -= 8) {
		print_number(address >> shift & 255);
		print(shift ? "." : " answers ARP, ICMP echo and UDP echo\n");
	}
}

static void run(u32 cpu)
{
	volatile struct cpu_record *record = &status.cpu[cpu];
	volatile u64 *own = record->words;
	u64 first, pages, per_ms, unused, writes = 0, passes = 0, steps = 0, reported;
	u32 page = 0, base;

	share(get64(&status.args[1]), cpu, &first, &pages);
	share(get64(&status.args[2]), cpu, &unused, &per_ms);
	if (!per_ms)
		per_ms = 1; /* fewer pages than CPUs */
	put64(&own[DIRTYRAM_FIRST], first);
	put64(&own[DIRTYRAM_PAGES], pages);
	put64(&own[DIRTYRAM_PER_STEP], per_ms);
	base = WORK_BASE + (u32)first * PAGE_SIZE;
	reported = read_counter(cpu);
	if (cpu == 0) {
		words = own;
		put64(&own[NET_ADDRESS], get64(&status.args[0]));
		print_address(get64(&status.args[0]));
	}
	for (;;) {
		u64 now = read_counter(cpu), batch = passes ? per_ms : PAGES_PER_READING;

		if (cpu == 0)
			serve();
		for (; pages && batch; batch--) {
			*mmio(base + page * PAGE_SIZE) = (u32)(writes + 1);
			put64(&own[DIRTYRAM_WRITES], ++writes);
			if (++page == (u32)pages) {
				page = 0;
				put64(&own[DIRTYRAM_PASSES], ++passes);
			}
		}
		put64(&own[DIRTYRAM_NEXT], page);
		put64(&record->steps, ++steps);
		if (cpu == 0 && now - reported >= milliseconds(REPORT_MS)) {
			reported = now;
			print_counts();
		}
		if (passes || !pages)
			sleep_until(cpu, now + milliseconds(1));
	}
}

const struct program program = {
	.id = PROGRAM_NET,
	.name = "net",
	.usage = "net ADDRESS [PAGES [PAGES_PER_MS]]",
	.least_arguments = 1,
	.most_arguments = 3,
	.addresses = 1,
	.defaults = {0, 0, 1},
	.check = check,
	.run = run,
};
