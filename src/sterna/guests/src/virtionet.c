/* SPDX-License-Identifier: GPL-2.0-or-later */
#include "virtionet.h"

#define SLOT_BYTES 0x200u
#define MAGIC 0x74726976u
#define VERSION 2u
#define DEVICE_NETWORK 1u

/* Registers of the memory-mapped transport (4.2.2). */
enum transport {
	REG_MAGIC = 0x00,
	REG_VERSION = 0x04,
	REG_DEVICE = 0x08,
	REG_DEVICE_FEATURES = 0x10,
	REG_DEVICE_FEATURES_SEL = 0x14,
	REG_DRIVER_FEATURES = 0x20,
	REG_DRIVER_FEATURES_SEL = 0x24,
	REG_QUEUE_SEL = 0x30,
	REG_QUEUE_NUM_MAX = 0x34,
	REG_QUEUE_NUM = 0x38,
	REG_QUEUE_READY = 0x44,
	REG_QUEUE_NOTIFY = 0x50,
	REG_STATUS = 0x70,
	REG_QUEUE_DESC = 0x80,
	REG_QUEUE_DRIVER = 0x90,
	REG_QUEUE_DEVICE = 0xa0,
	REG_CONFIG = 0x100,
};

enum device_status { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8 };

#define FEATURE_MAC (1u << 5)   /* in the lower half of the features */
#define FEATURE_VERSION_1 1u    /* in the upper half */

#define RX 0u
#define TX 1u
#define ENTRIES 32u
#define HEADER_BYTES 12u
#define BUFFER_BYTES (HEADER_BYTES + FRAME_BYTES)
#define DESC_WRITE 2u
#define NO_INTERRUPT 1u

struct descriptor {
	u64 address;
	u32 length;
	u16 flags;
	u16 next;
};

/* A split virtqueue (2.6) and its buffers: descriptor i is always buffer i. */
struct queue {
	volatile struct descriptor desc[ENTRIES];
	struct {
		volatile u16 flags, index, ring[ENTRIES];
	} avail;
	struct {
		volatile u16 flags, index;
		volatile struct {
			u32 id, length;
		} ring[ENTRIES];
	} used __attribute__((aligned(4)));
	u8 buffers[ENTRIES][BUFFER_BYTES] __attribute__((aligned(4)));
};

u8 net_mac[MAC_BYTES];

static struct queue queues[2] __attribute__((aligned(4096)));
static u32 device;
static u16 received; /* used entries of RX that have been looked at */

static volatile u32 *reg(u32 offset)
{
	return mmio(device + offset);
}

static void barrier(void)
{
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
}

static void set_address(u32 offset, const volatile void *where)
{
	*reg(offset) = (u32)(uintptr_t)where;
	*reg(offset + 4) = 0;
}

static void queue_init(u32 number)
{
	struct queue *queue = &queues[number];

	*reg(REG_QUEUE_SEL) = number;
	if (*reg(REG_QUEUE_READY) || *reg(REG_QUEUE_NUM_MAX) < ENTRIES)
		fail(ERROR_DEVICE, "a queue of the network device is too short");
	for (u32 i = 0; i < ENTRIES; i++) {
		queue->desc[i].address = (u32)(uintptr_t)queue->buffers[i];
		queue->desc[i].length = BUFFER_BYTES;
		queue->desc[i].flags = number == RX ? DESC_WRITE : 0;
		queue->avail.ring[i] = (u16)i;
	}
	queue->avail.flags = NO_INTERRUPT;
	queue->avail.index = number == RX ? ENTRIES : 0;
	*reg(REG_QUEUE_NUM) = ENTRIES;
	set_address(REG_QUEUE_DESC, queue->desc);
	set_address(REG_QUEUE_DRIVER, &queue->avail);
	set_address(REG_QUEUE_DEVICE, &queue->used);
	barrier();
	*reg(REG_QUEUE_READY) = 1;
}

void net_init(void)
{
	u32 old = 0;

	for (u32 slot = 0; slot < VIRTIO_SLOTS && !device; slot++) {
		volatile u32 *at_slot = mmio(VIRTIO_BASE + slot * SLOT_BYTES);

		if (at_slot[REG_MAGIC / 4] != MAGIC || at_slot[REG_DEVICE / 4] != DEVICE_NETWORK)
			continue;
		if (at_slot[REG_VERSION / 4] == VERSION)
			device = VIRTIO_BASE + slot * SLOT_BYTES;
		else
			old = 1;
	}
	if (!device)
		fail(ERROR_DEVICE, old ? "the network device is of before virtio 1" : "there is no network device");
	*reg(REG_STATUS) = 0;
	*reg(REG_STATUS) = ACKNOWLEDGE;
	*reg(REG_STATUS) = ACKNOWLEDGE | DRIVER;
	*reg(REG_DEVICE_FEATURES_SEL) = 0;
	*reg(REG_DRIVER_FEATURES_SEL) = 0;
	*reg(REG_DRIVER_FEATURES) = *reg(REG_DEVICE_FEATURES) & FEATURE_MAC;
	*reg(REG_DRIVER_FEATURES_SEL) = 1;
	*reg(REG_DRIVER_FEATURES) = FEATURE_VERSION_1;
	*reg(REG_STATUS) = ACKNOWLEDGE | DRIVER | FEATURES_OK;
	if (!(*reg(REG_STATUS) & FEATURES_OK))
		fail(ERROR_DEVICE, "the network device refuses its features");
	queue_init(RX);
	queue_init(TX);
	for (u32 i = 0; i < MAC_BYTES; i++)
		net_mac[i] = *(volatile u8 *)at(device + REG_CONFIG + i);
	*reg(REG_STATUS) = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
	*reg(REG_QUEUE_NOTIFY) = RX;
}

const u8 *net_receive(u32 *length)
{
	struct queue *queue = &queues[RX];
	u32 id, bytes;

	if (queue->used.index == received)
		return NULL;
	barrier();
	id = queue->used.ring[received % ENTRIES].id % ENTRIES;
	bytes = queue->used.ring[received % ENTRIES].length;
	*length = bytes < HEADER_BYTES || bytes > BUFFER_BYTES ? 0 : bytes - HEADER_BYTES;
	return queue->buffers[id] + HEADER_BYTES;
}

void net_done(void)
{
	struct queue *queue = &queues[RX];
	u32 id = queue->used.ring[received % ENTRIES].id % ENTRIES;

	received++;
	queue->avail.ring[queue->avail.index % ENTRIES] = (u16)id;
	barrier();
	queue->avail.index++;
	barrier();
	*reg(REG_QUEUE_NOTIFY) = RX;
}

/* The device sends in order, so that the buffers come back in order. */
u8 *net_buffer(void)
{
	struct queue *queue = &queues[TX];

	if ((u16)(queue->avail.index - queue->used.index) >= ENTRIES)
		return NULL;
	barrier();
	return queue->buffers[queue->avail.index % ENTRIES] + HEADER_BYTES;
}

void net_send(u32 length)
{
	struct queue *queue = &queues[TX];
	u32 id = queue->avail.index % ENTRIES;

	queue->desc[id].length = HEADER_BYTES + length;
	queue->avail.ring[id] = (u16)id;
	barrier();
	queue->avail.index++;
	barrier();
	*reg(REG_QUEUE_NOTIFY) = TX;
}
