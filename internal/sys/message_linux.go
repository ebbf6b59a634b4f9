package sys

import (
	"io"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// SeqpacketPair makes two connected Unix sockets that keep the bounds of messages, blocking and close-on-exec.
func SeqpacketPair() (a, b *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	return os.NewFile(uintptr(fds[0]), "seqpacket"), os.NewFile(uintptr(fds[1]), "seqpacket"), nil
}

// SendMessage sends one message with descriptors (253 at most, SCM_MAX_FD). It never raises SIGPIPE.
func SendMessage(sock *os.File, data []byte, files ...*os.File) error {
	fds := make([]int, len(files))
	raws := make([]syscall.RawConn, len(files))
	for i, f := range files {
		raw, err := f.SyscallConn()
		if err != nil {
			return err
		}
		raws[i] = raw
	}
	var send func(i int) error
	send = func(i int) error {
		if i < len(raws) {
			var inner error
			if err := raws[i].Control(func(fd uintptr) {
				fds[i] = int(fd)
				inner = send(i + 1)
			}); err != nil {
				return err
			}
			return inner
		}
		var rights []byte
		if len(fds) > 0 {
			rights = unix.UnixRights(fds...)
		}
		return control(sock, func(fd int) error {
			for {
				err := unix.Sendmsg(fd, data, rights, nil, unix.MSG_NOSIGNAL)
				if err != unix.EINTR {
					return os.NewSyscallError("sendmsg", err)
				}
			}
		})
	}
	return send(0)
}

// ReceiveMessage waits for one message and the descriptors that came with it, close-on-exec. io.EOF: the other end is closed.
func ReceiveMessage(sock *os.File, buf []byte) (n int, files []*os.File, err error) {
	oob := make([]byte, unix.CmsgSpace(253*4))
	var oobn, flags int
	err = control(sock, func(fd int) error {
		for {
			var err error
			n, oobn, flags, _, err = unix.Recvmsg(fd, buf, oob, unix.MSG_CMSG_CLOEXEC)
			if err != unix.EINTR {
				return os.NewSyscallError("recvmsg", err)
			}
		}
	})
	if err != nil {
		return 0, nil, err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return 0, nil, os.NewSyscallError("recvmsg", err)
	}
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			continue
		}
		for _, fd := range fds {
			if f, err := NewFile(fd, "received"); err == nil {
				files = append(files, f)
			}
		}
	}
	if flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		for _, f := range files {
			f.Close()
		}
		return 0, nil, os.NewSyscallError("recvmsg", unix.EMSGSIZE)
	}
	if n == 0 && len(files) == 0 {
		return 0, nil, io.EOF
	}
	return n, files, nil
}

// PeerUID is the user at the other end of a Unix connection when it connected (SO_PEERCRED, unix(7)).
func PeerUID(c syscall.Conn) (uint32, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var inner error
	if err := raw.Control(func(fd uintptr) {
		cred, inner = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if inner != nil {
		return 0, os.NewSyscallError("getsockopt SO_PEERCRED", inner)
	}
	return cred.Uid, nil
}

// PassSenders makes a Unix socket tell who sent each message (SO_PASSCRED, unix(7)).
func PassSenders(c syscall.Conn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := raw.Control(func(fd uintptr) {
		inner = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PASSCRED, 1)
	}); err != nil {
		return err
	}
	return os.NewSyscallError("setsockopt SO_PASSCRED", inner)
}

// SenderSize is the room that a message's sender takes.
var SenderSize = unix.CmsgSpace(unix.SizeofUcred)

// Sender is the process and the user that the kernel put beside a message; pid 0 if there is none. Descriptors that came along are closed.
func Sender(oob []byte) (pid, uid int) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return 0, 0
	}
	for _, m := range messages {
		if cred, err := unix.ParseUnixCredentials(&m); err == nil {
			pid, uid = int(cred.Pid), int(cred.Uid)
		}
		if fds, err := unix.ParseUnixRights(&m); err == nil {
			for _, fd := range fds {
				unix.Close(fd)
			}
		}
	}
	return pid, uid
}
