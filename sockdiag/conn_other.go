//go:build !linux

package sockdiag

import "iter"

// A Conn answers queries, on Linux.
type Conn struct{}

// Open returns ErrUnsupported.
func Open() (*Conn, error) { return nil, ErrUnsupported }

// Close does nothing.
func (*Conn) Close() error { return nil }

// Sockets yields ErrUnsupported.
func (*Conn) Sockets(Filter) iter.Seq2[Socket, error] {
	return func(yield func(Socket, error) bool) { yield(Socket{}, ErrUnsupported) }
}

// Get returns ErrUnsupported.
func (*Conn) Get(ID) (Socket, error) { return Socket{}, ErrUnsupported }
