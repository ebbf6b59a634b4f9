package intercept

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/berth-net/berth/internal/sys"
	"golang.org/x/net/bpf"
)

// Errors of [Filter.Install].
var (
	// ErrListenerExists means that a filter with a listener is in force already: one task can have only one.
	ErrListenerExists = errors.New("another seccomp filter with a listener watches this process already (is berth running inside berth, or in a container that intercepts system calls?)")
	// ErrUnsupported means that the kernel has no seccomp filters, or no notifications.
	ErrUnsupported = errors.New("this kernel cannot announce system calls through seccomp (needs amd64 or arm64, CONFIG_SECCOMP_FILTER and Linux 5.15)")
	// ErrRefused means that a seccomp filter or a security module already in force forbids another filter.
	ErrRefused = errors.New("a policy already in force forbids to install a seccomp filter")
)

// Filter says which calls are announced. The zero value announces bind and listen.
type Filter struct {
	Setsockopt bool // setsockopt too, for surroundings where pidfd_getfd is refused: each one costs a round trip
}

// Install puts the filter on the calling OS thread and returns the descriptor for [NewListener]. The caller has locked the thread
// and executes the program from it: the filter outlives exec, cannot be removed, and is inherited by every child.
// Without CAP_SYS_ADMIN no_new_privs is set on the thread, which takes their power from setuid programs.
func (f Filter) Install() (*os.File, error) {
	if len(sys.SeccompABIs) == 0 {
		return nil, ErrUnsupported
	}
	program, err := bpf.Assemble(f.program(sys.SeccompABIs))
	if err != nil {
		return nil, fmt.Errorf("seccomp filter: %w", err)
	}
	file, err := install(program)
	if errors.Is(err, syscall.EACCES) {
		// Only this tells whether CAP_SYS_ADMIN is there, in this user namespace and past every security module.
		if err := sys.SetNoNewPrivs(); err != nil {
			return nil, err
		}
		file, err = install(program)
	}
	for errno, sentinel := range map[syscall.Errno]error{
		syscall.EBUSY: ErrListenerExists, syscall.ENOSYS: ErrUnsupported, syscall.EINVAL: ErrUnsupported,
		syscall.EPERM: ErrRefused, syscall.EACCES: ErrRefused,
	} {
		if errors.Is(err, errno) {
			return nil, fmt.Errorf("%w: %w", sentinel, err)
		}
	}
	return file, err
}

// install prefers that signals don't disturb a caller once its call was received: Go programs preempt themselves with signals, and an
// interrupted bind would be done twice. Linux 5.19 has it.
func install(program []bpf.RawInstruction) (*os.File, error) {
	file, err := sys.SeccompListen(program, sys.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV)
	if errors.Is(err, syscall.EINVAL) {
		file, err = sys.SeccompListen(program, 0)
	}
	return file, err
}

// The least and the most bytes that an Internet socket's address has: struct sockaddr_in, struct sockaddr_storage.
const (
	minSockaddr = 16
	maxSockaddr = 128
)

// program is the filter. For all but a few calls its answer depends on their number alone; the kernel finds that out once and lets
// them pass without running it (seccomp_cache_prepare, Linux 5.11).
func (f Filter) program(abis []sys.SeccompABI) []bpf.Instruction {
	announce := []bpf.Instruction{bpf.RetConstant{Val: sys.SECCOMP_RET_USER_NOTIF}}
	allow := bpf.RetConstant{Val: sys.SECCOMP_RET_ALLOW}

	// bind(fd, address, length): a shorter address is AF_NETLINK's or AF_UNIX's, a longer one is refused by the kernel.
	bind := []bpf.Instruction{
		bpf.LoadAbsolute{Off: sys.SeccompOffsetArg(2), Size: 4},
		bpf.JumpIf{Cond: bpf.JumpLessThan, Val: minSockaddr, SkipTrue: 2},
		bpf.JumpIf{Cond: bpf.JumpGreaterThan, Val: maxSockaddr, SkipTrue: 1},
		bpf.RetConstant{Val: sys.SECCOMP_RET_USER_NOTIF},
		allow,
	}
	// socketcall(call, arguments in memory)
	socketcall := []bpf.Instruction{bpf.LoadAbsolute{Off: sys.SeccompOffsetArg(0), Size: 4}}
	socketcall = append(socketcall, when(sys.SYS_SOCKETCALL_BIND, announce)...)
	socketcall = append(socketcall, when(sys.SYS_SOCKETCALL_LISTEN, announce)...)
	if f.Setsockopt {
		socketcall = append(socketcall, when(sys.SYS_SOCKETCALL_SETSOCKOPT, announce)...)
	}
	socketcall = append(socketcall, allow)

	program := []bpf.Instruction{bpf.LoadAbsolute{Off: sys.SeccompOffsetArch, Size: 4}}
	for _, abi := range abis {
		calls := []bpf.Instruction{bpf.LoadAbsolute{Off: sys.SeccompOffsetNr, Size: 4}}
		for _, nr := range abi.Bind {
			calls = append(calls, when(nr, bind)...)
		}
		for _, nr := range abi.Listen {
			calls = append(calls, when(nr, announce)...)
		}
		if f.Setsockopt {
			for _, nr := range abi.Setsockopt {
				calls = append(calls, when(nr, announce)...)
			}
		}
		if abi.Socketcall != 0 {
			calls = append(calls, when(abi.Socketcall, socketcall)...)
		}
		program = append(program, when(abi.Arch, append(calls, allow))...)
	}
	return append(program, allow)
}

// when runs then, which ends in a return, if the accumulator holds value.
func when(value uint32, then []bpf.Instruction) []bpf.Instruction {
	return append([]bpf.Instruction{bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: value, SkipTrue: uint8(len(then))}}, then...)
}
