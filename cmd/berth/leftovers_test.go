//go:build linux

package main

import (
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/berth-net/berth/internal/load"
)

// TestLeftovers ends berth in every way there is; each time, gone looks for what is left.
func TestLeftovers(t *testing.T) {
	need(t, "/usr/bin/python3")
	for _, in := range []surroundings{asRoot, asUser, inContainer2} {
		t.Run(in.name, func(t *testing.T) {
			start := func(t *testing.T) *service {
				s := newService(t, in)
				s.start([]string{"--listen", portOf(s)}, "/usr/bin/python3", source("flawed.py"), portOf(s), s.dir+"/flaw")
				s.serving(0)
				return s
			}
			t.Run("stop", func(t *testing.T) { start(t).stop() })
			t.Run("stop after a restart", func(t *testing.T) {
				s := start(t)
				s.restart()
				s.stop()
			})
			t.Run("stop under load", func(t *testing.T) {
				s := start(t)
				l := s.load(load.Config{OneRequest: 4, KeepAlive: 4, Pause: 10 * time.Millisecond})
				l.requests(50)
				s.stop()
				// Whoever comes after the end is refused; nobody who came before is cut.
				r := l.stop()
				if n := failures(r, load.CutShort, load.TimedOut, load.WrongAnswer); n > 0 {
					t.Errorf("%d were cut: %+v", n, r.Failures)
				}
			})
			t.Run("stop --force", func(t *testing.T) {
				s := start(t)
				c, err := net.Dial("tcp", "127.0.0.1:"+portOf(s))
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				s.stop("--force")
			})
			t.Run("SIGTERM", func(t *testing.T) {
				s := start(t)
				s.signal(syscall.SIGTERM)
				s.gone(0)
			})
			t.Run("two SIGTERMs", func(t *testing.T) {
				s := start(t)
				s.signal(syscall.SIGTERM)
				s.signal(syscall.SIGTERM)
				s.gone(0)
			})
			t.Run("the first start dies", func(t *testing.T) {
				s := newService(t, in)
				s.write("flaw", "dies")
				s.start([]string{"--listen", portOf(s)}, "/usr/bin/python3", source("flawed.py"), portOf(s), s.dir+"/flaw")
				s.gone(1)
				if log := s.log(); !strings.Contains(log, "exit status 7") || !strings.Contains(log, "the configuration is wrong") {
					t.Errorf("the log lacks the reason or the last line:\n%s", log)
				}
			})
			t.Run("the first start is never ready", func(t *testing.T) {
				s := newService(t, in)
				s.write("flaw", "deaf")
				s.start([]string{"--ready-timeout", "500ms"}, "/usr/bin/python3", source("flawed.py"), portOf(s), s.dir+"/flaw")
				s.gone(1)
			})
			t.Run("SIGTERM before it is ready", func(t *testing.T) {
				s := newService(t, in)
				s.write("flaw", "slow")
				s.start([]string{"--listen", portOf(s)}, "/usr/bin/python3", source("flawed.py"), portOf(s), s.dir+"/flaw")
				eventually(t, patience, "it has begun", func() bool { return strings.Contains(s.log(), "starting") })
				s.signal(syscall.SIGTERM)
				select {
				case <-s.exited:
				case <-time.After(patience):
					t.Fatal("berth run does not end")
				}
				s.gone(s.cmd.ProcessState.ExitCode())
			})
			t.Run("the address is taken", func(t *testing.T) {
				s := newService(t, in)
				l, err := net.Listen("tcp", "127.0.0.1:"+portOf(s))
				if err != nil {
					t.Fatal(err)
				}
				s.start([]string{"--listen", portOf(s)}, "/usr/bin/python3", source("flawed.py"), portOf(s), s.dir+"/flaw")
				<-s.exited
				l.Close()
				s.gone(1)
				if log := s.log(); !strings.Contains(log, "address already in use") {
					t.Errorf("the log lacks the reason:\n%s", log)
				}
			})
		})
	}
}

func (s *service) signal(sig syscall.Signal) {
	s.t.Helper()
	if err := s.cmd.Process.Signal(sig); err != nil {
		s.t.Fatal(err)
	}
}
