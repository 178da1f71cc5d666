/* SPDX-License-Identifier: GPL-2.0-or-later */
/* PL011 output, polled (ARM DDI 0183). CPU 0 alone prints, except when another CPU fails. */
#include "guest.h"

#if defined(BOARD_LINUX_ARM)
void put(char character); /* linux-arm.c */
#else
#define UARTDR 0x00
#define UARTFR 0x18
#define UARTLCR_H 0x2c
#define UARTCR 0x30

#define FR_TXFF (1u << 5)
#define LCR_H_8BIT_FIFO 0x70u
#define CR_ENABLE_TX_RX 0x301u

#define CHARACTERS_PER_READING 8u

void uart_init(void)
{
	*mmio(UART_BASE + UARTLCR_H) = LCR_H_8BIT_FIFO;
	*mmio(UART_BASE + UARTCR) = CR_ENABLE_TX_RX;
}

static void put(char character)
{
	static u32 printed;

	while (*mmio(UART_BASE + UARTFR) & FR_TXFF)
		;
	*mmio(UART_BASE + UARTDR) = (unsigned char)character;
	if (status.state == STATE_RUNNING && ++printed % CHARACTERS_PER_READING == 0)
		read_counter(0);
}
#endif

void print(const char *text)
{
	for (; *text; text++) {
		if (*text == '\n')
			put('\r');
		put(*text);
	}
}

void print_padded(u64 value, u32 digits)
{
	char text[24];
	u32 at = sizeof(text) - 1;
	u64 digit;

	text[at] = 0;
	do {
		value = divide(value, 10, &digit);
		text[--at] = (char)('0' + digit);
		if (digits)
			digits--;
	} while ((value || digits) && at);
	print(text + at);
}

void print_number(u64 value)
{
	print_padded(value, 1);
}

void print_hex(u32 value)
{
	print("0x");
	for (int shift = 28; shift >= 0; shift -= 4)
		put("0123456789abcdef"[value >> shift & 15]);
}

void print_ms(u64 ticks)
{
	u64 rest, us = divide(ticks * 1000, status.frequency / 1000, &rest);

	us = divide(us, 1000, &rest);
	print_number(us);
	print(".");
	print_padded(rest, 3);
}
