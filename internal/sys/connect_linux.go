package sys

import (
	"errors"
	"io"
	"net/netip"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// A Stream is a client's TCP connection. It waits in the runtime's poller, so its deadlines work as a net.Conn's do.
//
// It does less than a net.Conn on purpose: a dial through package net starts a goroutine for each connection, asks
// for both names, and tries again by itself after EADDRNOTAVAIL, which would hide a failure from whoever counts
// failures.
type Stream struct {
	*os.File

	remote unix.Sockaddr
	target netip.AddrPort
	chosen bool // the kernel chose the source address, so the connection may have met itself
	raw    syscall.RawConn
}

// StartConnect makes a socket and begins to connect it to remote. The connection is usable when [Stream.FinishConnect]
// has returned nil. An error carries the errno and the name of the call that gave it.
func StartConnect(remote netip.AddrPort, o ConnectOptions) (*Stream, error) {
	remote = netip.AddrPortFrom(remote.Addr().Unmap(), remote.Port())
	family := INET
	if remote.Addr().Is6() {
		family = INET6
	}
	sa, err := sockaddr(family, remote)
	if err != nil {
		return nil, err
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	if err := startConnect(fd, family, sa, o); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return &Stream{
		File:   os.NewFile(uintptr(fd), remote.String()),
		remote: sa,
		target: remote,
		chosen: !o.Source.IsValid(),
	}, nil
}

func startConnect(fd, family int, remote unix.Sockaddr, o ConnectOptions) error {
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		return os.NewSyscallError("setsockopt TCP_NODELAY", err)
	}
	if o.ReceiveBuffer > 0 {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, o.ReceiveBuffer); err != nil {
			return os.NewSyscallError("setsockopt SO_RCVBUF", err)
		}
	}
	if o.Source.IsValid() {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1); err != nil {
			return os.NewSyscallError("setsockopt IP_BIND_ADDRESS_NO_PORT", err)
		}
		sa, err := sockaddr(family, netip.AddrPortFrom(o.Source, 0))
		if err != nil {
			return err
		}
		if err := unix.Bind(fd, sa); err != nil {
			return os.NewSyscallError("bind", err)
		}
	}
	if err := unix.Connect(fd, remote); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return os.NewSyscallError("connect", err)
	}
	return nil
}

// FinishConnect waits, within the stream's deadline, until the connection is made or has failed.
//
// A connection that met itself (the kernel gave it the target's own port as its source, so that both ends are this
// socket) counts as refused: nobody listens there.
func (s *Stream) FinishConnect() error {
	raw, err := s.SyscallConn()
	if err != nil {
		return err
	}
	s.raw = raw
	var failed error
	// A second connect(2) says how the first one went, in one call: 0, EALREADY, or the errno that ended it. Over
	// loopback the handshake is over before the first one returns, and nothing waits here.
	err = raw.Write(func(fd uintptr) bool {
		failed = unix.Connect(int(fd), s.remote)
		return failed != unix.EALREADY && failed != unix.EINPROGRESS
	})
	if err != nil {
		return err
	}
	if failed != nil && failed != unix.EISCONN {
		return os.NewSyscallError("connect", failed)
	}
	if s.chosen && s.metItself() {
		return os.NewSyscallError("connect to itself", unix.ECONNREFUSED)
	}
	return nil
}

func (s *Stream) metItself() bool {
	var local unix.Sockaddr
	if err := s.raw.Control(func(fd uintptr) { local, _ = unix.Getsockname(int(fd)) }); err != nil {
		return false
	}
	switch sa := local.(type) {
	case *unix.SockaddrInet4:
		return uint16(sa.Port) == s.target.Port() && netip.AddrFrom4(sa.Addr) == s.target.Addr()
	case *unix.SockaddrInet6:
		return uint16(sa.Port) == s.target.Port() && netip.AddrFrom16(sa.Addr) == s.target.Addr().WithZone("")
	}
	return false
}

// Peek copies what has arrived into p, leaves it there to be read, and never waits. It returns 0 and nil when the
// connection is open and nothing has arrived, and io.EOF when the peer has closed its side.
func (s *Stream) Peek(p []byte) (int, error) {
	var n int
	var failed error
	err := s.raw.Control(func(fd uintptr) {
		n, _, failed = unix.Recvfrom(int(fd), p, unix.MSG_PEEK|unix.MSG_DONTWAIT)
	})
	switch {
	case err != nil:
		return 0, err
	case failed == unix.EAGAIN || failed == unix.EINTR:
		return 0, nil
	case failed != nil:
		return 0, os.NewSyscallError("recvfrom", failed)
	case n == 0:
		return 0, io.EOF
	}
	return n, nil
}

// ErrnoName returns the symbol of the errno in err's chain, such as EADDRNOTAVAIL, or "" when there is none.
func ErrnoName(err error) string {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return ""
	}
	return unix.ErrnoName(errno)
}
