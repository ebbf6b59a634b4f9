package sys

import (
	"io"
	"os"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// What a seccomp filter returns (seccomp(2)).
const (
	SECCOMP_RET_ALLOW      = unix.SECCOMP_RET_ALLOW
	SECCOMP_RET_USER_NOTIF = unix.SECCOMP_RET_USER_NOTIF
)

// SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV keeps a caller whose notification was received from being interrupted by signals that don't kill (Linux 5.19).
const SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV = unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV

// SeccompData is struct seccomp_data: what a filter sees of a system call.
type SeccompData struct {
	Nr                 int32
	Arch               uint32
	InstructionPointer uint64
	Args               [6]uint64
}

// Offsets in struct seccomp_data, for a filter's loads.
const (
	SeccompOffsetNr   = uint32(unsafe.Offsetof(SeccompData{}.Nr))
	SeccompOffsetArch = uint32(unsafe.Offsetof(SeccompData{}.Arch))
)

// SeccompOffsetArg is where a filter loads the lower half of an argument; both architectures here are little-endian.
func SeccompOffsetArg(i int) uint32 { return uint32(unsafe.Offsetof(SeccompData{}.Args)) + uint32(8*i) }

// SeccompNotif is struct seccomp_notif.
type SeccompNotif struct {
	ID    uint64
	PID   uint32
	Flags uint32
	Data  SeccompData
}

// seccompNotifResp is struct seccomp_notif_resp.
type seccompNotifResp struct {
	id    uint64
	val   int64
	error int32
	flags uint32
}

// seccompNotifAddfd is struct seccomp_notif_addfd.
type seccompNotifAddfd struct {
	id         uint64
	flags      uint32
	srcfd      uint32
	newfd      uint32
	newfdFlags uint32
}

// SeccompABI is one of the conventions by which a task makes system calls on this machine.
type SeccompABI struct {
	Arch                     uint32   // AUDIT_ARCH_*
	Compat                   bool     // 32-bit
	Bind, Listen, Setsockopt []uint32 // their numbers; two where two conventions share an Arch
	Socketcall               uint32   // its number, 0 if there is none
}

// The calls of socketcall(2) (include/uapi/linux/net.h).
const (
	SYS_SOCKETCALL_BIND       = 2
	SYS_SOCKETCALL_LISTEN     = 4
	SYS_SOCKETCALL_SETSOCKOPT = 14
)

// SetNoNewPrivs sets no_new_privs on the calling thread.
func SetNoNewPrivs() error {
	return os.NewSyscallError("prctl PR_SET_NO_NEW_PRIVS", unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
}

// SeccompListen puts a filter on the calling thread and returns the descriptor on which its notifications arrive, close-on-exec.
func SeccompListen(filter []bpf.RawInstruction, flags uint) (*os.File, error) {
	prog, insns := sockFprog(filter)
	fd, err := retry(func() (int, error) {
		fd, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER,
			uintptr(flags|unix.SECCOMP_FILTER_FLAG_NEW_LISTENER), uintptr(unsafe.Pointer(prog)))
		return int(fd), errnoErr(errno)
	})
	runtime.KeepAlive(insns)
	if err != nil {
		return nil, os.NewSyscallError("seccomp", err)
	}
	// The kernel made it close-on-exec (init_listener, kernel/seccomp.c).
	return os.NewFile(uintptr(fd), "seccomp"), nil
}

// SeccompPollable takes a notification descriptor and returns one that waits in the runtime's poller, not on a thread of its own.
func SeccompPollable(f *os.File) (*os.File, error) {
	dup := -1
	err := control(f, func(fd int) error {
		var err error
		if dup, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0); err != nil {
			return os.NewSyscallError("fcntl F_DUPFD_CLOEXEC", err)
		}
		// The flag changes nothing for NOTIF_RECV, which blocks regardless; os.NewFile goes by it.
		return os.NewSyscallError("fcntl O_NONBLOCK", unix.SetNonblock(dup, true))
	})
	f.Close()
	if err != nil {
		if dup >= 0 {
			unix.Close(dup)
		}
		return nil, err
	}
	return os.NewFile(uintptr(dup), f.Name()), nil
}

// SeccompReceive waits for a notification; io.EOF if no task uses the filter any more. f comes from SeccompPollable.
// Only one may receive at a time: the poll says that a notification is there, and NOTIF_RECV blocks, deaf to Close, if another took it.
func SeccompReceive(f *os.File, n *SeccompNotif) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	err = raw.Read(func(fd uintptr) (done bool) {
		for {
			poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			if _, inner = retry(func() (int, error) { return unix.Poll(poll, 0) }); inner != nil {
				inner = os.NewSyscallError("poll", inner)
				return true
			}
			switch {
			case poll[0].Revents&unix.POLLIN != 0:
				*n = SeccompNotif{} // the kernel wants it zero
				switch errno := ioctl(int(fd), unix.SECCOMP_IOCTL_NOTIF_RECV, unsafe.Pointer(n)); errno {
				case 0:
					return true
				case unix.EINTR, unix.ENOENT: // ENOENT: the caller was killed in between
				default:
					inner = os.NewSyscallError("ioctl SECCOMP_IOCTL_NOTIF_RECV", errno)
					return true
				}
			case poll[0].Revents&unix.POLLHUP != 0:
				inner = io.EOF
				return true
			case poll[0].Revents&unix.POLLNVAL != 0:
				inner = os.NewSyscallError("poll", unix.EBADF)
				return true
			case poll[0].Revents&unix.POLLERR != 0: // a signal came while the kernel waited for its lock
			default:
				return false
			}
		}
	})
	if err != nil {
		return err
	}
	return inner
}

// SeccompValid returns ENOENT unless the caller of notification id waits for its answer.
func SeccompValid(f *os.File, id uint64) error {
	return notifIoctl(f, "NOTIF_ID_VALID", unix.SECCOMP_IOCTL_NOTIF_ID_VALID, unsafe.Pointer(&id))
}

// SeccompContinue lets the call of notification id go on.
func SeccompContinue(f *os.File, id uint64) error {
	resp := seccompNotifResp{id: id, flags: unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE}
	return notifIoctl(f, "NOTIF_SEND", unix.SECCOMP_IOCTL_NOTIF_SEND, unsafe.Pointer(&resp))
}

// SeccompReturn makes the call of notification id return 0, or fail with errno.
func SeccompReturn(f *os.File, id uint64, errno syscall.Errno) error {
	resp := seccompNotifResp{id: id, error: -int32(errno)}
	return notifIoctl(f, "NOTIF_SEND", unix.SECCOMP_IOCTL_NOTIF_SEND, unsafe.Pointer(&resp))
}

// SeccompPlace puts file at descriptor fd of the caller of notification id, over what is there.
func SeccompPlace(f *os.File, id uint64, file *os.File, fd int, cloexec bool) error {
	return control(file, func(src int) error {
		add := seccompNotifAddfd{id: id, flags: unix.SECCOMP_ADDFD_FLAG_SETFD, srcfd: uint32(src), newfd: uint32(fd)}
		if cloexec {
			add.newfdFlags = unix.O_CLOEXEC
		}
		return notifIoctl(f, "NOTIF_ADDFD", unix.SECCOMP_IOCTL_NOTIF_ADDFD, unsafe.Pointer(&add))
	})
}

func notifIoctl(f *os.File, name string, request uint, arg unsafe.Pointer) error {
	return control(f, func(fd int) error {
		for {
			// ADDFD waits for the caller to take the descriptor; interrupted, the kernel withdraws it, so that it can be tried again.
			switch errno := ioctl(fd, request, arg); errno {
			case 0:
				return nil
			case unix.EINTR:
			default:
				return os.NewSyscallError("ioctl SECCOMP_IOCTL_"+name, errno)
			}
		}
	})
}

func ioctl(fd int, request uint, arg unsafe.Pointer) syscall.Errno {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), uintptr(arg))
	return errno
}

// sockFprog is a classic BPF program as the kernel takes it. The second result must stay alive until the kernel has read it.
func sockFprog(program []bpf.RawInstruction) (*unix.SockFprog, []unix.SockFilter) {
	insns := make([]unix.SockFilter, len(program))
	for i, in := range program {
		insns[i] = unix.SockFilter{Code: in.Op, Jt: in.Jt, Jf: in.Jf, K: in.K}
	}
	return &unix.SockFprog{Len: uint16(len(insns)), Filter: unsafe.SliceData(insns)}, insns
}

// errnoErr turns errno 0 into nil.
func errnoErr(errno syscall.Errno) error {
	if errno == 0 {
		return nil
	}
	return errno
}
