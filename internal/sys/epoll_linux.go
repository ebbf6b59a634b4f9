package sys

import (
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// EpollMove gives the registration that the file old has in an epoll, under the descriptor number fd, to the file sock: under the same
// number, for the kernel knows a registration by file and number, and the program that made it will use that number to change it.
// The number may mean something else in this process; sock needn't be open under it.
//
// It works on a thread with a descriptor table of its own, which ends soon afterwards; until then what this process closes is still
// held by that table. fd must be below this process's RLIMIT_NOFILE.
func EpollMove(epoll, old, sock *os.File, fd int, events uint32, data uint64) error {
	return control(epoll, func(epoll int) error {
		return control(old, func(old int) error {
			return control(sock, func(sock int) error {
				m := &epollMove{epoll: epoll, old: old, sock: sock, fd: fd}
				m.event = unix.EpollEvent{Events: events, Fd: int32(uint32(data)), Pad: int32(uint32(data >> 32))}
				for i := range m.all.Val {
					m.all.Val[i] = ^m.all.Val[i]
				}
				onDyingThread(m.run)
				return m.err()
			})
		})
	})
}

// onDyingThread runs f on a thread that ends right after.
func onDyingThread(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if unix.Gettid() != unix.Getpid() {
			f()
			return
		}
		// The runtime can't end the main thread, it would park it for good with the second table. While it is locked here,
		// another goroutine runs on another thread.
		onDyingThread(f)
		runtime.UnlockOSThread()
	}()
	<-done
}

// epollMove is one EpollMove. All that the system calls point to is in it, so that run allocates nothing.
type epollMove struct {
	epoll, old, sock, fd int
	event                unix.EpollEvent
	all, mask            unix.Sigset_t

	trap  uintptr // the call that failed
	errno unix.Errno
}

// err is what run came to.
func (m *epollMove) err() error {
	names := map[uintptr]string{unix.SYS_UNSHARE: "unshare", unix.SYS_FCNTL: "fcntl F_DUPFD_CLOEXEC", unix.SYS_DUP3: "dup3", unix.SYS_EPOLL_CTL: "epoll_ctl"}
	return os.NewSyscallError(names[m.trap], errnoErr(m.errno))
}

// run does the work. The number fd may be the runtime's own epoll here, or the eventfd that wakes it: so the runtime must not run on this
// thread between unshare and the end. No signal, hence no preemption; nosplit, hence no scheduling point; raw system calls only;
// and the table is as it was when run returns.
//
//go:nosplit
//go:norace
//go:noinline
func (m *epollMove) run() {
	const sigsetSize = 8 // of the kernel's sigset_t
	unix.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&m.all)), uintptr(unsafe.Pointer(&m.mask)), sigsetSize, 0, 0)
	m.do(unix.SYS_UNSHARE, unix.CLONE_FILES, 0, 0, 0)
	m.move()
	unix.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&m.mask)), 0, sigsetSize, 0, 0)
}

//go:nosplit
//go:norace
//go:noinline
func (m *epollMove) move() {
	fd := uintptr(m.fd)
	before := m.do(unix.SYS_FCNTL, fd, unix.F_DUPFD_CLOEXEC, fd+1, 0)
	free := m.errno == unix.EBADF // the number means nothing in this process
	if free {
		m.errno = 0
	}
	// Copies above fd, for each of the three may be the one that is overwritten.
	epoll := m.do(unix.SYS_FCNTL, uintptr(m.epoll), unix.F_DUPFD_CLOEXEC, fd+1, 0)
	old := m.do(unix.SYS_FCNTL, uintptr(m.old), unix.F_DUPFD_CLOEXEC, fd+1, 0)
	sock := m.do(unix.SYS_FCNTL, uintptr(m.sock), unix.F_DUPFD_CLOEXEC, fd+1, 0)
	if m.errno != 0 {
		return // the thread ends, and its table with it
	}
	m.do(unix.SYS_DUP3, old, fd, unix.O_CLOEXEC, 0)
	if m.errno == 0 {
		// By itself the old socket leaves the epoll only when its last descriptor is closed; ENOENT if it has left.
		unix.RawSyscall6(unix.SYS_EPOLL_CTL, epoll, unix.EPOLL_CTL_DEL, fd, 0, 0, 0)
	}
	m.do(unix.SYS_DUP3, sock, fd, unix.O_CLOEXEC, 0)
	m.do(unix.SYS_EPOLL_CTL, epoll, unix.EPOLL_CTL_ADD, fd, uintptr(unsafe.Pointer(&m.event)))
	if free {
		unix.RawSyscall(unix.SYS_CLOSE, fd, 0, 0)
	} else {
		unix.RawSyscall(unix.SYS_DUP3, before, fd, unix.O_CLOEXEC)
		unix.RawSyscall(unix.SYS_CLOSE, before, 0, 0)
	}
	unix.RawSyscall(unix.SYS_CLOSE, epoll, 0, 0)
	unix.RawSyscall(unix.SYS_CLOSE, old, 0, 0)
	unix.RawSyscall(unix.SYS_CLOSE, sock, 0, 0)
}

// do makes a system call unless one has failed before.
//
//go:nosplit
//go:norace
//go:noinline
func (m *epollMove) do(trap, a1, a2, a3, a4 uintptr) uintptr {
	if m.errno != 0 {
		return ^uintptr(0)
	}
	m.trap = trap
	var r uintptr
	r, _, m.errno = unix.RawSyscall6(trap, a1, a2, a3, a4, 0, 0)
	return r
}
