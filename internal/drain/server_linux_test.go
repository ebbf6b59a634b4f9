package drain

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/berth-net/berth/internal/sys"
)

// The servers answer /, /slow (after 200 ms) and /stream (ten chunks, 20 ms apart), each as its language does it by default,
// and print "port N" when they listen.
const (
	pythonServer = `
import sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def do_GET(self):
        if self.path == '/stream':
            self.send_response(200)
            self.send_header('Transfer-Encoding', 'chunked')
            self.end_headers()
            for i in range(10):
                time.sleep(.02)
                self.wfile.write(b'6\r\nhello\n\r\n')
            self.wfile.write(b'0\r\n\r\n')
            return
        if self.path == '/slow':
            time.sleep(.2)
        self.send_response(200)
        self.send_header('Content-Length', '6')
        self.end_headers()
        self.wfile.write(b'hello\n')
    def log_message(self, *args): pass
class Server(ThreadingHTTPServer):
    request_queue_size = 256
s = Server(('127.0.0.1', 0), Handler)
print('port', s.server_port, flush=True)
s.serve_forever()
`
	nodeServer = `
const s = require('http').createServer((req, res) => {
  if (req.url === '/stream') {
    let n = 0
    const t = setInterval(() => { res.write('hello\n'); if (++n === 10) { clearInterval(t); res.end() } }, 20)
    return
  }
  const answer = () => { res.setHeader('Content-Length', 6); res.end('hello\n') }
  req.url === '/slow' ? setTimeout(answer, 200) : answer()
})
s.keepAliveTimeout = 60000
s.listen(0, '127.0.0.1', () => console.log('port ' + s.address().port))
`
	javaServer = `
import com.sun.net.httpserver.*;
import java.net.*;
import java.util.concurrent.*;
public class Hello {
  public static void main(String[] args) throws Exception {
    HttpServer s = HttpServer.create(new InetSocketAddress("127.0.0.1", 0), 256);
    s.setExecutor(Executors.newCachedThreadPool());
    s.createContext("/", e -> {
      try {
        byte[] b = "hello\n".getBytes();
        String path = e.getRequestURI().getPath();
        if (path.equals("/stream")) {
          e.sendResponseHeaders(200, 0);
          for (int i = 0; i < 10; i++) { Thread.sleep(20); e.getResponseBody().write(b); e.getResponseBody().flush(); }
          e.close();
          return;
        }
        if (path.equals("/slow")) Thread.sleep(200);
        e.sendResponseHeaders(200, b.length);
        e.getResponseBody().write(b);
        e.close();
      } catch (InterruptedException x) {}
    });
    s.start();
    System.out.println("port " + s.getAddress().getPort());
  }
}
`
)

// serve is a Go server, in a process of its own. Its handlers give up when the request is cancelled, as careful handlers do: that's
// what an end of file at the wrong time brings about.
func serve(mode string) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(context.Background(), "tcp", os.Getenv("BERTH_DRAIN_LISTEN"))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println("port", l.Addr().(*net.TCPAddr).Port)
	switch mode {
	case "linger":
		serveLingering(l)
		return
	case "stuck":
		serveStuck(l)
		return
	}
	wait := func(r *http.Request, d time.Duration) {
		select {
		case <-time.After(d):
		case <-r.Context().Done():
			panic(http.ErrAbortHandler)
		}
	}
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "hello\n") })
	http.HandleFunc("/slow", func(w http.ResponseWriter, r *http.Request) {
		wait(r, 200*time.Millisecond)
		io.WriteString(w, "hello\n")
	})
	http.HandleFunc("/stream", func(w http.ResponseWriter, r *http.Request) {
		for range 10 {
			io.WriteString(w, "hello\n")
			http.NewResponseController(w).Flush()
			wait(r, 20*time.Millisecond)
		}
	})
	http.Serve(l, nil)
}

// serveLingering answers one request, sends its FIN and reads on until the client closes.
func serveLingering(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			if _, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
				io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\nhello\n")
				c.(*net.TCPConn).CloseWrite()
				io.Copy(io.Discard, c)
			}
			c.Close()
		}()
	}
}

// serveStuck answers the first two lines of a connection with a line, and works on the third for ever.
func serveStuck(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			r := bufio.NewReader(c)
			for range 2 {
				if _, err := r.ReadString('\n'); err == nil {
					io.WriteString(c, "hello\n")
				}
			}
			r.ReadString('\n')
			select {}
		}()
	}
}

// A server is a program in a cgroup of its own.
type server struct {
	address netip.AddrPort
	cgroup  string
	pid     int
	order   *Order // nil: counters only
}

// start runs a server, in Go or by the interpreter of what's in code, and ends it with the test.
func start(t testing.TB, ordered bool, kind string) *server {
	t.Helper()
	var cmd *exec.Cmd
	switch kind {
	case "python", "node":
		interpreter, flag, code := "python3", "-c", pythonServer
		if kind == "node" {
			interpreter, flag, code = "node", "-e", nodeServer
		}
		need(t, interpreter)
		cmd = exec.Command(interpreter, flag, code)
	case "java":
		need(t, "javac")
		dir := t.TempDir()
		file := filepath.Join(dir, "Hello.java")
		if err := os.WriteFile(file, []byte(javaServer), 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command("javac", "-d", dir, file).CombinedOutput(); err != nil {
			t.Fatalf("javac: %v\n%s", err, out)
		}
		cmd = exec.Command("java", "-cp", dir, "Hello")
	default:
		listen := "127.0.0.1:0"
		if kind == "dual" {
			listen = "[::]:0"
		}
		cmd = exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "BERTH_DRAIN_SERVER="+kind, "BERTH_DRAIN_LISTEN="+listen)
	}
	s := &server{cgroup: cgroup(t)}
	dir, err := os.Open(s.cgroup)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if ordered {
		if s.order, err = NewOrder(s.cgroup); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := s.order.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s.pid = cmd.Process.Pid
	t.Cleanup(func() { // runs before the cgroup is removed
		cmd.Process.Kill()
		cmd.Wait()
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	port, ok := strings.CutPrefix(strings.TrimSpace(line), "port ")
	n, parseErr := strconv.Atoi(port)
	if err != nil || !ok || parseErr != nil {
		t.Fatalf("%s said %q, %v", kind, line, err)
	}
	s.address = netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(n))
	return s
}

func need(t testing.TB, program string) {
	t.Helper()
	if _, err := exec.LookPath(program); err != nil {
		t.Skip(err)
	}
}

// cgroup makes a cgroup that goes with the test.
func cgroup(t testing.TB) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root for a cgroup and BPF")
	}
	own, err := sys.OwnCgroup2()
	if err != nil {
		t.Skip(err)
	}
	dir, err := os.MkdirTemp(own, "berth-test-")
	if err != nil {
		t.Skip("can't make a cgroup: ", err)
	}
	t.Cleanup(func() {
		// A process that has ended leaves its cgroup a moment later.
		until(t, "an empty cgroup", func() bool { return os.Remove(dir) == nil })
	})
	return dir
}

func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("never happened: ", what)
		}
	}
}

// config drains the server.
func (s *server) config() Config {
	return Config{
		Ports:     []netip.AddrPort{s.address},
		Pids:      func() ([]int, error) { return []int{s.pid}, nil },
		Duplicate: duplicate,
		Order:     s.order,
	}
}

func duplicate(pid, fd int) (*os.File, error) {
	p, err := sys.PidfdOpen(pid, 0)
	if err != nil {
		return nil, err
	}
	defer p.Close()
	return sys.PidfdGetfd(p, fd)
}
