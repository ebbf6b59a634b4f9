package sys

import (
	"os"

	"golang.org/x/sys/unix"
)

// PIDFD_THREAD makes PidfdOpen refer to one thread rather than to its thread group (Linux 6.9).
const PIDFD_THREAD = unix.PIDFD_THREAD

// PidfdOpen returns a descriptor that refers to the process pid, or to the thread pid with PIDFD_THREAD.
func PidfdOpen(pid int, flags int) (*os.File, error) {
	fd, err := retry(func() (int, error) { return unix.PidfdOpen(pid, flags) })
	if err != nil {
		return nil, os.NewSyscallError("pidfd_open", err)
	}
	return os.NewFile(uintptr(fd), "pidfd"), nil
}

// PidfdGetfd duplicates descriptor fd of the process behind pidfd. It needs the right to attach to that process with ptrace.
// The duplicate is close-on-exec and stays out of the runtime's poller (see [NewFile]).
func PidfdGetfd(pidfd *os.File, fd int) (*os.File, error) {
	dup := -1
	err := control(pidfd, func(pidfd int) error {
		var err error
		dup, err = retry(func() (int, error) { return unix.PidfdGetfd(pidfd, fd, 0) })
		return os.NewSyscallError("pidfd_getfd", err)
	})
	if err != nil {
		return nil, err
	}
	return NewFile(dup, "pidfd_getfd")
}

// NewFile wraps fd in an os.File that never joins the runtime's poller. os.NewFile adds every descriptor with O_NONBLOCK to it; for a
// duplicate of another program's socket that would wake this process for each of that program's connections. On failure fd is closed.
func NewFile(fd int, name string) (*os.File, error) {
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("fcntl", err)
	}
	if flags&unix.O_NONBLOCK == 0 {
		return os.NewFile(uintptr(fd), name), nil
	}
	// O_NONBLOCK is shared with the other program, so it must not change here, not even for a moment. os.NewFile sees a
	// blocking descriptor first, then the socket takes its place.
	blocking, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("eventfd2", err)
	}
	f := os.NewFile(uintptr(blocking), name)
	_, err = retry(func() (int, error) { return 0, unix.Dup3(fd, blocking, unix.O_CLOEXEC) })
	unix.Close(fd)
	if err != nil {
		f.Close()
		return nil, os.NewSyscallError("dup3", err)
	}
	return f, nil
}

// retry repeats a system call that a signal interrupted.
func retry(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if err != unix.EINTR {
			return n, err
		}
	}
}
