package intercept

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"syscall"
	"testing"

	"github.com/berth-net/berth/internal/sys"
	"golang.org/x/net/bpf"
)

// epollBeforeBind registers its socket, under a number of the test's choice, in two epolls before bind, and uses the registration afterwards.
const epollBeforeBind = `
addr, fd = ("127.0.0.1", int(sys.argv[1])), int(sys.argv[2])
with_epoll = sys.argv[3] == "epoll"
s = socket(AF_INET, SOCK_STREAM)
if fd != s.fileno():
	os.dup2(s.fileno(), fd)   # not inheritable: close-on-exec is clear
	s.close()
	s = socket(fileno=fd)
s.setblocking(False)
if with_epoll:
	# High numbers: the one of the socket may be any.
	e1, e2 = select.epoll(), select.epoll()
	h1, h2 = fcntl.fcntl(e1, fcntl.F_DUPFD_CLOEXEC, 500), fcntl.fcntl(e2, fcntl.F_DUPFD_CLOEXEC, 500)
	e1.close(); e2.close()
	e1, e2 = select.epoll.fromfd(h1), select.epoll.fromfd(h2)
	e1.register(fd, select.EPOLLIN)
	e2.register(fd, select.EPOLLIN | select.EPOLLET)
s.bind(addr)
print("flags", bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK), fcntl.fcntl(fd, fcntl.F_GETFD))
s.listen(5)
if with_epoll:
	c = create_connection(addr)
	print("events", e1.poll(60), e2.poll(60))
	e1.modify(fd, select.EPOLLIN | select.EPOLLONESHOT)
	print("modified", e1.poll(60), e1.poll(0))
	e1.unregister(fd)
	e1.register(fd, select.EPOLLIN)
	print("registered again", e1.poll(60))
	a, _ = s.accept()
	e1.unregister(fd); e2.unregister(fd)
`

// TestReplaceEpoll uses every low number for the program's socket: some are those of the Go runtime's epoll and eventfd in this process.
func TestReplaceEpoll(t *testing.T) {
	for fd := 3; fd <= 20; fd++ {
		t.Run(fmt.Sprint(fd), func(t *testing.T) { replaceEpoll(t, fd) })
	}
	t.Run("700", func(t *testing.T) { replaceEpoll(t, 700) })
}

func replaceEpoll(t *testing.T, fd int) {
	addr := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), freePort(t))
	w := watch(t, Filter{}, python(epollBeforeBind, addr.Port(), fd, "epoll")...)
	c := w.next(Bind)
	if c.FD != fd {
		t.Fatalf("descriptor %d, not %d", c.FD, fd)
	}
	old, err := c.Socket() // held all the while: the old socket must leave the epolls nevertheless
	must(t, err)
	defer old.Close()
	sock := plain(t)
	defer sock.Close()
	must(t, bind(sock, addr))
	must(t, c.Replace(sock))
	must(t, c.Return(0))
	if fd == 3 || fd == 4 {
		w.line() // Python's own way of making the socket decides about close-on-exec
	} else {
		w.expect("flags True 0")
	}
	must(t, w.next(Listen).Continue())
	in := fmt.Sprintf("[(%d, 1)]", fd)
	w.expect("events " + in + " " + in)
	w.expect("modified " + in + " []")
	w.expect("registered again " + in)
	// The runtime's poller still works.
	echoHere(t)
	w.end()
}

// echoHere sends something through a connection of this process, which waits for it in the runtime's poller.
func echoHere(t *testing.T) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer ln.Close()
	go func() {
		conn, err := ln.Accept()
		if err == nil {
			conn.Write([]byte("hello\n"))
			conn.Close()
		}
	}()
	echo(t, ln.Addr().(*net.TCPAddr).AddrPort())
}

// TestReplaceFlags keeps O_NONBLOCK and FD_CLOEXEC, set or not, whatever the new socket has.
func TestReplaceFlags(t *testing.T) {
	for _, want := range []Flags{{}, {Nonblock: true}, {Cloexec: true}, {Nonblock: true, Cloexec: true}} {
		t.Run(fmt.Sprintf("%+v", want), func(t *testing.T) {
			addr := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), freePort(t))
			w := watch(t, Filter{}, python(`
s = socket(AF_INET, SOCK_STREAM)
s.setblocking(sys.argv[2] == "false")
s.set_inheritable(sys.argv[3] == "false")
s.bind(("127.0.0.1", int(sys.argv[1])))
print(bool(fcntl.fcntl(s, fcntl.F_GETFL) & os.O_NONBLOCK), bool(fcntl.fcntl(s, fcntl.F_GETFD)), s.getsockname()[1])
`, addr.Port(), want.Nonblock, want.Cloexec)...)
			c := w.next(Bind)
			sock := plain(t)
			defer sock.Close()
			must(t, sys.SetNonblock(sock, !want.Nonblock))
			must(t, bind(sock, addr))
			must(t, c.Replace(sock))
			if got, err := c.Flags(); got != want {
				t.Errorf("flags %+v, %v", got, err)
			}
			must(t, c.Return(0))
			w.expect(fmt.Sprintf("%s %s %d", title(want.Nonblock), title(want.Cloexec), addr.Port()))
			w.end()
		})
	}
}

// title is Python's name of a bool.
func title(b bool) string {
	if b {
		return "True"
	}
	return "False"
}

// TestWithoutPidfdGetfd answers calls on a thread where pidfd_getfd is refused, as in a container.
func TestWithoutPidfdGetfd(t *testing.T) {
	t.Run("epoll", func(t *testing.T) { withoutPidfdGetfd(t, "epoll") })
	t.Run("no epoll", func(t *testing.T) { withoutPidfdGetfd(t, "none") })
}

func withoutPidfdGetfd(t *testing.T, epoll string) {
	addr := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), freePort(t))
	w := watch(t, Filter{}, python(epollBeforeBind, addr.Port(), 9, epoll)...)
	c := w.next(Bind)
	sock := plain(t)
	defer sock.Close()
	must(t, bind(sock, addr))
	onThread(t, func() {
		if err := refuse(sysPidfdGetfd); err != nil {
			t.Error(err)
			return
		}
		if _, err := c.Socket(); !errors.Is(err, ErrNotPermitted) || !errors.Is(err, syscall.EPERM) {
			t.Errorf("Socket: %v", err)
		}
		if p, err := c.Protocol(); p != "TCP" || err != nil {
			t.Errorf("Protocol: %q, %v", p, err)
		}
		inode, err := c.Inode()
		if inode == 0 || err != nil {
			t.Errorf("Inode: %d, %v", inode, err)
		}
		if f, err := c.Flags(); f != (Flags{Nonblock: true}) || err != nil {
			t.Errorf("Flags: %+v, %v", f, err)
		}
		err = c.Replace(sock)
		after, _ := c.Inode()
		switch {
		case epoll == "epoll" && (!errors.Is(err, ErrEpoll) || after != inode):
			t.Errorf("Replace of a registered socket: %v; inode %d, before %d", err, after, inode)
		case epoll == "none" && (err != nil || after == inode):
			t.Errorf("Replace: %v; inode %d, before %d", err, after, inode)
		}
	})
	if epoll == "epoll" {
		must(t, c.Return(syscall.EACCES))
		w.cmd.Process.Kill()
		return
	}
	must(t, c.Return(0))
	w.expect("flags True 0")
	must(t, w.next(Listen).Continue())
	w.end()
}

// sysPidfdGetfd has one number everywhere.
const sysPidfdGetfd = 438

// refuse makes a system call fail with EPERM on the calling thread.
func refuse(nr uint32) error {
	filter, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadAbsolute{Off: sys.SeccompOffsetNr, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: nr, SkipTrue: 1},
		bpf.RetConstant{Val: 0x50000 | uint32(syscall.EPERM)}, // SECCOMP_RET_ERRNO
		bpf.RetConstant{Val: sys.SECCOMP_RET_ALLOW},
	})
	if err != nil {
		return err
	}
	if err := sys.SetNoNewPrivs(); err != nil {
		return err
	}
	listener, err := sys.SeccompListen(filter, 0)
	if err != nil {
		return err
	}
	return listener.Close()
}

func TestParseRegistration(t *testing.T) {
	r, ok, err := parseRegistration("tfd:       11 events: 8000201d data: 7f001122aabbccdd  pos:0 ino:1f2e sdev:8\n")
	if want := (registration{fd: 11, events: 0x8000201d, data: 0x7f001122aabbccdd, ino: 0x1f2e, dev: 8}); !ok || err != nil || r != want {
		t.Errorf("%+v, %v, %v", r, ok, err)
	}
	for _, line := range []string{"", "pos:\t0\n", "flags:\t02000002\n", "mnt_id:\t15\n"} {
		if _, ok, err := parseRegistration(line); ok || err != nil {
			t.Errorf("%q: %v, %v", line, ok, err)
		}
	}
	if _, _, err := parseRegistration("tfd: eleven\n"); err == nil {
		t.Error("a line that makes no sense passes")
	}
}

func FuzzParseRegistration(f *testing.F) {
	f.Add("tfd:       11 events:       19 data:               11  pos:0 ino:1f2e sdev:8\n")
	f.Add("tfd:\n")
	f.Fuzz(func(t *testing.T, line string) {
		if _, ok, err := parseRegistration(line); ok && err != nil {
			t.Error("both a registration and an error")
		}
	})
}

// TestEpollData keeps the 64 bits of data that a program gave with a registration.
func TestEpollData(t *testing.T) {
	addr := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), freePort(t))
	w := watch(t, Filter{}, python(`
libc = ctypes.CDLL(None)
s = socket(AF_INET, SOCK_STREAM)
e = libc.epoll_create1(0)
packed = sys.argv[2] == "amd64"   # struct epoll_event is packed there
layout = "=IQ" if packed else "=IxxxxQ"
event = ctypes.create_string_buffer(struct.pack(layout, select.EPOLLIN, 0x1122334455667788), 16)
libc.epoll_ctl(e, 1, s.fileno(), event)
s.bind(("127.0.0.1", int(sys.argv[1])))
s.listen(1)
c = create_connection(("127.0.0.1", int(sys.argv[1])))
got = ctypes.create_string_buffer(16)
print(libc.epoll_wait(e, got, 1, 60000), "%x" % struct.unpack(layout, got.raw[:struct.calcsize(layout)])[1])
`, addr.Port(), runtime.GOARCH)...)
	c := w.next(Bind)
	sock := plain(t)
	defer sock.Close()
	must(t, bind(sock, addr))
	must(t, c.Replace(sock))
	must(t, c.Return(0))
	must(t, w.next(Listen).Continue())
	w.expect("1 1122334455667788")
	w.end()
}

// TestSockaddrKept compares the bytes that a Call has with those of the program.
func TestSockaddrKept(t *testing.T) {
	w := watch(t, Filter{}, python(`
s = socket(AF_INET6, SOCK_STREAM)
try:
	s.bind(("fe80::1234", 4321, 77, 3))
except OSError as e:
	print(errno.errorcode[e.errno])
`)...)
	c := w.next(Bind)
	if c.Addr != netip.MustParseAddrPort("[fe80::1234]:4321") || c.ScopeID != 3 || c.FlowInfo != 77 || c.Family != afInet6 ||
		len(c.Sockaddr) != 28 || binary.BigEndian.Uint16(c.Sockaddr[2:]) != 4321 {
		t.Errorf("%+v", c)
	}
	must(t, c.Return(syscall.EADDRNOTAVAIL))
	w.expect("EADDRNOTAVAIL")
	w.end()
}
