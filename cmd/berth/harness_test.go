//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/berth-net/berth/internal/load"
	"github.com/berth-net/berth/internal/supervisor"
	"github.com/berth-net/berth/internal/sys"
	"github.com/berth-net/berth/sockdiag"
)

// patience is long enough that only a hang meets it.
const patience = 60 * time.Second

// surroundings are what berth may do where it runs, and what follows from that.
type surroundings struct {
	name     string
	uid      int
	refuse   []string // system calls
	adoption string
	steering string
}

var (
	asRoot       = surroundings{name: "root", adoption: "duplicate", steering: "eBPF"}
	asUser       = surroundings{name: "user", uid: 65534, adoption: "duplicate", steering: "classic BPF"}
	inContainer  = surroundings{name: "container", refuse: []string{"pidfd_getfd"}, adoption: "replace", steering: "eBPF"}
	inContainer2 = surroundings{name: "container without bpf", refuse: []string{"pidfd_getfd", "bpf"}, adoption: "replace", steering: "classic BPF"}
)

// service is a berth that a test runs.
type service struct {
	t       *testing.T
	in      surroundings
	name    string
	dir     string
	control string
	port    int
	cmd     *exec.Cmd
	exited  chan struct{}
	report  *load.Report // of the last load, for the account of a failure
}

var lastService, lastPort = 0, 20000

func servicePrefix() string { return fmt.Sprintf("e2e%d-", os.Getpid()) }

// newService has a folder and a port, and runs nothing yet. What it leaves behind fails the test.
func newService(t *testing.T, in surroundings) *service {
	t.Helper()
	if os.Geteuid() != 0 && (in.uid != os.Geteuid() || len(in.refuse) > 0) {
		if in.uid == 0 || len(in.refuse) > 0 {
			skip(t, "only root can be "+in.name)
		}
		in.uid = os.Geteuid()
	}
	lastService++
	lastPort++
	s := &service{t: t, in: in, port: lastPort, name: servicePrefix() + strconv.Itoa(lastService)}
	s.dir = filepath.Join(place, strconv.Itoa(lastService))
	s.control = filepath.Join(s.dir, "c.sock")
	if err := os.Mkdir(s.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	s.own(s.dir)
	t.Cleanup(s.cleanUp)
	return s
}

func (s *service) own(path string) {
	if os.Geteuid() == 0 {
		if err := os.Chown(path, s.in.uid, s.in.uid); err != nil {
			s.t.Fatal(err)
		}
	}
}

// write makes a file in the service's folder.
func (s *service) write(name, text string) string {
	s.t.Helper()
	path := filepath.Join(s.dir, name)
	// Renamed into place, so that a program never reads half of it.
	if err := os.WriteFile(path+".new", []byte(text), 0o644); err != nil {
		s.t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		s.t.Fatal(err)
	}
	return path
}

// berth is a command of berth's in the service's surroundings.
func (s *service) berth(args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(place, "berth"), args...)
	cmd.Env = append(os.Environ(), "HOME="+s.dir)
	if len(s.in.refuse) > 0 {
		cmd = exec.Command("/proc/self/exe", append([]string{cmd.Path}, args...)...)
		cmd.Env = append(os.Environ(), "HOME="+s.dir, envRefuse+"="+strings.Join(s.in.refuse, ","))
	}
	cmd.Dir = s.dir
	// Should the tests die, berth ends.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGTERM}
	if s.in.uid != os.Geteuid() {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(s.in.uid), Gid: uint32(s.in.uid)}
	}
	return cmd
}

// start runs berth with a program.
func (s *service) start(flags []string, program ...string) {
	s.t.Helper()
	log, err := os.OpenFile(filepath.Join(s.dir, "log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		s.t.Fatal(err)
	}
	defer log.Close()
	args := append([]string{"run", "--name", s.name, "--control", s.control}, flags...)
	s.cmd = s.berth(append(append(args, "--"), program...)...)
	s.cmd.Stdout, s.cmd.Stderr = log, log
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	exited := make(chan struct{})
	s.exited = exited
	go func() {
		_ = s.cmd.Wait()
		close(exited)
	}()
}

// serving waits until a generation serves that is newer than the given one, and returns it.
func (s *service) serving(after int) (g supervisor.GenerationStatus) {
	s.t.Helper()
	eventually(s.t, patience, "a generation serves", func() bool {
		select {
		case <-s.exited:
			s.t.Fatalf("berth run ended: %s", s.cmd.ProcessState)
		default:
		}
		st, err := s.status()
		if err != nil {
			return false
		}
		for _, g = range st.Serving {
			if g.Phase == supervisor.Serving && !g.Dead && g.Number > after {
				return true
			}
		}
		return false
	})
	return g
}

// command runs one of berth's commands on the service.
func (s *service) command(args ...string) (stdout, stderr string, status int) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	cmd := s.berth(append(args, "--control", s.control)...)
	cmd.Cancel = nil
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	defer context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })()
	_ = cmd.Wait()
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

func (s *service) status() (st supervisor.Status, err error) {
	out, errs, code := s.command("status", "--json")
	if code != 0 {
		return st, errors.New(errs)
	}
	return st, json.Unmarshal([]byte(out), &st)
}

// restart restarts and wants it done.
func (s *service) restart() {
	s.t.Helper()
	out, errs, code := s.command("restart")
	if code != 0 {
		s.t.Fatalf("restart: exit status %d\n%s%s", code, out, errs)
	}
	if !strings.HasPrefix(out, "restart ") {
		s.t.Errorf("restart printed %q", out)
	}
}

// stop ends the service and wants nothing to be left.
func (s *service) stop(flags ...string) {
	s.t.Helper()
	out, errs, code := s.command(append([]string{"stop"}, flags...)...)
	if code != 0 {
		s.t.Errorf("stop: exit status %d\n%s%s", code, out, errs)
	}
	s.gone(0)
}

// gone waits for berth's end and looks for what is left.
func (s *service) gone(status int) {
	s.t.Helper()
	select {
	case <-s.exited:
	case <-time.After(patience):
		s.t.Fatal("berth run does not end")
	}
	if code := s.cmd.ProcessState.ExitCode(); code != status {
		s.t.Errorf("berth run: exit status %d (%s), want %d", code, s.cmd.ProcessState, status)
	}
	// What lies in the machine is gone when berth is; only the kernel may still be at it.
	for _, f := range []string{s.control, strings.TrimSuffix(s.control, ".sock") + ".lock"} {
		if _, err := os.Lstat(f); err == nil {
			s.t.Errorf("%s is left", f)
		}
	}
	for _, c := range cgroups() {
		s.t.Errorf("cgroup %s is left", c)
	}
	if left := inhabitants(); len(left) > 0 {
		s.t.Errorf("processes are left: %v", left)
	}
	if left := listening(s.t); os.Getenv(envInside) != "" && len(left) > 0 {
		s.t.Errorf("listeners are left: %v", left)
	}
}

// cleanUp stops what still runs, and after a failure says what is known of it.
func (s *service) cleanUp() {
	// BERTH_RACE builds berth with the race detector, which writes here.
	if data, _ := os.ReadFile(filepath.Join(s.dir, "log")); bytes.Contains(data, []byte("DATA RACE")) {
		s.t.Errorf("berth has a data race:\n%s", data)
	}
	if s.t.Failed() {
		s.account()
	}
	if s.cmd == nil {
		return
	}
	select {
	case <-s.exited:
		return
	default:
	}
	if !s.t.Failed() {
		s.stop()
		if s.t.Failed() {
			s.account()
		}
	}
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-s.exited:
	case <-time.After(10 * time.Second):
		_ = s.cmd.Process.Kill()
		<-s.exited
	}
	for _, p := range inhabitants() {
		_ = sys.Kill(p.pid, syscall.SIGKILL)
	}
}

func (s *service) account() {
	if s.cmd != nil {
		out, _, _ := s.command("status")
		s.t.Logf("status:\n%s", out)
	}
	s.t.Logf("log:\n%s", s.log())
	if s.report != nil {
		text, _ := json.MarshalIndent(s.report, "", " ")
		s.t.Logf("load:\n%s", text)
	}
}

// accessLine is what python's http.server writes for each request.
var accessLine = regexp.MustCompile(`(?m)^.*"GET / HTTP/1.1" 200 -\n`)

// log is the end of what berth and the program have written.
func (s *service) log() string {
	data, _ := os.ReadFile(filepath.Join(s.dir, "log"))
	data = accessLine.ReplaceAll(data, nil)
	const most = 8 << 10
	return string(data[max(0, len(data)-most):])
}

// means checks that berth knows what it may do here.
func (s *service) means() {
	s.t.Helper()
	st, err := s.status()
	if err != nil {
		s.t.Fatal(err)
	}
	if st.Means.Adoption != s.in.adoption || st.Means.Steering != s.in.steering {
		s.t.Errorf("as %s: adoption %s (%s), steering %s (%s), want %s and %s", s.in.name, st.Means.Adoption, st.Means.AdoptionWhy,
			st.Means.Steering, st.Means.SteeringWhy, s.in.adoption, s.in.steering)
	}
}

// url is where the program is reached.
func (s *service) url() string { return fmt.Sprintf("http://127.0.0.1:%d/", s.port) }

// loading is a load that runs.
type loading struct {
	s *service
	g *load.Generator
	c chan *load.Report
}

// load begins a load without an end; stop ends it.
func (s *service) load(c load.Config) *loading {
	s.t.Helper()
	if c.URL == "" {
		c.URL = s.url()
	}
	if c.Expect == "" {
		c.Expect = "hello"
	}
	c.Duration = time.Hour
	g, err := load.New(c)
	if err != nil {
		s.t.Fatal(err)
	}
	l := &loading{s, g, make(chan *load.Report, 1)}
	go func() {
		r, err := g.Run(context.Background())
		if err != nil {
			s.t.Errorf("load: %v", err)
		}
		l.c <- r
	}()
	s.t.Cleanup(g.Stop)
	return l
}

// requests waits until as many more requests have ended.
func (l *loading) requests(n int64) {
	l.s.t.Helper()
	from := l.g.Snapshot().Requests
	eventually(l.s.t, patience, fmt.Sprintf("%d requests ended", n), func() bool { return l.g.Snapshot().Requests >= from+n })
}

func (l *loading) stop() *load.Report {
	l.s.t.Helper()
	l.g.Stop()
	select {
	case r := <-l.c:
		l.s.report = r
		return r
	case <-time.After(patience):
		l.s.t.Fatal("the load does not end")
		return nil
	}
}

// failures sums up failures of some kinds.
func failures(r *load.Report, of ...load.Kind) (n int64) {
	for _, k := range of {
		n += r.Failures[k].Count
	}
	return n
}

// flawless wants a load without any failure. Where berth can't reach a program's connections, it can't end the kept-alive ones one by one:
// a request may meet the close that comes when the program stops, and nothing else.
func (s *service) flawless(r *load.Report) {
	s.t.Helper()
	met := failures(r, load.Race)
	s.t.Logf("%d requests, %d failed, %d closed while idle, %d closes met by a request, longest wait %.0f ms",
		r.Requests, r.Failed, r.ClosedIdle.Count, met, r.LongestWaitMS)
	if r.Failed == 0 || s.in.adoption == "replace" && r.Failed == met {
		return
	}
	for k, f := range r.Failures {
		if f.Count > 0 {
			s.t.Errorf("%d %s: %v … %.0f ms", f.Count, k, f.First, f.LastMS)
		}
	}
}

// drained are the ledger's restarts' times of draining, sorted.
func (s *service) drained() []time.Duration {
	s.t.Helper()
	st, err := s.status()
	if err != nil {
		s.t.Fatal(err)
	}
	var took []time.Duration
	for _, e := range st.Ledger {
		if e.Cause == supervisor.ByRestart && e.Error == "" {
			took = append(took, e.Drained.Took)
		}
	}
	slices.Sort(took)
	return took
}

// ledger logs what the restarts cost.
func (s *service) ledger() {
	s.t.Helper()
	st, err := s.status()
	if err != nil {
		s.t.Fatal(err)
	}
	for _, e := range st.Ledger[max(0, len(st.Ledger)-5):] {
		s.t.Logf("%s (ready after %s, drain %s)", e, e.Ready.Sub(e.Began).Round(time.Millisecond), e.Drained.Took)
	}
}

// restarts is how often a test restarts: n, or what BERTH_RESTARTS says.
func restarts(t *testing.T, n int) int {
	t.Helper()
	if text := os.Getenv("BERTH_RESTARTS"); text != "" {
		set, err := strconv.Atoi(text)
		if err != nil || set < 1 {
			t.Fatalf("BERTH_RESTARTS=%s is no number", text)
		}
		return set
	}
	return n
}

// soak reports whether the tests may take hours.
func soak() bool { return os.Getenv("BERTH_SOAK") != "" }

// eventually waits for something that has no event of its own.
func eventually(t *testing.T, timeout time.Duration, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(timeout); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %s: %s", timeout, what)
		}
	}
}

// skip skips a test for something that is not here. Where everything is said to be here, it fails.
func skip(t *testing.T, reason string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatal("it can't be left out in CI: ", reason)
	}
	t.Skip(reason)
}

// need skips a test whose programs are not installed.
func need(t *testing.T, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			skip(t, p+" is not installed")
		}
	}
}

// process is one that the tests are answerable for.
type process struct {
	pid     int
	command string
}

func (p process) String() string { return fmt.Sprintf("process %d (%s)", p.pid, p.command) }

// inhabitants are the processes but this one in the tests' network namespace, or else those with the mark of a service of theirs.
func inhabitants() []process {
	own, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		return nil
	}
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	var found []process
	for _, dir := range dirs {
		pid, _ := strconv.Atoi(filepath.Base(dir))
		if pid == os.Getpid() {
			continue
		}
		if os.Getenv(envInside) != "" {
			if ns, err := os.Readlink(dir + "/ns/net"); err != nil || ns != own {
				continue
			}
		} else if env, err := os.ReadFile(dir + "/environ"); err != nil || !bytes.Contains(env, []byte("BERTH_SERVICE="+servicePrefix())) {
			continue
		}
		command, _ := os.ReadFile(dir + "/cmdline")
		found = append(found, process{pid, string(bytes.ReplaceAll(command, []byte{0}, []byte{' '}))})
	}
	return found
}

// listening lists the listening TCP sockets of the namespace.
func listening(t *testing.T) (all []string) {
	t.Helper()
	diag, err := sockdiag.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer diag.Close()
	for s, err := range diag.Sockets(sockdiag.Filter{States: sockdiag.In(sockdiag.Listen)}) {
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, s.Local.String())
	}
	return all
}
