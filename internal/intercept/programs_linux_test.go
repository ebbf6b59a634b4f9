package intercept

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// programs are what the test binary can be.
var programs = map[string]func(args []string){
	// echo listens at an address and serves one connection.
	"echo": func(args []string) {
		ln, err := net.Listen("tcp", args[0])
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println("listening")
		conn, err := ln.Accept()
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		line, _ := bufio.NewReader(conn).ReadString('\n')
		io.WriteString(conn, line)
		conn.Close()
	},
	// busy binds again and again while its runtime preempts the threads of other goroutines that never yield.
	"busy": func(args []string) {
		stop := make(chan bool)
		for range 4 {
			go func() {
				for n := 0; ; n++ {
					select {
					case <-stop:
						return
					default:
					}
				}
			}()
		}
		for range 200 {
			ln, err := net.Listen("tcp4", "127.0.0.1:0")
			if err != nil {
				fmt.Println(err)
				os.Exit(1)
			}
			ln.Close()
		}
		close(stop)
		fmt.Println("done")
	},
}

// cEcho is an echo server in C; with SOCKETCALL it makes the calls as an old libc does on i386.
const cEcho = `
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>
#ifdef SOCKETCALL
static int sc(int call, long a, long b, long c, long d, long e) { long args[] = {a, b, c, d, e}; return syscall(SYS_socketcall, call, args); }
#define bind(fd, addr, len) sc(2, fd, (long)(addr), len, 0, 0)
#define listen(fd, n) sc(4, fd, n, 0, 0, 0)
#define setsockopt(fd, level, name, value, len) sc(14, fd, level, name, (long)(value), len)
#endif
int main(int argc, char **argv) {
	struct sockaddr_in addr = {AF_INET, htons(atoi(argv[1])), {htonl(INADDR_LOOPBACK)}};
	char buf[64];
	int one = 1, s = socket(AF_INET, SOCK_STREAM, 0);
	if (setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one)) { perror("setsockopt"); return 1; }
	if (bind(s, &addr, sizeof addr)) { perror("bind"); return 1; }
	if (listen(s, 77)) { perror("listen"); return 1; }
	puts("listening"); fflush(stdout);
	int c = accept(s, 0, 0);
	long n = read(c, buf, sizeof buf);
	if (n > 0) write(c, buf, n);
	return 0;
}
`

const pythonEcho = `
s = socket(AF_INET, SOCK_STREAM)
s.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
s.bind(("127.0.0.1", int(sys.argv[1])))
s.listen(77)
print("listening")
c, _ = s.accept()
c.send(c.recv(64))
`

const nodeEcho = `
const s = require("net").createServer(c => { c.pipe(c); c.on("end", () => s.close()) });
s.listen({host: "127.0.0.1", port: +process.argv[1], backlog: 77}, () => console.log("listening"));
`

// compile makes a program of C source.
func compile(t *testing.T, source string, flags ...string) string {
	t.Helper()
	dir := publicDir(t)
	in, out := filepath.Join(dir, "program.c"), filepath.Join(dir, "program")
	must(t, os.WriteFile(in, []byte(source), 0o644))
	if msg, err := exec.Command("gcc", append(flags, "-w", "-o", out, in)...).CombinedOutput(); err != nil {
		t.Skipf("gcc %v: %v: %s", flags, err, msg)
	}
	return out
}

// TestPrograms watches real programs, of both word sizes, and binds their sockets for them.
func TestPrograms(t *testing.T) {
	for _, tt := range []struct {
		name   string
		argv   func(t *testing.T, port uint16) []string
		compat bool
	}{
		{"python", func(t *testing.T, port uint16) []string { return python(pythonEcho, port) }, false},
		{"node", func(t *testing.T, port uint16) []string {
			return []string{"/usr/bin/node", "-e", nodeEcho, fmt.Sprint(port)}
		}, false},
		{"C", func(t *testing.T, port uint16) []string { return []string{compile(t, cEcho), fmt.Sprint(port)} }, false},
		{"C of 32 bits", func(t *testing.T, port uint16) []string { return []string{compile(t, cEcho, "-m32"), fmt.Sprint(port)} }, true},
		{"C of 32 bits with socketcall", func(t *testing.T, port uint16) []string {
			return []string{compile(t, cEcho, "-m32", "-DSOCKETCALL"), fmt.Sprint(port)}
		}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			want := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), freePort(t))
			w := watch(t, Filter{}, tt.argv(t, want.Port())...)
			c := w.next(Bind)
			if c.Addr != want || c.Family != afInet || c.Compat != tt.compat || c.Err != nil || len(c.Sockaddr) != 16 {
				t.Errorf("bind: %+v", c)
			}
			if p, err := c.Protocol(); p != "TCP" {
				t.Errorf("protocol %q, %v", p, err)
			}
			adopt(t, c)
			c = w.next(Listen)
			if c.Backlog != 77 || c.Compat != tt.compat {
				t.Errorf("listen: %+v", c)
			}
			must(t, c.Continue())
			w.expect("listening")
			echo(t, want)
			w.end()
		})
	}
}

// TestGo watches a Go program, whose socket is an MPTCP one, and gives it a plain one.
func TestGo(t *testing.T) {
	want := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), freePort(t))
	w := watch(t, Filter{}, self("echo", want.String())...)
	var c *Call
	for {
		c = w.next(Bind)
		if c.Addr == want {
			break
		}
		must(t, c.Continue()) // the net package tries which families there are
	}
	if p, err := c.Protocol(); p != "MPTCP" {
		t.Errorf("protocol %q, %v", p, err)
	}
	before, err := c.Inode()
	must(t, err)
	sock := plain(t)
	defer sock.Close()
	must(t, bind(sock, want))
	must(t, c.Replace(sock))
	after, err := c.Inode()
	must(t, err)
	if p, err := c.Protocol(); p != "TCP" || before == after {
		t.Errorf("after Replace: protocol %q, inode %d, before %d, %v", p, after, before, err)
	}
	if f, err := c.Flags(); f != (Flags{Nonblock: true, Cloexec: true}) {
		t.Errorf("flags %+v, %v", f, err)
	}
	must(t, c.Return(0))
	must(t, w.next(Listen).Continue())
	w.expect("listening")
	echo(t, want)
	w.end()
}

// TestPreemption has a program's runtime send signals to its own threads all the while.
func TestPreemption(t *testing.T) {
	w := watch(t, Filter{}, self("busy")...)
	binds := 0
	for {
		c, err := w.listener.Recv()
		if err == io.EOF {
			break
		}
		must(t, err)
		if c.Op == Bind && c.Addr.Addr() == netip.MustParseAddr("127.0.0.1") && c.Addr.Port() == 0 {
			binds++
		}
		must(t, c.Continue())
	}
	w.expect("done")
	if binds < 200 {
		t.Errorf("%d binds were seen, not 200", binds)
	}
	must(t, w.cmd.Wait())
}
