/* SPDX-License-Identifier: GPL-2.0-or-later */
/* x86_64: long mode at privilege level 3, memory mapped to itself. */
#ifndef X86_64_H
#define X86_64_H

static inline void put64(volatile u64 *where, u64 value)
{
	__asm__ volatile("movq %1, %0" : "=m"(*where) : "r"(value) : "memory");
}

static inline u64 get64(const volatile u64 *where)
{
	u64 value;

	__asm__ volatile("movq %1, %0" : "=r"(value) : "m"(*where) : "memory");
	return value;
}

static inline void relax(void)
{
	__asm__ volatile("pause");
}

/* Where the hypervisor tells a CPU how the machine's clock follows from its time stamp counter: struct pvclock_vcpu_time_info. */
struct time_record {
	u32 version; /* odd while it changes */
	u32 pad0;
	u64 tsc_timestamp;
	u64 system_time; /* ns of the machine's clock at tsc_timestamp */
	u32 tsc_to_system_mul;
	signed char tsc_shift;
	unsigned char flags;
	unsigned char pad[2];
};

extern volatile struct time_record *time_records[];

/* The machine's clock, in ns (Linux, Documentation/virt/kvm/x86/msr.rst, MSR_KVM_SYSTEM_TIME_NEW). */
static inline u64 counter(u32 cpu)
{
	volatile struct time_record *record = time_records[cpu];
	u64 now, delta;
	u32 version, low, high;

	do {
		version = record->version & ~1u;
		__asm__ volatile("lfence\n\trdtsc" : "=a"(low), "=d"(high)::"memory");
		delta = ((u64)high << 32 | low) - record->tsc_timestamp;
		delta = record->tsc_shift < 0 ? delta >> -record->tsc_shift : delta << record->tsc_shift;
		now = record->system_time + (u64)((unsigned __int128)delta * record->tsc_to_system_mul >> 32);
	} while (record->version != version);
	return now;
}

#endif
