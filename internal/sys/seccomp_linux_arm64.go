package sys

import "golang.org/x/sys/unix"

// SeccompABIs are the conventions by which programs make system calls on this machine.
var SeccompABIs = []SeccompABI{
	{
		Arch:       unix.AUDIT_ARCH_AARCH64,
		Bind:       []uint32{unix.SYS_BIND},
		Listen:     []uint32{unix.SYS_LISTEN},
		Setsockopt: []uint32{unix.SYS_SETSOCKOPT},
	},
	{
		// arch/arm/tools/syscall.tbl; the EABI, the only one that arm64 runs, has no socketcall.
		Arch:       unix.AUDIT_ARCH_ARM,
		Compat:     true,
		Bind:       []uint32{282},
		Listen:     []uint32{284},
		Setsockopt: []uint32{294},
	},
}
