package sys

import (
	"errors"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Calls that a sandbox may refuse, by name.
var refusable = map[string]uint32{
	"pidfd_getfd": unix.SYS_PIDFD_GETFD,
	"bpf":         unix.SYS_BPF,
}

// Refuse makes system calls fail with EPERM on the calling thread and in all that it executes, as a container's profile does. Tests build
// their surroundings with it.
func Refuse(calls ...string) error {
	if len(SeccompABIs) == 0 {
		return errors.ErrUnsupported
	}
	deny := bpf.RetConstant{Val: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)}
	allow := bpf.RetConstant{Val: unix.SECCOMP_RET_ALLOW}
	program := []bpf.Instruction{
		bpf.LoadAbsolute{Off: SeccompOffsetArch, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: SeccompABIs[0].Arch, SkipTrue: 1},
		allow, // of another convention, which berth's own processes don't use
		bpf.LoadAbsolute{Off: SeccompOffsetNr, Size: 4},
	}
	for _, name := range calls {
		nr, ok := refusable[name]
		if !ok {
			return os.NewSyscallError(name, unix.EINVAL)
		}
		program = append(program, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: nr, SkipTrue: 1}, deny)
	}
	raw, err := bpf.Assemble(append(program, allow))
	if err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		if err := SetNoNewPrivs(); err != nil {
			return err
		}
	}
	prog, insns := sockFprog(raw)
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(prog)))
	runtime.KeepAlive(insns)
	return os.NewSyscallError("seccomp", errnoErr(errno))
}
