package intercept

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"syscall"

	"github.com/berth-net/berth/internal/sys"
)

// Errors of a [Call]'s methods.
var (
	// ErrGone means that the caller no longer waits: it was killed, or it has its answer.
	ErrGone = errors.New("the caller no longer waits for an answer")
	// ErrNotPermitted means that this process may not reach the caller's descriptors or memory.
	ErrNotPermitted = errors.New("not permitted to reach into the calling process (needs its uid and an ancestor's place, or CAP_SYS_PTRACE)")
)

// Call is a system call whose caller waits. It must be answered once, by Continue or Return; Replace alone does not answer it.
// What it says was copied from the caller's memory, which another thread may change: trust it no more than any input.
type Call struct {
	ID     uint64 // the kernel's number of the notification
	TID    int    // the calling thread, in this process's pid namespace; 0 if it isn't visible there
	Op     Op
	FD     int  // the descriptor that the caller named: it may not be open, or no socket. -1 if it could not be read
	Compat bool // a 32-bit caller on a 64-bit kernel

	Sockaddr []byte         // bind: the address as the caller gave it
	Family   int            // bind: its address family, 0 (AF_UNSPEC) also where none could be read
	Addr     netip.AddrPort // bind: not valid unless it is an Internet address. AF_UNSPEC with 0.0.0.0 counts as one, for AF_INET sockets take it so
	ScopeID  uint32         // bind: sin6_scope_id, an interface's index
	FlowInfo uint32         // bind: sin6_flowinfo

	Backlog int // listen

	Level, Name int    // setsockopt
	Value       []byte // setsockopt

	Err error // why the caller's memory could not be read, if it could not; Addr or Value is missing then

	listener *Listener
}

// Valid returns nil while the caller waits for the answer, else [ErrGone]. What was looked up by TID holds if Valid says so afterwards.
func (c *Call) Valid() error { return answer(sys.SeccompValid(c.listener.file, c.ID)) }

// Continue lets the kernel carry the call out as if it had not been intercepted. It reads the caller's memory again.
func (c *Call) Continue() error { return answer(sys.SeccompContinue(c.listener.file, c.ID)) }

// Return makes the call fail with errno, or succeed with 0.
func (c *Call) Return(errno syscall.Errno) error {
	return answer(sys.SeccompReturn(c.listener.file, c.ID, errno))
}

// answer names the error of an ioctl on the listener: ENOENT is a notification that isn't there any more, EINPROGRESS one that has its answer.
func answer(err error) error {
	if errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.EINPROGRESS) {
		return fmt.Errorf("%w: %w", ErrGone, err)
	}
	return err
}

// reach names the error of an attempt to look into the calling process.
func reach(err error) error {
	switch {
	case errors.Is(err, syscall.EPERM), errors.Is(err, syscall.EACCES), errors.Is(err, syscall.ENOSYS):
		return fmt.Errorf("%w: %w", ErrNotPermitted, err)
	case errors.Is(err, syscall.ESRCH):
		return fmt.Errorf("%w: %w", ErrGone, err)
	}
	return err
}

// lookedUp is the error of something that was looked up by TID or FD: if the caller is gone, that and nothing else, for the number may
// be another's by now.
func (c *Call) lookedUp(err error) error {
	if gone := c.Valid(); gone != nil {
		return gone
	}
	return reach(err)
}

// Socket returns a duplicate of what the caller's descriptor refers to.
func (c *Call) Socket() (*os.File, error) {
	pidfd, err := c.pidfd()
	if err != nil {
		return nil, err
	}
	defer pidfd.Close()
	return c.duplicate(pidfd, c.FD)
}

// pidfd refers to the calling thread, whose descriptors need not be those of its process; before Linux 6.9 to its process.
func (c *Call) pidfd() (*os.File, error) {
	if c.TID == 0 {
		return nil, fmt.Errorf("%w: it is in a pid namespace that is not visible here", ErrNotPermitted)
	}
	pidfd, err := sys.PidfdOpen(c.TID, sys.PIDFD_THREAD)
	if errors.Is(err, syscall.EINVAL) {
		var leader int
		if leader, err = c.leader(); err == nil {
			pidfd, err = sys.PidfdOpen(leader, 0)
		}
	}
	if err := c.lookedUp(err); err != nil {
		if pidfd != nil {
			pidfd.Close()
		}
		return nil, err
	}
	return pidfd, nil
}

// leader is the pid of the caller's process.
func (c *Call) leader() (int, error) {
	status, err := os.ReadFile(c.proc("status"))
	if err != nil {
		return 0, err
	}
	_, rest, _ := bytes.Cut(status, []byte("\nTgid:"))
	line, _, _ := bytes.Cut(rest, []byte("\n"))
	pid, err := strconv.Atoi(string(bytes.TrimSpace(line)))
	if err != nil {
		return 0, fmt.Errorf("%s: %w", c.proc("status"), err)
	}
	return pid, nil
}

// duplicate returns a duplicate of one of the caller's descriptors.
func (c *Call) duplicate(pidfd *os.File, fd int) (*os.File, error) {
	file, err := sys.PidfdGetfd(pidfd, fd)
	if err := c.lookedUp(err); err != nil {
		if file != nil {
			file.Close()
		}
		return nil, err
	}
	return file, nil
}

// proc is a path under the caller's directory in /proc.
func (c *Call) proc(name string) string { return "/proc/" + strconv.Itoa(c.TID) + "/" + name }
