//go:build linux

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/berth-net/berth/internal/sys"
)

// What a process of the test binary is to be, when it is not the one that go test started.
const (
	envInside = "BERTH_TEST_INSIDE" // the tests, in a network namespace of their own
	envRefuse = "BERTH_TEST_REFUSE" // a command under a filter that refuses these calls
)

// place is where the tests keep what they build and run; every user can read it.
var place string

// TestMain runs the tests in a network namespace of their own where it may, and fails if they leave anything behind.
func TestMain(m *testing.M) {
	if calls := os.Getenv(envRefuse); calls != "" {
		fatal(confine(strings.Split(calls, ",")))
	}
	if os.Geteuid() == 0 && os.Getenv(envInside) == "" {
		fatal(enterNamespace())
	}
	os.Exit(testAll(m))
}

func testAll(m *testing.M) int {
	if os.Getenv(envInside) != "" {
		if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
			fatal(fmt.Errorf("ip link set lo up: %w: %s", err, out))
		}
	}
	var err error
	place, err = os.MkdirTemp("", "berth-e2e-")
	fatal(err)
	defer os.RemoveAll(place)
	fatal(os.Chmod(place, 0o755))
	args := []string{"build", "-o", filepath.Join(place, "berth")}
	if os.Getenv("BERTH_RACE") != "" {
		args = append(args, "-race")
	}
	if out, err := exec.Command("go", append(args, ".")...).CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "go build: %v\n%s", err, out)
		return 1
	}
	before := bpfObjects()
	code := m.Run()
	for _, left := range leftBehind(before) {
		fmt.Fprintln(os.Stderr, "left behind:", left)
		code = max(code, 1)
	}
	return code
}

func fatal(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "the tests can't begin:", err)
		os.Exit(1)
	}
}

// enterNamespace executes the test binary again, as the same process, in a new network namespace. It returns only if that fails.
func enterNamespace() error {
	// A namespace is a thread's own, and the thread that executes takes it along.
	runtime.LockOSThread()
	if err := syscall.Unshare(syscall.CLONE_NEWNET); err != nil {
		return os.NewSyscallError("unshare", err)
	}
	return os.NewSyscallError("execve", syscall.Exec("/proc/self/exe", os.Args, append(os.Environ(), envInside+"=1")))
}

// confine executes a command under a filter. It returns only if that fails.
func confine(calls []string) error {
	runtime.LockOSThread()
	if err := sys.Refuse(calls...); err != nil {
		return err
	}
	env := slices.DeleteFunc(os.Environ(), func(kv string) bool { return strings.HasPrefix(kv, "BERTH_TEST_") })
	return os.NewSyscallError("execve", syscall.Exec(os.Args[1], os.Args[1:], env))
}

// leftBehind is what is still there of all that the tests started.
func leftBehind(before map[string]bool) []string {
	var left []string
	for _, p := range inhabitants() {
		left = append(left, p.String())
	}
	left = append(left, cgroups()...)
	_ = filepath.WalkDir(place, func(path string, d fs.DirEntry, _ error) error {
		if d != nil && (d.Type()&fs.ModeSocket != 0 || strings.HasSuffix(path, ".lock")) {
			left = append(left, path)
		}
		return nil
	})
	// Other packages' tests, and other berths of this machine, have objects of the same names. One is no leftover while a process has it open: of
	// these tests' own, none is left.
	var objects []string
	for o := range bpfObjects() {
		if !before[o] {
			objects = append(objects, o)
		}
	}
	for end := time.Now().Add(20 * time.Second); len(objects) > 0 && time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		now, open := bpfObjects(), openObjects()
		objects = slices.DeleteFunc(objects, func(o string) bool { return !now[o] || open[o[:strings.LastIndexByte(o, ' ')]] })
	}
	return append(left, objects...)
}

// cgroups are those of services of these tests. There are none below a cgroup that is not ours to see.
func cgroups() []string {
	own, err := sys.OwnCgroup2()
	if err != nil {
		return nil
	}
	found, _ := filepath.Glob(filepath.Join(own, "berth-"+servicePrefix()+"*"))
	return found
}

// openObjects are the programs and maps that a process has a descriptor of, without their names.
func openObjects() map[string]bool {
	open := map[string]bool{}
	infos, _ := filepath.Glob("/proc/[0-9]*/fdinfo/*")
	for _, info := range infos {
		data, err := os.ReadFile(info)
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(data)) {
			for key, what := range map[string]string{"map_id:": "BPF map ", "prog_id:": "BPF program "} {
				if id, ok := strings.CutPrefix(line, key); ok {
					open[what+strings.TrimSpace(id)] = true
				}
			}
		}
	}
	return open
}

// bpfObjects are the programs and maps of the machine that have berth's names. They are not seen without the right.
func bpfObjects() map[string]bool {
	found := map[string]bool{}
	for id, err := ebpf.ProgramGetNextID(0); err == nil; id, err = ebpf.ProgramGetNextID(id) {
		if p, err := ebpf.NewProgramFromID(id); err == nil {
			if info, err := p.Info(); err == nil && strings.HasPrefix(info.Name, "berth_") {
				found[fmt.Sprintf("BPF program %d %s", id, info.Name)] = true
			}
			p.Close()
		}
	}
	for id, err := ebpf.MapGetNextID(0); err == nil; id, err = ebpf.MapGetNextID(id) {
		if m, err := ebpf.NewMapFromID(id); err == nil {
			if info, err := m.Info(); err == nil && strings.HasPrefix(info.Name, "berth_") {
				found[fmt.Sprintf("BPF map %d %s", id, info.Name)] = true
			}
			m.Close()
		}
	}
	return found
}

// TestScripts runs the transcripts in testdata.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(e *testscript.Env) error {
			e.Setenv("PATH", place+string(os.PathListSeparator)+os.Getenv("PATH"))
			if _, err := os.Stat(filepath.Join(place, "berth")); err != nil {
				return errors.New("berth was not built")
			}
			return nil
		},
	})
}
