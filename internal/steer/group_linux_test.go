package steer

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"

	"github.com/berth-net/berth/internal/sys"
)

// modes runs a test in each mode that this process may use.
func modes(t *testing.T, test func(t *testing.T, m Mode)) {
	for _, m := range []Mode{Extended, Classic} {
		t.Run(m.String(), func(t *testing.T) {
			need(t, m)
			test(t, m)
		})
	}
}

// need skips a test where the process is not allowed the mode, and fails it where that is a surprise.
func need(t *testing.T, m Mode) {
	t.Helper()
	best, why := Best()
	switch {
	case best >= m:
	case m == Extended && os.Getuid() != 0:
		t.Skip("eBPF needs root: ", why)
	default:
		t.Fatalf("%v should work here, but: %v", m, why)
	}
}

// TestUnderLoad adds, steers, probes and removes listeners at random while clients connect.
func TestUnderLoad(t *testing.T) {
	modes(t, func(t *testing.T, m Mode) {
		for _, shape := range shapes {
			t.Run(shape.name, func(t *testing.T) {
				steps := 150
				if testing.Short() {
					steps = 50
				}
				underLoad(t, m, shape, steps)
			})
		}
	})
}

func underLoad(t *testing.T, m Mode, shape shape, steps int) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))

	g, err := NewGroup(m)
	must(t, err)
	var port uint16
	var lastID byte
	servers := map[Slot]*server{}
	add := func() *server {
		lastID++
		s := &server{t: t, id: lastID, sock: shape.listen(t, port)}
		port = portOf(t, s.sock)
		// The clients are there already: what the new listener gets before Steer is seen as a wrong answer.
		s.serve()
		slot, err := g.Add(s.sock)
		must(t, err)
		if servers[slot] != nil {
			t.Fatalf("slot %d given twice", slot)
		}
		s.slot = slot
		servers[slot] = s
		return s
	}
	first := add()
	clients := startTraffic(8, shape.targets, port, first.id)
	steered := []*server{first}
	var probing *server
	from := freeSource(t, shape.targets[0])

	ids := func(servers []*server) (ids []byte) {
		for _, s := range servers {
			ids = append(ids, s.id)
		}
		return ids
	}
	steer := func(to []*server) {
		var slots []Slot
		for _, s := range to {
			slots = append(slots, s.slot)
		}
		clients.allow(append(ids(steered), ids(to)...)...)
		must(t, g.Steer(slots...))
		clients.allow(ids(to)...)
		steered = to
	}
	probe := func(s *server) {
		addr := netip.AddrPort{}
		if s != nil {
			addr = from.AddrPort()
		}
		if probing != nil {
			must(t, g.Probe(probing.slot, netip.AddrPort{}))
		}
		if s != nil {
			must(t, g.Probe(s.slot, addr))
		}
		probing = s
	}
	any := func(but []*server) *server {
		var all []*server
		for slot := range Slot(Slots) {
			if s := servers[slot]; s != nil && !slices.Contains(but, s) {
				all = append(all, s)
			}
		}
		if len(all) == 0 {
			return nil
		}
		return all[random.IntN(len(all))]
	}
	for range steps {
		switch random.IntN(12) {
		case 0, 1, 2:
			if len(servers) < 4 {
				add()
			}
		case 3, 4, 5:
			to := []*server{any(nil)}
			if second := any(to); second != nil && random.IntN(3) == 0 {
				to = append(to, second)
			}
			steer(to)
		case 6:
			probe(any(nil))
			id, err := ask(from, net.JoinHostPort(shape.targets[0], fmt.Sprint(port)))
			must(t, err)
			if id != probing.id {
				t.Errorf("server %d answered the prober, not %d", id, probing.id)
			}
			if random.IntN(2) == 0 {
				probe(nil)
			}
		case 7, 8, 9, 10:
			s := any(steered)
			if s == nil {
				break
			}
			if m == Classic {
				clients.pass(1) // nothing migrates: what began before must be over
			}
			if s == probing {
				probing = nil
			}
			must(t, g.Remove(s.slot))
			delete(servers, s.slot)
			s.close()
		case 11:
			clients.pass(3)
		}
	}
	clients.pass(10)
	clients.stop(t)
	if n, err := g.Strays(); n != 0 || err != nil {
		t.Errorf("%d strays (%v)", n, err)
	}
	must(t, g.Close())
	for _, s := range servers {
		s.close()
	}
}

// TestProbe tells sources apart by address and by port.
func TestProbe(t *testing.T) {
	modes(t, func(t *testing.T, m Mode) {
		for _, shape := range shapes {
			for _, target := range shape.targets {
				t.Run(shape.name+" "+target, func(t *testing.T) {
					g, err := NewGroup(m)
					must(t, err)
					defer g.Close()
					var servers []*server
					var port uint16
					for i := range 3 {
						s := &server{t: t, id: byte(i), sock: shape.listen(t, port)}
						port = portOf(t, s.sock)
						s.slot, err = g.Add(s.sock)
						must(t, err)
						s.serve()
						defer s.close()
						servers = append(servers, s)
					}
					to := net.JoinHostPort(target, fmt.Sprint(port))
					ip := target
					if ip == "127.0.0.3" {
						ip = "127.0.0.1"
					}
					from := freeSource(t, ip)
					check := func(from *net.TCPAddr, want byte) {
						t.Helper()
						for range 20 {
							id, err := ask(from, to)
							must(t, err)
							if id != want {
								t.Fatalf("server %d answered %v, not %d", id, from, want)
							}
						}
					}
					otherPort := freeSource(t, ip)
					check(from, 0)
					must(t, g.Probe(servers[1].slot, from.AddrPort()))
					check(from, 1)
					check(otherPort, 0)
					if from.IP.To4() != nil {
						check(&net.TCPAddr{IP: net.IPv4(127, 0, 0, 2), Port: from.Port}, 0)
						// The same source, written as a v4-mapped address.
						mapped := netip.AddrPortFrom(netip.AddrFrom16(from.AddrPort().Addr().As16()), uint16(from.Port))
						must(t, g.Probe(servers[1].slot, netip.AddrPort{}))
						must(t, g.Probe(servers[1].slot, mapped))
						check(from, 1)
					}
					if err := g.Probe(servers[2].slot, from.AddrPort()); err == nil {
						t.Error("one source probes two listeners")
					}
					must(t, g.Probe(servers[2].slot, otherPort.AddrPort()))
					check(otherPort, 2)
					check(from, 1)
					must(t, g.Steer(servers[2].slot))
					check(from, 1)
					check(freeSource(t, ip), 2)
					must(t, g.Probe(servers[1].slot, netip.AddrPort{}))
					check(from, 2)
				})
			}
		}
	})
}

// TestSpread steers to several listeners.
func TestSpread(t *testing.T) {
	modes(t, func(t *testing.T, m Mode) {
		g, err := NewGroup(m)
		must(t, err)
		defer g.Close()
		var slots []Slot
		var port uint16
		const count = 5
		for i := range count {
			s := &server{t: t, id: byte(i), sock: shapes[0].listen(t, port)}
			port = portOf(t, s.sock)
			s.slot, err = g.Add(s.sock)
			must(t, err)
			s.serve()
			defer s.close()
			slots = append(slots, s.slot)
		}
		answers := func() (got [count]int) {
			for range 400 {
				id, err := ask(nil, fmt.Sprintf("127.0.0.1:%d", port))
				must(t, err)
				got[id]++
			}
			return got
		}
		must(t, g.Steer(slots[1], slots[3], slots[4], slots[3]))
		// 400 over three: fewer than 60 for one is less likely than one in 10^15.
		if got := answers(); got[0] != 0 || got[2] != 0 || got[1] < 60 || got[3] < 60 || got[4] < 60 {
			t.Errorf("answers by server: %v", got)
		}
		must(t, g.Remove(slots[3]))
		if got := answers(); got[0] != 0 || got[2] != 0 || got[1] < 60 || got[4] < 60 {
			t.Errorf("answers by server after one was removed: %v", got)
		}
	})
}

func TestRefusals(t *testing.T) {
	if _, err := NewGroup(None); !errors.Is(err, ErrNone) {
		t.Errorf("NewGroup(None): %v", err)
	}
	modes(t, func(t *testing.T, m Mode) {
		g, err := NewGroup(m)
		must(t, err)
		defer g.Close()
		one := shapes[0].listen(t, 0)
		defer one.Close()
		a, err := g.Add(one)
		must(t, err)
		if err := g.Steer(); !errors.Is(err, ErrSlot) {
			t.Errorf("Steer to nothing: %v", err)
		}
		if err := g.Steer(a + 1); !errors.Is(err, ErrSlot) {
			t.Errorf("Steer to an empty slot: %v", err)
		}
		if err := g.Probe(a+1, netip.AddrPort{}); !errors.Is(err, ErrSlot) {
			t.Errorf("Probe of an empty slot: %v", err)
		}
		if err := g.Remove(Slots + 7); !errors.Is(err, ErrSlot) {
			t.Errorf("Remove of an empty slot: %v", err)
		}
		other := shapes[0].listen(t, 0) // another port
		defer other.Close()
		if _, err := g.Add(other); !errors.Is(err, ErrForm) {
			t.Errorf("Add of another form: %v", err)
		}
		idle, err := sys.StreamSocket(sys.INET)
		must(t, err)
		defer idle.Close()
		if _, err := g.Add(idle); !errors.Is(err, ErrForm) {
			t.Errorf("Add of a socket that does not listen: %v", err)
		}
		two := shapes[0].listen(t, portOf(t, one))
		defer two.Close()
		b, err := g.Add(two)
		must(t, err)
		if err := g.Remove(a); !errors.Is(err, ErrSteered) {
			t.Errorf("Remove of the steered listener: %v", err)
		}
		must(t, g.Steer(b))
		must(t, g.Remove(a))
		if err := g.Steer(a); !errors.Is(err, ErrSlot) {
			t.Errorf("Steer to a removed listener: %v", err)
		}

		lc := net.ListenConfig{}
		lc.SetMultipathTCP(true)
		ln, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
		must(t, err)
		defer ln.Close()
		sock, err := ln.(*net.TCPListener).File()
		must(t, err)
		defer sock.Close()
		if kind, err := sys.KindOf(sock); err != nil || kind.Protocol != sys.ProtoMPTCP {
			t.Skip("no MPTCP here: ", kind.Protocol, err)
		}
		if _, err := g.Add(sock); !errors.Is(err, ErrMPTCP) {
			t.Errorf("Add of an MPTCP listener: %v", err)
		}
	})
}

func TestFull(t *testing.T) {
	modes(t, func(t *testing.T, m Mode) {
		g, err := NewGroup(m)
		must(t, err)
		defer g.Close()
		var port uint16
		for range Slots {
			sock := shapes[0].listen(t, port)
			defer sock.Close()
			port = portOf(t, sock)
			if _, err := g.Add(sock); err != nil {
				t.Fatal(err)
			}
		}
		sock := shapes[0].listen(t, port)
		defer sock.Close()
		if _, err := g.Add(sock); !errors.Is(err, ErrFull) {
			t.Errorf("Add to a full group: %v", err)
		}
	})
}
