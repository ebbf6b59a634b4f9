package intercept

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// TestReturn gives errors of its own to the program, for calls that would have succeeded.
func TestReturn(t *testing.T) {
	w := watch(t, Filter{}, python(`
s = socket(AF_INET, SOCK_STREAM)
for call in (lambda: s.bind(("127.0.0.1", 0)), lambda: s.listen(3)):
	try:
		call()
		print("ok")
	except OSError as e:
		print(errno.errorcode[e.errno])
`)...)
	c := w.next(Bind)
	must(t, c.Valid())
	must(t, c.Return(syscall.EADDRINUSE))
	w.expect("EADDRINUSE")
	if err := c.Valid(); !errors.Is(err, ErrGone) {
		t.Errorf("Valid after the answer: %v", err)
	}
	if err := c.Continue(); !errors.Is(err, ErrGone) {
		t.Errorf("a second answer: %v", err)
	}
	must(t, w.next(Listen).Continue())
	w.expect("ok")
	w.end()
}

// TestOddBinds lets the kernel refuse what makes no sense, as if nobody watched.
func TestOddBinds(t *testing.T) {
	w := watch(t, Filter{}, python(`
libc = ctypes.CDLL(None, use_errno=True)
def bind(fd, addr, length):
	print("ok" if libc.bind(fd, addr, length) == 0 else errno.errorcode[ctypes.get_errno()])
s = socket(AF_INET, SOCK_STREAM)
bind(s.fileno(), None, 16)
bind(s.fileno(), ctypes.c_void_p(0xffffffffffff0000), 16)
bind(-1, b"\x02\0" + bytes(14), 16)
bind(0, b"\x02\0" + bytes(14), 16)
bind(s.fileno(), b"\x0a\0" + bytes(26), 28)            # AF_INET6 on an AF_INET socket
bind(s.fileno(), b"\xff\xff" + bytes(14), 16)
bind(s.fileno(), b"\x02\0" + bytes(14), 15)             # too short: not announced
bind(s.fileno(), b"\x02\0" + bytes(14), -1)             # not announced
u = socket(AF_UNIX, SOCK_STREAM)
bind(u.fileno(), b"\x01\0\0berth-test-" + str(os.getpid()).encode() + bytes(4), 28)
n = socket(AF_NETLINK, SOCK_RAW, 0)
bind(n.fileno(), b"\x10\0" + bytes(10), 12)             # not announced
bind(s.fileno(), b"\0\0" + bytes(14), 16)               # AF_UNSPEC
`)...)
	for _, want := range []struct {
		errno  string
		hidden bool // not announced
		addr   string
		family int
		unread bool
	}{
		{errno: "EFAULT", unread: true},
		{errno: "EFAULT", unread: true},
		{errno: "EBADF", addr: "0.0.0.0:0", family: afInet},
		{errno: "ENOTSOCK", addr: "0.0.0.0:0", family: afInet},
		{errno: "EAFNOSUPPORT", addr: "[::]:0", family: afInet6},
		{errno: "EAFNOSUPPORT", family: 0xffff},
		{errno: "EINVAL", hidden: true},
		{errno: "EINVAL", hidden: true},
		{errno: "ok", family: 1},
		{errno: "ok", hidden: true},
		{errno: "ok", addr: "0.0.0.0:0"},
	} {
		if !want.hidden {
			c := w.next(Bind)
			addr := netip.AddrPort{}
			if want.addr != "" {
				addr = netip.MustParseAddrPort(want.addr)
			}
			if c.Addr != addr || c.Family != want.family || want.unread != (c.Err != nil) {
				t.Errorf("%+v, not %+v", c, want)
			}
			if want.errno == "EBADF" || want.errno == "ENOTSOCK" {
				_, err := c.Inode()
				if err == nil || errors.Is(err, ErrGone) {
					t.Errorf("Inode of no socket: %v", err)
				}
				if err := c.Replace(plain(t)); err == nil {
					t.Error("Replace of no socket works")
				}
			}
			must(t, c.Continue())
		}
		w.expect(want.errno)
	}
	w.end()
}

func TestSetsockopt(t *testing.T) {
	w := watch(t, Filter{Setsockopt: true}, python(`
s = socket(AF_INET, SOCK_STREAM)
s.setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1)
s.setsockopt(IPPROTO_TCP, TCP_CONGESTION, b"reno")
try:
	s.setsockopt(SOL_SOCKET, 9999, bytes(300))
except OSError as e:
	print(errno.errorcode[e.errno])
`)...)
	c := w.next(Setsockopt)
	if c.Level != syscall.SOL_SOCKET || c.Name != syscall.SO_KEEPALIVE || hex.EncodeToString(c.Value) != "01000000" {
		t.Errorf("%+v", c)
	}
	must(t, c.Continue())
	c = w.next(Setsockopt)
	if c.Level != syscall.IPPROTO_TCP || string(c.Value) != "reno" {
		t.Errorf("%+v", c)
	}
	must(t, c.Continue())
	c = w.next(Setsockopt)
	if c.Value != nil || c.Err == nil {
		t.Errorf("a value of 300 bytes: %+v", c)
	}
	must(t, c.Continue())
	w.expect("ENOPROTOOPT")
	w.end()
}

// TestThreads has threads bind all at once; their answers come in another order.
func TestThreads(t *testing.T) {
	const threads = 16
	w := watch(t, Filter{}, python(`
barrier = threading.Barrier(int(sys.argv[1]))
def run(i):
	s = socket(AF_INET, SOCK_STREAM)
	barrier.wait()
	try:
		s.bind(("127.0.0.%d" % (i + 1), 0))
		os.write(1, b"ok\n")
	except OSError as e:
		os.write(1, b"%d: %d\n" % (i, e.errno))
ts = [threading.Thread(target=run, args=(i,)) for i in range(int(sys.argv[1]))]
[t.start() for t in ts]
[t.join() for t in ts]
`, threads)...)
	var calls []*Call
	seen := map[string]bool{}
	for range threads {
		c := w.next(Bind)
		seen[fmt.Sprint(c.Addr, c.TID)] = true
		seen[fmt.Sprint(c.TID)] = true
		calls = append(calls, c)
	}
	if len(seen) != 2*threads {
		t.Errorf("addresses and threads: %v", seen)
	}
	var answers sync.WaitGroup
	for i := range calls {
		answers.Go(func() {
			sock, err := calls[threads-1-i].Socket()
			if err == nil {
				sock.Close()
				err = calls[threads-1-i].Continue()
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	answers.Wait()
	for range threads {
		w.expect("ok")
	}
	w.end()
}

// TestDaemon follows a program that leaves its parents behind.
func TestDaemon(t *testing.T) {
	w := watch(t, Filter{}, python(`
if os.fork() == 0:
	os.setsid()
	if os.fork() == 0:
		sys.stdin.readline()
		socket(AF_INET, SOCK_STREAM).bind(("127.0.0.1", 0))
		sys.stdin.readline()
		os._exit(0)
	os._exit(0)
os.wait()
`)...)
	if _, err := w.cmd.Process.Wait(); err != nil { // Cmd.Wait would close the daemon's stdin
		t.Fatal(err)
	}
	fmt.Fprintln(w.stdin)
	c := w.next(Bind) // not io.EOF: the daemon is there
	if c.TID == w.cmd.Process.Pid {
		t.Errorf("bound by %d, which is gone", c.TID)
	}
	must(t, c.Continue())
	fmt.Fprintln(w.stdin)
	if c, err := w.listener.Recv(); err != io.EOF {
		t.Errorf("after the daemon's end: %+v, %v", c, err)
	}
}

const bindOnce = `
print("start")
try:
	socket(AF_INET, SOCK_STREAM).bind(("127.0.0.1", 0))
	print("ok")
except OSError as e:
	print(errno.errorcode[e.errno])
`

func TestClose(t *testing.T) {
	t.Run("while a call waits for its answer", func(t *testing.T) {
		w := watch(t, Filter{}, python(bindOnce)...)
		c := w.next(Bind)
		must(t, w.listener.Close())
		w.expect("start")
		w.expect("ENOSYS")
		if err := c.Continue(); err == nil {
			t.Error("Continue works after Close")
		}
		if _, err := w.listener.Recv(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("Recv after Close: %v", err)
		}
		if err := w.listener.Close(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("the second Close: %v", err)
		}
		must(t, w.cmd.Wait())
	})
	t.Run("while two wait for a call", func(t *testing.T) {
		w := watch(t, Filter{}, python("sys.stdin.readline()")...)
		errs := make(chan error)
		for range 2 {
			go func() {
				_, err := w.listener.Recv()
				errs <- err
			}()
		}
		// Both are in Recv, or are about to call it: either must end.
		runtime.Gosched()
		must(t, w.listener.Close())
		for range 2 {
			if err := <-errs; !errors.Is(err, os.ErrClosed) {
				t.Errorf("Recv: %v", err)
			}
		}
	})
	t.Run("a descriptor of another kind", func(t *testing.T) {
		r, w, err := os.Pipe()
		must(t, err)
		defer w.Close()
		w.WriteString("x")
		l := NewListener(r)
		if _, err := l.Recv(); !errors.Is(err, syscall.ENOTTY) {
			t.Errorf("Recv from a pipe: %v", err)
		}
		must(t, l.Close())
	})
}

// TestKilled kills the caller while its call waits.
func TestKilled(t *testing.T) {
	t.Run("received", func(t *testing.T) {
		w := watch(t, Filter{}, python(bindOnce)...)
		c := w.next(Bind)
		must(t, w.cmd.Process.Kill())
		if c, err := w.listener.Recv(); err != io.EOF {
			t.Errorf("Recv: %+v, %v", c, err)
		}
		w.cmd.Wait()
		sock := plain(t)
		defer sock.Close()
		_, socketErr := c.Socket()
		_, inodeErr := c.Inode()
		_, protocolErr := c.Protocol()
		for what, err := range map[string]error{
			"Valid": c.Valid(), "Socket": socketErr, "Continue": c.Continue(), "Return": c.Return(0), "Replace": c.Replace(sock),
			"Inode": inodeErr, "Protocol": protocolErr,
		} {
			if !errors.Is(err, ErrGone) {
				t.Errorf("%s: %v", what, err)
			}
		}
	})
	t.Run("not yet received", func(t *testing.T) {
		w := watch(t, Filter{}, python(bindOnce)...)
		w.expect("start")
		// When it sleeps, it sleeps in bind.
		for state(t, w.cmd.Process.Pid) != "S" {
			runtime.Gosched()
		}
		must(t, w.cmd.Process.Kill())
		w.cmd.Wait()
		if c, err := w.listener.Recv(); err != io.EOF {
			t.Errorf("Recv: %+v, %v", c, err)
		}
	})
}

// state is the letter that ps shows for a process.
func state(t *testing.T, pid int) string {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	must(t, err)
	_, rest, _ := strings.Cut(string(stat), ") ")
	return rest[:1]
}

// TestSignals sends signals to a caller that waits for its answer: it gets them afterwards, and the call is made once.
func TestSignals(t *testing.T) {
	w := watch(t, Filter{}, python(`
got = []
signal.signal(signal.SIGUSR1, lambda *a: got.append(1))
signal.siginterrupt(signal.SIGUSR1, True)
socket(AF_INET, SOCK_STREAM).bind(("127.0.0.1", 0))
print("ok", len(got) > 0)
`)...)
	c := w.next(Bind)
	for range 100 {
		must(t, w.cmd.Process.Signal(syscall.SIGUSR1))
		must(t, c.Valid())
	}
	must(t, c.Continue())
	w.expect("ok True")
	w.end()
}

// TestNothingLeft counts descriptors after programs came and went.
func TestNothingLeft(t *testing.T) {
	run := func() {
		addr := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), freePort(t))
		w := watch(t, Filter{}, python(epollBeforeBind, addr.Port(), 9, "epoll")...)
		c := w.next(Bind)
		sock := plain(t)
		must(t, bind(sock, addr))
		must(t, c.Replace(sock))
		sock.Close()
		adopted, err := c.Socket()
		must(t, err)
		adopted.Close()
		must(t, c.Return(0))
		must(t, w.next(Listen).Continue())
		w.end()
		must(t, w.listener.Close())
	}
	run()
	before := descriptors(t)
	run()
	if after := descriptors(t); after != before {
		t.Errorf("%d descriptors, %d before", after, before)
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	return len(entries)
}

// TestNotPolled makes sure that a duplicate of a non-blocking socket does not join the runtime's poller.
func TestNotPolled(t *testing.T) {
	w := watch(t, Filter{}, python(`
s = socket(AF_INET, SOCK_STREAM)
s.setblocking(False)
s.bind(("127.0.0.1", 0))
`)...)
	c := w.next(Bind)
	sock, err := c.Socket()
	must(t, err)
	defer sock.Close()
	if err := sock.SetDeadline(time.Now()); !errors.Is(err, os.ErrNoDeadline) {
		t.Errorf("the duplicate can have a deadline (%v): it is polled", err)
	}
	if f, err := c.Flags(); !f.Nonblock {
		t.Errorf("the program's socket lost O_NONBLOCK (%v)", err)
	}
	must(t, c.Continue())
	w.end()
}
