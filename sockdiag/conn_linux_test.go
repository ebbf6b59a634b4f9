package sockdiag_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/berth-net/berth/sockdiag"
)

func TestMain(m *testing.M) {
	warm, err := net.Listen("tcp", "127.0.0.1:0") // the runtime's own descriptors
	if err != nil {
		panic(err)
	}
	warm.Close()
	before := descriptors()
	code := m.Run()
	if after := descriptors(); code == 0 && len(after) > len(before) {
		fmt.Printf("descriptors leaked:\nbefore %s\nafter  %s\n", strings.Join(before, " "), strings.Join(after, " "))
		code = 1
	}
	os.Exit(code)
}

func descriptors() []string {
	var all []string
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, e := range entries {
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && !strings.HasPrefix(target, "/proc/") {
			all = append(all, e.Name()+"→"+target)
		}
	}
	return all
}

func open(t testing.TB) *sockdiag.Conn {
	t.Helper()
	c, err := sockdiag.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func listen(t testing.TB, network, address string) net.Listener {
	t.Helper()
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(t.Context(), network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func addrPort(a net.Addr) netip.AddrPort {
	ap := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// pair is a connection over the listener, both ends.
func pair(t testing.TB, l net.Listener, to string) (client, server *net.TCPConn) {
	t.Helper()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	c, err := net.Dial("tcp", net.JoinHostPort(to, port))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return c.(*net.TCPConn), s.(*net.TCPConn)
}

func inode(t testing.TB, c syscall.Conn) uint32 {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var st syscall.Stat_t
	if err := raw.Control(func(fd uintptr) { err = syscall.Fstat(int(fd), &st) }); err != nil {
		t.Fatal(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return uint32(st.Ino)
}

func collect(t testing.TB, c *sockdiag.Conn, f sockdiag.Filter) []sockdiag.Socket {
	t.Helper()
	var all []sockdiag.Socket
	for s, err := range c.Sockets(f) {
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, s)
	}
	return all
}

// until polls for what another end of a connection makes happen.
func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("never happened: ", what)
		}
	}
}

func TestListening(t *testing.T) {
	c := open(t)
	l := listen(t, "tcp4", "127.0.0.1:0")
	at := addrPort(l.Addr())
	waiting, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer waiting.Close()

	filter := sockdiag.Filter{States: sockdiag.In(sockdiag.Listen), LocalPorts: []uint16{at.Port()}, Info: true}
	all := collect(t, c, filter)
	if len(all) != 1 {
		t.Fatalf("found %d listeners, want 1: %+v", len(all), all)
	}
	s := all[0]
	if s.Local != at || s.State != sockdiag.Listen || s.Inode != inode(t, l.(*net.TCPListener)) || s.UID != uint32(os.Getuid()) {
		t.Errorf("unexpected listener %+v", s)
	}
	if s.RecvQueue != 1 || s.SendQueue == 0 || !s.HasInfo || s.Info.Unacked != 1 {
		t.Errorf("queue %d of %d, TCP_INFO %d; want one connection", s.RecvQueue, s.SendQueue, s.Info.Unacked)
	}
	got, err := c.Get(sockdiag.ID{Local: at})
	if err != nil || got.Cookie != s.Cookie {
		t.Errorf("Get found cookie %x, %v; want %x", got.Cookie, err, s.Cookie)
	}
}

func TestDualStack(t *testing.T) {
	c := open(t)
	l := listen(t, "tcp", "[::]:0")
	port := addrPort(l.Addr()).Port()
	v6, _ := collectListener(t, c, port)
	if v6.Family != sockdiag.INET6 || v6.V6Only || v6.Local.Addr() != netip.IPv6Unspecified() {
		t.Errorf("unexpected listener %+v", v6)
	}
	client, server := pair(t, l, "127.0.0.1")
	pair(t, l, "::1")
	all := collect(t, c, sockdiag.Filter{States: sockdiag.In(sockdiag.Established), LocalPorts: []uint16{port}})
	if len(all) != 2 {
		t.Fatalf("found %d connections, want 2: %+v", len(all), all)
	}
	for _, s := range all {
		if s.Family != sockdiag.INET6 {
			t.Errorf("family %d, want the socket's own, INET6", s.Family)
		}
		got, err := c.Get(s.ID())
		if err != nil || got.Cookie != s.Cookie || got.Inode != s.Inode {
			t.Errorf("Get(%+v) = %+v, %v", s.ID(), got, err)
		}
	}
	s, err := c.Get(sockdiag.ID{Local: addrPort(server.LocalAddr()), Remote: addrPort(client.LocalAddr())})
	if err != nil || s.Inode != inode(t, server) || !s.Local.Addr().Is4() {
		t.Errorf("got %+v, %v", s, err)
	}

	only := listen(t, "tcp6", "[::1]:0")
	if s, n := collectListener(t, c, addrPort(only.Addr()).Port()); n != 1 || !s.V6Only {
		t.Errorf("found %d listeners, V6Only %v; want one, true", n, s.V6Only)
	}
}

func collectListener(t *testing.T, c *sockdiag.Conn, port uint16) (sockdiag.Socket, int) {
	t.Helper()
	all := collect(t, c, sockdiag.Filter{States: sockdiag.In(sockdiag.Listen), LocalPorts: []uint16{port}})
	if len(all) == 0 {
		return sockdiag.Socket{}, 0
	}
	return all[0], len(all)
}

func TestEstablishedCounts(t *testing.T) {
	c := open(t)
	client, server := pair(t, listen(t, "tcp4", "127.0.0.1:0"), "127.0.0.1")
	id := sockdiag.ID{Local: addrPort(server.LocalAddr()), Remote: addrPort(server.RemoteAddr())}
	if _, err := client.Write([]byte("request")); err != nil {
		t.Fatal(err)
	}
	var s sockdiag.Socket
	get := func() (err error) { s, err = c.Get(id); return err }
	until(t, "seven bytes unread", func() bool { return get() == nil && s.RecvQueue == 7 })
	if s.Info.BytesReceived != 7 || s.Info.DataSegsIn != 1 || s.Info.State != sockdiag.Established {
		t.Errorf("unexpected counters %+v", s.Info)
	}
	if _, err := server.Write([]byte("the answer")); err != nil {
		t.Fatal(err)
	}
	until(t, "ten bytes acknowledged", func() bool { return get() == nil && s.Info.BytesAcked == 10 })
	if s.Info.BytesSent != 10 || s.Info.Unsent != 0 || s.Info.DataSegsOut != 1 || s.SendQueue != 0 || s.Info.SendMSS == 0 {
		t.Errorf("unexpected counters %+v", s)
	}
	wrong := s.ID()
	wrong.Cookie++
	if _, err := c.Get(wrong); !errors.Is(err, sockdiag.ErrNotFound) {
		t.Errorf("another socket's cookie: %v, want ErrNotFound", err)
	}
}

func TestSynQueue(t *testing.T) {
	c := open(t)
	l := listen(t, "tcp4", "127.0.0.1:0")
	raw, err := l.(*net.TCPListener).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	// With TCP_DEFER_ACCEPT a handshake isn't complete before the client's first byte.
	if err := raw.Control(func(fd uintptr) {
		err = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_DEFER_ACCEPT, 10)
	}); err != nil {
		t.Fatal(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	client, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	filter := sockdiag.Filter{States: sockdiag.In(sockdiag.SynReceived), LocalPorts: []uint16{addrPort(l.Addr()).Port()}}
	until(t, "a request in the SYN queue", func() bool {
		all := collect(t, c, filter)
		return len(all) == 1 && all[0].State == sockdiag.SynReceived && all[0].Remote == addrPort(client.LocalAddr()) && all[0].Inode == 0
	})
	if _, err := client.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	until(t, "an empty SYN queue", func() bool { return len(collect(t, c, filter)) == 0 })
}

func TestTimeWait(t *testing.T) {
	c := open(t)
	client, server := pair(t, listen(t, "tcp4", "127.0.0.1:0"), "127.0.0.1")
	id := sockdiag.ID{Local: addrPort(server.LocalAddr()), Remote: addrPort(server.RemoteAddr())}
	server.Close()
	client.Close()
	filter := sockdiag.Filter{States: sockdiag.In(sockdiag.TimeWait), LocalPorts: []uint16{id.Local.Port()}, Info: true}
	until(t, "TIME_WAIT", func() bool { return len(collect(t, c, filter)) == 1 })
	s := collect(t, c, filter)[0]
	if s.ID().Remote != id.Remote || s.State != sockdiag.TimeWait || s.Timer != sockdiag.TimeWaitTimer || s.Expires <= 0 ||
		s.Inode != 0 || s.HasInfo {
		t.Errorf("unexpected socket %+v", s)
	}
	if got, err := c.Get(s.ID()); err != nil || got.State != sockdiag.TimeWait {
		t.Errorf("Get = %+v, %v", got, err)
	}
}

func TestPortsOfAFilter(t *testing.T) {
	c := open(t)
	var ports, want []uint16
	for range 12 {
		l := listen(t, "tcp4", "127.0.0.1:0")
		ports = append(ports, addrPort(l.Addr()).Port())
	}
	want = append(want, ports[1], ports[4], ports[5], ports[11])
	states := sockdiag.In(sockdiag.Listen)
	found := map[uint16]bool{}
	for _, s := range collect(t, c, sockdiag.Filter{States: states, LocalPorts: want}) {
		found[s.Local.Port()] = true
	}
	for i, p := range ports {
		wanted := i == 1 || i == 4 || i == 5 || i == 11
		if found[p] != wanted {
			t.Errorf("port %d found: %v, want %v", p, found[p], wanted)
		}
	}
	// Every port between the first and the last, which is one run, and many runs, which make a long program.
	var even []uint16
	for p := 2; p < 2500; p += 2 {
		even = append(even, uint16(p))
	}
	for s, err := range c.Sockets(sockdiag.Filter{States: states, LocalPorts: append(even, ports...)}) {
		if err != nil {
			t.Fatal(err)
		}
		delete(found, s.Local.Port())
	}
	if len(found) != 0 {
		t.Errorf("not found: %v", found)
	}
	var odd []uint16
	for p := 1; p < 1<<16; p += 2 {
		odd = append(odd, uint16(p))
	}
	for _, err := range c.Sockets(sockdiag.Filter{LocalPorts: odd}) {
		if err == nil {
			t.Fatal("a filter of 32,768 ports was accepted")
		}
	}
}

// A query inside the loop over another one's answer, and a loop that stops early.
func TestNested(t *testing.T) {
	c := open(t)
	l := listen(t, "tcp4", "127.0.0.1:0")
	for range 50 {
		pair(t, l, "127.0.0.1")
	}
	for range 3 {
		n := 0
		for s, err := range c.Sockets(sockdiag.Filter{States: sockdiag.In(sockdiag.Established), LocalPorts: []uint16{addrPort(l.Addr()).Port()}}) {
			if err != nil {
				t.Fatal(err)
			}
			if _, err := c.Get(s.ID()); err != nil {
				t.Fatal(err)
			}
			if n++; n == 10 {
				break
			}
		}
	}
	c.Close()
	if _, err := c.Get(sockdiag.ID{Local: addrPort(l.Addr())}); err == nil {
		t.Error("a closed Conn answers")
	}
}

func ExampleConn_Sockets() {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).AddrPort().Port()

	conn, err := sockdiag.Open()
	if err != nil {
		fmt.Println(err)
		return
	}
	defer conn.Close()
	for s, err := range conn.Sockets(sockdiag.Filter{States: sockdiag.In(sockdiag.Listen), LocalPorts: []uint16{port}}) {
		if err != nil {
			fmt.Println(err)
			return
		}
		fmt.Println(s.State, "on", s.Local.Addr(), "with", s.RecvQueue, "connections waiting")
	}
	// Output: LISTEN on 127.0.0.1 with 0 connections waiting
}

func BenchmarkGet(b *testing.B) {
	c := open(b)
	client, server := pair(b, listen(b, "tcp4", "127.0.0.1:0"), "127.0.0.1")
	id := sockdiag.ID{Local: addrPort(server.LocalAddr()), Remote: addrPort(client.LocalAddr())}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.Get(id); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkDump(b *testing.B) {
	c := open(b)
	l := listen(b, "tcp4", "127.0.0.1:0")
	for range 500 {
		pair(b, l, "127.0.0.1")
	}
	for _, f := range []struct {
		name   string
		filter sockdiag.Filter
	}{
		{"no match", sockdiag.Filter{LocalPorts: []uint16{1}}},
		{"no match in one family", sockdiag.Filter{LocalPorts: []uint16{1}, Family: sockdiag.INET}},
		{"500 of 1000", sockdiag.Filter{LocalPorts: []uint16{addrPort(l.Addr()).Port()}, Info: true}},
		{"listeners", sockdiag.Filter{States: sockdiag.In(sockdiag.Listen), LocalPorts: []uint16{addrPort(l.Addr()).Port()}}},
	} {
		b.Run(f.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				for _, err := range c.Sockets(f.filter) {
					if err != nil {
						b.Fatal(err)
					}
				}
			}
		})
	}
}
