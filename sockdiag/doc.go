// Package sockdiag asks the kernel which TCP sockets exist, in what state they are and whose they are.
//
// It speaks sock_diag(7), the interface behind ss(8). A [Filter] is compiled to the kernel's own bytecode, so a socket that
// doesn't match costs a few instructions there and nothing here; [Conn.Get] finds one connection by its four-tuple without
// walking any table. Both see the network namespace in which the [Conn] was opened, and no privilege is needed.
//
// What it doesn't tell: which process holds a socket (look for the inode in /proc/PID/fd), and socket options such as
// SO_REUSEADDR. It is for Linux; elsewhere [Open] returns [ErrUnsupported].
package sockdiag

import (
	"errors"
	"fmt"
)

// ErrUnsupported is returned where the system has no sock_diag.
var ErrUnsupported = fmt.Errorf("sockdiag: %w on this system", errors.ErrUnsupported)

// ErrNotFound says that no socket has the ID that was asked for, or not any more.
var ErrNotFound = errors.New("no such socket")
