//go:build linux

package main

import (
	"io"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/berth-net/berth/internal/load"
	"github.com/berth-net/berth/internal/supervisor"
)

// shape is a way to make listeners; the C program has one of the same name.
type shape struct {
	name      string
	urls      []string // PORT2 is 10,000 above PORT
	listeners int      // that berth holds, a generation
	root      bool     // only root can
}

var shapes = []shape{
	{"ipv4", []string{"http://127.0.0.1:PORT/"}, 1, false},
	{"wildcard", []string{"http://127.0.0.1:PORT/"}, 1, false},
	{"ipv6", []string{"http://[::1]:PORT/"}, 1, false},
	{"v6only", []string{"http://[::1]:PORT/"}, 1, false},
	{"dual-stack", []string{"http://127.0.0.1:PORT/", "http://[::1]:PORT/"}, 1, false},
	{"v4-mapped", []string{"http://127.0.0.1:PORT/"}, 1, false},
	{"two forms", []string{"http://127.0.0.1:PORT/", "http://[::1]:PORT/"}, 2, false},
	{"two ports", []string{"http://127.0.0.1:PORT/", "http://127.0.0.1:PORT2/"}, 2, false},
	{"reuseport", []string{"http://127.0.0.1:PORT/"}, 4, false},
	{"fork", []string{"http://127.0.0.1:PORT/"}, 1, false},
	{"setuid", []string{"http://127.0.0.1:PORT/"}, 1, true},
	{"epoll first", []string{"http://127.0.0.1:PORT/"}, 1, false},
	{"mptcp", []string{"http://127.0.0.1:PORT/"}, 1, false},
	{"mptcp epoll first", []string{"http://127.0.0.1:PORT/", "http://[::1]:PORT/"}, 1, false},
	{"others untouched", []string{"http://127.0.0.1:PORT/"}, 1, false},
	{"listen twice", []string{"http://127.0.0.1:PORT/"}, 1, false},
	{"bind twice", []string{"http://127.0.0.1:PORT/"}, 1, false},
	{"bind again", []string{"http://127.0.0.1:PORT/"}, 1, false},
	{"bind and go", []string{"http://127.0.0.1:PORT/"}, 1, false},
}

// adopters are the C program, built in each way that it can call the kernel.
var adopters = []struct {
	name  string
	build func(t *testing.T) string
}{
	{"native", built("adopt", "gcc", "-O1", "-o", "OUT", "SRC/adopt.c")},
	{"32 bits", built("adopt32", "gcc", "-m32", "-O1", "-o", "OUT", "SRC/adopt.c")},
	{"socketcall", built("adoptcall", "gcc", "-m32", "-DSOCKETCALL", "-O1", "-o", "OUT", "SRC/adopt.c")},
}

// builds32 reports whether gcc can make programs for i386.
func builds32() bool {
	cmd := exec.Command("gcc", "-m32", "-xc", "-o", os.DevNull, "-")
	cmd.Stdin = strings.NewReader("#include <stdlib.h>\nint main(void) { return 0; }\n")
	return cmd.Run() == nil
}

// TestAdoption holds listeners of every shape through a restart.
func TestAdoption(t *testing.T) {
	need(t, "gcc")
	for _, in := range []surroundings{asRoot, asUser, inContainer, inContainer2} {
		t.Run(in.name, func(t *testing.T) {
			for _, a := range adopters {
				t.Run(a.name, func(t *testing.T) {
					if a.name != "native" {
						if runtime.GOARCH != "amd64" {
							t.Skip("only amd64 runs programs for i386")
						}
						if !builds32() {
							skip(t, "gcc-multilib is not installed")
						}
					}
					path := a.build(t)
					for _, sh := range shapes {
						// What depends on the way into the kernel is the decoding of calls; a few shapes tell.
						if a.name != "native" && !soak() && sh.name != "dual-stack" && sh.name != "reuseport" && sh.name != "epoll first" && sh.name != "bind twice" {
							continue
						}
						t.Run(sh.name, func(t *testing.T) { adopt(t, in, path, sh) })
					}
				})
			}
		})
	}
}

func adopt(t *testing.T, in surroundings, path string, sh shape) {
	if sh.root && (in.uid != 0 || os.Geteuid() != 0) {
		t.Skip("it has to be root to change its uid")
	}
	s := newService(t, in)
	s.start([]string{"--ready-timeout", "10s"}, path, sh.name, portOf(s))
	if in.adoption == "replace" && strings.HasSuffix(sh.name, "epoll first") {
		// Without pidfd_getfd nobody can move what is registered with the program's epoll: it has to be said.
		s.gone(1)
		if log := s.log(); !strings.Contains(log, "epoll registrations") {
			t.Errorf("the log lacks the reason:\n%s", log)
		}
		return
	}
	g := s.serving(0)
	if len(g.Listeners) != sh.listeners {
		t.Errorf("berth holds %d listeners, want %d: %+v", len(g.Listeners), sh.listeners, g.Listeners)
	}
	var loads []*loading
	for _, u := range sh.urls {
		u = strings.NewReplacer("PORT2", strconv.Itoa(s.port+10000), "PORT", portOf(s)).Replace(u)
		loads = append(loads, s.load(load.Config{URL: u, OneRequest: 4, PauseBetween: time.Millisecond, Expect: "hello " + sh.name}))
	}
	more := func() {
		for _, l := range loads {
			l.requests(50)
		}
	}
	more()
	if sh.name == "reuseport" {
		s.spreads(sh.listeners)
	}
	s.restart()
	more()
	if sh.name == "reuseport" {
		s.spreads(sh.listeners)
	}
	for _, l := range loads {
		s.flawless(l.stop())
	}
	if g := s.serving(1); len(g.Listeners) != sh.listeners {
		t.Errorf("berth holds %d listeners after a restart, want %d: %+v", len(g.Listeners), sh.listeners, g.Listeners)
	}
	st, err := s.status()
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range st.Serving {
		if g.Phase != supervisor.Serving {
			t.Errorf("generation %d is %s", g.Number, g.Phase)
		}
	}
}

// spreads waits until each of a program's listeners has answered.
func (s *service) spreads(listeners int) {
	s.t.Helper()
	client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	answered := map[string]bool{}
	for range 500 {
		resp, err := client.Get(s.url())
		if err != nil {
			s.t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			s.t.Fatal(err)
		}
		_, listener, _ := strings.Cut(string(body), "listener ")
		if answered[listener] = true; len(answered) == listeners {
			return
		}
	}
	s.t.Errorf("of %d listeners, only %d have got a connection", listeners, len(answered))
}
