//go:build linux

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/berth-net/berth/internal/load"
)

// program is a server that knows nothing of berth.
type program struct {
	name    string
	needs   []string
	redis   bool // speaks RESP, not HTTP
	delays  bool // its handler can take its time
	command func(s *service, delay time.Duration) []string
}

var programs = []program{
	{"python http.server", []string{"/usr/bin/python3"}, false, false, func(s *service, _ time.Duration) []string {
		s.write("index.html", "hello\n")
		return []string{"/usr/bin/python3", "-m", "http.server", portOf(s), "--directory", s.dir}
	}},
	{"python kept alive", []string{"/usr/bin/python3"}, false, true, func(s *service, delay time.Duration) []string {
		return []string{"/usr/bin/python3", source("server.py"), portOf(s), seconds(delay)}
	}},
	{"go", nil, false, true, func(s *service, delay time.Duration) []string {
		return []string{goServer(s.t), portOf(s), seconds(delay)}
	}},
	{"node", []string{"node"}, false, true, func(s *service, delay time.Duration) []string {
		return []string{"node", source("server.js"), portOf(s), seconds(delay)}
	}},
	{"java HttpServer", []string{"java", "javac"}, false, true, func(s *service, delay time.Duration) []string {
		return append(java(s.t), "HttpServer", portOf(s), seconds(delay))
	}},
	{"java ServerSocket", []string{"java", "javac"}, false, true, func(s *service, delay time.Duration) []string {
		return append(java(s.t), "SocketServer", portOf(s), seconds(delay))
	}},
	{"nginx", []string{"/usr/sbin/nginx"}, false, false, func(s *service, _ time.Duration) []string { return nginx(s, "off") }},
	{"nginx daemon", []string{"/usr/sbin/nginx"}, false, false, func(s *service, _ time.Duration) []string { return nginx(s, "on") }},
	{"gunicorn", []string{"/usr/bin/gunicorn"}, false, true, func(s *service, delay time.Duration) []string {
		return []string{"/usr/bin/env", "DELAY=" + seconds(delay), "PYTHONDONTWRITEBYTECODE=1", "/usr/bin/gunicorn", "--workers", "2",
			"--bind", "0.0.0.0:" + portOf(s), "--chdir", filepath.Dir(source("app.py")), "app:app"}
	}},
	{"redis", []string{"redis-server"}, true, false, func(s *service, _ time.Duration) []string {
		return []string{"redis-server", "--port", portOf(s), "--save", "", "--appendonly", "no", "--dir", s.dir}
	}},
}

func nginx(s *service, daemon string) []string {
	text, err := os.ReadFile(source("nginx.conf"))
	if err != nil {
		s.t.Fatal(err)
	}
	config := strings.NewReplacer("DIR", s.dir, "PORT", portOf(s), "DAEMON", daemon).Replace(string(text))
	return []string{"/usr/sbin/nginx", "-p", s.dir, "-e", "stderr", "-c", s.write("nginx.conf", config)}
}

func portOf(s *service) string { return strconv.Itoa(s.port) }

// source is a file of testdata/programs, where every user can read it.
func source(name string) string { return filepath.Join(programSources(), name) }

var programSources = sync.OnceValue(func() string {
	to := filepath.Join(place, "programs")
	if err := os.CopyFS(to, os.DirFS(filepath.Join("testdata", "programs"))); err != nil {
		panic(err)
	}
	return to
})

// built is the path of something that a command makes once.
func built(name string, command ...string) func(t *testing.T) string {
	make := sync.OnceValues(func() (string, error) {
		path := filepath.Join(place, name)
		args := []string{}
		for _, a := range command {
			args = append(args, strings.NewReplacer("OUT", path, "SRC", programSources()).Replace(a))
		}
		cmd := exec.Command("/usr/bin/env", args...)
		out, err := cmd.CombinedOutput()
		if err != nil {
			_, _ = os.Stderr.Write(out)
		}
		return path, err
	})
	return func(t *testing.T) string {
		t.Helper()
		path, err := make()
		if err != nil {
			t.Fatalf("%s: %v", strings.Join(command, " "), err)
		}
		return path
	}
}

var (
	goServer = built("goserver", "CGO_ENABLED=0", "go", "build", "-o", "OUT", "SRC/server.go")
	javac    = built("classes", "javac", "-d", "OUT", "SRC/HttpServer.java", "SRC/SocketServer.java")
)

func java(t *testing.T) []string {
	return []string{"java", "-XX:-UsePerfData", "-XX:TieredStopAtLevel=1", "-cp", javac(t)}
}

func seconds(d time.Duration) string { return strconv.FormatFloat(d.Seconds(), 'f', -1, 64) }

// each runs a test for each program of a choice.
func each(t *testing.T, in surroundings, choice func(program) bool, test func(t *testing.T, s *service, p program)) {
	t.Run(in.name, func(t *testing.T) {
		for _, p := range programs {
			if !choice(p) {
				continue
			}
			t.Run(p.name, func(t *testing.T) {
				need(t, p.needs...)
				test(t, newService(t, in), p)
			})
		}
	})
}

func all(program) bool { return true }

// few are enough to tell whether surroundings matter, where there is no time for all.
func few(p program) bool {
	return soak() || p.name == "python kept alive" || p.name == "go" || p.name == "node"
}

// TestPrograms restarts each program under a usual load.
func TestPrograms(t *testing.T) {
	for _, in := range []surroundings{asRoot, asUser, inContainer, inContainer2} {
		choice := all
		if in.name != asRoot.name {
			choice = few
		}
		each(t, in, choice, func(t *testing.T, s *service, p program) {
			s.start(nil, p.command(s, 0)...)
			s.serving(0)
			s.means()
			if p.redis {
				restartRedis(s)
				return
			}
			restartUnder(s, load.Config{OneRequest: 12, KeepAlive: 4, Pause: 100 * time.Millisecond}, restarts(t, 5))
		})
	}
}

// TestProgramsSlow restarts programs that take 200 ms for a request.
func TestProgramsSlow(t *testing.T) {
	each(t, asRoot, func(p program) bool { return p.delays }, slow)
	each(t, asUser, func(p program) bool { return p.delays && few(p) }, slow)
}

func slow(t *testing.T, s *service, p program) {
	s.start(nil, p.command(s, 200*time.Millisecond)...)
	s.serving(0)
	l := s.load(load.Config{OneRequest: 12, KeepAlive: 4, Pause: 100 * time.Millisecond})
	restartTimes(s, l, restarts(t, 3), 16)
	s.ledger()
	s.flawless(l.stop())
}

// TestProgramsBurst restarts programs under many clients that never pause.
func TestProgramsBurst(t *testing.T) {
	choice := func(p program) bool { return !p.redis && p.name != "nginx daemon" }
	burst := func(t *testing.T, s *service, p program) {
		s.start(nil, p.command(s, 0)...)
		s.serving(0)
		restartUnder(s, load.Config{OneRequest: 200, Timeout: 30 * time.Second}, restarts(t, 3))
	}
	each(t, asRoot, choice, burst)
	each(t, asUser, func(p program) bool { return choice(p) && few(p) }, burst)
}

// TestProgramsBusy restarts programs whose kept-alive clients never all rest.
func TestProgramsBusy(t *testing.T) {
	choice := func(p program) bool {
		return !p.redis && p.name != "nginx daemon" && p.name != "python http.server" && p.name != "gunicorn"
	}
	for _, in := range []surroundings{asRoot, asUser} {
		pick := choice
		if in.name != asRoot.name {
			pick = func(p program) bool { return choice(p) && few(p) }
		}
		each(t, in, pick, func(t *testing.T, s *service, p program) {
			s.start(nil, p.command(s, 0)...)
			s.serving(0)
			l := s.load(load.Config{KeepAlive: 16, Pause: 10 * time.Millisecond})
			restartTimes(s, l, restarts(t, 5), 50)
			r := l.stop()
			took := s.drained()
			closed, races := r.ClosedIdle.Count, failures(r, load.Race)
			t.Logf("%d requests, %d closed while idle, %d closes met by a request, median drain %s, longest wait %.0f ms",
				r.Requests, closed, races, took[len(took)/2], r.LongestWaitMS)
			if cut := r.Failed - races; cut > 0 {
				t.Errorf("%d requests failed: %+v", cut, r.Failures)
			}
			if races > max(1, (closed+races)/1000) {
				t.Errorf("%d of %d closes were met by a request: %v", races, closed+races, r.Failures[load.Race].First)
			}
		})
	}
}

// restartUnder restarts n times under a load and wants no failure.
func restartUnder(s *service, c load.Config, n int) {
	s.t.Helper()
	l := s.load(c)
	restartTimes(s, l, n, 50)
	s.ledger()
	s.flawless(l.stop())
}

// restartTimes restarts n times, with some requests before, between and after.
func restartTimes(s *service, l *loading, n int, between int64) {
	s.t.Helper()
	l.requests(between)
	for range n {
		began := s.serving(0).Number
		s.restart()
		if now := s.serving(0).Number; now != began+1 {
			s.t.Fatalf("generation %d serves after a restart of generation %d", now, began)
		}
		l.requests(between)
	}
}
