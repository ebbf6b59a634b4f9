//go:build linux

package main

import (
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/berth-net/berth/internal/load"
	"github.com/berth-net/berth/internal/sys"
)

// times is how often something fails in a test: n, in soak 20.
func times(n int) int {
	if soak() {
		return 20
	}
	return n
}

// TestKill kills programs with -9 under load: only those are cut whom the dead process had accepted.
func TestKill(t *testing.T) {
	kill := func(t *testing.T, s *service, p program) {
		const clients = 12 + 4
		s.start(nil, p.command(s, 0)...)
		s.serving(0)
		l := s.load(load.Config{OneRequest: 12, KeepAlive: 4, Pause: 100 * time.Millisecond, Timeout: 30 * time.Second})
		l.requests(100)
		n := times(5)
		for range n {
			g := s.serving(0)
			pid := g.PID
			if err := sys.Kill(pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			s.serving(g.Number)
			l.requests(50)
		}
		r := l.stop()
		eventually(t, patience, "the dead are cleared away", func() bool {
			st, err := s.status()
			return err == nil && len(st.Serving) == 1 && len(st.Ledger) == min(n+1, 20)
		})
		s.ledger()
		theirs := failures(r, load.Reset, load.CutShort, load.Race)
		t.Logf("%d requests, %d of them cut in %d kills, longest wait %.0f ms", r.Requests, theirs, n, r.LongestWaitMS)
		if others := r.Failed - theirs; others > 0 || theirs > int64(n*clients) {
			t.Errorf("%d failures, at most %d cut connections wanted: %+v", r.Failed, n*clients, r.Failures)
		}
	}
	choice := func(p program) bool { return !p.redis && p.name != "nginx daemon" }
	each(t, asRoot, choice, kill)
	each(t, asUser, func(p program) bool { return choice(p) && few(p) }, kill)
	each(t, inContainer2, func(p program) bool { return choice(p) && few(p) && (soak() || p.name == "go") }, kill)
}

// TestCandidate restarts into programs that fail: what served goes on, and nobody notices.
func TestCandidate(t *testing.T) {
	need(t, "/usr/bin/python3")
	for _, in := range []surroundings{asRoot, asUser, inContainer, inContainer2} {
		t.Run(in.name, func(t *testing.T) {
			for _, c := range []struct {
				flaw, reason, output string
				n                    int
			}{
				{"dies", "exit status 7", "the configuration is wrong", times(5)},
				{"deaf", "accepts no connection", "waiting for the database", times(2)},
			} {
				t.Run(c.flaw, func(t *testing.T) {
					s := newService(t, in)
					s.start([]string{"--ready-timeout", "1s"}, "/usr/bin/python3", source("flawed.py"), portOf(s), s.dir+"/flaw")
					g := s.serving(0)
					s.write("flaw", c.flaw)
					l := s.load(load.Config{OneRequest: 12, KeepAlive: 4, Pause: 100 * time.Millisecond})
					l.requests(100)
					for range c.n {
						out, errs, code := s.command("restart")
						if code != 1 || !strings.Contains(errs, c.reason) || !strings.Contains(errs, c.output) {
							t.Fatalf("exit status %d, want 1, %q and %q:\n%s%s", code, c.reason, c.output, out, errs)
						}
						if now := s.serving(0); now.PID != g.PID {
							t.Fatalf("pid %d serves, want %d as before", now.PID, g.PID)
						}
						l.requests(50)
					}
					s.flawless(l.stop())
					// And it can still be restarted.
					s.write("flaw", "")
					s.restart()
				})
			}
		})
	}
}
