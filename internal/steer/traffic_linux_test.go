package steer

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/berth-net/berth/internal/sys"
)

// deadline is long enough that only a hang meets it.
const deadline = 60 * time.Second

// shape is a form to listen on, and where to connect to.
type shape struct {
	name    string
	family  int
	v6only  bool
	address string
	targets []string
}

var shapes = []shape{
	{"IPv4", sys.INET, false, "127.0.0.1", []string{"127.0.0.1"}},
	{"IPv4 any", sys.INET, false, "0.0.0.0", []string{"127.0.0.1", "127.0.0.3"}},
	{"IPv6", sys.INET6, false, "::1", []string{"::1"}},
	{"dual-stack", sys.INET6, false, "::", []string{"127.0.0.1", "::1"}},
	{"IPv6 only", sys.INET6, true, "::", []string{"::1"}},
}

// server is a listener that tells each client its number.
type server struct {
	t     *testing.T
	id    byte
	sock  *os.File
	slot  Slot
	ln    net.Listener
	conns sync.WaitGroup
}

// listen makes a socket of the shape listen; port 0 picks one.
func (s shape) listen(t *testing.T, port uint16) *os.File {
	t.Helper()
	sock, err := sys.StreamSocket(s.family)
	must(t, err)
	if s.family == sys.INET6 {
		must(t, sys.SetV6Only(sock, s.v6only))
	}
	must(t, sys.SetReusePort(sock, true))
	must(t, sys.Bind(sock, s.family, netip.AddrPortFrom(netip.MustParseAddr(s.address), port)))
	must(t, sys.ListenOn(sock, 4096))
	return sock
}

func portOf(t *testing.T, sock *os.File) uint16 {
	t.Helper()
	addr, err := sys.LocalAddr(sock)
	must(t, err)
	return addr.Port()
}

// serve accepts connections until the server is closed.
func (s *server) serve() {
	s.t.Helper()
	var err error
	s.ln, err = net.FileListener(s.sock) // a duplicate
	must(s.t, err)
	s.conns.Go(func() {
		for {
			conn, err := s.ln.Accept()
			if err != nil {
				return
			}
			s.conns.Go(func() {
				defer conn.Close()
				conn.Write([]byte{s.id})
				io.Copy(io.Discard, conn) // the client ends it with a reset, which leaves no TIME_WAIT
			})
		}
	})
}

func (s *server) close() {
	if s.ln != nil {
		s.ln.Close()
	}
	s.sock.Close()
	s.conns.Wait()
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// ask connects and returns the number of the server that answers.
func ask(from *net.TCPAddr, target string) (byte, error) {
	d := net.Dialer{Timeout: deadline, LocalAddr: nil}
	if from != nil {
		d.LocalAddr = from
	}
	conn, err := d.Dial("tcp", target)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	conn.(*net.TCPConn).SetLinger(0)
	conn.SetDeadline(time.Now().Add(deadline))
	var id [1]byte
	_, err = io.ReadFull(conn, id[:])
	return id[0], err
}

// traffic is clients that connect without a pause, and the account of who may answer them.
type traffic struct {
	mu      sync.Mutex
	changed *sync.Cond
	epochs  [][]byte // the servers that may answer, in the course of time
	rounds  []int    // connections that each client has made
	failed  []string

	stopped atomic.Bool
	clients sync.WaitGroup
}

func startTraffic(clients int, targets []string, port uint16, first byte) *traffic {
	l := &traffic{epochs: [][]byte{{first}}, rounds: make([]int, clients)}
	l.changed = sync.NewCond(&l.mu)
	for i := range clients {
		target := net.JoinHostPort(targets[i%len(targets)], fmt.Sprint(port))
		l.clients.Go(func() {
			for !l.stopped.Load() {
				since := l.epoch()
				id, err := ask(nil, target)
				l.mu.Lock()
				switch may := slices.Concat(l.epochs[since:]...); {
				case err != nil:
					l.failed = append(l.failed, err.Error())
				case !slices.Contains(may, id):
					l.failed = append(l.failed, fmt.Sprintf("server %d answered, not one of %v", id, may))
				}
				l.rounds[i]++
				l.changed.Broadcast()
				l.mu.Unlock()
			}
		})
	}
	return l
}

func (l *traffic) epoch() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.epochs) - 1
}

// allow begins an epoch.
func (l *traffic) allow(ids ...byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.epochs = append(l.epochs, ids)
}

// pass waits until each client has made n connections from beginning to end.
func (l *traffic) pass(n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	at := slices.Clone(l.rounds)
	for i := range at {
		for l.rounds[i] < at[i]+n+1 {
			l.changed.Wait()
		}
	}
}

// stop ends the load and reports what went wrong.
func (l *traffic) stop(t *testing.T) {
	t.Helper()
	l.stopped.Store(true)
	l.clients.Wait()
	total := 0
	for _, n := range l.rounds {
		total += n
	}
	t.Logf("%d connections, %d failed or misguided", total, len(l.failed))
	if len(l.failed) > 0 {
		t.Errorf("the first failures: %s", strings.Join(l.failed[:min(5, len(l.failed))], "; "))
	}
}

// freeSource is an address of this host and a port that nobody uses, from which to connect to target.
func freeSource(t *testing.T, target string) *net.TCPAddr {
	t.Helper()
	ln, err := net.Listen("tcp", net.JoinHostPort(target, "0"))
	must(t, err)
	defer ln.Close()
	return ln.Addr().(*net.TCPAddr)
}
