package sys

import "golang.org/x/sys/unix"

// x32 marks the numbers of the x32 convention, which shares AUDIT_ARCH_X86_64 (__X32_SYSCALL_BIT).
const x32 = 0x40000000

// SeccompABIs are the conventions by which programs make system calls on this machine.
// x32 has a number of its own for setsockopt (arch/x86/entry/syscalls/syscall_64.tbl).
var SeccompABIs = []SeccompABI{
	{
		Arch:       unix.AUDIT_ARCH_X86_64,
		Bind:       []uint32{unix.SYS_BIND, x32 | unix.SYS_BIND},
		Listen:     []uint32{unix.SYS_LISTEN, x32 | unix.SYS_LISTEN},
		Setsockopt: []uint32{unix.SYS_SETSOCKOPT, x32 | 541},
	},
	{
		// arch/x86/entry/syscalls/syscall_32.tbl
		Arch:       unix.AUDIT_ARCH_I386,
		Compat:     true,
		Bind:       []uint32{361},
		Listen:     []uint32{363},
		Setsockopt: []uint32{366},
		Socketcall: 102,
	},
}
