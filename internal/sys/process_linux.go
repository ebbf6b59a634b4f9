package sys

import (
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// BecomeSubreaper makes orphaned descendants children of this process.
func BecomeSubreaper() error {
	return os.NewSyscallError("prctl PR_SET_CHILD_SUBREAPER", unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
}

// Reap takes one ended child, whichever; pid 0 if none has ended.
func Reap() (pid int, status syscall.WaitStatus, err error) {
	for {
		pid, err = syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
		if err != syscall.EINTR {
			break
		}
	}
	if err == syscall.ECHILD {
		return 0, 0, nil
	}
	return pid, status, os.NewSyscallError("wait4", err)
}

// Kill signals a process, or with a negative pid a process group. A target that is gone is no error.
func Kill(pid int, sig syscall.Signal) error {
	if err := syscall.Kill(pid, sig); err != nil && err != syscall.ESRCH {
		return os.NewSyscallError("kill", err)
	}
	return nil
}

// LockFile takes an exclusive lock that ends with the file, or reports that another holds it.
func LockFile(f *os.File) (bool, error) {
	err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == unix.EWOULDBLOCK {
		return false, nil
	}
	return err == nil, os.NewSyscallError("flock", err)
}

// KernelRelease is what uname -r prints.
func KernelRelease() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}

// PlaceListenFDs puts the files at descriptors 3 and up, open across exec, as LISTEN_FDS wants them. The file keep,
// which may be in their way, moves above them and stays close-on-exec.
func PlaceListenFDs(keep *os.File, files []*os.File) (*os.File, error) {
	const first = 3
	above := first + len(files)
	move := func(f *os.File) (int, error) {
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, above)
		return fd, os.NewSyscallError("fcntl F_DUPFD_CLOEXEC", err)
	}
	kept, err := move(keep)
	if err != nil {
		return keep, err
	}
	moved := make([]int, len(files))
	for i, f := range files {
		if moved[i], err = move(f); err != nil {
			return keep, err
		}
	}
	for i, fd := range moved {
		if err := unix.Dup3(fd, first+i, 0); err != nil {
			return keep, os.NewSyscallError("dup3", err)
		}
		unix.Close(fd)
	}
	return os.NewFile(uintptr(kept), keep.Name()), nil
}

// SignalNumber is the signal of a name such as "SIGTERM", or 0.
func SignalNumber(name string) syscall.Signal { return unix.SignalNum(name) }

// HasIPv6 reports whether IPv6 sockets can be made.
func HasIPv6() bool {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		unix.Close(fd)
	}
	return err == nil
}
