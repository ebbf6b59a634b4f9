package steer

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/berth-net/berth/internal/sys"
	"github.com/cilium/ebpf"
)

// TestMigrate closes a listener on which connections wait, some for accept, some for the end of their handshake.
func TestMigrate(t *testing.T) {
	need(t, Extended)
	for _, shape := range shapes {
		t.Run(shape.name, func(t *testing.T) {
			g, err := NewGroup(Extended)
			must(t, err)
			defer g.Close()
			old := shape.listen(t, 0)
			port := portOf(t, old)
			a, err := g.Add(old)
			must(t, err)

			const each = 100
			dial := func() (conns []net.Conn) {
				for i := range each {
					conn, err := net.DialTimeout("tcp", net.JoinHostPort(shape.targets[i%len(shape.targets)], fmt.Sprint(port)), deadline)
					must(t, err)
					conns = append(conns, conn)
				}
				return conns
			}
			queued := dial()
			if n, _, err := sys.Queue(old); n != each || err != nil {
				t.Fatalf("%d connections wait for accept (%v), not %d", n, err, each)
			}
			// With TCP_DEFER_ACCEPT the client is connected, but for the listener the handshake goes on until data come.
			must(t, sys.SetOption(old, syscall.IPPROTO_TCP, syscall.TCP_DEFER_ACCEPT, []byte{60, 0, 0, 0}))
			halfway := dial()
			if n, _, err := sys.Queue(old); n != each || err != nil {
				t.Fatalf("%d connections wait for accept (%v): TCP_DEFER_ACCEPT does not hold them", n, err)
			}

			// A candidate that is neither steered to nor to get anything.
			idle := shape.listen(t, port)
			defer idle.Close()
			_, err = g.Add(idle)
			must(t, err)
			next := &server{t: t, id: 7, sock: shape.listen(t, port)}
			defer next.close()
			next.slot, err = g.Add(next.sock)
			must(t, err)
			must(t, g.Steer(next.slot))
			must(t, g.Remove(a))
			old.Close()
			next.serve()

			for i, conn := range append(queued, halfway...) {
				conn.SetDeadline(time.Now().Add(deadline))
				if _, err := conn.Write([]byte("x")); err != nil {
					t.Errorf("connection %d: %v", i, err)
				}
				var id [1]byte
				if _, err := io.ReadFull(conn, id[:]); err != nil || id[0] != 7 {
					t.Errorf("connection %d: server %d, %v", i, id[0], err)
				}
				conn.(*net.TCPConn).SetLinger(0)
				conn.Close()
			}
			if n, _, err := sys.Queue(idle); n != 0 || err != nil {
				t.Errorf("%d connections reached the candidate (%v)", n, err)
			}
			if n, err := g.Strays(); n != 0 || err != nil {
				t.Errorf("%d strays (%v)", n, err)
			}
		})
	}
}

// TestLeft steers to a listener that was shut down behind the group's back.
func TestLeft(t *testing.T) {
	modes(t, func(t *testing.T, m Mode) {
		g, err := NewGroup(m)
		must(t, err)
		defer g.Close()
		one := shapes[0].listen(t, 0)
		defer one.Close()
		two := shapes[0].listen(t, portOf(t, one))
		defer two.Close()
		_, err = g.Add(one)
		must(t, err)
		slot, err := g.Add(two)
		must(t, err)
		must(t, sys.StopListening(two))
		if err := g.Steer(slot); !errors.Is(err, ErrLeft) {
			t.Errorf("Steer: %v", err)
		}
		conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", portOf(t, one)))
		must(t, err)
		conn.Close()
	})
}

// TestStrays shuts the steered listener down behind the group's back.
func TestStrays(t *testing.T) {
	need(t, Extended)
	g, err := NewGroup(Extended)
	must(t, err)
	defer g.Close()
	one, two := &server{t: t, id: 1, sock: shapes[0].listen(t, 0)}, &server{t: t, id: 2}
	two.sock = shapes[0].listen(t, portOf(t, one.sock))
	for _, s := range []*server{one, two} {
		var err error
		s.slot, err = g.Add(s.sock)
		must(t, err)
		s.serve()
		defer s.close()
	}
	must(t, sys.StopListening(one.sock))
	for range 10 {
		if id, err := ask(nil, fmt.Sprintf("127.0.0.1:%d", portOf(t, two.sock))); id != 2 || err != nil {
			t.Errorf("server %d, %v", id, err)
		}
	}
	if n, err := g.Strays(); n != 10 || err != nil {
		t.Errorf("%d strays (%v), not 10", n, err)
	}
	must(t, g.Steer(two.slot))
	must(t, g.Remove(one.slot))
}

// TestNothingLeft looks for descriptors and BPF objects of a group that is closed.
func TestNothingLeft(t *testing.T) {
	modes(t, func(t *testing.T, m Mode) {
		run := func() (maps []ebpf.MapID, program ebpf.ProgramID) {
			g, err := NewGroup(m)
			must(t, err)
			if e, ok := g.engine.(*extended); ok {
				for _, m := range []*ebpf.Map{e.socks, e.config, e.probes} {
					info, err := m.Info()
					must(t, err)
					id, _ := info.ID()
					maps = append(maps, id)
				}
				info, err := e.program.Info()
				must(t, err)
				program, _ = info.ID()
			}
			var socks []*os.File
			var port uint16
			for range 4 {
				sock := shapes[0].listen(t, port)
				port = portOf(t, sock)
				socks = append(socks, sock)
				_, err := g.Add(sock)
				must(t, err)
			}
			must(t, g.Steer(3))
			must(t, g.Remove(1)) // Classic: must stay a while
			must(t, g.Remove(0))
			must(t, g.Close())
			for _, sock := range socks {
				sock.Close()
			}
			return maps, program
		}
		run() // what is opened once and for all, is now
		before := descriptors(t)
		maps, program := run()
		if after := descriptors(t); after != before {
			t.Errorf("%d descriptors, %d before", after, before)
		}
		if m != Extended {
			return
		}
		// The kernel frees them some time after the last reference is gone.
		for end := time.Now().Add(deadline); ; {
			alive := 0
			for _, id := range maps {
				if m, err := ebpf.NewMapFromID(id); !errors.Is(err, os.ErrNotExist) {
					alive++
					m.Close()
				}
			}
			if p, err := ebpf.NewProgramFromID(program); !errors.Is(err, os.ErrNotExist) {
				alive++
				p.Close()
			}
			if alive == 0 {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("%d BPF objects are left", alive)
			}
			must(t, sys.WaitGracePeriod())
		}
	})
}

func descriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	return len(entries)
}
