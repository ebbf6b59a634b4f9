//go:build linux

package main

import (
	"fmt"
	"testing"

	"github.com/berth-net/berth/internal/load"
)

// TestWaiting opens a port before its program: clients wait, and none is refused.
func TestWaiting(t *testing.T) {
	need(t, "/usr/bin/python3")
	for _, in := range []surroundings{asRoot, asUser, inContainer2} {
		t.Run(in.name, func(t *testing.T) {
			for _, c := range []struct{ name, held, bound string }{
				{"same form", "0.0.0.0:%d", "0.0.0.0"},
				{"IPv4 where [::] waits", ":%d", "0.0.0.0"},
				{"[::] where [::] waits", ":%d", "::"},
				{"[::] where 127.0.0.1 waits", "127.0.0.1:%d", "::"},
				{"127.0.0.1 where 0.0.0.0 waits", "0.0.0.0:%d", "127.0.0.1"},
			} {
				if in.name != asRoot.name && !soak() && c.bound != "::" {
					continue // each takes seconds
				}
				t.Run(c.name, func(t *testing.T) {
					s := newService(t, in)
					s.start([]string{"--listen", fmt.Sprintf(c.held, s.port)}, "/usr/bin/python3", source("late.py"), portOf(s), c.bound)
					eventually(t, patience, "the port is open", func() bool { return len(listening(t)) > 0 })
					l := s.load(load.Config{OneRequest: 8, URL: s.url(), NoSpread: true})
					s.serving(0)
					l.requests(50)
					s.restart()
					l.requests(50)
					s.flawless(l.stop())
				})
			}
		})
	}
}
