package intercept

import (
	"encoding/binary"
	"errors"
	"os"
	"runtime"
	"testing"

	"github.com/berth-net/berth/internal/sys"
	"golang.org/x/net/bpf"
)

// TestFilterProgram runs the filter on every call of interest and on its neighbours.
func TestFilterProgram(t *testing.T) {
	for _, f := range []Filter{{}, {Setsockopt: true}} {
		vm, err := bpf.NewVM(f.program(sys.SeccompABIs))
		if err != nil {
			t.Fatal(err)
		}
		check := func(arch, nr uint32, arg0, arg2 uint32, want bool) {
			t.Helper()
			// The machine of x/net/bpf loads big-endian words, seccomp those of the host.
			data := make([]byte, 64)
			binary.BigEndian.PutUint32(data[sys.SeccompOffsetNr:], nr)
			binary.BigEndian.PutUint32(data[sys.SeccompOffsetArch:], arch)
			binary.BigEndian.PutUint32(data[sys.SeccompOffsetArg(0):], arg0)
			binary.BigEndian.PutUint32(data[sys.SeccompOffsetArg(2):], arg2)
			got, err := vm.Run(data)
			if err != nil {
				t.Fatal(err)
			}
			wantReturn := sys.SECCOMP_RET_ALLOW
			if want {
				wantReturn = sys.SECCOMP_RET_USER_NOTIF
			}
			if uint32(got) != uint32(wantReturn) {
				t.Errorf("%+v: arch %#x, call %#x (%d, …, %d): %#x", f, arch, nr, arg0, arg2, got)
			}
		}
		for _, abi := range sys.SeccompABIs {
			for _, nr := range abi.Bind {
				for length, want := range map[uint32]bool{0: false, 12: false, 15: false, 16: true, 28: true, 110: true, 128: true, 129: false, 0xffffffff: false} {
					check(abi.Arch, nr, 3, length, want)
				}
			}
			for _, nr := range abi.Listen {
				check(abi.Arch, nr, 3, 0, true)
			}
			for _, nr := range abi.Setsockopt {
				check(abi.Arch, nr, 3, 0, f.Setsockopt)
			}
			if abi.Socketcall != 0 {
				for call := range uint32(20) {
					check(abi.Arch, abi.Socketcall, call, 0, call == 2 || call == 4 || call == 14 && f.Setsockopt)
				}
			}
			check(abi.Arch, 0, 3, 16, false)
			check(abi.Arch, 435, 3, 16, false) // clone3
			check(abi.Arch, 0xffffffff, 3, 16, false)
			check(0xdeadbeef, abi.Bind[0], 3, 16, false)
		}
	}
}

// TestInstallTwice tries what happens in a berth within a berth.
func TestInstallTwice(t *testing.T) {
	onThread(t, func() {
		f, err := Filter{}.Install()
		if err != nil {
			t.Error(err)
			return
		}
		defer f.Close()
		if _, err := (Filter{}).Install(); !errors.Is(err, ErrListenerExists) {
			t.Errorf("the second filter: %v", err)
		}
	})
}

// TestNoNewPrivs looks whether the bit is set only where it must be.
func TestNoNewPrivs(t *testing.T) {
	onThread(t, func() {
		f, err := Filter{}.Install()
		if err != nil {
			t.Error(err)
			return
		}
		defer f.Close()
		if got, want := noNewPrivs(t), os.Getuid() != 0; got != want {
			t.Errorf("no_new_privs is %v for uid %d", got, os.Getuid())
		}
	})
}

// onThread runs f on a thread of its own, which ends with it.
func onThread(t *testing.T, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		f()
	}()
	<-done
}
