/* SPDX-License-Identifier: GPL-2.0-or-later */
/* A driver of one virtio network device (Virtual I/O Device Version 1.1), polled. */
#ifndef VIRTIONET_H
#define VIRTIONET_H

#include "guest.h"

typedef uint16_t u16;
typedef unsigned char u8;

#define FRAME_BYTES 2036u /* the most that a frame can have */
#define MAC_BYTES 6u

/* Find the device and set it up; fail() when there is none, or it refuses. */
void net_init(void);

extern u8 net_mac[MAC_BYTES];

/* The next frame that has come, and its length; NULL when there is none. It is the caller's until net_done(). */
const u8 *net_receive(u32 *length);
void net_done(void);

/* Where to put the next frame to be sent; NULL when all buffers are on their way. net_send() sends it. */
u8 *net_buffer(void);
void net_send(u32 length);

#endif
