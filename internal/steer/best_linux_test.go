package steer

import (
	"errors"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/berth-net/berth/internal/sys"
	"golang.org/x/net/bpf"
)

// sysBPF is the number of bpf(2).
var sysBPF = map[string]uint32{"amd64": 321, "arm64": 280}[runtime.GOARCH]

// TestUnprivileged runs this package's tests as a user who may do nothing.
func TestUnprivileged(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can become another user")
	}
	args := []string{"-test.run=^(TestUnderLoad|TestProbe|TestSpread|TestRefusals|TestFull|TestBest|ExampleGroup)$", "-test.v"}
	if testing.Short() {
		args = append(args, "-test.short")
	}
	// By way of /proc, for the directory where go test builds is root's.
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", args...)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"--- PASS: TestUnderLoad/classic_BPF/dual-stack", "--- SKIP: TestUnderLoad/eBPF"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("%q is not in the output:\n%s", want, out)
		}
	}
}

func TestBest(t *testing.T) {
	m, why := Best()
	t.Log(m, why)
	want := Extended
	if os.Getuid() != 0 {
		want = Classic
	}
	if m != want || (why == nil) != (m == Extended) {
		t.Errorf("Best: %v, %v", m, why)
	}
}

// TestBestRefused tries on a thread where a filter refuses bpf(2), as containers have it.
func TestBestRefused(t *testing.T) {
	onFilteredThread(t, func() {
		m, why := try()
		t.Log(m, why)
		if m != Classic || !errors.Is(why, syscall.EPERM) {
			t.Errorf("with bpf(2) refused: %v, %v", m, why)
		}
		if scarce(why) {
			t.Error("a refusal counts as scarcity")
		}
	})
}

// onFilteredThread runs f on a thread of its own where bpf(2) fails with EPERM.
func onFilteredThread(t *testing.T, f func()) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // the thread ends with the goroutine
		filter, err := bpf.Assemble([]bpf.Instruction{
			bpf.LoadAbsolute{Off: sys.SeccompOffsetNr, Size: 4},
			bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: sysBPF, SkipTrue: 1},
			bpf.RetConstant{Val: 0x50000 | uint32(syscall.EPERM)}, // SECCOMP_RET_ERRNO
			bpf.RetConstant{Val: sys.SECCOMP_RET_ALLOW},
		})
		if err == nil {
			err = sys.SetNoNewPrivs()
		}
		if err == nil {
			var listener *os.File
			if listener, err = sys.SeccompListen(filter, 0); err == nil {
				listener.Close()
				f()
			}
		}
		done <- err
	}()
	must(t, <-done)
}
