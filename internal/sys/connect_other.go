//go:build !linux

package sys

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
)

var errConnect = fmt.Errorf("connecting from a chosen source address needs Linux: %w", errors.ErrUnsupported)

// A Stream is a client's TCP connection. It can only be made on Linux.
type Stream struct{ *os.File }

// StartConnect returns an error that is errors.ErrUnsupported.
func StartConnect(netip.AddrPort, ConnectOptions) (*Stream, error) { return nil, errConnect }

// FinishConnect returns an error that is errors.ErrUnsupported.
func (*Stream) FinishConnect() error { return errConnect }

// Peek returns an error that is errors.ErrUnsupported.
func (*Stream) Peek([]byte) (int, error) { return 0, errConnect }

// ErrnoName returns "".
func ErrnoName(error) string { return "" }
