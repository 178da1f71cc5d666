/* SPDX-License-Identifier: GPL-2.0-or-later */
/* An exception ends the program. */
#include "guest.h"

_Noreturn void fail_by_exception(u32 cpu, u32 vector, u32 pc, u32 address, u32 syndrome)
{
	volatile struct cpu_record *record = &status.cpu[cpu];

	record->fault_pc = pc;
	record->fault_address = address;
	record->fault_status = syndrome;
	record->fault_vector = vector;
	record->state = CPU_STOPPED;
	status.error = ERROR_EXCEPTION;
	status.state = STATE_ERROR;
	print(program.name);
	print(": error: exception at vector ");
	print_hex(vector);
	print(", cpu ");
	print_number(cpu);
	print(", pc ");
	print_hex(pc);
	print(", address ");
	print_hex(address);
	print(", status ");
	print_hex(syndrome);
	print("\n");
	halt();
}
