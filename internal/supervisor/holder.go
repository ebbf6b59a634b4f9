//go:build linux

package supervisor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/berth-net/berth/internal/keeper"
	"github.com/berth-net/berth/sockdiag"
)

// HintError is an error with what to do about it.
type HintError struct {
	Err  error
	Text string
}

func (e *HintError) Error() string { return e.Err.Error() }

// Unwrap is the error without the hint.
func (e *HintError) Unwrap() error { return e.Err }

// Hint is what to do.
func (e *HintError) Hint() string { return e.Text }

// explainHold says why an address could not be opened.
func (s *Supervisor) explainHold(form keeper.Form, err error) error {
	hint := ""
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return &HintError{fmt.Errorf("%w%s", err, s.holder(form)), "stop the other program, or choose another port"}
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		hint = "no interface of this machine has that address; `ip addr` lists those that there are"
	case errors.Is(err, syscall.EACCES):
		hint = fmt.Sprintf("port %d needs the right CAP_NET_BIND_SERVICE: run berth as root, or lower net.ipv4.ip_unprivileged_port_start", form.Addr.Port())
	default:
		return err
	}
	return &HintError{err, hint}
}

// holder names who listens on an address: ": by python3 (pid 4711)". It is empty if nobody can be seen there.
func (s *Supervisor) holder(form keeper.Form) string {
	filter := sockdiag.Filter{States: sockdiag.In(sockdiag.Listen), LocalPorts: []uint16{form.Addr.Port()}}
	for sock, err := range s.diag.Sockets(filter) {
		if err != nil {
			break
		}
		held := keeper.Form{Addr: sock.Local, V6Only: sock.V6Only}
		if !held.Overlaps(form) || s.ours(uint64(sock.Inode)) {
			continue
		}
		if pid := owner(uint64(sock.Inode)); pid != 0 {
			name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
			return fmt.Sprintf(": %s (pid %d) listens on %s", strings.TrimSpace(string(name)), pid, held)
		}
		return fmt.Sprintf(": a program of uid %d listens on %s", sock.UID, held)
	}
	return ""
}

func (s *Supervisor) ours(inode uint64) bool {
	for _, l := range s.listeners {
		if l.Inode == inode {
			return true
		}
	}
	return false
}

// owner is a process that has a socket open, or 0.
func owner(inode uint64) int {
	want := fmt.Sprintf("socket:[%d]", inode)
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, fd := range fds {
		if target, err := os.Readlink(fd); err == nil && target == want {
			pid, _ := strconv.Atoi(strings.Split(fd, "/")[2])
			return pid
		}
	}
	return 0
}
