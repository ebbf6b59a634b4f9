package load

import (
	"io"
	"net"
	"net/netip"
	"testing"
	"time"
)

// A client without a pause has no time to watch: it finds out right before it sends that the server has closed.
func TestLookBeforeSending(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	g, err := New(Config{URL: "http://" + l.Addr().String(), KeepAlive: 1})
	if err != nil {
		t.Fatal(err)
	}
	g.target = netip.MustParseAddrPort(l.Addr().String())
	g.start = time.Now()
	c := g.clients[0]
	defer c.hangUp()

	if err := c.connect(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	first, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	first.Close()
	// The end of file is here once it has been read, and it stays.
	if _, err := c.conn.Read(make([]byte, 1)); err != io.EOF {
		t.Fatalf("read: %v, want EOF", err)
	}

	served := make(chan error, 1)
	go func() {
		second, err := l.Accept()
		if err == nil {
			defer second.Close()
			_, err = io.WriteString(second, "HTTP/1.1 204 No Content\r\n\r\n")
			_, _ = io.Copy(io.Discard, second)
		}
		served <- err
	}()
	c.exchange(1)
	c.hangUp()
	if err := <-served; err != nil {
		t.Fatal(err)
	}
	if n := &g.counts; n.closedIdle.n.Load() != 1 || n.requests.Load() != 1 || n.failed.Load() != 0 || n.connections.Load() != 2 {
		t.Errorf("%d closed while idle, %d requests, %d failed, %d connections",
			n.closedIdle.n.Load(), n.requests.Load(), n.failed.Load(), n.connections.Load())
	}
}

func TestParseURL(t *testing.T) {
	for in, want := range map[string]string{
		"8080":               "http://localhost:8080",
		":8080/x?y=z":        "http://localhost:8080/x?y=z",
		"127.0.0.1":          "http://127.0.0.1",
		"[::1]:80":           "http://[::1]:80",
		"http://example.org": "http://example.org",
	} {
		if u, err := parseURL(in); err != nil || u.String() != want {
			t.Errorf("%q: %v, %v, want %s", in, u, err, want)
		}
	}
}

func TestCount(t *testing.T) {
	for n, want := range map[int64]string{0: "0", 999: "999", 1000: "1,000", 1234567: "1,234,567"} {
		if got := count(n); got != want {
			t.Errorf("%d is %s, want %s", n, got, want)
		}
	}
}
