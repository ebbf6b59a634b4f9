package drain

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/berth-net/berth/sockdiag"
	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// packet is an Ethernet frame, which is what the kernel's test run wants.
func packet(v6 bool, hopByHop bool, protocol byte, payload string) []byte {
	tcp := make([]byte, 32) // 12 bytes of options
	binary.BigEndian.PutUint32(tcp[4:], 0xfffffff0)
	tcp[12] = 8 << 4
	frame := make([]byte, 12, 128)
	if !v6 {
		frame = append(frame, 0x08, 0x00)
		ip := make([]byte, 20)
		ip[0], ip[9] = 0x45, protocol
		frame = append(frame, ip...)
	} else {
		frame = append(frame, 0x86, 0xdd)
		ip := make([]byte, 40)
		ip[0], ip[6] = 0x60, protocol
		if hopByHop {
			ip[6] = 0
			ip = append(ip, protocol, 0, 0, 0, 0, 0, 0, 0)
		}
		frame = append(frame, ip...)
	}
	return append(append(frame, tcp...), payload...)
}

func TestOrderReadsPackets(t *testing.T) {
	o, err := NewOrder(cgroup(t))
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	for _, tt := range []struct {
		name    string
		program *ebpf.Program
		packet  []byte
		want    *value // times are only there or not
	}{
		{"in", o.programs[0], packet(false, false, 6, "hello"), &value{LastIn: 1, InEnd: 0xfffffff5}},
		{"in, IPv6", o.programs[0], packet(true, false, 6, strings.Repeat("x", 17)), &value{LastIn: 1, InEnd: 1}},
		{"in, BIG TCP", o.programs[0], packet(true, true, 6, "hello"), &value{LastIn: 1, InEnd: 0xfffffff5}},
		{"in, without payload", o.programs[0], packet(false, false, 6, ""), nil},
		{"in, UDP", o.programs[0], packet(false, false, 17, "hello"), nil},
		{"in, ICMPv6", o.programs[0], packet(true, false, 58, "hello"), nil},
		{"out", o.programs[1], packet(false, false, 6, "hello\n"), &value{LastOut: 1, OutEnd: 0xfffffff6, Responses: 1}},
		{"out, without payload", o.programs[1], packet(true, false, 6, ""), nil},
		{"out, a byte", o.programs[1], packet(false, false, 6, "\n"), &value{LastOut: 1, OutEnd: 0xfffffff1, Responses: 1}},
		{"out, a chunk", o.programs[1], packet(false, false, 6, "5\r\nhello\r\n"), &value{LastOut: 1, OutEnd: 0xfffffffa, Responses: 1, Open: endsLine}},
		{"out, the last chunk", o.programs[1], packet(false, false, 6, "0\r\n\r\n"), &value{LastOut: 1, OutEnd: 0xfffffff5, Responses: 1, Open: endsBody}},
		{"out, two chunks", o.programs[1], packet(false, false, 6, "1\r\nx\r\n0\r\n\r\n"), &value{LastOut: 1, OutEnd: 0xfffffffb, Responses: 1, Open: endsBody}},
		{"out, a chunk of a line", o.programs[1], packet(false, false, 6, "4\r\n10\r\n\r\n"), &value{LastOut: 1, OutEnd: 0xfffffff9, Responses: 1, Open: endsHead}},
		{"out, a header", o.programs[1], packet(true, false, 6, "A: b\r\n\r\n"), &value{LastOut: 1, OutEnd: 0xfffffff8, Responses: 1, Open: endsHead}},
	} {
		if verdict, _, err := tt.program.Test(tt.packet); err != nil || verdict != 1 {
			t.Fatalf("%s: verdict %d, %v; want 1, to let it pass", tt.name, verdict, err)
		}
		var got []value
		var key uint64
		var v value
		for entries := o.activities.Iterate(); entries.Next(&key, &v); {
			v.LastIn, v.LastOut = min(v.LastIn, 1), min(v.LastOut, 1)
			got = append(got, v)
		}
		for _, key := range keys(o) {
			if err := o.activities.Delete(key); err != nil {
				t.Fatal(err)
			}
		}
		if tt.want == nil && len(got) != 0 || tt.want != nil && (len(got) != 1 || got[0] != *tt.want) {
			t.Errorf("%s: noted %+v, want %+v", tt.name, got, tt.want)
		}
	}
}

func keys(o *Order) (all []uint64) {
	var key uint64
	var v value
	for entries := o.activities.Iterate(); entries.Next(&key, &v); {
		all = append(all, key)
	}
	return all
}

func TestOrderOfRequests(t *testing.T) {
	s := start(t, true, "go")
	conn, cookie := dial(t, s)
	if _, ok := s.order.Lookup(cookie); ok {
		t.Error("an activity before any payload")
	}
	conn.Write([]byte("GET /slow HTTP/1.1\r\nHost: test\r\n\r\n"))
	until(t, "a request in flight", func() bool {
		a, ok := s.order.Lookup(cookie)
		return ok && a.LastIn > 0 && a.LastOut == 0
	})
	r := bufio.NewReader(conn)
	if _, err := r.ReadString('o'); err != nil { // of "hello"
		t.Fatal(err)
	}
	a, _ := s.order.Lookup(cookie)
	if a.LastOut-a.LastIn < 150*ms || a.Responses != 1 || a.Open {
		t.Errorf("after a response: %+v", a)
	}
	conn.Write([]byte("GET /stream HTTP/1.1\r\nHost: test\r\n\r\n"))
	var body []byte
	for !bytes.HasSuffix(body, []byte("\r\n0\r\n\r\n")) {
		b, err := r.ReadByte()
		if err != nil {
			t.Fatal(err)
		}
		if body = append(body, b); bytes.HasSuffix(body, []byte("\r\nhello\n\r\n")) {
			// Another chunk comes 20 ms later, so what the last one left behind is still there.
			if a, _ := s.order.Lookup(cookie); !a.Open || a.Responses != 2 {
				t.Errorf("within a stream: %+v", a)
			}
		}
	}
	if a, _ := s.order.Lookup(cookie); a.Open || !a.Complete || a.Gap < 15*ms || a.LastOut <= a.LastIn {
		t.Errorf("after a stream: %+v", a)
	}
}

// The response to an earlier request that is sent again after the next request has come must not look like an answer to that.
func TestOrderIgnoresRetransmissions(t *testing.T) {
	s := start(t, true, "stuck")
	conn, cookie := dial(t, s)
	line := func() {
		if _, err := io.WriteString(conn, "line\n"); err != nil {
			t.Fatal(err)
		}
	}
	line()
	if _, err := bufio.NewReader(conn).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	// The client's socket refuses every packet, as if it were lost on the way.
	controlErr := raw.Control(func(fd uintptr) {
		//lint:ignore SA1019 the alternative only assembles the filter
		err = syscall.AttachLsf(int(fd), []syscall.SockFilter{{Code: syscall.BPF_RET | syscall.BPF_K}})
	})
	if controlErr != nil || err != nil {
		t.Fatal(controlErr, err)
	}
	line()
	until(t, "a second response", func() bool { a, _ := s.order.Lookup(cookie); return a.Responses == 2 })
	line()
	var before Activity
	until(t, "a third request", func() bool {
		before, _ = s.order.Lookup(cookie)
		return before.LastIn > before.LastOut
	})
	diag, err := sockdiag.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer diag.Close()
	client := conn.LocalAddr().(*net.TCPAddr).AddrPort()
	until(t, "a retransmission each way", func() bool {
		server, err := diag.Get(sockdiag.ID{Local: s.address, Remote: client})
		mine, err2 := diag.Get(sockdiag.ID{Local: client, Remote: s.address})
		return err == nil && err2 == nil && server.Info.BytesRetrans > 0 && mine.Info.BytesRetrans > 0
	})
	if after, _ := s.order.Lookup(cookie); after != before {
		t.Errorf("retransmissions changed\n%+v to\n%+v", before, after)
	}
}

// dial connects, and finds the cookie of the server's end.
func dial(t *testing.T, s *server) (net.Conn, uint64) {
	t.Helper()
	conn, err := net.Dial("tcp", s.address.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	diag, err := sockdiag.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer diag.Close()
	var end sockdiag.Socket
	until(t, "accept", func() bool {
		end, err = diag.Get(sockdiag.ID{Local: s.address, Remote: conn.LocalAddr().(*net.TCPAddr).AddrPort()})
		return err == nil && end.Inode != 0
	})
	return conn, end.Cookie
}

func TestOrderLeavesNothing(t *testing.T) {
	dir := cgroup(t)
	o, err := NewOrder(dir)
	if err != nil {
		t.Fatal(err)
	}
	mapInfo, err := o.activities.Info()
	if err != nil {
		t.Fatal(err)
	}
	mapID, _ := mapInfo.ID()
	attached := func() (n int) {
		for _, at := range []ebpf.AttachType{ebpf.AttachCGroupInetIngress, ebpf.AttachCGroupInetEgress} {
			f, err := os.Open(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			r, err := link.QueryPrograms(link.QueryOptions{Target: int(f.Fd()), Attach: at})
			if err != nil {
				t.Fatal(err)
			}
			n += len(r.Programs)
		}
		return n
	}
	if n := attached(); n != 2 {
		t.Errorf("%d programs attached, want 2", n)
	}
	if err := o.Close(); err != nil {
		t.Error(err)
	}
	if n := attached(); n != 0 {
		t.Errorf("%d programs attached after Close", n)
	}
	until(t, "the end of the map", func() bool {
		m, err := ebpf.NewMapFromID(mapID)
		if err == nil {
			m.Close()
		}
		return errors.Is(err, os.ErrNotExist)
	})
}

func TestOrderRefused(t *testing.T) {
	o, err := NewOrder(t.TempDir())
	if err == nil {
		o.Close()
		t.Fatal("attached to a directory that isn't a cgroup")
	}
	if !strings.Contains(err.Error(), "can't note the order of packets in "+t.TempDir()[:5]) {
		t.Errorf("unexpected error: %v", err)
	}
}

// BenchmarkOrder is what a packet costs, the kernel's test run included.
func BenchmarkOrder(b *testing.B) {
	o, err := NewOrder(cgroup(b))
	if err != nil {
		b.Fatal(err)
	}
	defer o.Close()
	for _, bb := range []struct {
		name    string
		program *ebpf.Program
		packet  []byte
	}{
		{"in", o.programs[0], packet(false, false, 6, strings.Repeat("x", 100))},
		{"in, ACK", o.programs[0], packet(false, false, 6, "")},
		{"in, UDP", o.programs[0], packet(false, false, 17, "x")},
		{"out", o.programs[1], packet(false, false, 6, strings.Repeat("x", 1000))},
		{"out, ACK", o.programs[1], packet(false, false, 6, "")},
	} {
		b.Run(bb.name, func(b *testing.B) {
			_, each, err := bb.program.Benchmark(bb.packet, max(b.N, 1000), b.ResetTimer)
			if err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(float64(each)/float64(time.Nanosecond), "ns/packet")
		})
	}
}
