package sys

import (
	"net/netip"
)

// ConnectOptions are what a TCP connection is given before it is made. The zero value gives it nothing.
type ConnectOptions struct {
	// Source is the local address to connect from; the kernel chooses when it is not valid. Its port is
	// chosen at connect(2), not at bind(2), so the range of ephemeral ports counts once for each four-tuple
	// and not once for each source address.
	Source netip.Addr

	// ReceiveBuffer is SO_RCVBUF in bytes; 0 leaves it to the kernel.
	ReceiveBuffer int
}
