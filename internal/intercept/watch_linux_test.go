package intercept

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/berth-net/berth/internal/sys"
)

// deadline is long enough that only a hang meets it.
const deadline = 60 * time.Second

// The environment that makes the test binary something else.
const (
	shimEnv    = "BERTH_TEST_SHIM"    // what to announce: "bind" or "setsockopt"
	programEnv = "BERTH_TEST_PROGRAM" // one of programs
)

func TestMain(m *testing.M) {
	if what := os.Getenv(shimEnv); what != "" {
		fmt.Fprintln(os.Stderr, "shim:", shim(Filter{Setsockopt: what == "setsockopt"}, os.Args[1:]))
		os.Exit(1)
	}
	if name := os.Getenv(programEnv); name != "" {
		programs[name](os.Args[1:])
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// shim puts the filter on itself, hands the listener over descriptor 3 to its parent, and becomes the program.
func shim(f Filter, argv []string) error {
	runtime.LockOSThread()
	parent := os.NewFile(3, "parent")
	listener, err := f.Install()
	if err != nil {
		return err
	}
	if err := sys.SendMessage(parent, []byte{0}, listener); err != nil {
		return err
	}
	listener.Close()
	if _, _, err := sys.ReceiveMessage(parent, make([]byte, 1)); err != nil {
		return err
	}
	parent.Close()
	os.Unsetenv(shimEnv)
	if argv[0] == "self" {
		os.Setenv(programEnv, argv[1])
		return syscall.Exec(exe, argv[1:], os.Environ())
	}
	return syscall.Exec(argv[0], argv, os.Environ())
}

// watched is a program whose calls are announced.
type watched struct {
	t        *testing.T
	cmd      *exec.Cmd
	listener *Listener
	stdin    io.WriteCloser
	stdout   *bufio.Scanner
}

// self is the command for the test binary as one of programs.
func self(program string, args ...string) []string { return append([]string{"self", program}, args...) }

// exe is the test binary by way of a link that another user may follow: the directory where go test builds is root's.
const exe = "/proc/self/exe"

// watch starts a program behind the filter.
func watch(t *testing.T, f Filter, argv ...string) *watched {
	t.Helper()
	if _, err := exec.LookPath(argv[0]); err != nil && argv[0] != "self" {
		t.Skip(err)
	}
	ours, theirs, err := sys.SeqpacketPair()
	must(t, err)
	defer ours.Close()
	w := &watched{t: t, cmd: exec.Command(exe, argv...)}
	w.cmd.Dir = "/"
	what := "bind"
	if f.Setsockopt {
		what = "setsockopt"
	}
	w.cmd.Env = append(os.Environ(), shimEnv+"="+what)
	w.cmd.ExtraFiles = []*os.File{theirs}
	w.cmd.Stderr = t.Output()
	w.stdin, err = w.cmd.StdinPipe()
	must(t, err)
	stdout, err := w.cmd.StdoutPipe()
	must(t, err)
	w.stdout = bufio.NewScanner(stdout)
	must(t, w.cmd.Start())
	theirs.Close()
	t.Cleanup(func() {
		w.cmd.Process.Kill()
		w.cmd.Wait()
		if w.listener != nil {
			w.listener.Close()
		}
	})
	_, files, err := sys.ReceiveMessage(ours, make([]byte, 1))
	must(t, err)
	if len(files) != 1 {
		t.Fatalf("the shim sent %d descriptors", len(files))
	}
	w.listener = NewListener(files[0])
	must(t, sys.SendMessage(ours, []byte{0}))
	return w
}

// publicDir is a directory that every user can read.
func publicDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "berth-intercept-")
	must(t, err)
	must(t, os.Chmod(dir, 0o755))
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// next receives a call and checks which it is.
func (w *watched) next(op Op) *Call {
	w.t.Helper()
	c, err := w.listener.Recv()
	if err != nil {
		w.t.Fatalf("waiting for %v: %v", op, err)
	}
	if c.Op != op {
		w.t.Fatalf("%v was announced, not %v: %+v", c.Op, op, c)
	}
	return c
}

// line is the next line that the program prints.
func (w *watched) line() string {
	w.t.Helper()
	if !w.stdout.Scan() {
		w.t.Fatalf("the program printed nothing more (%v)", w.stdout.Err())
	}
	return w.stdout.Text()
}

func (w *watched) expect(want string) {
	w.t.Helper()
	if got := w.line(); got != want {
		w.t.Fatalf("the program printed %q, not %q", got, want)
	}
}

// end waits for the program, and for the end of all who use the filter.
func (w *watched) end() {
	w.t.Helper()
	w.stdin.Close()
	if c, err := w.listener.Recv(); err != io.EOF {
		w.t.Errorf("after the last process ended: %+v, %v", c, err)
	}
	if err := w.cmd.Wait(); err != nil {
		w.t.Errorf("the program: %v", err)
	}
}

// adopt binds the caller's own socket with SO_REUSEPORT.
func adopt(t *testing.T, c *Call) {
	t.Helper()
	sock, err := c.Socket()
	must(t, err)
	defer sock.Close()
	kind, err := sys.KindOf(sock)
	must(t, err)
	must(t, sys.SetReusePort(sock, true))
	must(t, sys.Bind(sock, kind.Family, c.Addr))
	must(t, c.Return(0))
}

// plain is a new TCP socket for IPv4 with SO_REUSEPORT.
func plain(t *testing.T) *os.File {
	t.Helper()
	sock, err := sys.StreamSocket(sys.INET)
	must(t, err)
	must(t, sys.SetReusePort(sock, true))
	return sock
}

func bind(sock *os.File, addr netip.AddrPort) error { return sys.Bind(sock, sys.INET, addr) }

// freePort is a port of which nobody has a socket.
func freePort(t *testing.T) uint16 {
	t.Helper()
	ln, err := net.Listen("tcp", "[::]:0")
	must(t, err)
	defer ln.Close()
	return ln.Addr().(*net.TCPAddr).AddrPort().Port()
}

// echo connects, sends a line and wants it back.
func echo(t *testing.T, addr netip.AddrPort) {
	t.Helper()
	conn, err := net.DialTimeout("tcp", addr.String(), deadline)
	must(t, err)
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(deadline))
	fmt.Fprintln(conn, "hello")
	if got, err := bufio.NewReader(conn).ReadString('\n'); got != "hello\n" {
		t.Errorf("echo: %q, %v", got, err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// noNewPrivs reads the bit of the calling thread.
func noNewPrivs(t *testing.T) bool {
	t.Helper()
	status, err := os.ReadFile("/proc/thread-self/status")
	must(t, err)
	return strings.Contains(string(status), "NoNewPrivs:\t1")
}

// TestUnprivileged runs this package's tests as a user who may do nothing.
func TestUnprivileged(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can become another user")
	}
	cmd := exec.CommandContext(t.Context(), exe, "-test.v", "-test.skip=^TestUnprivileged$")
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, "--- SKIP") {
			t.Log(strings.TrimSpace(line))
		}
	}
	if !strings.Contains(string(out), "--- PASS: TestPrograms/python") {
		t.Errorf("the tests did not run:\n%s", out)
	}
}

// python is a program in Python, with what the scripts of these tests have in common.
func python(script string, args ...any) []string {
	argv := []string{"/usr/bin/python3", "-u", "-c", "import ctypes, errno, fcntl, os, select, signal, socket, struct, sys, threading\nfrom socket import *\n" + script}
	for _, a := range args {
		argv = append(argv, fmt.Sprint(a))
	}
	return argv
}
