package intercept

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"

	"github.com/berth-net/berth/internal/sys"
)

// What /proc shows of the caller's descriptor, to one that may read it but not attach to it.

// Flags are the flags of a descriptor that [Call.Replace] keeps.
type Flags struct {
	Nonblock bool // O_NONBLOCK, of the open file
	Cloexec  bool // FD_CLOEXEC, of the descriptor
}

// Flags returns the flags of the caller's descriptor. It works where Socket is refused.
func (c *Call) Flags() (Flags, error) {
	name := c.proc("fdinfo/" + strconv.Itoa(c.FD))
	info, err := os.ReadFile(name)
	if err := c.lookedUp(err); err != nil {
		return Flags{}, err
	}
	for line := range strings.Lines(string(info)) {
		if octal, ok := strings.CutPrefix(line, "flags:"); ok {
			flags, err := strconv.ParseUint(strings.TrimSpace(octal), 8, 32)
			if err != nil {
				return Flags{}, fmt.Errorf("%s: %w", name, err)
			}
			return Flags{Nonblock: flags&syscall.O_NONBLOCK != 0, Cloexec: flags&syscall.O_CLOEXEC != 0}, nil
		}
	}
	return Flags{}, fmt.Errorf("%s: no flags", name)
}

// Inode returns the inode number of the caller's socket, the one that sock_diag shows. It works where Socket is refused.
func (c *Call) Inode() (uint64, error) {
	st, err := c.stat()
	if err != nil {
		return 0, err
	}
	return st.Ino, nil
}

// stat is that of the caller's socket.
func (c *Call) stat() (*syscall.Stat_t, error) {
	var st syscall.Stat_t
	name := c.proc("fd/" + strconv.Itoa(c.FD))
	err := syscall.Stat(name, &st)
	if err != nil {
		err = &os.PathError{Op: "stat", Path: name, Err: err}
	}
	if err := c.lookedUp(err); err != nil {
		return nil, err
	}
	if st.Mode&syscall.S_IFMT != syscall.S_IFSOCK {
		return nil, &os.PathError{Op: "stat", Path: name, Err: syscall.ENOTSOCK}
	}
	return &st, nil
}

// Protocol returns the kernel's name for the protocol of the caller's socket: TCP, TCPv6, MPTCP, UNIX … It works where Socket is refused.
func (c *Call) Protocol() (string, error) {
	name, err := sys.SocketProtocol(c.proc("fd/" + strconv.Itoa(c.FD)))
	return name, c.lookedUp(err)
}
