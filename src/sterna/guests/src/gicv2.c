/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The little of the GICv2 that lets wfi end: the timer's interrupt must reach the CPU, which masks it from being taken. */
#include "guest.h"

#define VIRTUAL_TIMER_PPI 27

#define GICD_CTLR 0x000
#define GICD_ISENABLER0 0x100
#define GICC_CTLR 0x00
#define GICC_PMR 0x04

void machine_init(void)
{
	*mmio(GIC_DISTRIBUTOR + GICD_CTLR) = 1;
}

void cpu_init(void)
{
	*mmio(GIC_DISTRIBUTOR + GICD_ISENABLER0) = 1u << VIRTUAL_TIMER_PPI; /* banked per CPU */
	*mmio(GIC_CPU_INTERFACE + GICC_PMR) = 0xff;
	*mmio(GIC_CPU_INTERFACE + GICC_CTLR) = 1;
}
