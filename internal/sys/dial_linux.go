package sys

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// DialFrom connects to an address of this machine from a port that is known before the first segment is sent: bound is
// called with the source address between bind and connect.
func DialFrom(to netip.AddrPort, timeout time.Duration, bound func(from netip.AddrPort) error) (net.Conn, error) {
	family := unix.AF_INET
	if !to.Addr().Unmap().Is4() {
		family = unix.AF_INET6
	}
	sock, err := StreamSocket(family)
	if err != nil {
		return nil, err
	}
	defer sock.Close()
	// Sent to itself, an address is its own source.
	if err := Bind(sock, family, netip.AddrPortFrom(to.Addr(), 0)); err != nil {
		return nil, os.NewSyscallError("bind", err)
	}
	from, err := LocalAddr(sock)
	if err != nil {
		return nil, err
	}
	if err := bound(from); err != nil {
		return nil, err
	}
	sa, err := sockaddr(family, to)
	if err != nil {
		return nil, err
	}
	err = control(sock, func(fd int) error {
		tv := unix.NsecToTimeval(max(int64(timeout), int64(time.Millisecond)))
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv); err != nil {
			return os.NewSyscallError("setsockopt SO_SNDTIMEO", err)
		}
		err := unix.Connect(fd, sa)
		if errors.Is(err, unix.EINPROGRESS) || errors.Is(err, unix.EINTR) {
			err = os.ErrDeadlineExceeded
		}
		return os.NewSyscallError("connect", err)
	})
	if err != nil {
		return nil, err
	}
	return net.FileConn(sock)
}
