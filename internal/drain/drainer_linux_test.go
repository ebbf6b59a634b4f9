package drain

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

var (
	rounds     = flag.Int("rounds", 2, "how often TestBusyClients drains each server")
	idleConns  = flag.Int("idle", 2000, "how many connections TestIdleConnections makes")
	measureFor = flag.Duration("measure", 0, "run TestMeasure for so long on each server")
	pause      = flag.Duration("pause", 10*time.Millisecond, "how long TestMeasure's clients pause")
)

// A kind of server, judged by the Order or by counters.
type setting struct {
	kind    string
	ordered bool
}

func (s setting) String() string {
	if s.ordered {
		return s.kind + " by order"
	}
	return s.kind + " by counters"
}

// settings are both ways of judging for each kind.
func settings(kinds ...string) (all []setting) {
	for _, k := range kinds {
		all = append(all, setting{k, true}, setting{k, false})
	}
	return all
}

// drain drains, for the given time at most if it isn't 0.
func drain(t *testing.T, config Config, limit time.Duration) Result {
	t.Helper()
	ctx := t.Context()
	if limit > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, limit)
		defer cancel()
	}
	d, err := New(config)
	if err != nil {
		t.Fatal(err)
	}
	r, err := d.Run(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// What a restart meets: clients that pause 10 ms between requests, as many as can be.
func TestBusyClients(t *testing.T) {
	for _, set := range settings("go", "dual", "python", "node", "java") {
		t.Run(set.String(), func(t *testing.T) {
			s := start(t, set.ordered, set.kind)
			var took, longest time.Duration
			met := 0
			for range *rounds {
				c := run(t, s, 16, "/", 10*time.Millisecond, false)
				r := drain(t, s.config(), 0)
				c.wg.Wait() // each client ends with its connection
				met += int(c.met.Load())
				if c.cut.Load() != 0 || c.idle.Load()+c.met.Load() != 16 || r.Ended != 16 || r.Left() != 0 {
					t.Errorf("%v; %+v", c, r)
				}
				took += r.Elapsed
				longest = max(longest, r.Elapsed)
			}
			t.Logf("%d connections ended, %d met a request; a drain took %v, at most %v", *rounds*16, met, took/time.Duration(*rounds), longest)
			if met > 1+*rounds*16/1000 { // one may: the machine is busy
				t.Errorf("%d of %d met a request", met, *rounds*16)
			}
		})
	}
}

// A slow handler whose clients send the next request at once: one is always in flight, though counters hardly show it.
func TestSlowHandler(t *testing.T) {
	for _, set := range settings("go", "node") {
		t.Run(set.String(), func(t *testing.T) {
			s := start(t, set.ordered, set.kind)
			c := run(t, s, 16, "/slow", 0, false)
			r := drain(t, s.config(), 1500*time.Millisecond)
			c.end()
			// A client that has to wait for a CPU for milliseconds pauses too; then it's right to end its connection.
			if c.cut.Load() != 0 || r.Left() < 14 {
				t.Errorf("%v; %+v", c, r)
			}
		})
	}
}

// A handler that pauses 20 ms within its response, and gives up when the connection seems to end.
func TestStream(t *testing.T) {
	for _, set := range settings("go", "node") {
		t.Run(set.String(), func(t *testing.T) {
			s := start(t, set.ordered, set.kind)
			c := run(t, s, 16, "/stream", 10*time.Millisecond, true)
			r := drain(t, s.config(), 3*time.Second)
			c.end()
			// Only an Order sees that a response's last chunk has left; otherwise the clients don't pause for long enough.
			if c.cut.Load() != 0 || set.ordered && c.idle.Load() < 16 {
				t.Errorf("%v; %+v", c, r)
			}
		})
	}
}

func TestIdleConnections(t *testing.T) {
	for _, set := range settings("go", "dual") {
		t.Run(set.String(), func(t *testing.T) {
			n := *idleConns
			s := start(t, set.ordered, set.kind)
			var conns []net.Conn
			for range n {
				c, err := net.Dial("tcp", s.address.String())
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				request(t, c)
				conns = append(conns, c)
			}
			r := drain(t, s.config(), 0)
			if r.Ended != n || r.Met != 0 || r.Left() != 0 {
				t.Errorf("%+v", r)
			}
			for _, c := range conns {
				if _, err := c.Read(make([]byte, 1)); err != io.EOF {
					t.Fatalf("read: %v, want EOF", err)
				}
			}
			t.Logf("%d connections in %v, %v of it busy", n, r.Elapsed, r.Busy)
		})
	}
}

// request sends one and reads the response, whose header and body together end with "hello\n".
func request(t *testing.T, c net.Conn) {
	t.Helper()
	if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: test\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(c)
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		if line == "hello\n" {
			return
		}
	}
}

// A client that connects and says nothing may be about to.
func TestSilentConnection(t *testing.T) {
	for _, set := range settings("go") {
		t.Run(set.String(), func(t *testing.T) {
			s := start(t, set.ordered, set.kind)
			silent, _ := dial(t, s)
			late, _ := dial(t, s)
			d, err := New(s.config())
			if err != nil {
				t.Fatal(err)
			}
			var r Result
			var wg sync.WaitGroup
			wg.Go(func() {
				if r, err = d.Run(t.Context()); err != nil {
					t.Error(err)
				}
			})
			until(t, "two connections", func() bool { return d.Progress().Connections == 2 })
			request(t, late)
			wg.Wait()
			if r.Ended != 2 || r.Left() != 0 || r.Met != 0 || r.Elapsed < Silence {
				t.Errorf("%+v", r)
			}
			for _, c := range []net.Conn{silent, late} {
				if _, err := c.Read(make([]byte, 1)); err != io.EOF {
					t.Errorf("read: %v, want EOF", err)
				}
			}
		})
	}
}

// A server that has sent its FIN and reads on has something in flight until it closes.
func TestLingeringClose(t *testing.T) {
	for _, set := range settings("linger") {
		t.Run(set.String(), func(t *testing.T) {
			s := start(t, set.ordered, set.kind)
			c, _ := dial(t, s)
			request(t, c)
			d, err := New(s.config())
			if err != nil {
				t.Fatal(err)
			}
			done := make(chan Result)
			go func() {
				r, err := d.Run(t.Context())
				if err != nil {
					t.Error(err)
				}
				done <- r
			}()
			until(t, "a connection in flight", func() bool { return d.Progress().InFlight == 1 })
			select {
			case r := <-done:
				t.Fatalf("done while the server lingers: %+v", r)
			case <-time.After(100 * time.Millisecond):
			}
			c.Close()
			if r := <-done; r.Closed != 1 || r.Ended != 0 || r.Left() != 0 {
				t.Errorf("%+v", r)
			}
		})
	}
}

// Where idle connections stay, the drain is over when nothing is in flight.
func TestKeepIdle(t *testing.T) {
	for _, set := range settings("go") {
		t.Run(set.String(), func(t *testing.T) {
			s := start(t, set.ordered, set.kind)
			var conns []net.Conn
			for range 3 {
				c, _ := dial(t, s)
				request(t, c)
				conns = append(conns, c)
			}
			keep, without, refused := s.config(), s.config(), s.config()
			keep.KeepIdle = true
			without.Duplicate = nil
			refused.Duplicate = func(int, int) (*os.File, error) { return nil, os.NewSyscallError("pidfd_getfd", syscall.EPERM) }
			for name, config := range map[string]Config{"KeepIdle": keep, "no Duplicate": without, "Duplicate refused": refused} {
				r := drain(t, config, 0)
				if r.Connections != 3 || r.Idle != 3 || r.Left() != 3 || (r.Refused != nil) != strings.HasSuffix(name, "refused") {
					t.Errorf("%s: %+v", name, r)
				}
			}
			for _, c := range conns {
				request(t, c) // it still serves
			}
		})
	}
}

// A program that doesn't close at the end of file keeps its connection until the deadline.
func TestProgramThatDoesNotClose(t *testing.T) {
	s := start(t, true, "stuck")
	c, _ := dial(t, s)
	io.WriteString(c, "line\n")
	if _, err := bufio.NewReader(c).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	if r := drain(t, s.config(), time.Second); r.Asked != 1 || r.Left() != 1 || r.Ended != 0 {
		t.Errorf("%+v", r)
	}
}

// What waits in the accept queue or hasn't completed its handshake belongs to the old generation too. This process is the generation.
func TestQueues(t *testing.T) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	address := l.Addr().(*net.TCPAddr).AddrPort()
	waiting, err := net.Dial("tcp", address.String())
	if err != nil {
		t.Fatal(err)
	}
	defer waiting.Close()
	deferAccept(t, l.(*net.TCPListener))
	handshake, err := net.Dial("tcp", address.String())
	if err != nil {
		t.Fatal(err)
	}
	defer handshake.Close()

	var mu sync.Mutex
	queue := 1
	d, err := New(Config{
		Ports:     []netip.AddrPort{netip.AddrPortFrom(netip.IPv6Unspecified(), address.Port())},
		Pids:      func() ([]int, error) { return []int{os.Getpid()}, nil },
		Duplicate: duplicate,
		Queues: func() (int, error) {
			mu.Lock()
			defer mu.Unlock()
			return queue, nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan Result, 1)
	go func() {
		r, err := d.Run(t.Context())
		if err != nil {
			t.Error(err)
		}
		done <- r
	}()
	until(t, "one waiting and one handshake", func() bool {
		p := d.Progress()
		return p.Waiting == 1 && p.Handshakes == 1 && p.Connections == 0
	})
	for range 2 {
		if _, err := handshake.Write([]byte("x")); err != nil { // which completes the handshake; the second time nothing is new
			t.Fatal(err)
		}
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
	mu.Lock()
	queue = 0
	mu.Unlock()
	if r := <-done; r.Left() != 0 || r.Ended != 0 {
		t.Errorf("%+v", r)
	}
}

// deferAccept keeps handshakes incomplete until the client's first byte.
func deferAccept(t *testing.T, l *net.TCPListener) {
	t.Helper()
	raw, err := l.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	controlErr := raw.Control(func(fd uintptr) {
		err = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_DEFER_ACCEPT, 10)
	})
	if controlErr != nil || err != nil {
		t.Fatal(controlErr, err)
	}
}

// Two generations have the same port; only the old one's connections are ended.
func TestOtherGeneration(t *testing.T) {
	old := start(t, true, "go")
	c, _ := dial(t, old)
	request(t, c)
	config := old.config()
	config.Pids = func() ([]int, error) { return nil, nil } // as if the process were another generation's
	if r := drain(t, config, 0); r.Connections != 0 || r.Left() != 0 {
		t.Errorf("%+v", r)
	}
	request(t, c)
}

func TestErrors(t *testing.T) {
	if _, err := New(Config{}); err == nil {
		t.Error("a drain of nothing was accepted")
	}
	wanted := errors.New("no list")
	d, err := New(Config{Ports: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:1")}, Pids: func() ([]int, error) { return nil, wanted }})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.Run(t.Context()); !errors.Is(err, wanted) {
		t.Errorf("got %v, want %v", err, wanted)
	}
}

// TestMeasure counts how many closes meet a request when the clients connect again at once, so that each is closed hundreds of
// times: go test -run TestMeasure -v -measure 30s.
func TestMeasure(t *testing.T) {
	if *measureFor == 0 {
		t.Skip("takes long; give -measure 30s")
	}
	for _, set := range settings("go", "python", "node", "java") {
		t.Run(set.String(), func(t *testing.T) {
			s := start(t, set.ordered, set.kind)
			c := run(t, s, 16, "/", *pause, true)
			r := drain(t, s.config(), *measureFor)
			c.end()
			t.Logf("%v; %+v; %v a poll", c, r, r.Busy/time.Duration(r.Polls))
		})
	}
}
