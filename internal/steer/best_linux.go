package steer

import (
	"errors"
	"fmt"
	"sync"
	"syscall"

	"github.com/berth-net/berth/internal/sys"
	"golang.org/x/net/bpf"
)

// best is what Best found; why is nil only with Extended.
var best struct {
	sync.Mutex
	known bool
	mode  Mode
	why   error
}

// Best returns the best mode that this process may use, and why it isn't [Extended] if it isn't. It tries it once and remembers the answer,
// unless the attempt failed for want of memory or descriptors, which says nothing.
func Best() (Mode, error) {
	best.Lock()
	defer best.Unlock()
	if !best.known {
		best.mode, best.why = try()
		best.known = !scarce(best.why)
	}
	return best.mode, best.why
}

func try() (Mode, error) {
	e, err := newExtended()
	if err == nil {
		return Extended, e.close()
	}
	err = fmt.Errorf("eBPF cannot be used (it needs CAP_BPF or CAP_SYS_ADMIN, and no policy against it): %w", err)
	if cerr := tryClassic(); cerr != nil {
		return None, errors.Join(err, fmt.Errorf("classic BPF cannot be used: %w", cerr))
	}
	return Classic, err
}

// tryClassic attaches a program to a socket that is alone in its group.
func tryClassic() error {
	sock, err := sys.StreamSocket(sys.INET)
	if err != nil {
		return err
	}
	defer sock.Close()
	if err := sys.SetReusePort(sock, true); err != nil {
		return err
	}
	program, err := bpf.Assemble([]bpf.Instruction{bpf.RetConstant{}})
	if err != nil {
		return err
	}
	return sys.AttachReuseportClassic(sock, program)
}

// scarce reports whether an error may be gone next time.
func scarce(err error) bool {
	for _, errno := range []syscall.Errno{syscall.ENOMEM, syscall.ENOBUFS, syscall.EMFILE, syscall.ENFILE, syscall.EAGAIN, syscall.EINTR} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}
