package sys

import (
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Traffic is what a connection's descriptor tells of it.
type Traffic struct {
	TCPInfo
	Unread int // bytes received that the program hasn't read (SIOCINQ)
	Unsent int // bytes written that TCP hasn't sent yet (SIOCOUTQNSD)
}

// TrafficOf reads how a TCP connection stands.
func TrafficOf(conn *os.File) (Traffic, error) {
	var t Traffic
	err := control(conn, func(fd int) error {
		var err error
		if t.TCPInfo, err = tcpInfo(fd); err != nil {
			return err
		}
		if t.Unread, err = unix.IoctlGetInt(fd, unix.SIOCINQ); err != nil {
			return os.NewSyscallError("ioctl SIOCINQ", err)
		}
		if t.Unsent, err = unix.IoctlGetInt(fd, unix.SIOCOUTQNSD); err != nil {
			return os.NewSyscallError("ioctl SIOCOUTQNSD", err)
		}
		return nil
	})
	return t, err
}

// SocketCookie is the kernel's name for a socket, never used twice (SO_COOKIE).
func SocketCookie(sock *os.File) (uint64, error) {
	var cookie uint64
	err := control(sock, func(fd int) error {
		var err error
		cookie, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
		return os.NewSyscallError("getsockopt SO_COOKIE", err)
	})
	return cookie, err
}

// ShutdownRead makes whoever reads from the connection see its end. What arrives later is still delivered.
func ShutdownRead(conn *os.File) error {
	return control(conn, func(fd int) error {
		return os.NewSyscallError("shutdown", unix.Shutdown(fd, unix.SHUT_RD))
	})
}

// Monotonic is CLOCK_MONOTONIC, the clock of bpf_ktime_get_ns.
func Monotonic() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		panic(os.NewSyscallError("clock_gettime", err)) // it can't fail: the clock exists and ts is ours
	}
	return time.Duration(ts.Nano())
}
