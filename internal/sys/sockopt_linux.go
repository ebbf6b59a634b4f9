package sys

import (
	"os"
	"runtime"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// SocketProtocol returns the name of the protocol of the socket that a link under /proc/PID/fd leads to (sockfs_xattr_get, net/socket.c).
func SocketProtocol(link string) (string, error) {
	buf := make([]byte, 64)
	n, err := retry(func() (int, error) { return unix.Getxattr(link, "system.sockprotoname", buf) })
	if err != nil {
		return "", os.NewSyscallError("getxattr system.sockprotoname", err)
	}
	return unix.ByteSliceToString(buf[:n]), nil
}

// SetNonblock sets or clears O_NONBLOCK, which all descriptors of the file share.
func SetNonblock(f *os.File, on bool) error {
	return control(f, func(fd int) error { return os.NewSyscallError("fcntl O_NONBLOCK", unix.SetNonblock(fd, on)) })
}

// StatDev turns a device number as the kernel prints it into that of stat(2).
func StatDev(dev uint64) uint64 {
	const minorBits = 20 // MINORBITS, include/linux/kdev_t.h
	return unix.Mkdev(uint32(dev>>minorBits), uint32(dev&(1<<minorBits-1)))
}

// AttachReuseportClassic makes a classic BPF program choose the listener of the socket's reuseport group, by its index.
func AttachReuseportClassic(sock *os.File, program []bpf.RawInstruction) error {
	prog, insns := sockFprog(program)
	err := control(sock, func(fd int) error {
		return os.NewSyscallError("setsockopt SO_ATTACH_REUSEPORT_CBPF", unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_CBPF, prog))
	})
	runtime.KeepAlive(insns)
	return err
}

// AttachReuseportExtended makes an eBPF program choose the listener of the socket's reuseport group.
func AttachReuseportExtended(sock *os.File, program int) error {
	return control(sock, func(fd int) error {
		return os.NewSyscallError("setsockopt SO_ATTACH_REUSEPORT_EBPF", unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_EBPF, program))
	})
}

// WaitGracePeriod returns when no CPU is any longer within a stretch of kernel code that was under way when it was called:
// a BPF program for one (synchronize_rcu in MEMBARRIER_CMD_GLOBAL). It takes some milliseconds, and can't be had with nohz_full.
func WaitGracePeriod() error {
	const membarrierGlobal = 1 // MEMBARRIER_CMD_GLOBAL
	_, err := retry(func() (int, error) {
		_, _, errno := unix.Syscall(unix.SYS_MEMBARRIER, membarrierGlobal, 0, 0)
		return 0, errnoErr(errno)
	})
	return os.NewSyscallError("membarrier", err)
}

// CutQueue resets the connections that wait on a listener, as closing it would, and leaves the listener non-blocking.
func CutQueue(sock *os.File) error {
	return control(sock, func(fd int) error {
		if err := unix.SetNonblock(fd, true); err != nil {
			return os.NewSyscallError("fcntl O_NONBLOCK", err)
		}
		for {
			conn, err := retry(func() (int, error) {
				conn, _, err := unix.Accept4(fd, unix.SOCK_CLOEXEC)
				return conn, err
			})
			switch err {
			case nil:
				// A plain close would end the stream politely, and the client would take it for an answer.
				_ = unix.SetsockoptLinger(conn, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
				unix.Close(conn)
			case unix.ECONNABORTED:
			case unix.EAGAIN:
				return nil
			default:
				return os.NewSyscallError("accept4", err)
			}
		}
	})
}
